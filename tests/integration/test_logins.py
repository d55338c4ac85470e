"""PINs and the virtual token's login state (DESIGN.md 1.1 and 4.7), seen from an application.

What a PIN costs is counted where it counts: by the interposer, in the members' own C_Login.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import hagroup as pkcs11
from hagroup import Attribute, KeyType, Mechanism, ObjectClass, UserType
from hagroup.errors import NotOnGroup
from tests.support import plain
from tests.support.faulty import FaultGroup, engine, make_fault_group
from tests.support.groups import PIN, SO_PIN, GroupFixture, run_client, wait_until

WRONG = "9999"
NEW = "4321"

_FLAGS = """
import json, sys, pkcs11
asked = json.load(sys.stdin)
token = pkcs11.lib(asked["module"]).get_token(token_serial=asked["serial"].encode())
for old, new in asked["pins"]:
    with token.open(rw=True, user_pin=old) as session:
        session.set_pin(old, new)
for wrong in asked["wrong"]:
    try:
        token.open(user_pin=wrong)
    except pkcs11.exceptions.PinIncorrect:
        pass
token = pkcs11.lib(asked["module"]).get_token(token_serial=asked["serial"].encode())
print(int(token.flags))
"""
COUNT_LOW = 0x10000


def by_hand(member: dict[str, Any], *, pins: Sequence[tuple[str, str]] = (), wrong: Sequence[str] = ()) -> int:
    """A person with the member's own module: changes PINs, tries wrong ones; gives back the token's flags."""
    question = {"module": member["module"], "serial": member["serial"], "pins": pins, "wrong": wrong}
    done = subprocess.run(
        [sys.executable, "-c", _FLAGS],
        input=json.dumps(question),
        env=os.environ | member["env"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return int(done.stdout)


def low(group: GroupFixture) -> list[str]:
    """Members whose token remembers a failed login."""
    return [name for name, member in group.members.items() if by_hand(member) & COUNT_LOW]


class Logins:
    """How many C_Login each member saw since."""

    def __init__(self, faulty: FaultGroup) -> None:
        self._faulty = faulty
        self._before = self._counts()

    def _counts(self) -> dict[str, int]:
        return {name: int(control.counts().get("C_Login", 0)) for name, control in self._faulty.controls.items()}

    def since(self) -> dict[str, int]:
        return {name: count - self._before[name] for name, count in self._counts().items()}


@pytest.fixture
def opened() -> Iterator[Callable[[GroupFixture], Any]]:
    """Opens the library on a group; unloads it in the end."""
    libraries: list[Any] = []

    def open_library(group: GroupFixture) -> Any:
        library = pkcs11.lib(str(group.toml))
        libraries.append(library)
        return library.get_token(token_label="payments")

    yield open_library
    for library in libraries:
        library.unload()


def roster(token: Any) -> Any:
    return token.slot._library.group.roster


def settle(token: Any) -> dict[str, str]:
    """Each member's state when nothing is on its way any more."""
    token.slot._library.group.supervisor.settle()
    return {name: member.state.value for name, member in roster(token).members.items()}


def serving(token: Any) -> set[str]:
    return {member.name for member in roster(token).serving()}


def wait_serving(token: Any, *names: str) -> None:
    token.slot._library.group.supervisor.wake()
    wait_until(lambda: serving(token) == set(names), f"{names} in service")


def logged_in(token: Any) -> set[str]:
    return {m.name for m in roster(token).members.values() if m.life is not None and m.life.logged_in}


@pytest.fixture(scope="module")
def sources(fast_folder: Path) -> FaultGroup:
    """Members with PIN sources."""
    return make_fault_group(fast_folder / "sources")


@pytest.fixture(scope="module")
def bare(fast_folder: Path) -> FaultGroup:
    """Members that use the PIN the application logs in with."""
    return make_fault_group(fast_folder / "bare", "--no-pin-sources")


# -- wrong PINs ------------------------------------------------------------------------------------------------


