"""Messages over a socket pair."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from hagroup.members.frames import BULK, Channel


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
