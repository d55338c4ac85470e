"""``lib()``: which path is what, one object for one configuration, and the slots and tokens that it shows."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pkcs11
import pytest
from pkcs11 import Mechanism, MechanismFlag, SlotFlag, TokenFlag

import hagroup
from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.engine.api import MemberSlot, VirtualToken
from hagroup.errors import ConfigurationError, NotOnGroup
from hagroup.facade import lib as facade
from hagroup.members.api import MechanismInfo

TOKEN = VirtualToken(
    label="payments",
    serial="74007601",
    manufacturer="maker",
    model="model",
    flags=int(TokenFlag.RNG | TokenFlag.LOGIN_REQUIRED | TokenFlag.TOKEN_INITIALIZED),
    hardware_version=(1, 2),
    firmware_version=(3, 4),
)
MECHANISMS = {
    int(Mechanism.RSA_PKCS): MechanismInfo(512, 4096, int(MechanismFlag.SIGN)),
    0x80000001: MechanismInfo(0, 0, 0),
}


class FakeSession:
    def __init__(self, number: int, rw: bool, log: list[str]) -> None:
        self.id, self.rw, self._log = number, rw, log

    def login(self, user_type: int, pin: bytes) -> None:
        self._log.append(f"login {user_type}")
        if pin == b"wrong":
            raise Ckr(CKR.PIN_INCORRECT, "C_Login")

    def logout(self) -> None:
        self._log.append("logout")

    def close(self) -> None:
        self._log.append("close")


class FakeGroup:
    opened: ClassVar[list[Any]] = []
    members: ClassVar[list[MemberSlot]] = []
    token_info: ClassVar[VirtualToken] = TOKEN

    def __init__(self, path: str) -> None:
        self.label, self.serial = "payments", "74007601"
        self.closed = False
        self.log: list[str] = []
        FakeGroup.opened.append((path, self))

    def token(self) -> VirtualToken:
        return self.token_info

    def mechanisms(self) -> dict[int, MechanismInfo]:
        return MECHANISMS

    def member_slots(self) -> list[MemberSlot]:
        return self.members

    def open_session(self, *, rw: bool) -> FakeSession:
        self.log.append("open")
        return FakeSession(len(self.log), rw, self.log)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a configuration, which the fake group does not read."""
    bootstrap = ModuleType("hagroup.bootstrap")
    bootstrap.open_group = FakeGroup  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hagroup.bootstrap", bootstrap)
    monkeypatch.setattr(hagroup, "bootstrap", bootstrap, raising=False)
    monkeypatch.setattr(FakeGroup, "opened", [])
    monkeypatch.setattr(facade, "_libraries", {})
    monkeypatch.delenv("HAGROUP_CONFIG", raising=False)
    path = tmp_path / "hagroup.toml"
    path.write_text("")
    return path


def group_of(library: Any) -> FakeGroup:
    group = library.group
    assert isinstance(group, FakeGroup)
    return group


def test_one_object_for_one_configuration(config: Path) -> None:
    library = hagroup.lib(str(config))
    (config.parent / "link.toml").symlink_to(config)
    assert hagroup.lib(config) is library
    assert hagroup.lib(str(config.parent)) is library, "the folder that holds a hagroup.toml"
    assert hagroup.lib(str(config.parent / "link.toml")) is library
    assert len(FakeGroup.opened) == 1
    assert library.so == str(config)
    assert isinstance(library, facade.GroupLibrary)


def test_other_paths_go_to_pkcs11(config: Path, tmp_path: Path) -> None:
    for path in ("thislibdoesntexist.so", str(tmp_path / "sub")):
        with pytest.raises(pkcs11.PKCS11Error, match="loading"):
            hagroup.lib(path)
    hagroup.unload("thislibdoesntexist.so")
    assert FakeGroup.opened == []


def test_without_a_path(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="HAGROUP_CONFIG"):
        hagroup.lib()
    monkeypatch.setenv("HAGROUP_CONFIG", str(config))
    library = hagroup.lib()
    assert library is hagroup.lib(str(config))
    monkeypatch.setenv("HAGROUP_CONFIG", str(config.parent))
    assert hagroup.lib() is library