def test_wrong_pin_with_sources_costs_no_attempt(sources: FaultGroup, opened: Any) -> None:
    token = opened(sources.group)
    settle(token)
    logins = Logins(sources)
    for _ in range(3):
        with pytest.raises(pkcs11.exceptions.PinIncorrect):
            token.open(user_pin=WRONG)
    assert sum(logins.since().values()) == 0
    with token.open(user_pin=PIN) as session:
        assert session.user_type is UserType.USER
    assert low(sources.group) == []
    assert serving(token) == {"hsm1", "hsm2", "hsm3"}


def test_wrong_pin_without_sources_costs_one_attempt_on_one_member(bare: FaultGroup, opened: Any) -> None:
    token = opened(bare.group)
    settle(token)
    logins = Logins(bare)
    with pytest.raises(pkcs11.exceptions.PinIncorrect):
        token.open(user_pin=WRONG)
    assert sorted(logins.since().values()) == [0, 0, 1]
    assert len(low(bare.group)) == 1
    assert serving(token) == {"hsm1", "hsm2", "hsm3"}, "nobody is quarantined for it"
    with token.open(rw=True, user_pin=PIN) as session:
        wait_until(lambda: logged_in(token) == {"hsm1", "hsm2", "hsm3"}, "all logged in")
        session.generate_key(KeyType.AES, 128, store=True, label="after a wrong pin").destroy()
    assert low(bare.group) == []
    logins = Logins(bare)
    with pytest.raises(pkcs11.exceptions.PinIncorrect):
        token.open(user_pin=WRONG)
    assert sum(logins.since().values()) == 0, "compared in memory where this process is logged in"


def test_second_wrong_pin_after_restart_goes_to_the_same_member(bare: FaultGroup, opened: Any) -> None:
    for _ in range(2):
        token = opened(bare.group)
        with pytest.raises(pkcs11.exceptions.PinIncorrect):
            token.open(user_pin=WRONG)
        token.slot._library.unload()
    assert len(low(bare.group)) == 1
    with opened(bare.group).open(user_pin=PIN) as session:
        session.generate_random(64)


def test_a_locked_member_does_not_lock_the_group_out(bare: FaultGroup, opened: Any) -> None:
    token = opened(bare.group)
    settle(token)
    first = max(token.slot._library.group.journal.logins(), key=lambda record: record.boot_time).member
    bare.controls[first].add("C_Login", "error", rv="CKR_PIN_LOCKED")
    try:
        with token.open(user_pin=PIN) as session:
            session.generate_random(8)
            assert settle(token)[first] == "quarantined"
            assert "PIN_LOCKED" in roster(token).members[first].reason
    finally:
        bare.clear()
    assert bare.group.admin("member", "resume", first).returncode == 0
    with token.open(user_pin=PIN):
        wait_serving(token, "hsm1", "hsm2", "hsm3")


# -- a member whose PIN is another one --------------------------------------------------------------------------


def test_member_with_another_pin_is_quarantined_and_not_tried_again(new_group: Any, opened: Any) -> None:
    group = new_group("--no-pin-sources")
    by_hand(group.members["hsm2"], pins=[(PIN, NEW)])
    token = opened(group)
    settle(token)
    with token.open(rw=True, user_pin=PIN) as session:
        wait_until(lambda: roster(token).members["hsm2"].state.value == "quarantined", "quarantine of hsm2")
        assert "PIN differs" in roster(token).members["hsm2"].reason
        session.generate_key(KeyType.AES, 128, store=True, label="on two")
    token.slot._library.unload()
    status = {member["name"]: member for member in group.status()["members"]}
    assert status["hsm2"]["state"] == "quarantined"
    assert "PIN differs" in status["hsm2"]["reason"]
    assert by_hand(group.members["hsm2"], pins=[(NEW, NEW)]) & COUNT_LOW == 0
    run_client(group, "session.generate_random(8)\n")  # hsm2 shows no failed login now: it could be tried, and is not
    assert by_hand(group.members["hsm2"]) & COUNT_LOW == 0


