"""Cryptoki sessions of one executor: pools of anonymous ones, and the state that each is in.

A Cryptoki session does one operation at a time. A session taken from a pool belongs to one call until it is given
back; one whose operation state is not certain is closed instead, so that nobody inherits CKR_OPERATION_ACTIVE.
"""

from __future__ import annotations

import ctypes
import threading

from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.members.cryptoki import CKF_RW_SESSION, CKF_SERIAL_SESSION, Cryptoki

BUFFER_SIZE = 16 * 1024
LARGEST_KEPT = 2 << 20
"""A session's buffer grows up to this where an output asks for it: a new one each time costs its page faults."""

SESSION_LOST = frozenset(
    {
        CKR.SESSION_HANDLE_INVALID,
        CKR.SESSION_CLOSED,
        CKR.CRYPTOKI_NOT_INITIALIZED,
        CKR.DEVICE_REMOVED,
        CKR.TOKEN_NOT_PRESENT,
    }
)
"""After these the session is gone, and its number may already be another's: it must not be closed."""


class Session:
    """An open session, used by one call at a time."""

    __slots__ = (
        "buffer",
        "handle",
        "kind",
        "length",
        "length_pointer",
        "lock",
        "operation",
        "owns_objects",
        "pool_life",
        "shut",
        "slow",
    )

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.operation: str | None = None
        """The operation that may be active on it (sign, encrypt, ... or find)."""
        self.owns_objects = False
        self.kind: str | None = None
        """For a stream: which operation it is."""
        self.lock = threading.Lock()
        """For a named session: callers take turns."""
        self.shut = False
        self.pool_life = 0
        self.slow = 0
        """For a stream: pieces that the module did not take at once; -1: it took one at once."""
        # Each session has its own output buffer: allocating one costs as much as the smallest operations.
        self.buffer = ctypes.create_string_buffer(BUFFER_SIZE)
        self.length = ctypes.c_ulong()
        self.length_pointer = ctypes.byref(self.length)


def open_session(cryptoki: Cryptoki, slot_id: int, *, rw: bool = True) -> Session:
    handle = ctypes.c_ulong()
    flags = CKF_SERIAL_SESSION | (CKF_RW_SESSION if rw else 0)
    cryptoki.C_OpenSession(slot_id, flags, None, None, ctypes.byref(handle))
    return Session(handle.value)


def close_session(cryptoki: Cryptoki, session: Session) -> None:
    """C_CloseSession; a session that cannot be closed is lost already."""
    session.shut = True
    try:
        cryptoki.C_CloseSession(session.handle)
    except Ckr:
        pass


class SessionPool:
    """Read-write sessions, opened when needed and reused last in, first out."""

    def __init__(self, cryptoki: Cryptoki, slot_id: int) -> None:
        self._cryptoki = cryptoki
        self._slot_id = slot_id
        self._idle: list[Session] = []
        self._lock = threading.Lock()
        self._count = 0
        self._life = 0

    def acquire(self) -> Session:
        try:
            return self._idle.pop()
        except IndexError:
            return self.fresh()

    def fresh(self, *, rw: bool = True) -> Session:
        """A session that nobody used before."""
        # Counted before it is open: whoever waits for `busy` to become zero must see this call.
        self._add(1)
        life = self._life
        try:
            session = open_session(self._cryptoki, self._slot_id, rw=rw)
        except BaseException:
            self._add(-1)
            raise
        session.pool_life = life
        return session

    def release(self, session: Session) -> None:
        if session.pool_life == self._life:
            self._idle.append(session)
        else:
            self.forget(session)

    def close(self, session: Session) -> None:
        if session.pool_life == self._life:
            close_session(self._cryptoki, session)
        self.forget(session)

    def forget(self, session: Session) -> None:
        """The session is lost, or somebody else's business from now on (until :meth:`adopt`)."""
        session.shut = session.pool_life != self._life or session.shut
        self._add(-1)

    def adopt(self, session: Session) -> None:
        self._add(1)
        self.release(session)

    def lose_all(self) -> None:
        """All sessions are lost. None is closed: a dead session's number may be a new session's by now."""
        with self._lock:
            self._life += 1
            self._count -= len(self._idle)
            self._idle.clear()

    def close_idle(self) -> None:
        while True:
            try:
                session = self._idle.pop()
            except IndexError:
                return
            self.close(session)

    @property
    def busy(self) -> int:
        """How many sessions are inside a call."""
        with self._lock:
            return self._count - len(self._idle)

    def _add(self, number: int) -> None:
        with self._lock:
            self._count += number