def test_finalize_and_open_again(config: Path) -> None:
    library = hagroup.lib(str(config))
    group = group_of(library)
    session = library.get_token().open(user_pin="1234")
    library.finalize()
    assert group.closed
    assert not library.initialized
    library.finalize()
    with pytest.raises(pkcs11.PKCS11Error, match="not initialized"):
        library.get_slots()
    with pytest.raises(pkcs11.PKCS11Error, match="not initialized"):
        list(session.get_objects())
    assert hagroup.lib(str(config)) is library
    assert library.initialized
    assert group_of(library) is not group
    with pytest.raises(pkcs11.SessionHandleInvalid):
        session.generate_random(8)
    with pytest.raises(pkcs11.SessionHandleInvalid):
        session.close()
    assert "logout" not in group_of(library).log, "a session of before must not log out those of now"
    library.reinitialize()
    assert library.initialized


def test_unload(config: Path) -> None:
    library = hagroup.lib(str(config))
    group = group_of(library)
    hagroup.unload(str(config))
    assert group.closed
    hagroup.unload(str(config))
    assert hagroup.lib(str(config)) is not library


def test_a_group_that_does_not_open_is_not_kept(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise ConfigurationError("line 3")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["hagroup.bootstrap"], "open_group", refuse)
        with pytest.raises(ConfigurationError):
            hagroup.lib(str(config))
    assert hagroup.lib(str(config)).initialized


def test_what_it_says_of_itself(config: Path) -> None:
    library = hagroup.lib(str(config))
    assert library.library_description == "HA group payments"
    assert library.cryptoki_version == (2, 40)
    assert repr(library) == f"<hagroup.lib ({config})>"
    assert str(library).splitlines()[0] == f"Library: {config}"


def test_the_virtual_slot(config: Path) -> None:
    (slot,) = hagroup.lib(str(config)).get_slots(token_present=True)
    assert isinstance(slot, pkcs11.Slot)
    assert slot.slot_id == 0
    assert slot.flags == SlotFlag.TOKEN_PRESENT
    assert slot.get_mechanisms() == {Mechanism.RSA_PKCS, 0x80000001}
    info = slot.get_mechanism_info(Mechanism.RSA_PKCS)
    assert isinstance(info, pkcs11.MechanismInfo)
    assert (info.min_key_length, info.max_key_length, info.flags) == (512, 4096, MechanismFlag.SIGN)
    with pytest.raises(pkcs11.MechanismInvalid):
        slot.get_mechanism_info(Mechanism.AES_GCM)
    assert "payments" in str(slot)
    assert "slotID=0" in repr(slot)
    assert slot == hagroup.lib(str(config)).get_slots()[0]
    assert len({slot, hagroup.lib(str(config)).get_slots()[0]}) == 1


def test_the_virtual_token(config: Path) -> None:
    token = hagroup.lib(str(config)).get_token(token_label="payments")
    assert isinstance(token, pkcs11.Token)
    assert (token.label, token.serial, token.manufacturer_id, token.model) == (
        "payments",
        b"74007601",
        "maker",
        "model",
    )
    assert (token.hardware_version, token.firmware_version) == ((1, 2), (3, 4))
    assert TokenFlag.LOGIN_REQUIRED in token.flags
    assert token == token.slot.get_token()
    assert str(token) == "payments"
    assert "74007601" in repr(token)


def test_groups_are_different_tokens(config: Path) -> None:
    other = config.parent / "other.toml"
    other.write_text("")
    assert hagroup.lib(str(config)).get_token() != hagroup.lib(str(other)).get_token()


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({}, True),
        ({"token_label": "payments", "token_serial": b"74007601"}, True),
        ({"token_label": "other"}, False),
        ({"token_serial": b"1"}, False),
        ({"token_flags": TokenFlag.RNG}, True),
        ({"token_flags": TokenFlag.CLOCK_ON_TOKEN}, False),
        ({"slot_flags": SlotFlag.TOKEN_PRESENT}, True),
        ({"slot_flags": SlotFlag.HW_SLOT}, False),
        ({"mechanisms": [Mechanism.RSA_PKCS]}, True),
        ({"mechanisms": {Mechanism.RSA_PKCS, Mechanism.AES_GCM}}, False),
        ({"mechanisms": []}, True),
    ],
)
def test_filters(config: Path, filters: dict[str, Any], found: bool) -> None:
    library = hagroup.lib(str(config))
    assert len(list(library.get_tokens(**filters))) == found
    if not found:
        with pytest.raises(pkcs11.NoSuchToken, match="No token matching"):
            library.get_token(**filters)


