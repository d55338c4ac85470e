"""A progress bar on a terminal; nothing elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from hagroup.errors import HAError

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_INTERVAL = 0.2


class Progress:
    """Called with what is being done, how much of it is done, and how much there is."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._tasks: dict[str, int] = {}
        if sys.stderr.isatty():
            from rich.console import Console  # a fifth of every command's start, and seldom needed
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bar is None:
            return
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=min(done, total), total=total)  # type: ignore[arg-type]

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def going_down(what: str, left: Callable[[], int]) -> Iterator[None]:
    """While the block runs: how much of what was ``left`` is done, asked again and again; on a terminal only."""
    if not sys.stderr.isatty():
        yield
        return
    total, over = left(), threading.Event()

    def look(told: Progress) -> None:
        while not over.wait(_INTERVAL):
            with contextlib.suppress(HAError):  # the command itself will say so
                told(what, total - left(), total)

    with Progress() as told:
        looking = threading.Thread(target=look, args=(told,), daemon=True)
        looking.start()
        try:
            yield
        finally:
            over.set()
            looking.join()