def test_first_member_with_another_pin_is_the_applications_error(new_group: Any, opened: Any) -> None:
    group = new_group("--no-pin-sources")
    for name in group.members:
        by_hand(group.members[name], pins=[(PIN, NEW)])
    token = opened(group)
    with pytest.raises(pkcs11.exceptions.PinIncorrect):
        token.open(user_pin=PIN)
    assert len(low(group)) == 1
    with token.open(user_pin=NEW) as session:
        session.generate_random(8)
    assert serving(token) == set(group.members)


def test_refused_pin_file_is_not_tried_again_until_it_changes(new_group: Any) -> None:
    group = new_group()
    (group.folder / "hsm2" / "pin").write_text(WRONG)
    run_client(group, "lib.group.supervisor.settle(); print(lib.group.roster.members['hsm2'].state)\n")
    assert low(group) == ["hsm2"]
    by_hand(group.members["hsm2"], pins=[(PIN, PIN)])  # the flag is gone: nothing but the record protects it
    for _ in range(2):
        run_client(group, "lib.group.supervisor.settle()\n")
    assert low(group) == []
    assert group.admin("status").returncode == 1
    (group.folder / "hsm2" / "pin").write_text(PIN)
    resumed = group.admin("member", "resume", "hsm2")
    assert resumed.returncode == 0, resumed.stderr
    run_client(
        group,
        "from tests.support.groups import wait_until\n"
        "wait_until(lambda: len(lib.group.roster.serving()) == 3, 'hsm2 serves again')\n",
    )
    assert group.admin("status").returncode == 0


def test_one_wrong_pin_file_for_all_costs_one_attempt_on_one_member(new_group: Any) -> None:
    group = new_group()
    shared = group.folder / "shared-pin"
    shared.touch(mode=0o600)
    shared.write_text(WRONG)
    text, count = re.subn(r'"hsm\d/pin"', '"shared-pin"', group.toml.read_text())
    assert count == 3
    group.toml.write_text(text)
    for _ in range(2):
        lib = pkcs11.lib(str(group.toml))
        members = lib.group.roster.members.values()
        wait_until(lambda them=members: all(member.reason or member.life for member in them), "a look at all")
        lib.group.supervisor.settle()
        assert not lib.group.roster.serving()
        lib.unload()
        assert len(low(group)) == 1
    done = group.admin("sync")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert len(low(group)) == 1
    reasons = [member["reason"] for member in group.status()["members"] if "shared-pin" in (member["reason"] or "")]
    assert reasons
    shared.write_text(PIN)
    (first,) = low(group)
    by_hand(group.members[first], pins=[(PIN, PIN)])
    assert group.admin("member", "resume", first).returncode == 0
    run_client(
        group,
        "from tests.support.groups import wait_until\n"
        "wait_until(lambda: len(lib.group.roster.serving()) == 3, 'all serve again')\n",
    )
    assert low(group) == []


def test_nobody_logs_in_automatically_while_the_count_is_low(new_group: Any) -> None:
    group = new_group()
    assert by_hand(group.members["hsm3"], wrong=[WRONG]) & COUNT_LOW
    program = "lib.group.supervisor.settle()\nprint(*sorted(m.name for m in lib.group.roster.serving()))\n"
    assert run_client(group, program).split() == ["hsm1", "hsm2"]
    assert by_hand(group.members["hsm3"]) & COUNT_LOW, "still: nobody logged in there"
    status = {member["name"]: member for member in group.status()["members"]}
    assert "USER_PIN_COUNT_LOW" in status["hsm3"]["reason"]
    by_hand(group.members["hsm3"], pins=[(PIN, PIN)])  # a person logged in with the right PIN: nothing else is needed
    assert run_client(group, program).split() == ["hsm1", "hsm2", "hsm3"]
    assert group.admin("status").returncode == 0


