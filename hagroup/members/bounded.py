"""The time that several requests to a member may take together (G5).

A deadline for each request alone bounds nothing where a change is a dozen of them: a member that answers each one just
in time would take a dozen deadlines.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_until: ContextVar[float] = ContextVar("hagroup.members.until", default=math.inf)
"""Monotonic time, of this thread."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """What this thread asks members for in the block ends within so many seconds: later requests get what is left."""
    before = _until.set(min(_until.get(), time.monotonic() + seconds))
    try:
        yield
    finally:
        _until.reset(before)


def left(timeout: float) -> float:
    """What a request with this timeout may take now; zero or less: its time is up."""
    until = _until.get()
    return timeout if until == math.inf else min(timeout, until - time.monotonic())
