"""The virtual slot with the group's token, and beside it the members where they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from pkcs11 import types
from pkcs11.attributes import AttributeMapper
from pkcs11.constants import CancelStrategy, SlotFlag, TokenFlag, UserType
from pkcs11.exceptions import ArgumentsBad
from pkcs11.mechanisms import Mechanism

from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.engine import api
from hagroup.errors import NotOnGroup
from hagroup.facade.errors import error_for, raises_pkcs11
from hagroup.facade.packing import as_pin
from hagroup.facade.session import Session
from hagroup.members.api import MechanismInfo

if TYPE_CHECKING:
    from hagroup.facade.lib import GroupLibrary

VIRTUAL_SLOT = 0
"""Slot numbers must not shift: the virtual slot is always this one, members come after it in the file's order."""

MANUFACTURER = "hagroup"
LIBRARY_VERSION = (0, 1)
CRYPTOKI_VERSION = (2, 40)


def _mechanism(number: int) -> Any:
    try:
        return Mechanism(number)
    except ValueError:
        return number


class Slot(types.Slot):
    """The virtual slot."""

    __slots__ = ("_library", "slot_description", "slot_id")

    slot_id: int
    slot_description: str
    flags = SlotFlag.TOKEN_PRESENT  # always: members come and go behind it
    hardware_version = LIBRARY_VERSION
    firmware_version = LIBRARY_VERSION
    cryptoki_version = CRYPTOKI_VERSION
    manufacturer_id = MANUFACTURER

    def __init__(self, library: GroupLibrary, slot_id: int, description: str) -> None:
        self._library = library
        self.slot_id = slot_id
        self.slot_description = description

    def _identity(self) -> Any:
        return "hagroup.Slot", self._library, self.slot_id

    @raises_pkcs11
    def get_token(self) -> Token:
        return Token(self, self._library.group.token())

    @raises_pkcs11
    def _mechanisms(self) -> Mapping[int, MechanismInfo]:
        return self._library.group.mechanisms()

    def get_mechanisms(self) -> set[Any]:
        return {_mechanism(number) for number in self._mechanisms()}

    def get_mechanism_info(self, mechanism: Any) -> types.MechanismInfo:
        info = self._mechanisms().get(int(mechanism))
        if info is None:
            raise error_for(CKR.MECHANISM_INVALID)
        return types.MechanismInfo(
            self, mechanism, ulMinKeySize=info.min_key, ulMaxKeySize=info.max_key, flags=info.flags
        )

    def open_group_session(self, *, rw: bool) -> api.Session:
        """A session of the group (hagroup's own)."""
        return self._library.group.open_session(rw=rw)

    def track(self, session: Session) -> None:
        """Remembers an open session, to end it with the library (hagroup's own)."""
        self._library.track(session)

    def __str__(self) -> str:
        return "\n".join(
            (
                f"Slot Description: {self.slot_description}",
                f"Manufacturer ID: {self.manufacturer_id}",
                "Hardware Version: {}.{}".format(*self.hardware_version),
                "Firmware Version: {}.{}".format(*self.firmware_version),
                f"Flags: {self.flags}",
            )
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} (slotID={self.slot_id} flags={self.flags!s})>"


class Token(types.Token):
    """The virtual token."""

    __slots__ = ("_info", "label", "manufacturer_id", "model", "serial", "slot")

    slot: Slot
    label: str
    serial: bytes
    manufacturer_id: str
    model: str

    def __init__(self, slot: Slot, info: api.VirtualToken) -> None:
        self.slot = slot
        self.label = info.label
        self.serial = info.serial.encode("utf-8")
        self.manufacturer_id = info.manufacturer
        self.model = info.model
        self._info = info

    @property
    def flags(self) -> TokenFlag:
        return TokenFlag(self._info.flags)

    @property
    def hardware_version(self) -> tuple[int, int]:
        return self._info.hardware_version

    @property
    def firmware_version(self) -> tuple[int, int]:
        return self._info.firmware_version

    def _identity(self) -> Any:
        return "hagroup.Token", self.slot

    @raises_pkcs11
    def open(
        self,
        rw: bool = False,
        user_pin: Any = None,
        so_pin: Any = None,
        user_type: UserType | int | None = None,
        attribute_mapper: AttributeMapper | None = None,
        cancel_strategy: CancelStrategy = CancelStrategy.DEFAULT,
    ) -> Session:
        """As in python-pkcs11; nothing stays open if the login fails."""
        if user_pin is not None and so_pin is not None:
            raise ArgumentsBad("Set either `user_pin` or `so_pin`")
        if user_pin is types.PROTECTED_AUTH or so_pin is types.PROTECTED_AUTH:
            self._refuse_protected_authentication()
        who = int(UserType.NOBODY)
        pin = b""
        if user_pin is not None:
            pin = as_pin(user_pin)
            who = int(UserType.USER if user_type is None else user_type)
        elif so_pin is not None:
            pin = as_pin(so_pin)
            who = int(UserType.SO)
        engine = self.slot.open_group_session(rw=bool(rw))
        if who != UserType.NOBODY:
            try:
                engine.login(who, pin)
            except BaseException:
                engine.close()
                raise
        session = Session(self, engine, user_type=who, mapper=attribute_mapper or AttributeMapper())
        self.slot.track(session)
        return session

    def _refuse_protected_authentication(self) -> NoReturn:
        if not self.flags & TokenFlag.PROTECTED_AUTHENTICATION_PATH:
            raise ArgumentsBad("Protected authentication is not supported by loaded module")
        raise NotOnGroup(
            "a PIN entered at one member's own device cannot log in to the others; give the PIN to open(), or a `pin` "
            "source to each member in the configuration"
        )

    def __str__(self) -> str:
        return self.label

    def __repr__(self) -> str:
        return f"<{type(self).__name__} (label='{self.label}' serial={self.serial!r} flags={self.flags!s})>"


class MemberSlot(Slot):
    """A member, to be looked at (``ha_only = false``). Its sessions belong to the group."""

    __slots__ = ("_member",)

    def __init__(self, library: GroupLibrary, slot_id: int, member: api.MemberSlot) -> None:
        super().__init__(library, slot_id, f"member {member.name}")
        self._member = member

    @property
    def flags(self) -> SlotFlag:  # type: ignore[override]
        return SlotFlag(0) if self._member.token is None else SlotFlag.TOKEN_PRESENT

    @raises_pkcs11
    def get_token(self) -> Token:
        if self._member.token is None:
            raise Ckr(CKR.TOKEN_NOT_PRESENT, "C_GetTokenInfo")
        return Token(self, self._member.token)

    def _mechanisms(self) -> Mapping[int, MechanismInfo]:
        return self._member.mechanisms

    def open_group_session(self, *, rw: bool) -> api.Session:
        raise NotOnGroup(
            f"member {self._member.name} is used through the group's own slot ({VIRTUAL_SLOT}); for a session with "
            "this member alone give the path of its own module to lib()"
        )


class EndedSession:
    """Stands in the place of a group's session once the library was finalized."""

    __slots__ = ("_library", "id", "rw")

    def __init__(self, library: GroupLibrary, session: api.Session) -> None:
        self._library = library
        self.id = session.id
        self.rw = session.rw

    def __getattr__(self, name: str) -> NoReturn:
        raise Ckr(
            CKR.SESSION_HANDLE_INVALID if self._library.initialized else CKR.CRYPTOKI_NOT_INITIALIZED, f"session {name}"
        )
