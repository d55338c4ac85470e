"""Roles, draining, priorities, capabilities and slots (DESIGN.md 3): who serves, and who only has the objects."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hagroup as pkcs11
from hagroup import Attribute, KeyType, Mechanism
from hagroup.core.records import Role
from hagroup.errors import ConfigurationError, GroupUnavailable
from tests.support import plain
from tests.support.faulty import FaultGroup, Load, engine, make_fault_group
from tests.support.groups import PIN, GroupFixture, wait_until

MECHANISM = Mechanism.SHA256_RSA_PKCS


@pytest.fixture(scope="module")
def faulty(fast_folder: Path) -> FaultGroup:
    return make_fault_group(fast_folder / "roles")


@pytest.fixture
def client(faulty: FaultGroup) -> Iterator[Any]:
    """A session with all members in service, and a key that signs; roles are undone in the end."""
    with faulty.client() as session:
        _, private = session.generate_keypair(KeyType.RSA, 2048, store=True, label="signer")
        faulty.heal(session)  # a replica is proved by a signature, maybe after the call returned
        yield session, private
        faulty.clear()
        for name in faulty.names:
            engine(session).journal.update_member(name, role=Role.ACTIVE, draining=False)
        faulty.wait_serving(session)
        for item in list(session.get_objects({Attribute.TOKEN: True})):
            item.destroy()
        faulty.heal(session)


def signs(faulty: FaultGroup, private: Any, calls: int = 40) -> dict[str, int]:
    """How many of so many signatures by four threads each member made."""
    before = {name: control.counts().get("C_Sign", 0) for name, control in faulty.controls.items()}

    def sign(_: int) -> None:
        private.sign(b"data", mechanism=MECHANISM)

    with Load(sign, threads=4) as load:
        load.wait_for(calls)
    assert not load.errors, load.errors[0]
    return {name: control.counts().get("C_Sign", 0) - before[name] for name, control in faulty.controls.items()}


def gone(faulty: FaultGroup, session: Any, *names: str) -> None:
    """These members' tokens are absent, and this process noticed."""
    for name in names:
        faulty.controls[name].add("all", "absent")

    def noticed() -> bool:
        session.generate_random(8)
        return not {member.name for member in engine(session).roster.serving()} & set(names)

    wait_until(noticed, f"{names} out of service")


def test_all_active_members_share_the_load(faulty: FaultGroup, client: Any) -> None:
    assert all(count > 0 for count in signs(faulty, client[1], 60).values())


def test_standby_serves_only_when_no_active_member_can(faulty: FaultGroup, client: Any) -> None:
    session, private = client
    engine(session).journal.update_member("hsm3", role=Role.STANDBY)
    counts = signs(faulty, private)
    assert counts["hsm3"] == 0
    assert counts["hsm1"] > 0
    assert counts["hsm2"] > 0
    session.generate_key(KeyType.AES, 128, store=True, label="while standing by")
    wait_until(lambda: "while standing by" in plain.labels(faulty.group.members["hsm3"]), "the copy on standby")
    gone(faulty, session, "hsm1", "hsm2")
    counts = signs(faulty, private)
    assert counts["hsm3"] >= 40
    session.get_key(label="while standing by").encrypt(b"x" * 16, mechanism_param=bytes(16))
    faulty.clear()
    faulty.wait_serving(session)
    assert signs(faulty, private)["hsm3"] == 0


