"""Messages over a socket pair, and through the memory that both ends see."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from hagroup.members import window
from hagroup.members.frames import BULK, Channel
from hagroup.members.window import LONGEST, Placed, Window, WorkerWindow


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel, socket.socket]]:
    one, two = socket.socketpair()
    channels = Channel(one), Channel(two)
    yield (*channels, one)
    for channel in channels:
        channel.close()


def test_small_messages(pair: tuple[Channel, Channel, socket.socket]) -> None:
    one, two, _ = pair
    for message in ([1, "sign", 5, [0, b"data", None]], [], [2**64 - 1, b"", [[1, {3: b"x"}]]]):
        one.send(message)
        assert two.receive() == message
        two.send(message)
        assert one.receive() == message


@pytest.mark.parametrize("size", [0, 1, BULK - 1, BULK, 65536 - 30, 65536, 70_000, 3_000_000])
def test_bulk_is_the_last_element(pair: tuple[Channel, Channel, socket.socket], size: int) -> None:
    one, two, _ = pair
    data = os.urandom(size)
    # Where the bulk stood there was an empty byte string: the two ways of sending cannot be told apart.
    for message, bulk in (([1, "encrypt", [0, b""]], data), ([1, "encrypt", [0, data]], None)):
        received: list[Any] = []
        thread = threading.Thread(target=lambda received=received: received.append(two.receive()))  # type: ignore[misc]
        thread.start()
        one.send(message, bulk)
        thread.join(20)
        assert received == [[1, "encrypt", [0, data]]]


def test_two_messages_at_once_are_an_error(pair: tuple[Channel, Channel, socket.socket]) -> None:
    one, two, _ = pair
    one.send([1])
    one.send([2])
    with pytest.raises(ValueError, match="second message"):
        two.receive()


def test_a_message_in_pieces(pair: tuple[Channel, Channel, socket.socket]) -> None:
    _, two, raw = pair
    received: list[Any] = []
    thread = threading.Thread(target=lambda: received.append(two.receive()))
    thread.start()
    for byte in b"\x00\x00\x00\x05\x92\x01\xc4\x01x":
        raw.send(bytes([byte]))
    thread.join(20)
    assert received == [[1, b"x"]]


def test_the_other_end_closes(pair: tuple[Channel, Channel, socket.socket]) -> None:
    one, two, raw = pair
    raw.send(b"\x00\x00\x00\x05\x92")
    one.close()
    with pytest.raises(EOFError):
        two.receive()
    with pytest.raises(OSError, match="Broken pipe"):
        two.send([1])


def test_the_deadline_bounds_the_whole_message(pair: tuple[Channel, Channel, socket.socket]) -> None:
    one, two, raw = pair
    two.limit(0.3)
    stop = threading.Event()

    def drip() -> None:
        raw.send(b"\x00\x00\xff\xff")
        while not stop.wait(0.02):
            raw.send(b"x")

    thread = threading.Thread(target=drip)
    thread.start()
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        two.receive()
    assert time.monotonic() - begin < 5
    stop.set()
    thread.join()
    one.limit(0.1)
    with pytest.raises(TimeoutError):  # nobody reads
        one.send([1, b""], bytes(50_000_000))


@pytest.fixture
def shared() -> Iterator[tuple[Channel, Channel, Window]]:
    """The caller's end, the worker's, and the window of the former."""
    one, two = socket.socketpair()
    seen, descriptor = window.create()
    channels = Channel(one, seen), Channel(two, WorkerWindow(descriptor))
    yield (*channels, seen)
    for channel in channels:
        channel.close()


def is_empty(seen: Window) -> bool:
    return bytes(seen._mapped().bytes).count(0) == len(seen._mapped().bytes)


@pytest.mark.parametrize("size", [BULK, 1_000_000, LONGEST])
def test_long_byte_strings_lie_in_the_window(shared: tuple[Channel, Channel, Window], size: int) -> None:
    caller, worker, seen = shared
    data = os.urandom(size)
    caller.send([1, "encrypt", 7, [0, b""]], data)
    *_, [_, placed] = worker.receive()
    assert isinstance(placed, Placed)
    assert ctypes.string_at(placed.address, len(placed)) == data
    answer = placed.answer(size + 16)
    ctypes.memmove(answer.address, data[::-1], size)
    answer.ended(size)
    worker.send_placed([1, 0, b""], answer.length)
    assert caller.receive() == [1, 0, data[::-1]]
    caller.wipe()
    assert is_empty(seen)
    # A long answer to a short request; a short one to a long request.
    caller.send([2, "random", 7, [size]])
    assert worker.receive() == [2, "random", 7, [size]]
    worker.send([2, 0, b""], data)
    assert caller.receive() == [2, 0, data]
    assert caller.holds
    caller.send([3, "sign", 7, [b""]], data)
    worker.receive()
    worker.send([3, 0, b"signature"])
    assert caller.receive() == [3, 0, b"signature"]
    caller.wipe()
    assert is_empty(seen)


def test_what_is_too_long_goes_through_the_socket(shared: tuple[Channel, Channel, Window]) -> None:
    caller, worker, seen = shared
    data = os.urandom(LONGEST + 1)
    received: list[Any] = []
    thread = threading.Thread(target=lambda: received.append(worker.receive()))
    thread.start()
    caller.send([1, b""], data)
    thread.join(20)
    assert received == [[1, data]]
    assert is_empty(seen)


def test_a_place_outside_of_the_window(shared: tuple[Channel, Channel, Window]) -> None:
    for receiver, sender in (shared[:2], shared[1::-1]):
        sender.send_placed([1, 0, b""], 2 * LONGEST)
        with pytest.raises(ValueError, match="window"):
            receiver.receive()


def test_wherever_a_message_is_cut() -> None:
    """Wherever it is cut. Packets, of which a receive returns one, instead of the stream that may join them."""
    placed = struct.pack(">III", 0, 3, 4) + b"\x92\x01\xc4\x00"
    plain = struct.pack(">I", 7) + b"\x92\x01\xc4\x03abc"
    memory, descriptor = window.create()
    os.close(descriptor)
    for message, expected in ((placed, [1, bytes(3)]), (plain, [1, b"abc"])):
        for size in range(1, len(message) + 1):
            one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with one, two:
                for start in range(0, len(message), size):
                    two.send(message[start : start + size])
                assert Channel(one, memory).receive() == expected
    memory.close()


def test_the_size_of_a_window_is_fixed() -> None:
    seen, descriptor = window.create()
    for size in (0, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    os.close(descriptor)
    seen.close()