def test_members_beside_the_virtual_slot(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [MemberSlot(name=name, token=TOKEN, mechanisms=MECHANISMS) for name in ("hsm1", "hsm2")]
    monkeypatch.setattr(FakeGroup, "members", members)
    library = hagroup.lib(str(config))
    slots = library.get_slots()
    assert [slot.slot_id for slot in slots] == [0, 1, 2]
    assert slots[2].get_mechanisms() == slots[0].get_mechanisms()
    assert slots[1].get_token().label == "payments"
    with pytest.raises(NotOnGroup, match="hsm1"):
        slots[1].get_token().open()
    with pytest.raises(pkcs11.FunctionNotSupported):
        slots[2].get_token().open(user_pin="1234")
    assert group_of(library).log == []
    with pytest.raises(pkcs11.MultipleTokensReturned):
        library.get_token()


def test_slot_events(config: Path) -> None:
    library = hagroup.lib(str(config))
    with pytest.raises(pkcs11.NoEvent):
        library.wait_for_slot_event(blocking=False)
    with pytest.raises(pkcs11.FunctionNotSupported, match="for ever"):
        library.wait_for_slot_event()


# -- opening sessions ----------------------------------------------------------------------------------------------
def test_open_and_close(config: Path) -> None:
    library = hagroup.lib(str(config))
    token = library.get_token()
    log = group_of(library).log
    with token.open() as session:
        assert session.user_type is pkcs11.UserType.NOBODY
        assert not session.rw
    assert log == ["open", "close"]
    log.clear()
    with token.open(rw=True, user_pin="1234") as session:
        assert session.user_type is pkcs11.UserType.USER
        assert session.rw
        assert session.token is token
    assert log == ["open", "login 1", "logout", "close"]
    log.clear()
    token.open(so_pin="1234").close()
    assert log == ["open", "login 0", "logout", "close"]
    log.clear()
    with token.open(user_pin="1", user_type=0x80000005) as session:
        assert session.user_type == 0x80000005
    assert log[1] == "login 2147483653"
    with pytest.raises(pkcs11.SessionHandleInvalid):
        session.close()


def test_a_failed_open_leaves_nothing_open(config: Path) -> None:
    library = hagroup.lib(str(config))
    log = group_of(library).log
    with pytest.raises(pkcs11.PinIncorrect):
        library.get_token().open(user_pin="wrong")
    assert log == ["open", "login 1", "close"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"user_pin": "1", "so_pin": "2"}, pkcs11.ArgumentsBad),
        ({"user_pin": pkcs11.PROTECTED_AUTH}, pkcs11.ArgumentsBad),
        ({"so_pin": pkcs11.PROTECTED_AUTH}, pkcs11.ArgumentsBad),
        ({"user_pin": b"1234"}, AttributeError),
        ({"so_pin": 1234}, AttributeError),
    ],
)
def test_refused_before_anything_happens(config: Path, arguments: dict[str, Any], error: type[Exception]) -> None:
    library = hagroup.lib(str(config))
    with pytest.raises(error):
        library.get_token().open(**arguments)
    assert group_of(library).log == []


def test_pin_pad(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import msgspec

    flags = TOKEN.flags | TokenFlag.PROTECTED_AUTHENTICATION_PATH
    monkeypatch.setattr(FakeGroup, "token_info", msgspec.structs.replace(TOKEN, flags=int(flags)))
    with pytest.raises(NotOnGroup, match="PIN"):
        hagroup.lib(str(config)).get_token().open(user_pin=pkcs11.PROTECTED_AUTH)