# -- changing PINs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--no-pin-sources",)])
def test_set_pin_changes_every_member(new_group: Any, opened: Any, options: tuple[str, ...], capfd: Any) -> None:
    group = new_group(*options)
    token = opened(group)
    with token.open(rw=True, user_pin=PIN) as session:
        wait_serving(token, *group.members)
        with pytest.raises(pkcs11.exceptions.PinIncorrect):
            session.set_pin(WRONG, NEW)
        with pytest.raises(pkcs11.exceptions.PinLenRange):
            session.set_pin(PIN, "1")
        session.set_pin(PIN, NEW)
    for member in group.members.values():
        assert plain.labels(member, pin=NEW) == []
    for wrong in (PIN, WRONG):
        with pytest.raises(pkcs11.exceptions.PinIncorrect):
            token.open(user_pin=wrong)
    with token.open(rw=True, user_pin=NEW) as session:
        # a worker that is killed comes back, although the PIN file still has the old PIN
        for name in group.members:
            before = group.workers()[name].pid
            group.workers()[name].send_signal(signal.SIGKILL)

            def back(name: str = name, before: int = before) -> bool:
                session.generate_random(8)
                worker = group.workers().get(name)
                return worker is not None and worker.pid != before and name in serving(token)

            wait_until(back, f"{name} back in service")
        assert logged_in(token) == set(group.members)
        session.generate_key(KeyType.AES, 128, store=True, label="after").destroy()
    assert low(group) == []


def test_stale_pin_sources_are_named(new_group: Any) -> None:
    group = new_group()
    program = (
        "from hagroup.config import logging; logging.configure('console', 'WARNING')\n"
        "from tests.support.groups import wait_until\n"
        "wait_until(lambda: len(lib.group.roster.serving()) == 3, 'all in service')\n"
        f"session.set_pin({PIN!r}, {NEW!r})\n"
    )
    prologue = (
        "import hagroup as pkcs11\n"
        f"lib = pkcs11.lib({str(group.toml)!r})\n"
        f"session = lib.get_token().open(rw=True, user_pin={PIN!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", prologue + program], capture_output=True, text=True, check=True)
    for name in group.members:
        assert f"file:{group.folder / name / 'pin'}" in done.stderr
    assert NEW not in done.stderr


def test_init_pin_changes_every_member(new_group: Any, opened: Any) -> None:
    group = new_group()
    token = opened(group)
    settle(token)
    with token.open(rw=True, so_pin=SO_PIN) as session:
        session.init_pin(NEW)
    for member in group.members.values():
        assert plain.labels(member, pin=NEW) == []
    with pytest.raises(pkcs11.exceptions.PinIncorrect):
        token.open(user_pin=PIN)
    with token.open(user_pin=NEW) as session:
        session.generate_random(8)


def test_pin_changes_need_every_member(new_group: Any, opened: Any) -> None:
    group = new_group()
    token = opened(group)
    settle(token)
    with token.open(rw=True, user_pin=PIN) as session:
        group.stop("hsm3")
        wait_until(lambda: "hsm3" not in serving(token), "hsm3 gone")
        with pytest.raises(NotOnGroup, match="hsm3"):
            session.set_pin(PIN, NEW)
        group.bring_back("hsm3")
    for member in group.members.values():
        assert plain.labels(member, pin=PIN) == []


def test_pin_change_that_one_member_does_not_take(fast_folder: Path, opened: Any) -> None:
    faulty = make_fault_group(fast_folder / "half-changed")
    group = faulty.group
    token = opened(group)
    with token.open(rw=True, user_pin=PIN) as session:
        wait_serving(token, *group.members)
        faulty.controls["hsm1"].add("C_SetPIN", "error", rv="CKR_PIN_INVALID", times=1)
        with pytest.raises(pkcs11.exceptions.PinInvalid):
            session.set_pin(PIN, NEW)
        assert serving(token) == set(group.members), "the first one said no: nothing was changed anywhere"
        faulty.controls["hsm2"].add("C_SetPIN", "error", rv="CKR_DEVICE_ERROR", times=1)
        session.set_pin(PIN, NEW)
        assert roster(token).members["hsm2"].state.value == "quarantined"
        assert "PIN may differ" in roster(token).members["hsm2"].reason
        session.generate_random(8)
    faulty.clear()
    assert [
        plain.labels(group.members[name], pin=pin) for name, pin in (("hsm1", NEW), ("hsm2", PIN), ("hsm3", NEW))
    ] == [
        [],
        [],
        [],
    ]
    kinds = [event.kind for event in token.slot._library.group.journal.events()]
    assert kinds.count("pin change begins") == 2
    assert kinds.count("pin changed") == 1


