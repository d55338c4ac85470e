"""Fixtures for all tests: folders on tmpfs, and groups of SoftHSM members."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.groups import FAST, GroupFixture, make_group
from tests.support.networks import SAID

_numbers = itertools.count(1)

settings.register_profile("suite", derandomize=True)
settings.load_profile("suite")
"""The same examples each time: what fails here was broken by what was changed. ``--hypothesis-profile=default`` takes
others, and ``tools/explore`` is there to find what nobody thought of."""

with contextlib.suppress(ValueError):  # not in the main thread
    # Where the tests run in the background of a script, SIGINT is ignored, and every program that they start would
    # inherit that: Ctrl-C could not be tested.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def fast_folder() -> Iterator[Path]:
    """A folder on tmpfs where there is one (10,000 SoftHSM objects: 5 s against 55 s)."""
    base = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix=FAST, dir=base if base.is_dir() else None))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def new_group(fast_folder: Path) -> Callable[..., GroupFixture]:
    """Makes groups: ``new_group(members=3, isolation="process")``."""

    def make(*options: str, members: int = 3, isolation: str = "process") -> GroupFixture:
        return make_group(fast_folder / f"group{next(_numbers)}", *options, members=members, isolation=isolation)

    return make


@pytest.fixture
def group(new_group: Callable[..., GroupFixture]) -> GroupFixture:
    """Three members, worker processes."""
    return new_group()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which of the ways that a test has of simulating hosts this system allows."""
    reports = [one for kind in ("passed", "failed") for one in terminalreporter.getreports(kind)]
    for said in sorted({str(value) for one in reports for name, value in one.user_properties if name == SAID}):
        terminalreporter.write_line(said)
