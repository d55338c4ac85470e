"""What the executor's operations have in common."""

from __future__ import annotations

import ctypes
from typing import Any

from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.members.cryptoki import Function
from hagroup.members.life import Life
from hagroup.members.module import Module
from hagroup.members.sessions import LARGEST_KEPT, Session

_ABSURD = 1 << 31  # bytes: a length that no module means


class Operations:
    """A module, and the life of its sessions."""

    def __init__(self, module: Module, generation: int) -> None:
        self._module = module
        self._cryptoki = module.cryptoki
        self._life = Life(module, generation)


def memory(session: Session, room: int) -> tuple[int, Any]:
    """Size and object of the session's memory for an output, or of new one where that is not kept."""
    if len(session.buffer) < room <= LARGEST_KEPT:
        session.buffer = ctypes.create_string_buffer(1 << (room - 1).bit_length())  # few sizes: each is a type
    if len(session.buffer) < room:
        return room, ctypes.c_char.from_buffer(bytearray(room))
    return len(session.buffer), session.buffer


def larger_memory(error: Ckr, size: int, wanted: int) -> tuple[int, Any]:
    """For a module that found ``size`` too small; any other error is raised."""
    if error.rv != CKR.BUFFER_TOO_SMALL or size > _ABSURD:
        raise error
    size = max(wanted if wanted < _ABSURD else 0, 2 * size)
    return size, ctypes.c_char.from_buffer(bytearray(size))


def output(session: Session, function: Function, *arguments: Any) -> bytes:
    """Calls ``function(*arguments, buffer, length)``, without asking for the length first."""
    target: Any = session.buffer
    size, length = len(target), session.length
    while True:
        length.value = size
        pointer: Any = ctypes.byref(target)
        try:
            function(*arguments, pointer, session.length_pointer)
        except Ckr as error:
            size, target = larger_memory(error, size, length.value)
        else:
            return ctypes.string_at(pointer, length.value)
