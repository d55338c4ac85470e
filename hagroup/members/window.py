"""Memory that both ends of a channel see: long byte strings lie there instead of going through the socket.

One half is the request's, the other the answer's. The caller copies into the one and out of the other; the module
reads and writes there itself. The memory has no name, its size is sealed, and once both have mapped it there is no
descriptor of it. It serves one exchange at a time, as its channel does, and is overwritten before that is over. An
exchange that was given up takes it along: a worker that still reads there, or writes, shares it with nobody any more.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

LONGEST = 2 << 20
"""Bytes that a request may have, and an answer about as many. Only what is used takes memory."""

_HALF = LONGEST + mmap.PAGESIZE  # an answer may be a little longer than its request
_SIZE = 2 * _HALF
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_ZEROS = bytes(64 * 1024)


def create() -> tuple[Window, int]:
    """The caller's view, and the descriptor that the worker makes its own of; OSError where there is none to be had."""
    descriptor = os.memfd_create("hagroup", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, _SIZE)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return Window(mmap.mmap(descriptor, _SIZE)), descriptor
    except BaseException:
        os.close(descriptor)
        raise


class Window:
    """The caller's view."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._asked = 0

    def put(self, request: bytes) -> bool:
        """False for one that is too long."""
        length = len(request)
        if length > LONGEST:
            return False
        self._asked = length
        self._memory[:length] = request
        return True

    def get(self, length: int) -> bytes:
        """The answer, which is there no longer."""
        answer = self._memory[_HALF : _HALF + _checked(length)]
        self._wipe(_HALF, length)
        return answer

    def over(self) -> None:
        """The exchange is: nor is the request."""
        self._wipe(0, self._asked)
        self._asked = 0

    def _wipe(self, begin: int, length: int) -> None:
        end = begin + length
        for start in range(begin, end, len(_ZEROS)):
            stop = min(start + len(_ZEROS), end)
            self._memory[start:stop] = _ZEROS if stop - start == len(_ZEROS) else bytes(stop - start)

    def close(self) -> None:
        self._memory.close()


class WorkerWindow:
    """The worker's view. It stays mapped as long as anything refers to it: a call may still be in progress."""

    def __init__(self, descriptor: int) -> None:
        """Takes over the descriptor."""
        try:
            self._mapped: mmap.mmap | None = mmap.mmap(descriptor, _SIZE)
        finally:
            os.close(descriptor)
        self._memory: ctypes.Array[ctypes.c_char] | None = (ctypes.c_char * _SIZE).from_buffer(self._mapped)

    def get(self, length: int) -> Placed:
        """The request, where it lies."""
        assert self._memory is not None
        return Placed(self._memory, _checked(length))

    def put(self, answer: bytes) -> bool:
        """False for one that is too long."""
        length = len(answer)
        if length > _HALF or self._mapped is None:
            return False
        self._mapped[_HALF : _HALF + length] = answer
        return True

    def close(self) -> None:
        self._memory = self._mapped = None


class Placed:
    """A request in the window, as an argument of a Cryptoki function, which reads it where it lies."""

    __slots__ = ("_as_parameter_", "_length", "_memory", "address")

    def __init__(self, memory: ctypes.Array[ctypes.c_char], length: int) -> None:
        self._memory = memory
        self._length = length
        self.address = ctypes.addressof(memory)
        self._as_parameter_ = ctypes.c_char_p(self.address)  # what ctypes passes on

    def __len__(self) -> int:
        return self._length

    def answer(self, room: int) -> Answer:
        """Where its answer may be written, if it is not longer than ``room``."""
        return Answer(self._memory, min(room, _HALF))


class Answer:
    """An answer in the window; until it is :meth:`ended`, the place for one."""

    __slots__ = ("_memory", "address", "length")

    def __init__(self, memory: ctypes.Array[ctypes.c_char], length: int) -> None:
        self._memory = memory
        self.address = ctypes.addressof(memory) + _HALF
        self.length = length

    def ended(self, length: int) -> None:
        """Nothing stays of what a module wrote behind its end."""
        ctypes.memset(self.address + length, 0, self.length - length)
        self.length = length


def _checked(length: int) -> int:
    if length > _HALF:
        raise ValueError("more than the window holds")
    return length
