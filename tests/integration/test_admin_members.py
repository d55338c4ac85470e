"""``ha-admin member …`` on a live group (issue 4; T 3.4.12, T 3.4.13), by real processes."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hagroup as pkcs11
from hagroup import KeyType, Mechanism
from hagroup.core.calls import Template
from hagroup.core.records import Membership
from hagroup.engine.challenge import DomainMember
from hagroup.engine.joining import import_domain
from hagroup.engine.membership import BEING_REMOVED
from hagroup.journal import SqliteJournal
from hagroup.members.lock import WorkerLock
from tests.integration.replica_support import connect
from tests.support import plain
from tests.support.faulty import Load, engine
from tests.support.groups import PIN, GroupFixture, run_client, wait_until
from tests.support.newcomers import add, new_token, private
from tests.support.softhsm import SOFTHSM, TokenFixture

T = 30.0
DATA = b"data"


def names(group: GroupFixture) -> list[str]:
    return [member["name"] for member in tomllib.loads(group.toml.read_text())["member"]]


def own_labels(group: GroupFixture, name: str, member: dict[str, Any]) -> list[str]:
    return [item["label"] for item in plain.objects(member, own=True)]


def test_members_come_and_go_under_a_running_application(new_group: Callable[..., GroupFixture]) -> None:
    group = new_group(members=2)
    token = new_token(group, "hsm3")
    lib = pkcs11.lib(str(group.toml))
    with lib.get_token(token_label="payments").open(rw=True, user_pin=PIN) as session:
        _, signer = session.generate_keypair(KeyType.RSA, 2048, store=True, label="signer")
        session.generate_key(KeyType.AES, 256, store=True, label="wrapper")
        expected = signer.sign(DATA, mechanism=Mechanism.SHA256_RSA_PKCS)
        roster = engine(session).roster

        def sign(_: int) -> None:
            assert signer.sign(DATA, mechanism=Mechanism.SHA256_RSA_PKCS) == expected

        def serving() -> list[str]:
            return [member.name for member in roster.serving()]

        with Load(sign, threads=4) as load:
            load.wait_for(50)
            done = add(group, "hsm3", token)
            assert done.returncode == 0, done.stderr
            assert "security officer" in done.stdout
            wait_until(lambda: "hsm3" in serving(), "the running application sees the new member")
            member = group.members["hsm3"]
            wait_until(lambda: "hsm3" in engine(session).view.object(signer.uid).members, "it has the key")
            assert plain.use(member, "sign", 3, "signer", DATA, "SHA256_RSA_PKCS") == expected
            session.generate_key(KeyType.AES, 128, store=True, label="made after")
            assert plain.labels(member) == ["made after", "signer", "signer", "wrapper"]

            drained = group.admin("member", "drain", "hsm3")
            assert drained.returncode == 0, drained.stderr
            wait_until(lambda: "hsm3" not in serving(), "it is out of service here")
            session.generate_key(KeyType.AES, 128, store=True, label="made meanwhile")
            wait_until(lambda: "made meanwhile" in plain.labels(member), "a draining member is kept in sync")
            resumed = group.admin("member", "resume", "hsm3")
            assert resumed.returncode == 0, resumed.stderr
            wait_until(lambda: "hsm3" in serving(), "it is back")

            assert group.admin("member", "standby", "hsm3").returncode == 0
            wait_until(lambda: roster.members["hsm3"].standby, "standby is known here")
            assert tomllib.loads(group.toml.read_text())["member"][2]["role"] == "standby"
            assert group.admin("member", "activate", "hsm3").returncode == 0
            wait_until(lambda: not roster.members["hsm3"].standby, "active again")
            assert group.admin("status").returncode == 0

            assert group.admin("member", "backup", "hsm3").returncode == 0
            wait_until(lambda: "hsm3" not in serving(), "a backup never serves")
            assert tomllib.loads(group.toml.read_text())["member"][2]["role"] == "backup"
            refused = group.admin("member", "backup", "hsm2")
            assert refused.returncode == 2 and "min_replicas is 2" in refused.stderr, refused.stderr
            session.generate_key(KeyType.AES, 128, store=True, label="made for the backup")
            wait_until(lambda: "made for the backup" in plain.labels(member), "a backup is kept in sync")
            assert group.admin("member", "activate", "hsm3").returncode == 0
            wait_until(lambda: "hsm3" in serving(), "it serves again")

            removed = group.admin("member", "remove", "hsm3", "--yes")
            assert removed.returncode == 0, removed.stderr
            wait_until(lambda: "hsm3" not in roster.members, "it is gone here")
            load.wait_for(50)
        assert not load.errors, load.errors[0]
        assert load.longest() < 5.0
    assert own_labels(group, "hsm3", member) == []
    assert names(group) == ["hsm1", "hsm2"]
    assert group.admin("status").returncode == 0
    listed = json.loads(group.admin("member", "list", "--json").stdout)
    assert [one["name"] for one in listed] == ["hsm1", "hsm2"]


def _implant(token: TokenFixture, domain: bytes, partition: bytes, ids: tuple[bytes, bytes]) -> None:
    connection = connect(token)
    try:
        member = DomainMember(connection=connection, name="implant")
        import_domain(member, domain, partition, ids, sealed=False, timeout=T)
    finally:
        connection.close()


def _objects(token: TokenFixture) -> int:
    connection = connect(token)
    try:
        every: Template = []
        return len(connection.find(every, timeout=T))
    finally:
        connection.close()


DOMAIN, PARTITION, IDS = b"D" * 32, b"P" * 32, (b"d" * 16, b"p" * 16)


@pytest.fixture
def known_secrets(fast_folder: Path) -> GroupFixture:
    """A group of one whose secrets the test knows: so that a newcomer can share one of them."""
    folder = fast_folder / "known"
    folder.mkdir(mode=0o700)
    toml = folder / "hagroup.toml"
    group = GroupFixture(toml)
    token = new_token(group, "hsm1")
    _implant(token, DOMAIN, PARTITION, IDS)
    private(
        toml,
        '[group]\nlabel = "payments"\nmin_replicas = 1\n[journal]\nurl = "sqlite:journal.db"\n'
        '[[member]]\nname = "hsm1"\n'
        f'module = "{SOFTHSM}"\ntoken_serial = "{token.serial}"\npin = {{ file = "hsm1/pin" }}\n'
        'env = { SOFTHSM2_CONF = "hsm1/softhsm2.conf" }\n',
    )
    done = group.admin("group", "create", "--yes", "--so-pin-file", str(folder / "so-pin"))
    assert done.returncode == 0, done.stderr
    group.reload()
    return group


def test_3_4_12_and_13_refused_and_nothing_created(known_secrets: GroupFixture) -> None:
    group = known_secrets
    run_client(group, "session.generate_key(KeyType.AES, 256, store=True, label='key')\n")
    text = group.toml.read_text()
    for name, domain, partition, ids, sentence in (
        ("other-domain", b"x" * 32, PARTITION, IDS, "another domain key"),
        ("other-partition", DOMAIN, b"x" * 32, IDS, "partition secret differs"),
        ("other-group", b"x" * 32, b"y" * 32, (b"1" * 16, b"2" * 16), "domain key and the partition secret differ"),
    ):
        token = new_token(group, name)
        _implant(token, domain, partition, ids)
        before = _objects(token)
        done = add(group, name, token)
        assert done.returncode == 2, done.stdout
        assert f'member "{name}"' in done.stderr
        assert sentence in done.stderr
        assert "nothing was changed" in done.stderr
        assert _objects(token) == before
    assert group.toml.read_text() == text
    assert [member["name"] for member in group.status()["members"]] == ["hsm1"]
    assert plain.labels(group.members["hsm1"]) == ["key"]
    token = new_token(group, "same")
    _implant(token, DOMAIN, PARTITION, IDS)
    done = add(group, "same", token)
    assert done.returncode == 0, done.stderr
    assert plain.labels(group.members["same"]) == ["key"]


def test_refused_without_trace(group: GroupFixture) -> None:
    """Wrong PIN, a member's own token, a wrong SO PIN, not confirmed: nothing changes."""
    token = new_token(group, "hsm4")
    text = group.toml.read_text()
    (group.folder / "so-pin").write_text("00000000")
    refused = add(group, "hsm4", token)
    assert refused.returncode == 2
    assert "refused the SO PIN" in refused.stderr
    (group.folder / "hsm4" / "pin").write_text("9999")
    refused = add(group, "hsm4", token)
    assert refused.returncode == 2
    assert "refused its user PIN" in refused.stderr
    arguments = ["member", "add", "other", "--module", "/usr/lib/softhsm/libsofthsm2.so", "--token-serial"]
    arguments += [group.members["hsm1"]["serial"], "--env", f"SOFTHSM2_CONF={group.folder / 'hsm1' / 'softhsm2.conf'}"]
    arguments += ["--pin-file", str(group.folder / "hsm1" / "pin")]
    twice = group.admin(*arguments, "--yes")
    assert twice.returncode == 2
    assert "hsm1" in twice.stderr
    assert group.toml.read_text() == text
    assert _objects(token) == 0
    assert group.admin("status").returncode == 0


