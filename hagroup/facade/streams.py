"""Multi-part operations: one at a time in a session.

A second one in the same thread raises ``OperationActive``; another thread waits. One-shot operations are not held up:
each goes to a member session of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pkcs11 import types
from pkcs11.exceptions import ArgumentsBad, OperationActive

from hagroup.core.calls import Ckr, Mechanism
from hagroup.core.ckr import CKR
from hagroup.engine import api
from hagroup.facade.errors import error_for, raises_pkcs11
from hagroup.facade.packing import as_bytes

if TYPE_CHECKING:
    from hagroup.facade.session import Session


class OperationLock:
    """A lock that its owner may not take twice, and that any thread may give back.

    A generator is finalized by whichever thread drops it last, which a ``threading.RLock`` does not survive.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._process = os.getpid()

    def acquire(self) -> None:
        if self._process != os.getpid():
            self._reset()  # after a fork, the thread that held it is not here to give it back
        me = threading.get_ident()
        if self._owner == me:
            raise OperationActive()
        self._lock.acquire()
        self._owner = me

    def release(self) -> None:
        if self._process == os.getpid():
            self._owner = None
            self._lock.release()


class Operation:
    """One multi-part operation of a session, as a context: left in any way, it is over and the session is free."""

    def __init__(
        self, session: Session, kind: str, mech: Mechanism, key: bytes | None, pin: bytes | None = None
    ) -> None:
        self._session = session
        self._kind = kind
        self._mech = mech
        self._key = key
        self._pin = pin
        self._stream: api.Stream | None = None
        self._untouched = True
        self._active = False

    @raises_pkcs11
    def __enter__(self) -> Operation:
        self._session.operation_lock.acquire()
        self._active = True
        try:
            self._open()
        except BaseException:
            self._over()
            raise
        self._session.operation = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._active:
            try:
                if self._stream is not None:
                    self._stream.cancel()
            except Ckr:
                pass  # cancelled or not, nobody asks this stream again
            finally:
                self._over()

    def _open(self) -> None:
        self._stream = self._session.engine.stream(self._kind, self._mech, self._key, pin=self._pin)

    def _over(self) -> None:
        self._active = False
        if self._session.operation is self:
            self._session.operation = None
        self._session.operation_lock.release()

    def _running(self) -> api.Stream:
        if self._session.closed:
            raise Ckr(CKR.SESSION_HANDLE_INVALID, "multi-part operation")
        if self._stream is None or not self._active:
            raise Ckr(CKR.OPERATION_NOT_INITIALIZED, "multi-part operation")
        return self._stream

    def reaffirm(self, pin: bytes) -> None:
        """The context-specific login belongs between Init and the first data: the operation begins anew with it."""
        if not self._untouched:
            raise Ckr(CKR.OPERATION_NOT_INITIALIZED, "C_Login")
        self._running().cancel()
        self._pin = pin
        self._open()

    @raises_pkcs11
    def update(self, chunk: Any) -> bytes:
        self._untouched = False
        return self._running().update(as_bytes(chunk))

    @raises_pkcs11
    def update_key(self, key: Any) -> None:
        uid = getattr(key, "uid", None)
        if not isinstance(uid, bytes):
            raise ArgumentsBad("This key is not an object of this group.")
        self._untouched = False
        self._running().update_key(uid)

    def final(self, signature: bytes = b"") -> bytes:
        """Ends the operation, so that the session is free before the caller has taken the result."""
        try:
            return self._running().final(signature)
        except Ckr as error:
            raise error_for(error.rv) from error
        finally:
            if self._active:
                self._over()

    def crypt(self, chunks: Iterable[Any]) -> Iterator[bytes]:
        """Output for every chunk of input that is not empty, then the rest."""
        for chunk in chunks:
            if chunk:
                yield self.update(chunk)
        yield self.final()

    def ingest(self, chunks: Iterable[Any]) -> None:
        """Input without output; keys among it are digested."""
        for chunk in chunks:
            if not chunk:
                continue
            if self._kind == "digest" and isinstance(chunk, types.Key):
                self.update_key(chunk)
            else:
                self.update(chunk)
