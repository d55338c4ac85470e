"""Messages over a stream socket: four bytes of length, then msgpack. Both ends of a worker's channel.

A request is ``[number, operation, generation, arguments]`` and a reply ``[number, status, payload]``. One is under way
at a time, so a message is nearly always one send and one receive. A long byte string at the very end of a message lies
in the channel's window; where there is none, or no room, it is sent from where it is, without a copy into the message.
"""

from __future__ import annotations

import socket
import struct
import time
from typing import Any

import msgspec

from hagroup.members.window import Window, WorkerWindow

OK, CKR_RETURNED, STALE, DEADLINE, FAULT = range(5)
"""Statuses of a reply. Payloads: the result; ``[rv, function, generation]``; the generation now; a text; a text."""

BULK = 32 * 1024
"""From this length on a byte string is not copied into its message."""

_BUFFER = 64 * 1024
_LARGEST_KEPT = 2 << 20
"""A channel's buffer grows up to this with what is received: a new one costs its zeroing and page faults each time."""
_LENGTH = struct.Struct(">I")
_PLACED = struct.Struct(">III")
"""No length, which no message has; how long its last byte string is, which lies in the window; then its length."""
_BIN32 = struct.Struct(">BI")  # msgpack's header of a byte string with a length of four bytes
_encode_into = msgspec.msgpack.Encoder().encode_into
_decode = msgspec.msgpack.Decoder().decode
_MSG_NOSIGNAL = socket.MSG_NOSIGNAL


class Channel:
    """One end of a socket pair. Not for two threads at a time."""

    __slots__ = ("_in", "_out", "_socket", "_timeout", "_view", "_window", "deadline", "holds", "number")

    def __init__(self, sock: socket.socket, window: Window | WorkerWindow | None = None) -> None:
        self._socket = sock
        self._window = window
        self._timeout: float | None = None
        self._out = bytearray()
        self._in = bytearray(_BUFFER)
        self._view = memoryview(self._in)
        self.deadline = 0.0
        """Monotonic time at which the exchange in progress is given up; 0 between exchanges or without one."""
        self.number = 0
        self.holds = False
        """Something is in the window."""

    def limit(self, timeout: float) -> None:
        """Each wait of what follows ends with TimeoutError; ``deadline`` bounds their sum."""
        self.deadline = time.monotonic() + timeout
        if timeout != self._timeout:  # each change costs a system call
            self._set(timeout)

    def _set(self, timeout: float) -> None:
        # Python's own timeout and not SO_RCVTIMEO, although that would save a poll (1.5 µs): a receive that a signal
        # interrupts begins its whole SO_RCVTIMEO again, so a profiler's timer makes it wait for ever.
        self._socket.settimeout(timeout)
        self._timeout = timeout

    def _set_remaining(self) -> None:
        if self.deadline:
            remaining = self.deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self._set(remaining)

    # -- sending

    def send(self, message: list[Any], bulk: bytes | None = None) -> None:
        """``bulk`` takes the place of an empty byte string at the very end of the message."""
        out = self._out
        if bulk is None:
            _encode_into(message, out, 4)
            _LENGTH.pack_into(out, 0, len(out) - 4)
            self._send_out()
        elif self._window is not None and self._window.put(bulk):
            self.send_placed(message, len(bulk))
        else:
            _encode_into(message, out, 4)
            del out[-2:]
            out += _BIN32.pack(0xC6, len(bulk))
            _LENGTH.pack_into(out, 0, len(out) - 4 + len(bulk))
            self._send_rest([memoryview(out), memoryview(bulk)])

    def send_placed(self, message: list[Any], length: int) -> None:
        """So many bytes in the window take the place of an empty byte string at the very end of the message."""
        self.holds = True
        out = self._out
        _encode_into(message, out, _PLACED.size)
        _PLACED.pack_into(out, 0, 0, length, len(out) - _PLACED.size)
        self._send_out()

    def _send_out(self) -> None:
        sent = self._socket.send(self._out, _MSG_NOSIGNAL)
        if sent != len(self._out):
            self._send_rest([memoryview(self._out)[sent:]])

    def _send_rest(self, parts: list[memoryview]) -> None:
        try:
            while parts:
                self._set_remaining()
                sent = self._socket.sendmsg(parts, (), _MSG_NOSIGNAL)
                while parts and sent >= len(parts[0]):
                    sent -= len(parts[0])
                    parts.pop(0).release()
                if parts:
                    parts[0] = parts[0][sent:]
        finally:
            for part in parts:
                part.release()

    # -- receiving

    def receive(self) -> Any:
        """The next message; EOFError when the other end is closed, ValueError for what is not one message."""
        got = self._socket.recv_into(self._in)
        while got < 4:
            got += self._more(self._view[got:]) if got else self._eof()
        length = _LENGTH.unpack_from(self._in)[0] + 4
        if got == length > 4:
            return _decode(self._view[4:length])
        if length == 4 and self._window is not None:
            return self._receive_placed(got, self._window)
        if got > length:
            raise ValueError("a second message came before it was asked for")
        return _decode(self._receive_rest(got, length))

    def _eof(self) -> int:
        raise EOFError

    def _more(self, view: memoryview) -> int:
        self._set_remaining()
        return self._socket.recv_into(view) or self._eof()

    def _receive_rest(self, got: int, length: int) -> memoryview:
        view = self._view
        if length > len(self._in):
            buffer = bytearray(length if length > _LARGEST_KEPT else 1 << (length - 1).bit_length())
            view = memoryview(buffer)
            view[:got] = self._view[:got]
            if length <= _LARGEST_KEPT:
                self._in, self._view = buffer, view
        while got < length:
            got += self._more(view[got:length])
        return view[4:length]

    def _receive_placed(self, got: int, window: Window | WorkerWindow) -> Any:
        while got < _PLACED.size:
            got += self._more(self._view[got:])
        _, placed, length = _PLACED.unpack_from(self._in)
        if got > _PLACED.size + length:
            raise ValueError("a second message came before it was asked for")
        message = innermost = _decode(self._receive_rest(got, _PLACED.size + length)[_PLACED.size - 4 :])
        while isinstance(innermost[-1], list):
            innermost = innermost[-1]
        self.holds = True
        innermost[-1] = window.get(placed)
        return message

    # -- the end

    def wipe(self) -> None:
        """Of the caller's end: nothing stays in the window."""
        if isinstance(self._window, Window):
            self._window.wipe()
        self.holds = False

    def shutdown(self) -> None:
        """Wakes whoever waits on this channel; the descriptor stays until :meth:`close`."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        self._socket.close()
        if self._window is not None:
            self._window.close()
        self.deadline = 0.0