def die_in_a_change(group: GroupFixture, member: str) -> None:
    """As if a program had been killed while its worker wrote to the member's token."""
    journal = SqliteJournal.open(group.folder / "journal.db")
    lock = WorkerLock(journal.worker_lock(member)[1])
    with lock:
        lock.release()
    journal.close()


def cut_off(group: GroupFixture, member: str) -> list[str]:
    journal = SqliteJournal.open(group.folder / "journal.db")
    try:
        return journal.cut_off(member)
    finally:
        journal.close()


def test_the_last_members_cannot_leave(new_group: Callable[..., GroupFixture]) -> None:
    group = new_group(members=1)
    for command in (["drain", "hsm1"], ["remove", "hsm1", "--yes"]):
        done = group.admin("member", *command)
        assert done.returncode == 2
        assert "nothing was changed" in done.stderr
    unknown = group.admin("member", "drain", "hsm9")
    assert unknown.returncode == 2
    assert "hsm1" in unknown.stderr
    assert group.admin("status").returncode == 0


def test_removed_while_away_is_left_to_do(group: GroupFixture) -> None:
    run_client(group, "session.generate_key(KeyType.AES, 256, store=True, label='key')\n")
    group.take_away("hsm3")
    die_in_a_change(group, "hsm3")
    done = group.admin("member", "remove", "hsm3", "--yes")
    assert done.returncode == 1, done.stderr
    assert "NOT destroyed" in done.stdout
    assert cut_off(group, "hsm3") == []
    assert names(group) == ["hsm1", "hsm2"]
    refused = group.admin("member", "remove", "hsm2", "--yes")
    assert refused.returncode == 2
    assert "min_replicas" in refused.stderr
    text = group.toml.read_text()
    shorter = re.sub(r"min_replicas( *)= 2", r"min_replicas\1= 1", text[: text.rindex("[[member]]")])
    group.toml.write_text(shorter)
    assert "member remove" in group.admin("sync").stderr  # the file is older than the group, it seems
    assert group.admin("member", "remove", "hsm2", "--yes").returncode == 1
    assert group.admin("status").returncode == 0
    todo = group.admin("journal", "todo")
    assert todo.returncode == 1
    assert "hsm3" in todo.stdout


