"""What a front end can ask of the group: raw attributes, mechanism and parameters, CKR-shaped errors.

The facade (python-pkcs11's classes) is one front end; a C module or a daemon can be another. All methods raise
:class:`hagroup.core.calls.Ckr` for what PKCS#11 would return, and subclasses of :class:`hagroup.errors.HAError` for
what only a group can say. Objects are named by their UID (16 bytes); a front end gives them handles of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from hagroup.core.calls import Mechanism, Template
from hagroup.members.api import MechanismInfo


class VirtualToken(msgspec.Struct, frozen=True, kw_only=True):
    """CK_TOKEN_INFO of the virtual slot's token. ``flags`` are those that all serving members have, with what the
    group itself adds (TOKEN_INITIALIZED, LOGIN_REQUIRED, USER_PIN_INITIALIZED, RNG)."""

    label: str
    serial: str
    manufacturer: str
    model: str
    flags: int
    hardware_version: tuple[int, int]
    firmware_version: tuple[int, int]


class Stream(Protocol):
    """One multi-part operation, pinned to a member; replayed on another if that one fails (up to the replay limit)."""

    def update(self, data: bytes) -> bytes: ...
    def update_key(self, uid: bytes) -> None:
        """C_DigestKey (digest streams only)."""
        ...

    def final(self, signature: bytes = b"") -> bytes:
        """The last output (sign, digest, encrypt, decrypt); for verify raises Ckr(SIGNATURE_INVALID, ...)."""
        ...

    def cancel(self) -> None:
        """Give it up. Idempotent; also after ``final``."""
        ...


class Session(Protocol):
    """One virtual session. Session objects made in it die with it. Usable from several threads at once."""

    @property
    def id(self) -> int:
        """A number not used twice in this process: the virtual session handle."""
        ...

    @property
    def rw(self) -> bool: ...

    def close(self) -> None:
        """Destroys its session objects on every member that has them. Does not log out."""
        ...

    # -- login of the virtual token (process-wide state; the members' own logins are the engine's affair)
    def login(self, user_type: int, pin: bytes) -> None:
        """CKU_USER (1) or CKU_SO (0). USER_ALREADY_LOGGED_IN, USER_ANOTHER_ALREADY_LOGGED_IN, PIN_INCORRECT, ..."""
        ...

    def logout(self) -> None:
        """Virtual token back to public: private session objects end, private objects no longer show."""
        ...

    @property
    def logouts(self) -> int:
        """How often somebody logged out of the virtual token in this process: handles that a front end gave to
        private objects before are invalid, even if the user logs in again (PKCS#11, C_Logout)."""
        ...

    def set_pin(self, old: bytes, new: bytes) -> None: ...
    def init_pin(self, pin: bytes) -> None: ...

    # -- objects
    def find(self, attributes: Mapping[int, bytes]) -> list[bytes]:
        """UIDs of the objects that match: token objects from the journal's record, session objects from memory."""
        ...

    def get(self, uid: bytes, types: Sequence[int]) -> tuple[dict[int, bytes], dict[int, int]]:
        """Values by type, and for those that could not be read the CKR of asking for each alone."""
        ...

    def set(self, uid: bytes, template: Template) -> None: ...
    def create(self, template: Template, *, assign_id: bool) -> bytes:
        """``assign_id``: the application left CKA_ID open; a token object then gets its UID as CKA_ID."""
        ...

    def copy(self, uid: bytes, template: Template) -> bytes: ...
    def destroy(self, uid: bytes) -> None: ...
    def generate(self, mech: Mechanism, template: Template, *, assign_id: bool) -> bytes: ...
    def generate_pair(
        self, mech: Mechanism, public: Template, private: Template, *, assign_id: bool
    ) -> tuple[bytes, bytes]: ...
    def wrap(self, mech: Mechanism, wrapping_key: bytes, key: bytes) -> bytes: ...
    def unwrap(
        self, mech: Mechanism, unwrapping_key: bytes, wrapped: bytes, template: Template, *, assign_id: bool
    ) -> bytes: ...
    def derive(self, mech: Mechanism, base_key: bytes, template: Template, *, assign_id: bool) -> bytes: ...
    def encapsulate(
        self, mech: Mechanism, public_key: bytes, template: Template, *, assign_id: bool
    ) -> tuple[bytes, bytes]:
        """(ciphertext, UID of the shared secret)."""
        ...

    def decapsulate(
        self, mech: Mechanism, private_key: bytes, template: Template, ciphertext: bytes, *, assign_id: bool
    ) -> bytes: ...

    # -- operations
    def sign(self, mech: Mechanism, key: bytes, data: bytes, *, pin: bytes | None = None) -> bytes: ...
    def verify(self, mech: Mechanism, key: bytes, data: bytes, signature: bytes) -> None: ...
    def encrypt(self, mech: Mechanism, key: bytes, data: bytes) -> bytes: ...
    def decrypt(self, mech: Mechanism, key: bytes, data: bytes, *, pin: bytes | None = None) -> bytes: ...
    def digest(self, mech: Mechanism, data: bytes) -> bytes: ...
    def random(self, length: int) -> bytes: ...
    def seed(self, data: bytes) -> None: ...
    def stream(self, kind: str, mech: Mechanism, key: bytes | None, *, pin: bytes | None = None) -> Stream:
        """``kind``: sign | verify | encrypt | decrypt | digest."""
        ...


class MemberSlot(msgspec.Struct, frozen=True, kw_only=True):
    """A member as shown beside the virtual slot when ``ha_only = false``."""

    name: str
    token: VirtualToken | None
    """None: not connected now."""
    mechanisms: Mapping[int, MechanismInfo]


class Group(Protocol):
    """The group in this process."""

    @property
    def label(self) -> str: ...
    @property
    def serial(self) -> str: ...
    def token(self) -> VirtualToken: ...
    def mechanisms(self) -> Mapping[int, MechanismInfo]:
        """Those that every active member has; key sizes and flags that all allow."""
        ...

    def member_slots(self) -> Sequence[MemberSlot]:
        """All members in the configuration's order, connected or not, so that places do not shift; empty when
        ``ha_only``."""
        ...

    def open_session(self, *, rw: bool) -> Session: ...
    def login_state(self) -> int | None:
        """CKU number of who is logged in on the virtual token in this process; None: nobody."""
        ...

    def close(self) -> None:
        """Finish what runs in the background (bounded), end the workers, close the journal."""
        ...
