"""What the engine can ask of one member: the interface that every transport and the simulated member share.

One method is one exchange with the member and (nearly) one Cryptoki operation. All raise :class:`Ckr` for what the
module returned, :class:`MemberGone` / :class:`DeadlinePassed` / :class:`WorkerFault` for what became of the
connection, :class:`StaleGeneration` for handles of an earlier life. ``timeout`` is in seconds. ``sid`` names a
session opened with :meth:`open_session`; 0 is a pooled one, logged in with the member's login.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from hagroup.core.calls import Handle, Mechanism, SessionId, Template


class TokenInfo(msgspec.Struct, frozen=True, kw_only=True):
    """CK_TOKEN_INFO, strings stripped (PKCS#11 v2.40 3.2)."""

    label: str
    manufacturer: str
    model: str
    serial: str
    flags: int
    hardware_version: tuple[int, int]
    firmware_version: tuple[int, int]
    min_pin_len: int
    max_pin_len: int
    free_private_memory: int | None
    """None where the token does not tell (CK_UNAVAILABLE_INFORMATION)."""
    total_private_memory: int | None = None
    """None where it does not tell, or does not limit it."""


class ModuleInfo(msgspec.Struct, frozen=True, kw_only=True):
    """CK_INFO and the slot the token was found in."""

    manufacturer: str
    description: str
    library_version: tuple[int, int]
    cryptoki_version: tuple[int, int]
    slot_id: int
    slot_description: str
    slot_manufacturer: str
    slot_flags: int
    has_v30: bool
    has_v32: bool


class MechanismInfo(msgspec.Struct, frozen=True):
    """CK_MECHANISM_INFO."""

    min_key: int
    max_key: int
    flags: int


class Connection(Protocol):
    """One life of one member's module: from its start to its end ("generation", a number never used twice)."""

    @property
    def generation(self) -> int: ...

    @property
    def alive(self) -> bool: ...

    @property
    def module_info(self) -> ModuleInfo: ...

    # -- token
    def token_info(self, *, timeout: float) -> TokenInfo: ...
    def mechanisms(self, *, timeout: float) -> dict[int, MechanismInfo]: ...
    def probe(self, *, timeout: float) -> TokenInfo:
        """C_GetTokenInfo and, on a session of its own, C_GenerateRandom: on a channel that no other call uses."""
        ...

    # -- login: of the whole module (PKCS#11 v2.40 3.2, "login state is the application's")
    def login(self, user_type: int, pin: bytes, *, timeout: float) -> None: ...
    def logout(self, *, timeout: float) -> None:
        """C_Logout; handles of private objects end with it, so the generation's number moves."""
        ...

    def set_pin(self, old: bytes, new: bytes, *, timeout: float) -> None: ...
    def init_pin(self, pin: bytes, *, timeout: float) -> None: ...

    # -- sessions
    def open_session(self, *, rw: bool = True, timeout: float) -> SessionId: ...
    def close_session(self, sid: SessionId, *, timeout: float) -> None: ...

    # -- objects
    def find(self, template: Template, *, limit: int = 0, sid: SessionId = 0, timeout: float) -> list[Handle]: ...
    def get(
        self, handle: Handle, types: list[int], *, sid: SessionId = 0, timeout: float
    ) -> tuple[dict[int, bytes], dict[int, int]]:
        """Values by type, and for those that could not be read the return value of asking for each alone."""
        ...

    def set(self, handle: Handle, template: Template, *, sid: SessionId = 0, timeout: float) -> None: ...
    def create(self, template: Template, *, sid: SessionId = 0, timeout: float) -> Handle: ...
    def copy(self, handle: Handle, template: Template, *, sid: SessionId = 0, timeout: float) -> Handle: ...
    def destroy(self, handle: Handle, *, sid: SessionId = 0, timeout: float) -> None: ...
    def generate(self, mech: Mechanism, template: Template, *, sid: SessionId = 0, timeout: float) -> Handle: ...
    def generate_pair(
        self, mech: Mechanism, public: Template, private: Template, *, sid: SessionId = 0, timeout: float
    ) -> tuple[Handle, Handle]: ...
    def wrap(
        self, mech: Mechanism, wrapping_key: Handle, key: Handle, *, sid: SessionId = 0, timeout: float
    ) -> bytes: ...
    def unwrap(
        self,
        mech: Mechanism,
        unwrapping_key: Handle,
        wrapped: bytes,
        template: Template,
        *,
        sid: SessionId = 0,
        timeout: float,
    ) -> Handle: ...
    def derive(
        self, mech: Mechanism, base_key: Handle, template: Template, *, sid: SessionId = 0, timeout: float
    ) -> Handle: ...
    def encapsulate(
        self, mech: Mechanism, public_key: Handle, template: Template, *, sid: SessionId = 0, timeout: float
    ) -> tuple[bytes, Handle]: ...
    def decapsulate(
        self,
        mech: Mechanism,
        private_key: Handle,
        template: Template,
        ciphertext: bytes,
        *,
        sid: SessionId = 0,
        timeout: float,
    ) -> Handle: ...

    # -- one-shot operations; ``pin`` is C_Login(CKU_CONTEXT_SPECIFIC) between Init and the operation
    def sign(
        self,
        mech: Mechanism,
        key: Handle,
        data: bytes,
        *,
        pin: bytes | None = None,
        sid: SessionId = 0,
        timeout: float,
    ) -> bytes: ...
    def verify(
        self, mech: Mechanism, key: Handle, data: bytes, signature: bytes, *, sid: SessionId = 0, timeout: float
    ) -> None: ...
    def encrypt(self, mech: Mechanism, key: Handle, data: bytes, *, sid: SessionId = 0, timeout: float) -> bytes: ...
    def decrypt(
        self,
        mech: Mechanism,
        key: Handle,
        data: bytes,
        *,
        pin: bytes | None = None,
        sid: SessionId = 0,
        timeout: float,
    ) -> bytes: ...
    def digest(self, mech: Mechanism, parts: list[bytes | Handle], *, sid: SessionId = 0, timeout: float) -> bytes:
        """C_Digest for one bytes part; else C_DigestUpdate for bytes and C_DigestKey for handles, in order."""
        ...

    def random(self, length: int, *, sid: SessionId = 0, timeout: float) -> bytes: ...
    def seed(self, data: bytes, *, sid: SessionId = 0, timeout: float) -> None: ...

    # -- multi-part operations; ``kind`` is sign | verify | encrypt | decrypt | digest
    def stream_open(
        self, kind: str, mech: Mechanism, key: Handle, *, pin: bytes | None = None, timeout: float
    ) -> SessionId:
        """Init on a session that belongs to this stream alone until :meth:`stream_final` or :meth:`stream_cancel`."""
        ...

    def stream_update(self, stream: SessionId, data: bytes | Handle, *, timeout: float) -> bytes: ...
    def stream_final(self, stream: SessionId, signature: bytes = b"", *, timeout: float) -> bytes: ...
    def stream_cancel(self, stream: SessionId, *, timeout: float) -> None:
        """Ends the operation and closes its session."""
        ...

    # -- the connection itself
    def close(self) -> None:
        """Orderly end: the call in progress is finished, then C_Finalize."""
        ...

    def outstanding(self) -> list[float]:
        """Deadlines (monotonic clock) of the calls in progress."""
        ...

    def abandon_after_fork(self) -> None:
        """In a forked child: drop what is inherited, without a word to the parent's worker."""
        ...

    def take_no_more(self) -> None:
        """No call begins any more; those in progress go on."""
        ...

    def let_go(self) -> None:
        """Orderly end that nobody waits for: a worker process finishes the calls in progress (else what one writes to
        the token would be torn) and leaves by itself, in bounded time; a module in this process is abandoned."""
        ...

    def kill(self) -> None:
        """At once: SIGKILL for a worker process; a module in this process is abandoned. Idempotent."""
        ...
