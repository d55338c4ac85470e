"""The view number: 8 bytes in a file that all processes map, so that looking costs one read of memory.

Each transaction that others have to notice increments ``head.view`` inside itself. After its commit, and before it
returns, the writer stores *that* number here. Two writers may store in the other order than they committed, so the
number may step back for a moment; but each number is stored by one transaction only and differs from what any reader
saw before that commit, so a reader sees "differs" after every commit, and a lost race costs one reload too many. Were
it a counter that each writer increments here, two at once could leave it incremented once, and a reader that saw it
between them would miss the second commit. An aligned 8-byte store is one instruction on every 64-bit machine: no
reader sees half of it.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import secrets
import time
from pathlib import Path

_SIZE = 8
_PATIENCE, _LOOK_AGAIN = 5.0, 0.005  # seconds


class ViewNumber:
    """The mapped side file of one journal. If it was removed, whoever notices first makes it anew, under its lock."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = None
        self._map: mmap.mmap | None = None
        self._cell = ctypes.c_uint64(0)

    def get(self) -> int:
        return self._cell.value

    def put(self, number: int) -> None:
        self._cell.value = number

    def attached(self) -> bool:
        """Whether the file is still the one that is mapped here: a file removed by hand would cut us off."""
        try:
            status = os.stat(self._path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._identity

    def attach(self) -> None:
        """Map the file, made where it is missing. Raises OSError, also if another process keeps it locked.

        A new file begins with a random number above all real ones: no reader can have seen it, so all look again.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock(descriptor)
            status = os.fstat(descriptor)
            fresh = status.st_size < _SIZE
            if fresh:
                os.ftruncate(descriptor, _SIZE)
            # Never close the old mapping: another thread may be reading from it. It is garbage with its last reader.
            mapped = mmap.mmap(descriptor, _SIZE)
            cell = ctypes.c_uint64.from_buffer(mapped)
            if fresh:
                cell.value = secrets.randbits(63) | 1 << 63
            self._map, self._cell = mapped, cell
            self._identity = (status.st_dev, status.st_ino)
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: mmap keeps a duplicate of the descriptor
            os.close(descriptor)


def _lock(descriptor: int) -> None:
    """:raises OSError: whoever has the lock, for an instant, was stopped in it: nobody else must hang for that."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_LOOK_AGAIN)