def test_nobody_looks_for_what_was_cut_off_on_a_member_that_is_gone(group: GroupFixture) -> None:
    """One that hagroup.toml does not have any more: nothing can be connected, and its file would stay for ever."""
    die_in_a_change(group, "hsm3")
    text = group.toml.read_text()
    group.toml.write_text(text[: text.rindex("[[member]]")])
    done = group.admin("member", "remove", "hsm3", "--yes")
    assert "member removed: hsm3" in group.admin("status").stdout, done.stdout + done.stderr
    assert cut_off(group, "hsm3") == []


def test_interrupted_and_back_again(group: GroupFixture) -> None:
    """What was cut off in the middle is completed by the same command; a kept token comes back without its SO."""
    run_client(group, "session.generate_keypair(KeyType.RSA, 2048, store=True, label='signer')\n")
    member = group.members["hsm3"]
    section = group.toml.read_text()[group.toml.read_text().rindex("[[member]]") :]
    assert group.admin("member", "remove", "hsm3", "--keep", "--yes").returncode == 0
    assert plain.labels(member) == ["signer", "signer"]
    group.toml.write_text(f"{group.toml.read_text()}\n{section}")  # as if it ended after the section was written
    arguments = ["member", "add", "hsm3", "--module", member["module"], "--token-serial", member["serial"]]
    arguments += ["--env", "SOFTHSM2_CONF=hsm3/softhsm2.conf", "--pin-file", str(group.folder / "hsm3" / "pin")]
    done = group.admin(*arguments, "--yes")
    assert done.returncode == 0, done.stderr
    assert "shares both" in done.stdout
    assert plain.labels(member) == ["signer", "signer"]
    verified = group.admin("verify")
    assert verified.returncode == 0, verified.stdout
    assert group.admin(*arguments, "--yes").returncode == 2  # it is in the group already

    journal = SqliteJournal.open(group.folder / "journal.db")  # as if a removal ended before the token was wiped
    journal.update_member("hsm3", draining=True)
    journal.update_member("hsm3", membership=Membership.QUARANTINED, reason=BEING_REMOVED)
    journal.close()
    assert "member remove" in group.admin("status").stdout
    done = group.admin("member", "remove", "hsm3", "--yes")
    assert done.returncode == 0, done.stderr
    assert own_labels(group, "hsm3", member) == []
    assert names(group) == ["hsm1", "hsm2"]
    assert group.admin("status").returncode == 0


def test_two_administrators_at_once(new_group: Callable[..., GroupFixture]) -> None:
    group = new_group(members=2)
    token = new_token(group, "hsm3")
    journal = SqliteJournal.open(group.folder / "journal.db")
    try:
        assert journal.acquire_lease("administration", ttl=60.0) is not None
        done = add(group, "hsm3", token)
        assert done.returncode == 3
        assert "another ha-admin" in done.stderr
        assert names(group) == ["hsm1", "hsm2"]
        assert _objects(token) == 0
    finally:
        journal.close()  # it ends, however long its right would have lasted
    done = add(group, "hsm3", token)
    assert done.returncode == 0, done.stderr
    assert names(group) == ["hsm1", "hsm2", "hsm3"]