def test_members_with_different_pins(new_group: Any, opened: Any) -> None:
    """One member logs in by itself with a PIN of its own, the others with the application's."""
    group = new_group("--no-pin-sources")
    by_hand(group.members["hsm1"], pins=[(PIN, NEW)])
    (group.folder / "hsm1" / "pin").write_text(NEW)
    first, block, rest = group.toml.read_text().partition("[[member]]\n")
    group.toml.write_text(f'{first}{block}pin = {{ file = "hsm1/pin" }}\n{rest}')
    token = opened(group)
    settle(token)
    with pytest.raises(pkcs11.exceptions.PinIncorrect):
        token.open(user_pin=WRONG)
    assert len(low(group)) == 1
    with token.open(rw=True, user_pin=PIN) as session:
        wait_until(lambda: logged_in(token) == set(group.members), "all logged in")
        with pytest.raises(NotOnGroup, match="hsm1"):
            session.set_pin(PIN, "5678")
    assert low(group) == []
    assert serving(token) == set(group.members)


def test_pin_changed_by_another_process(new_group: Any, opened: Any) -> None:
    group = new_group("--no-pin-sources")
    token = opened(group)
    with token.open(user_pin=PIN):
        wait_until(lambda: logged_in(token) == set(group.members), "all logged in")
    change = (
        "from tests.support.groups import wait_until\n"
        "wait_until(lambda: all(m.life and m.life.logged_in for m in lib.group.roster.members.values()), 'all')\n"
        f"session.set_pin({PIN!r}, {NEW!r})\n"
    )
    run_client(group, change)
    with pytest.raises(pkcs11.exceptions.PinIncorrect):
        token.open(user_pin=PIN)
    with token.open(user_pin=NEW) as session:
        session.generate_random(8)
    assert serving(token) == set(group.members)


def test_basic_recovery_keeps_no_pin(new_group: Any, opened: Any) -> None:
    group = new_group("--no-pin-sources")
    text = group.toml.read_text()
    group.toml.write_text(
        text.replace('"enhanced"', '"basic"')
        if "enhanced" in text
        else text.replace("[group]", '[group]\nrecovery_mode = "basic"')
    )
    token = opened(group)
    settle(token)
    with token.open(rw=True, user_pin=PIN) as session:
        assert logged_in(token) == set(group.members)
        key = session.generate_key(KeyType.AES, 128, store=True, label="basic")
        group.workers()["hsm2"].send_signal(signal.SIGKILL)
        wait_until(lambda: (session.generate_random(8), "hsm2" not in logged_in(token))[1], "hsm2 noticed")
        wait_serving(token, *group.members)
        assert logged_in(token) == {"hsm1", "hsm3"}, "the PIN is not kept, so it is not logged in again"
        for _ in range(6):
            key.encrypt(b"x" * 16, mechanism_param=bytes(16))
    with pytest.raises(pkcs11.exceptions.PinIncorrect):
        token.open(user_pin=WRONG)
    with token.open(rw=True, user_pin=PIN) as session:
        wait_until(lambda: logged_in(token) == set(group.members), "hsm2 logged in by the next open")
        session.get_key(label="basic").destroy()


# -- the virtual token's login state ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(fast_folder: Path) -> GroupFixture:
    from tests.support.groups import make_group

    return make_group(fast_folder / "login-state")


def test_one_login_at_a_time(three: GroupFixture, opened: Any) -> None:
    token = opened(three)
    with token.open(user_pin=PIN), pytest.raises(pkcs11.exceptions.UserAlreadyLoggedIn):
        token.open(user_pin=PIN)
    with token.open(rw=True, user_pin=PIN), pytest.raises(pkcs11.exceptions.AnotherUserAlreadyLoggedIn):
        token.open(rw=True, so_pin=SO_PIN)
    with token.open(rw=True, so_pin=SO_PIN), pytest.raises(pkcs11.exceptions.AnotherUserAlreadyLoggedIn):
        token.open(rw=True, user_pin=PIN)


