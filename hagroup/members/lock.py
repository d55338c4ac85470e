"""A worker's lock file: that it lives, and whether a call that changes its token is inside the module.

Held means alive: an flock for the life of the descriptor. The file's first byte tells the rest. Where the lock is free
and the byte says that a call was inside, that call was cut off, and may have left half of what it was to write
(DESIGN.md 8, trap 3); ``hagroup.journal.owners`` reads it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading

from hagroup.core.worker_lock import CHANGING, RESTING


class WorkerLock:
    """``with`` it around each call that may change the token."""

    def __init__(self, path: str) -> None:
        """:raises OSError: the file cannot be had, or somebody else holds the lock."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._guard = threading.RLock()  # a signal handler or finalizer may call while its own thread is in it
        self._inside = 0
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise
        self._show(RESTING)

    def __enter__(self) -> None:
        with self._guard:
            self._inside += 1
            if self._inside == 1:
                self._show(CHANGING)

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._inside -= 1
            if not self._inside:
                self._show(RESTING)

    def _show(self, what: bytes) -> None:
        """A byte that is there already needs no room on a full disk; and no call fails for what it cannot show."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.pwrite(self._descriptor, what, 0)

    def release(self) -> None:
        """What is inside now stays shown as inside: nobody waits for it any more."""
        with self._guard:
            self._close()

    def release_inherited(self) -> None:
        """In a forked child, where the parent keeps its lock. (A thread of the parent may have been in the guard.)"""
        self._guard = threading.RLock()
        self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
