"""What runs in the background for one member, at most so much of it at once.

Nobody waits for the slowest member to take a new object, so what it still has to do would pile up until it holds every
thread of the pool, and all members were as slow as that one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

WIDTH = 16
"""Tasks of one member at once."""
_Task = tuple["Future[Any]", Callable[[], Any]]


class Lanes:
    """A queue for each member, in front of a pool of threads."""

    def __init__(self, submit: Callable[[Callable[[], None]], object]) -> None:
        """:param submit: runs a function in the background."""
        self._submit = submit
        self._lock = threading.Lock()
        self._running: dict[str, int] = {}
        self._waiting: dict[str, deque[_Task]] = {}

    def run(self, name: str, task: Callable[[], T]) -> Future[T]:
        """In its turn among this member's tasks; the caller looks at the outcome."""
        future: Future[T] = Future()
        with self._lock:
            if self._running.get(name, 0) >= WIDTH:
                self._waiting.setdefault(name, deque()).append((future, task))
                return future
            self._running[name] = self._running.get(name, 0) + 1
        self._submit(lambda: self._work(name, (future, task)))
        return future

    def _work(self, name: str, task: _Task) -> None:
        """A task, and then those that wait for its place."""
        now: _Task | None = task
        try:
            while now is not None:
                future, function = now
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)
                    if not isinstance(error, Exception):
                        raise
                now = self._next(name)
        except BaseException:
            self._ended(name)
            raise

    def _next(self, name: str) -> _Task | None:
        with self._lock:
            waiting = self._waiting.get(name)
            if waiting:
                return waiting.popleft()
            self._running[name] -= 1
            return None

    def _ended(self, name: str) -> None:
        with self._lock:
            self._running[name] -= 1

    def renew_after_fork(self) -> None:
        """In the child: nothing of the parent's runs or waits here."""
        self._lock = threading.Lock()
        self._running.clear()
        self._waiting.clear()
