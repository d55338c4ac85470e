"""Steps of ha-admin that Ctrl-C does not cut in two, since what was asked of a member then goes on without its caller:
keys of a domain that nobody knows of are on a token, or an object is given up that somebody brings back.

They take seconds. Pressed twice, Ctrl-C is as good as a crash: what that leaves is dealt with as elsewhere.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def one_step() -> Iterator[None]:
    """Ctrl-C takes effect when the block is left; pressed a second time, at once."""
    at_once = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(at_once):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []

    def later(number: int, frame: FrameType | None) -> None:
        if came:
            at_once(number, frame)
        came.append((number, frame))

    signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, at_once)
        if came:
            at_once(*came[0])
