"""The operations of :class:`hagroup.members.api.Connection`, carried out in the process that has the module.

Each takes the generation its handles belong to and the session it names (0: any), then its own arguments. Both
transports, a worker's channel and a direct call, come here through :data:`Executor.operations`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hagroup.core.calls import Ckr, SessionId
from hagroup.core.ckr import CKR
from hagroup.members.api import MechanismInfo, ModuleInfo, TokenInfo
from hagroup.members.key_use import KeyUse
from hagroup.members.lock import WorkerLock
from hagroup.members.module import Module
from hagroup.members.objects import ObjectOperations
from hagroup.members.sessions import Session

_OPERATIONS = """
    token_info probe login logout set_pin init_pin open_session close_session
    find get set destroy create copy generate generate_pair wrap unwrap derive encapsulate decapsulate
    sign verify encrypt decrypt digest digest_parts random seed
    stream_open stream_update stream_final stream_cancel
"""

_CHANGING = "set destroy create copy generate generate_pair unwrap derive encapsulate decapsulate"
"""Those that may write to the token."""


def _shown(lock: WorkerLock, operation: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        with lock:
            return operation(*arguments)

    return run


class Executor(ObjectOperations, KeyUse):
    """All operations on one initialised module."""

    def __init__(self, module: Module, generation: int, lock: WorkerLock | None = None) -> None:
        super().__init__(module, generation)
        self.mechanisms: dict[int, MechanismInfo] = module.mechanisms()
        self.operations: dict[str, Callable[..., Any]] = {name: getattr(self, name) for name in _OPERATIONS.split()}
        if lock is not None:
            self.operations |= {name: _shown(lock, self.operations[name]) for name in _CHANGING.split()}

    @property
    def generation(self) -> int:
        return self._life.generation

    @property
    def module_info(self) -> ModuleInfo:
        return self._module.info

    def finish(self, wait: float) -> bool:
        """The end of the module's use, unless a call does not come out; whether it was finalized."""
        return self._life.finish(wait)

    def undelivered(self, operation: str, result: Any) -> None:
        """Nobody received this result: a session that only its receiver could close is closed."""
        if operation in ("open_session", "stream_open"):
            self._life.close_named(result)

    # -- token

    def token_info(self, _: int) -> TokenInfo:
        return self._module.token_info()

    def probe(self, _: int) -> TokenInfo:
        def touch(session: Session) -> None:
            self._cryptoki.C_GenerateRandom(session.handle, session.buffer, 8)

        info = self._module.token_info()
        try:
            self._life.run_probe(touch)
        except Ckr as error:
            # A token without a generator of random numbers still answered: on a session, and logged in or not.
            if error.rv not in (CKR.RANDOM_NO_RNG, CKR.FUNCTION_NOT_SUPPORTED):
                raise
        return info

    # -- login

    def login(self, _: int, user_type: int, wait: float, pin: bytes) -> None:
        self._life.login(user_type, pin, wait)

    def logout(self, _: int, wait: float) -> int:
        """The number of the generation that begins with it."""
        self._life.logout(wait)
        return self._life.generation

    def set_pin(self, generation: int, old: bytes, new: bytes) -> None:
        def action(session: Session) -> None:
            self._cryptoki.C_SetPIN(session.handle, old, len(old), new, len(new))

        self._life.run(generation, 0, action)

    def init_pin(self, generation: int, pin: bytes) -> None:
        def action(session: Session) -> None:
            self._cryptoki.C_InitPIN(session.handle, pin, len(pin))

        self._life.run(generation, 0, action)

    # -- sessions

    def open_session(self, generation: int, rw: bool) -> SessionId:
        return self._life.open_named(generation, rw)

    def close_session(self, _: int, sid: SessionId) -> None:
        self._life.close_named(sid)