def test_backup_never_serves_but_has_everything(faulty: FaultGroup, client: Any) -> None:
    session, private = client
    faulty.heal(session)
    engine(session).journal.update_member("hsm3", role=Role.BACKUP)
    assert signs(faulty, private)["hsm3"] == 0
    doomed = session.generate_key(KeyType.AES, 128, store=True, label="doomed")
    key = session.generate_key(KeyType.AES, 128, store=True, label="kept")
    key[Attribute.LABEL] = "renamed"
    doomed.destroy()

    def labels() -> list[str]:
        return plain.labels(faulty.group.members["hsm3"])

    wait_until(lambda: "renamed" in labels() and not {"doomed", "kept"} & set(labels()), "the backup's copy")
    wait_until(lambda: not engine(session).journal.owed(), "the journal to know of it")
    status = faulty.group.status()
    assert status["group"]["state"] == "ok", "a backup that is in sync is no degradation"
    assert status["group"]["in_sync"]
    assert faulty.group.admin("sync").returncode == 0
    with pytest.raises(GroupUnavailable):
        gone_and_sign(faulty, session, private)


def gone_and_sign(faulty: FaultGroup, session: Any, private: Any) -> None:
    for name in ("hsm1", "hsm2"):
        faulty.controls[name].add("all", "absent")
    before = faulty.controls["hsm3"].counts().get("C_Sign", 0)
    try:
        for _ in range(4):
            private.sign(b"data", mechanism=MECHANISM)
    finally:
        assert faulty.controls["hsm3"].counts().get("C_Sign", 0) == before


def test_a_draining_member_gets_no_calls_and_stays_in_sync(faulty: FaultGroup, client: Any) -> None:
    session, private = client
    engine(session).journal.update_member("hsm2", draining=True)
    assert signs(faulty, private)["hsm2"] == 0
    session.generate_key(KeyType.AES, 128, store=True, label="while draining")
    wait_until(lambda: "while draining" in plain.labels(faulty.group.members["hsm2"]), "the copy on the drained one")
    members = {member["name"]: member for member in faulty.group.status()["members"]}
    assert members["hsm2"]["state"] == "draining"
    engine(session).journal.update_member("hsm2", draining=False)
    wait_until(lambda: signs(faulty, private)["hsm2"] > 0, "hsm2 serving again")


def test_a_pin_change_reaches_standby_and_backup(new_group: Any) -> None:
    group: GroupFixture = new_group()
    library = pkcs11.lib(str(group.toml))
    try:
        with library.get_token(token_label="payments").open(rw=True, user_pin=PIN) as session:
            library.group.supervisor.settle()
            library.group.journal.update_member("hsm2", role=Role.STANDBY)
            library.group.journal.update_member("hsm3", role=Role.BACKUP)
            session.generate_random(8)
            session.set_pin(PIN, "4321")
        for member in group.members.values():
            assert plain.labels(member, pin="4321") == []
    finally:
        library.unload()


def test_priority_decides_between_free_members(new_group: Any) -> None:
    group: GroupFixture = new_group()
    text = group.toml.read_text()
    for name, priority in (("hsm1", 2), ("hsm2", 1), ("hsm3", 3)):
        text, count = re.subn(rf'(?m)^(name\s*= "{name}")$', rf"\1\npriority = {priority}", text)
        assert count == 1
    group.toml.write_text(text)
    library = pkcs11.lib(str(group.toml))
    try:
        with library.get_token(token_label="payments").open(rw=True, user_pin=PIN) as session:
            library.group.supervisor.settle()
            used = {member.name: member.answers for member in library.group.roster.members.values()}
            for _ in range(10):
                session.generate_random(64)
            after = {member.name: member.answers for member in library.group.roster.members.values()}
            assert after["hsm2"] - used["hsm2"] >= 9
            assert after["hsm3"] == used["hsm3"]
    finally:
        library.unload()


@pytest.fixture(scope="module")
def uneven(fast_folder: Path) -> GroupFixture:
    """A group in which one member lacks a mechanism, and whose members are shown."""
    from tests.support.groups import make_group

    group = make_group(fast_folder / "uneven")
    conf = group.folder / "hsm2" / "softhsm2.conf"
    conf.write_text(
        conf.read_text() + "slots.mechanisms = -CKM_NONE,CKM_SHA512_RSA_PKCS\n"
    )  # the first: a bug of SoftHSM 2.6
    text = group.toml.read_text()
    lines = [line for line in text.splitlines() if not line.startswith("ha_only")]
    lines.insert(lines.index("[group]") + 1, "ha_only = false")
    group.toml.write_text("\n".join(lines) + "\n")
    return group