def test_closing_the_session_with_the_pin_logs_all_out(three: GroupFixture, opened: Any) -> None:
    token = opened(three)
    other = token.open(rw=True)
    with token.open(rw=True, user_pin=PIN) as session:
        stored = other.generate_key(KeyType.AES, 128, store=True, label="private")
        loose = other.generate_key(KeyType.AES, 128)
        shown = other.generate_key(KeyType.AES, 128, template={Attribute.PRIVATE: False, Attribute.LABEL: "shown"})
        assert session.get_key(label="private").encrypt(b"x" * 16, mechanism_param=bytes(16))
    for key in (stored, loose):
        with pytest.raises((pkcs11.exceptions.KeyHandleInvalid, pkcs11.exceptions.ObjectHandleInvalid)):
            key.encrypt(b"x" * 16, mechanism_param=bytes(16))
        with pytest.raises(pkcs11.exceptions.ObjectHandleInvalid):
            key[Attribute.LABEL]
    assert shown[Attribute.LABEL] == "shown", "public session objects live on"
    assert list(other.get_objects({Attribute.LABEL: "private"})) == []
    with token.open(user_pin=PIN):
        # PKCS#11 C_Logout: handles of private objects stay invalid even if the user logs in again
        with pytest.raises(pkcs11.exceptions.ObjectHandleInvalid):
            stored[Attribute.LABEL]
        with pytest.raises(pkcs11.exceptions.ObjectHandleInvalid):
            stored.encrypt(b"x" * 16, mechanism_param=bytes(16))
        (again,) = other.get_objects({Attribute.LABEL: "private"})
        again.destroy()
        with pytest.raises(pkcs11.exceptions.ObjectHandleInvalid):
            loose[Attribute.LABEL]
    other.close()


def test_without_login_public_objects_only(three: GroupFixture, opened: Any) -> None:
    token = opened(three)
    with token.open(rw=True, user_pin=PIN) as session:
        public, private = session.generate_keypair(
            KeyType.RSA, 2048, store=True, label="pair", public_template={Attribute.PRIVATE: False}
        )
        assert public[Attribute.PRIVATE] is False
        signature = private.sign(b"data", mechanism=Mechanism.SHA256_RSA_PKCS)
        session.create_object(
            {
                Attribute.CLASS: ObjectClass.DATA,
                Attribute.TOKEN: True,
                Attribute.PRIVATE: False,
                Attribute.LABEL: "pair",
                Attribute.VALUE: b"read me",
            }
        )
    with token.open() as session:
        found = list(session.get_objects({Attribute.LABEL: "pair"}))
        assert sorted(item[Attribute.CLASS] for item in found) == [ObjectClass.DATA, ObjectClass.PUBLIC_KEY]
        key = session.get_key(object_class=ObjectClass.PUBLIC_KEY, label="pair")
        assert key.verify(b"data", signature, mechanism=Mechanism.SHA256_RSA_PKCS)
        assert not key.verify(b"other", signature, mechanism=Mechanism.SHA256_RSA_PKCS)
        with pytest.raises(pkcs11.exceptions.NoSuchKey):
            session.get_key(object_class=ObjectClass.PRIVATE_KEY, label="pair")
        with pytest.raises(pkcs11.PKCS11Error):
            session.generate_key(KeyType.AES, 128)
    with token.open(rw=True) as session:
        with pytest.raises(pkcs11.exceptions.UserNotLoggedIn):
            session.generate_key(KeyType.AES, 128, store=True, label="without login")
        for item in list(session.get_objects({Attribute.LABEL: "pair"})):
            item.destroy()
    with token.open(rw=True, user_pin=PIN) as session:
        (left,) = session.get_objects({Attribute.LABEL: "pair"})
        left.destroy()


