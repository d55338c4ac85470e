"""The lives of one module's sessions: which handles are valid now, who is logged in, and on which session a call runs.

Handles, and the numbers of named sessions, belong to one *generation*. It ends at logout, and when the module says
that a session is gone (the HSM restarted, another handle numbering begins): from that moment every call of the old
generation is refused *before* it enters the module, and the next login or logout waits until those that are inside
came out. So a handle can never meet a key of another generation that happens to have its number (trap 10).

Three kinds of session serve the calls that name none:
the *working* ones own nothing and are closed as soon as their state is in doubt;
the *keepers* own the session objects made with ``sid=0``, so they stay open as long as the generation lasts;
the *holder* does nothing at all, and with that keeps the login alive.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from hagroup.core.calls import Ckr, DeadlinePassed, SessionId, StaleGeneration
from hagroup.core.ckr import CKR
from hagroup.members.cryptoki import CKF_PROTECTED_AUTHENTICATION_PATH, Cryptoki
from hagroup.members.module import Module
from hagroup.members.sessions import SESSION_LOST, Session, SessionPool, close_session, open_session

_LOOK_AGAIN = 0.001  # seconds between two looks whether the calls inside came out


class Life:
    """Sessions, login and generation of one module in this process."""

    def __init__(self, module: Module, generation: int) -> None:
        self._module = module
        self._cryptoki: Cryptoki = module.cryptoki
        self.generation = generation
        self._accepting: int | None = generation
        """The generation whose calls may enter the module; None while none may."""
        self._working = SessionPool(self._cryptoki, module.slot_id)
        self._keepers = SessionPool(self._cryptoki, module.slot_id)
        self._probing = SessionPool(self._cryptoki, module.slot_id)
        self._holder: Session | None = None
        self._user: int | None = None
        self._named: dict[SessionId, Session] = {}
        # Begins anywhere: the number of a session of an earlier connection is none of this one's.
        self._next_sid = int.from_bytes(os.urandom(8), "little") >> 2
        self._losses = 0
        self._broken = False
        """Sessions were lost, and nobody logged in or out since."""
        self._state = threading.Lock()  # short: numbers and dictionaries
        self._admin = threading.Lock()  # long: one login or logout at a time

    # -- running a call

    def run(self, generation: int, sid: SessionId, action: Callable[..., Any], *arguments: Any) -> Any:
        """``action(session, *arguments)`` on the named session, or on a working one."""
        if sid:
            return self._run_named(generation, sid, action, arguments)
        return self._run_pooled(self._working, generation, action, arguments)

    def run_creating(
        self, generation: int, sid: SessionId, on_token: bool, action: Callable[..., Any], *arguments: Any
    ) -> Any:
        """Like :meth:`run` for a call that makes objects; ``on_token`` if no session will own one of them."""
        if sid:
            return self._run_named(generation, sid, action, arguments)
        pool = self._working if on_token else self._keepers
        return self._run_pooled(pool, generation, action, arguments, creating=True)

    def run_probe(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """On a session that only probes use, whatever the generation is."""
        return self._run_pooled(self._probing, None, action, arguments)

    def _run_pooled(
        self,
        pool: SessionPool,
        generation: int | None,
        action: Callable[..., Any],
        arguments: tuple[Any, ...],
        *,
        creating: bool = False,
        keep: bool = False,
    ) -> Any:
        """``keep``: the action's result is the session itself, and the caller's from now on."""
        session = pool.acquire()
        # Only now: who ends a generation waits for the sessions that are out (_quiesce), so that nothing can
        # happen to the generation between this comparison and the call.
        if generation is not None and generation != self._accepting:
            pool.release(session)
            self._refuse(generation)
        try:
            try:
                result = action(session, *arguments)
            except Ckr as error:
                if error.rv != CKR.OPERATION_ACTIVE or session.operation is not None:
                    raise
                # The module kept an operation that it should have ended. Nothing was executed: once more.
                pool.close(session)
                session = pool.fresh()
                result = action(session, *arguments)
        except BaseException as error:
            self._after_error(pool, session, error, creating)
            raise
        if creating and pool is self._keepers:
            session.owns_objects = True
        if not keep:
            pool.release(session)
        return result

    def _after_error(self, pool: SessionPool, session: Session, error: BaseException, creating: bool) -> None:
        if session.shut:  # closed already, and no fresh one could be opened
            return
        if isinstance(error, Ckr) and error.rv in SESSION_LOST:
            session.shut = True
            pool.forget(session)
            self._lost()
        elif session.owns_objects or (session.operation is None and isinstance(error, Ckr) and not creating):
            pool.release(session)
        else:
            # Its state is uncertain; or a ghost of a failed creation hangs on it and goes with it (trap 4).
            pool.close(session)

    def _run_named(
        self, generation: int, sid: SessionId, action: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> Any:
        session = self._named.get(sid)
        if session is None:
            self._check(generation)
            raise Ckr(CKR.SESSION_HANDLE_INVALID, "no such session")
        with session.lock:
            self._check(generation)
            if session.shut:
                raise Ckr(CKR.SESSION_HANDLE_INVALID, "no such session")
            try:
                return action(session, *arguments)
            except Ckr as error:
                if error.rv in SESSION_LOST:
                    self._lost()
                elif session.operation is not None and session.kind is None:
                    self._end_operation(session)
                raise

    def _check(self, generation: int) -> None:
        if generation != self._accepting:
            self._refuse(generation)

    def _refuse(self, generation: int) -> NoReturn:
        if self._broken and generation == self.generation:
            raise Ckr(CKR.SESSION_CLOSED, "sessions were lost, log in again")
        raise StaleGeneration(f"generation {generation} is over")

    def _end_operation(self, session: Session) -> None:
        """Ends what may be active on a session that cannot be given up because it owns objects.

        Most modules ended it with the error. Of the others some end a one-shot operation only by the one-shot call,
        and one with parts only by its Final: whatever they make of nothing is thrown away.
        """
        kind, session.operation = session.operation, None
        c, handle, out = self._cryptoki, session.handle, (session.buffer, session.length_pointer)
        ways: dict[str | None, list[Callable[[], int]]] = {
            "sign": [lambda: c.C_Sign(handle, b"", 0, *out), lambda: c.C_SignFinal(handle, *out)],
            "verify": [lambda: c.C_Verify(handle, b"", 0, b"", 0), lambda: c.C_VerifyFinal(handle, b"", 0)],
            "encrypt": [lambda: c.C_Encrypt(handle, b"", 0, *out), lambda: c.C_EncryptFinal(handle, *out)],
            "decrypt": [lambda: c.C_Decrypt(handle, b"", 0, *out), lambda: c.C_DecryptFinal(handle, *out)],
            "digest": [lambda: c.C_DigestFinal(handle, *out)],
            "find": [lambda: c.C_FindObjectsFinal(handle)],
        }
        for way in ways[kind]:
            session.length.value = len(session.buffer)
            try:
                way()
            except Ckr:
                pass

    # -- named sessions and streams

    def open_named(self, generation: int, rw: bool) -> SessionId:
        return self._name(generation, self._working.fresh(rw=rw), None)

    def open_stream(self, generation: int, kind: str, action: Callable[[Session], object]) -> SessionId:
        """A stream begins: ``action`` is its Init, the session is its own from then on."""

        def begin(session: Session) -> Session:
            action(session)
            return session

        session: Session = self._run_pooled(self._working, generation, begin, (), keep=True)
        return self._name(generation, session, kind)

    def _name(self, generation: int, session: Session, kind: str | None) -> SessionId:
        """Gives a session that is counted as in use by the working pool a number of its own."""
        with self._state:
            fits = generation == self._accepting
            if fits:
                session.kind = kind
                self._next_sid += 1
                sid = self._next_sid
                self._named[sid] = session
        if not fits:
            self._working.close(session)
            self._refuse(generation)
        self._working.forget(session)
        return sid

    def run_stream(
        self, generation: int, sid: SessionId, action: Callable[..., Any], *arguments: Any, last: bool
    ) -> Any:
        """A step of a stream. It is over after an error (PKCS#11 ends the operation) and after the last step."""
        try:
            result = self._run_named(generation, sid, action, arguments)
        except Exception:
            self.close_named(sid)
            raise
        if last:
            session = self._named.pop(sid, None)
            if session is not None:
                session.kind = None
                self._working.adopt(session)
        return result

    def close_named(self, sid: SessionId) -> None:
        """Closes a named session or stream, whatever it is doing; one that is closed already is fine."""
        session = self._named.pop(sid, None)
        if session is None:
            return
        with session.lock:
            if not session.shut:
                close_session(self._cryptoki, session)

    def stream_kind(self, sid: SessionId) -> str:
        session = self._named.get(sid)
        return (session.kind if session is not None else None) or "none"

    # -- login

    def login(self, user_type: int, pin: bytes, wait: float) -> None:
        with self._admin:
            again = self._accepting is None
            if again:
                self._quiesce(wait)
            if self._holder is None:
                self._holder = open_session(self._cryptoki, self._module.slot_id)
            try:
                self._cryptoki.C_Login(self._holder.handle, user_type, self._pin(pin), len(pin))
            except Ckr as error:
                if error.rv in SESSION_LOST:
                    self._holder = None
                    self._lost()
                # Lost one session only: the token kept the login that this process made before.
                kept = error.rv == CKR.USER_ALREADY_LOGGED_IN and again and self._user == user_type
                if not kept:
                    raise
            self._user = user_type
            self._broken = False
            self._accepting = self.generation

    def _pin(self, pin: bytes) -> bytes | None:
        """NULL asks for the PIN at the token itself, where it has a way of its own to enter one."""
        if not pin and self._module.token_info().flags & CKF_PROTECTED_AUTHENTICATION_PATH:
            return None
        return pin

    def logout(self, wait: float) -> None:
        """C_Logout; every session ends and the generation moves, whatever the module answers."""
        with self._admin:
            accepted, self._accepting = self._accepting, None
            losses = self._losses
            try:
                self._quiesce(wait)
            except DeadlinePassed:
                if losses == self._losses:
                    self._accepting = accepted
                raise
            session = self._holder
            try:
                if session is None:
                    session = self._holder = open_session(self._cryptoki, self._module.slot_id)
                self._cryptoki.C_Logout(session.handle)
            except Ckr as error:
                if error.rv in SESSION_LOST:
                    self._forget_sessions()
                elif error.rv != CKR.USER_NOT_LOGGED_IN:
                    raise
            finally:
                self._close_sessions()
                self._user = None
                with self._state:
                    self.generation += 1
                    self._broken = False
                    self._accepting = self.generation

    def _quiesce(self, wait: float) -> None:
        """Waits until no call is inside the module; new ones are refused already."""
        deadline = time.monotonic() + wait
        while (
            self._working.busy
            or self._keepers.busy
            or any(session.lock.locked() for session in list(self._named.values()))
        ):
            if time.monotonic() > deadline:
                raise DeadlinePassed("calls in progress did not end")
            time.sleep(_LOOK_AGAIN)

    def _close_sessions(self) -> None:
        with self._state:
            named = list(self._named.values())
            self._named.clear()
        for session in named:
            close_session(self._cryptoki, session)
        self._working.close_idle()
        self._keepers.close_idle()
        if self._holder is not None:
            close_session(self._cryptoki, self._holder)
            self._holder = None

    def _lost(self) -> None:
        """A session is gone, so all may be: this generation is over until somebody logs in or out."""
        with self._state:
            self._losses += 1
            if self._accepting is None:
                return
            self._accepting = None
            self._broken = True
            self.generation += 1
        self._forget_sessions()

    def _forget_sessions(self) -> None:
        with self._state:
            named = list(self._named.values())
            self._named.clear()
        for session in named:
            session.shut = True
        self._holder = None
        for pool in (self._working, self._keepers, self._probing):
            pool.lose_all()

    # -- the end

    def finish(self, wait: float) -> bool:
        """The calls inside are waited for; then C_Finalize, unless one stays (it would be torn to pieces).

        Whether it was called.
        """
        self._accepting = None
        try:
            self._quiesce(wait)
        except DeadlinePassed:
            return False
        if self._probing.busy:
            return False
        self._module.finalize()
        return True
