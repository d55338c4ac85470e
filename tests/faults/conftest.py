"""The group whose members fail on request, and a client of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.faulty import FaultGroup, fault_group


@pytest.fixture(scope="session")
def faulty(fast_folder: Path) -> FaultGroup:
    return fault_group(fast_folder)


@pytest.fixture(scope="module")
def client(faulty: FaultGroup) -> Iterator[Any]:
    """A session of this process, isolation ``process``."""
    with faulty.client() as session:
        yield session


@pytest.fixture
def session(faulty: FaultGroup, client: Any) -> Iterator[Any]:
    """The same, whole again after the test."""
    yield client
    faulty.heal(client)
