"""Long parts of streams: in pieces into a module that is quick, whole into one that is not; outputs of any length."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.members import bulk, window
from hagroup.members.sessions import BUFFER_SIZE, LARGEST_KEPT, Session
from hagroup.members.window import Answer, Placed, WorkerWindow

PIECE = 64 * 1024
DATA = os.urandom(5 * PIECE + 100)
Source = Callable[[bytes], bytes | Placed]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Module:
    """Its function turns every bit, and takes as long as it is told."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.took: Iterator[float] = iter(())
        self.sizes: list[int] = []
        self.longer = b""
        self.fail_at = -1

    def __call__(self, handle: int, data: Any, size: int, place: Any, length: Any) -> int:
        if len(self.sizes) == self.fail_at:
            ctypes.memset(place, 1, size)
            raise Ckr(CKR.DEVICE_ERROR, "C_EncryptUpdate")
        out = turned(ctypes.string_at(data, size)) + self.longer
        if length._obj.value < len(out):
            length._obj.value = len(out)
            raise Ckr(CKR.BUFFER_TOO_SMALL, "C_EncryptUpdate")
        self.sizes.append(size)
        self.clock.now += next(self.took, 0.0001)
        ctypes.memmove(place, out, len(out))
        length._obj.value = len(out)
        return 0


def turned(data: bytes) -> bytes:
    return data.translate(bytes(255 - number for number in range(256)))


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    clock = Clock()
    monkeypatch.setattr(bulk, "time", clock)
    return Module(clock)


def in_memory(data: bytes) -> bytes | Placed:
    return data


def in_window(data: bytes) -> bytes | Placed:
    callers, descriptor = window.create()
    assert callers.put(data)
    return WorkerWindow(descriptor).get(len(data))


def read(result: bytes | Answer) -> bytes:
    return ctypes.string_at(result.address, result.length) if isinstance(result, Answer) else result


@pytest.fixture(params=[in_memory, in_window])
def source(request: pytest.FixtureRequest) -> Source:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("length", [bulk.LONG, PIECE, PIECE + 1, len(DATA)])
def test_pieces_into_a_quick_module(module: Module, source: Source, length: int) -> None:
    data = DATA[:length]
    assert read(bulk.update(Session(1), module, source(data))) == turned(data)
    assert max(module.sizes) <= PIECE
    assert len(module.sizes) == -(-length // PIECE)


def test_whole_parts_into_a_slow_one(module: Module, source: Source) -> None:
    """Two pieces of a stream tell; the next stream asks anew."""
    session = Session(1)
    module.took = iter([0.005] * 4)
    for _ in range(2):
        assert read(bulk.update(session, module, source(DATA))) == turned(DATA)
    assert module.sizes == [PIECE, PIECE, len(DATA) - 2 * PIECE, len(DATA)]


def test_one_slow_piece_tells_nothing(module: Module) -> None:
    """Another program may have had the processor meanwhile; and once a piece was quick, none that follows is asked."""
    session = Session(1)
    module.took = iter([0.005, 0.0001, 0.005, 0.005, 0.005])
    bulk.update(session, module, DATA)
    assert module.sizes == [PIECE] * 5 + [100]


def test_one_call_is_one(module: Module, source: Source) -> None:
    assert read(bulk.transform(Session(1), module, source(DATA))) == turned(DATA)
    assert module.sizes == [len(DATA)]


def test_input_without_output(module: Module, source: Source) -> None:
    seen: list[bytes] = []
    session = Session(1)

    def ingest(handle: int, data: Any, size: int) -> int:
        seen.append(ctypes.string_at(data, size))
        return 0

    part = source(DATA)  # it must live as long as it is read
    bulk.ingest(session, ingest, part)
    assert b"".join(seen) == DATA
    assert len(seen) == 6


@pytest.mark.parametrize("length", [BUFFER_SIZE, LARGEST_KEPT + 5])
def test_an_output_that_is_longer_than_its_input(module: Module, source: Source, length: int) -> None:
    """By so much that the room for it does not do: what the module gave before is not lost."""
    data = os.urandom(length)[: window.LONGEST]
    module.longer = b"x" * 5000
    result = read(bulk.update(Session(1), module, source(data)))
    parts = [turned(data[start : start + PIECE]) + module.longer for start in range(0, len(data), PIECE)]
    assert result == b"".join(parts)


def test_nothing_is_left_behind_a_result_or_an_error(module: Module) -> None:
    placed = in_window(DATA)
    assert isinstance(placed, Placed)
    place = placed.answer(len(DATA)).address
    module.fail_at = 2
    with pytest.raises(Ckr):
        bulk.update(Session(1), module, placed)
    assert ctypes.string_at(place, len(DATA)) == bytes(len(DATA))

    def padded(handle: int, data: Any, size: int, place: Any, length: Any) -> int:
        ctypes.memset(place, 1, size)
        length._obj.value = 10
        return 0

    result = bulk.transform(Session(1), padded, placed)
    assert read(result) == b"\1" * 10
    assert ctypes.string_at(place, len(DATA)) == b"\1" * 10 + bytes(len(DATA) - 10)