def test_public_objects_without_any_login_of_members(bare: FaultGroup, opened: Any) -> None:
    """No PIN was ever given in this process: members are not logged in either."""
    program = (
        "_, private = session.generate_keypair(KeyType.RSA, 2048, store=True, label='bare',\n"
        "    public_template={Attribute.PRIVATE: False})\n"
        "print(private.sign(b'data', mechanism=Mechanism.SHA256_RSA_PKCS).hex())\n"
    )
    signature = bytes.fromhex(run_client(bare.group, program).strip())
    token = opened(bare.group)
    settle(token)
    assert logged_in(token) == set()
    with token.open() as session:
        key = session.get_key(object_class=ObjectClass.PUBLIC_KEY, label="bare")
        assert key.verify(b"data", signature, mechanism=Mechanism.SHA256_RSA_PKCS)
        loose = session.create_object(
            {
                Attribute.CLASS: ObjectClass.DATA,
                Attribute.PRIVATE: False,
                Attribute.LABEL: "session data",
                Attribute.VALUE: b"value",
            }
        )
        assert loose[Attribute.VALUE] == b"value"


def test_read_only_sessions(three: GroupFixture, opened: Any) -> None:
    token = opened(three)
    with token.open(rw=True, user_pin=PIN) as writing:
        stored = writing.generate_key(KeyType.AES, 128, store=True, label="stored")
        reading = token.open()
        key = reading.get_key(label="stored")
        loose = reading.generate_key(KeyType.AES, 128)
        loose[Attribute.LABEL] = "session objects may be changed"
        refused: list[Callable[[], Any]] = [
            lambda: reading.generate_key(KeyType.AES, 128, store=True),
            lambda: reading.generate_keypair(KeyType.RSA, 2048, store=True),
            lambda: key.copy({Attribute.LABEL: "copy"}),
            lambda: loose.copy({Attribute.TOKEN: True}),
            lambda: key.destroy(),
            lambda: key.__setitem__(Attribute.LABEL, "other"),
            lambda: reading.create_object(
                {Attribute.CLASS: ObjectClass.DATA, Attribute.TOKEN: True, Attribute.LABEL: "no"}
            ),
            lambda: reading.set_pin(PIN, NEW),
        ]
        for call in refused:
            with pytest.raises(pkcs11.exceptions.SessionReadOnly):
                call()
        assert key[Attribute.LABEL] == "stored"
        reading.close()
        stored.destroy()


def test_security_officer_and_read_only_sessions(three: GroupFixture, opened: Any) -> None:
    token = opened(three)
    reading = token.open()
    with pytest.raises(pkcs11.exceptions.SessionReadOnlyExists):
        token.open(rw=True, so_pin=SO_PIN)
    reading.close()
    with pytest.raises(pkcs11.exceptions.PinIncorrect):
        token.open(rw=True, so_pin=WRONG)
    with token.open(rw=True, so_pin=SO_PIN) as session:
        assert session.user_type is UserType.SO
        with pytest.raises(pkcs11.exceptions.SessionReadWriteSOExists):
            token.open()
        with pytest.raises(NotOnGroup):
            session.set_pin(SO_PIN, "87654321")
    with pytest.raises(pkcs11.exceptions.SessionReadOnlyExists):
        token.open(so_pin=SO_PIN)
    with token.open(user_pin=PIN) as session:
        session.generate_random(8)
        with pytest.raises(pkcs11.exceptions.UserNotLoggedIn):
            token.open(rw=True).init_pin(NEW)


def test_finalize_and_reinitialize(three: GroupFixture, opened: Any) -> None:
    token = opened(three)
    library = token.slot._library
    session = token.open(user_pin=PIN)
    library.finalize()
    with pytest.raises(pkcs11.PKCS11Error):
        session.generate_random(8)
    library.initialize()
    with pytest.raises(pkcs11.exceptions.SessionHandleInvalid):
        session.generate_random(8)
    token = library.get_token(token_label="payments")
    session = token.open(user_pin=PIN)
    session.generate_random(8)
    library.reinitialize()
    with pytest.raises(pkcs11.PKCS11Error):
        session.close()
    with library.get_token(token_label="payments").open(user_pin=PIN) as session:
        session.generate_random(8)
    assert time.monotonic() > 0
    assert engine(session) is library.group
