"""Long byte strings through the module: a part of a stream in pieces, results written where the caller takes them.

A module on this machine is quickest with pieces that stay in the processor's cache and in memory that it has already:
64 KiB at a time SoftHSM encrypts 1 MiB in half the time of one call. One behind a network costs a round trip for each
call, so the first piece of a stream tells: only where it came back at once there are more.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from hagroup.core.calls import Ckr
from hagroup.members.cryptoki import Function
from hagroup.members.operation import larger_memory, memory
from hagroup.members.sessions import Session
from hagroup.members.window import Answer, Placed

Bulk: TypeAlias = "bytes | Placed"
Result: TypeAlias = "bytes | Answer"

LONG = 8 * 1024
"""Below this a call through the session's own buffer is quicker."""
_PIECE = 64 * 1024
_AT_ONCE = 0.0005  # seconds
_TRIES = 2
"""Another process may have had the processor meanwhile."""
_ROOM = 1024
"""What an output may be longer than its input: padding, tag, a stream's held-back block."""


def transform(session: Session, function: Function, data: Bulk) -> Result:
    """What ``function`` makes of all at once."""
    return _through(session, function, data, ((0, len(data)),))


def update(session: Session, function: Function, data: Bulk) -> Result:
    """What ``function`` makes of a part of a stream."""
    return _through(session, function, data, _pieces(session, len(data)))


def ingest(session: Session, function: Function, data: Bulk) -> None:
    """Gives ``function`` a part of a stream that has no output."""
    address = _address(data)
    for offset, length in _pieces(session, len(data)):
        function(session.handle, ctypes.c_char_p(address + offset), length)


def _pieces(session: Session, length: int) -> Iterator[tuple[int, int]]:
    """Offset and length of each."""
    offset = 0
    while offset < length:
        size = length - offset
        if size <= _PIECE or session.slow >= _TRIES:
            yield offset, size
        elif session.slow < 0:
            size = _PIECE
            yield offset, size
        else:
            size = _PIECE
            began = time.monotonic()
            yield offset, size
            session.slow = -1 if time.monotonic() - began < _AT_ONCE else session.slow + 1
        offset += size


def _through(session: Session, function: Function, data: Bulk, pieces: Iterable[tuple[int, int]]) -> Result:
    address = _address(data)
    target = _Target(session, data)
    try:
        for offset, length in pieces:
            target.call(function, ctypes.c_char_p(address + offset), length)
    except BaseException:
        target.give_up()
        raise
    return target.result()


def _address(data: Bulk) -> int:
    if isinstance(data, Placed):
        return data.address
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


class _Target:
    """Where the output goes: to the answer's place in the window, or into memory of the session's."""

    def __init__(self, session: Session, data: Bulk) -> None:
        self._session = session
        self._before: list[bytes] = []
        self._answer: Answer | None = None
        room = len(data) + _ROOM
        if isinstance(data, Placed):
            self._answer = data.answer(room)
            self._address, self._size, self._written = self._answer.address, self._answer.length, 0
        else:
            self._use(*memory(session, room))

    def _use(self, size: int, own: Any) -> None:
        self._own = own  # alive as long as this
        self._address, self._size, self._written = ctypes.addressof(own), size, 0

    def call(self, function: Function, *arguments: Any) -> None:
        length = self._session.length
        while True:
            length.value = self._size - self._written
            place = ctypes.c_void_p(self._address + self._written)
            try:
                function(self._session.handle, *arguments, place, self._session.length_pointer)
            except Ckr as error:
                larger = larger_memory(error, self._size, length.value)
                self._before.append(ctypes.string_at(self._address, self._written))
                self.give_up()
                self._use(*larger)
            else:
                self._written += length.value
                return

    def give_up(self) -> None:
        """Nothing is answered in the window."""
        if self._answer is not None:
            self._answer.ended(0)
            self._answer = None

    def result(self) -> Result:
        if self._answer is not None:
            self._answer.ended(self._written)
            return self._answer
        last = ctypes.string_at(self._address, self._written)
        return b"".join([*self._before, last]) if self._before else last