def test_a_mechanism_that_one_member_lacks(uneven: GroupFixture) -> None:
    library = pkcs11.lib(str(uneven.toml))
    try:
        token = library.get_token(token_label="payments")
        with token.open(rw=True, user_pin=PIN) as session:
            library.group.supervisor.settle()
            assert len(library.group.roster.serving()) == 3
            common = token.slot.get_mechanisms()
            assert Mechanism.SHA256_RSA_PKCS in common
            assert Mechanism.SHA512_RSA_PKCS not in common, "the virtual slot lists what all members have"
            with pytest.raises(pkcs11.exceptions.MechanismInvalid):
                token.slot.get_mechanism_info(Mechanism.SHA512_RSA_PKCS)
            public, private = session.generate_keypair(KeyType.RSA, 2048, store=True, label="uneven")

            def sign(_: int) -> None:
                private.sign(b"data", mechanism=Mechanism.SHA512_RSA_PKCS)

            with Load(sign, threads=6) as load:
                load.wait_for(60)
            assert not load.errors, load.errors[0]
            assert len(library.group.roster.serving()) == 3, "nobody fails for it"
            assert library.group.journal.owed() == [], "and nothing is repaired"
            private.destroy()
            public.destroy()
    finally:
        library.unload()


def test_member_slots_have_stable_numbers(uneven: GroupFixture) -> None:
    library = pkcs11.lib(str(uneven.toml))
    try:
        library.get_token(token_label="payments")
        slots = library.get_slots()
        assert [slot.slot_id for slot in slots] == [0, 1, 2, 3]
        assert [slot.slot_description for slot in slots[1:]] == ["member hsm1", "member hsm2", "member hsm3"]
        serials = {name: member["serial"] for name, member in uneven.members.items()}
        assert [slot.get_token().serial.decode() for slot in slots[1:]] == [serials[f"hsm{n}"] for n in (1, 2, 3)]
        assert Mechanism.SHA512_RSA_PKCS in slots[1].get_mechanisms()
        assert Mechanism.SHA512_RSA_PKCS not in slots[2].get_mechanisms()
        with pytest.raises(pkcs11.PKCS11Error, match="hsm1"):
            slots[1].get_token().open()
    finally:
        library.unload()
    uneven.take_away("hsm1")
    try:
        library = pkcs11.lib(str(uneven.toml))
        slots = library.get_slots()
        assert [slot.slot_id for slot in slots] == [0, 1, 2, 3]
        with pytest.raises(pkcs11.exceptions.TokenNotPresent):
            slots[1].get_token()
        assert [slot.slot_id for slot in library.get_slots(token_present=True)] == [0, 2, 3]
        assert library.get_token(token_serial=uneven.members["hsm3"]["serial"].encode()).slot.slot_id == 3
    finally:
        library.unload()
        uneven.bring_back("hsm1")


def test_member_that_this_host_does_not_know(new_group: Any) -> None:
    """In the journal but not in this host's file: the file is older than the group, which is said and not guessed."""
    group: GroupFixture = new_group()
    whole = group.toml.read_text()
    first, *blocks = whole.split("[[member]]")
    without = [block for block in blocks if '"hsm3"' not in block]
    assert len(without) == 2
    group.toml.write_text("[[member]]".join([first, *without]))
    with pytest.raises(ConfigurationError, match="hsm3"):
        pkcs11.lib(str(group.toml))
    done = group.admin("status")
    assert done.returncode == 1
    assert "not in hagroup.toml of this host" in done.stdout
    assert group.admin("sync").returncode == 2
    group.toml.write_text(whole)
    assert group.admin("status").returncode == 0
