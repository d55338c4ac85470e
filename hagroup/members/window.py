"""Memory that both ends of a channel see: long byte strings lie there instead of going through the socket.

One half is the request's, the other the answer's. The caller copies into the one and out of the other; the module
reads and writes there itself. The memory has no name, its size is sealed, and once both have mapped it there is no
descriptor of it. It serves one exchange at a time, as its channel does, and is overwritten when that is over, or when
the stream is of which it was a part: the next part overwrites it anyway. An exchange that was given up takes it along:
a worker that still reads there, or writes, shares it with nobody any more.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable

LONGEST = 2 << 20
"""Bytes that a request may have, and an answer about as many. Only what is used takes memory."""

_HALF = LONGEST + 4096  # an answer may be a little longer than its request
_SIZE = 2 * _HALF
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_ZEROS = bytes(64 * 1024)

_PROT_READ_WRITE, _MAP_SHARED = 3, 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class _Memory:
    """Mapped as long as anything refers to it. (Python's own ``mmap`` would keep a descriptor.)"""

    __slots__ = ("address", "bytes")

    def __init__(self, descriptor: int) -> None:
        address = _libc.mmap(None, _SIZE, _PROT_READ_WRITE, _MAP_SHARED, descriptor, 0)
        self.address: int = 0 if address == ctypes.c_void_p(-1).value else address
        if not self.address:
            raise OSError(ctypes.get_errno(), "mmap")
        self.bytes = memoryview((ctypes.c_char * _SIZE).from_address(address)).cast("B")

    def __del__(self, munmap: Callable[[int, int], int] = _libc.munmap) -> None:
        if self.address:
            munmap(self.address, _SIZE)


def create() -> tuple[Window, int]:
    """The caller's view, and the descriptor that the worker makes its own of; OSError where there is none to be had."""
    descriptor = os.memfd_create("hagroup", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, _SIZE)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return Window(_Memory(descriptor)), descriptor
    except BaseException:
        os.close(descriptor)
        raise


class _View:
    def __init__(self, memory: _Memory) -> None:
        self._memory: _Memory | None = memory

    def _mapped(self) -> _Memory:
        if self._memory is None:
            raise OSError(errno.EBADF, "the channel is closed")
        return self._memory

    def close(self) -> None:
        """It goes with the last call that still uses it."""
        self._memory = None


class Window(_View):
    """The caller's view."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__(memory)
        self._asked = self._answered = 0  # so much of each half was used since it was wiped

    def put(self, request: bytes) -> bool:
        """False for one that is too long."""
        length = len(request)
        if length > LONGEST:
            return False
        self._asked = max(self._asked, length)
        self._mapped().bytes[:length] = request
        return True

    def get(self, length: int) -> bytes:
        """The answer."""
        self._answered = max(self._answered, _checked(length))
        return bytes(self._mapped().bytes[_HALF : _HALF + length])

    def wipe(self) -> None:
        memory = self._memory
        if memory is not None:
            _wipe(memory, 0, self._asked)
            _wipe(memory, _HALF, self._answered)
            self._asked = self._answered = 0


class WorkerWindow(_View):
    """The worker's view."""

    def __init__(self, descriptor: int) -> None:
        """Takes over the descriptor."""
        try:
            super().__init__(_Memory(descriptor))
        finally:
            os.close(descriptor)

    def get(self, length: int) -> Placed:
        """The request, where it lies."""
        return Placed(self._mapped(), _checked(length))

    def put(self, answer: bytes) -> bool:
        """False for one that is too long."""
        length = len(answer)
        if length > _HALF:
            return False
        self._mapped().bytes[_HALF : _HALF + length] = answer
        return True


class Placed:
    """A request in the window, as an argument of a Cryptoki function, which reads it where it lies."""

    __slots__ = ("_as_parameter_", "_length", "_memory", "address")

    def __init__(self, memory: _Memory, length: int) -> None:
        self._memory = memory
        self._length = length
        self.address = memory.address
        self._as_parameter_ = ctypes.c_char_p(self.address)  # what ctypes passes on

    def __len__(self) -> int:
        return self._length

    def answer(self, room: int) -> Answer:
        """Where its answer may be written, if it is not longer than ``room``."""
        return Answer(self._memory, min(room, _HALF))


class Answer:
    """An answer in the window; until it is :meth:`ended`, the place for one."""

    __slots__ = ("_memory", "address", "length")

    def __init__(self, memory: _Memory, length: int) -> None:
        self._memory = memory
        self.address = memory.address + _HALF
        self.length = length

    def ended(self, length: int) -> None:
        """Nothing stays of what a module wrote behind its end."""
        _wipe(self._memory, _HALF + length, self.length - length)
        self.length = length


def _checked(length: int) -> int:
    if length > _HALF:
        raise ValueError("more than the window holds")
    return length


def _wipe(memory: _Memory, begin: int, length: int) -> None:
    end = begin + length
    for start in range(begin, end, len(_ZEROS)):
        stop = min(start + len(_ZEROS), end)
        memory.bytes[start:stop] = _ZEROS if stop - start == len(_ZEROS) else bytes(stop - start)
