"""``ha-admin domain …`` (issue 4, DESIGN.md 5), by real processes on one group."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hagroup as pkcs11
from hagroup import Attribute, KeyType, Mechanism, ObjectClass
from hagroup.core.attributes import CKA, CKK, pack_bool, pack_ulong
from hagroup.core.calls import Ckr, Template
from hagroup.engine import transport
from hagroup.engine.envelope import generation
from hagroup.engine.inner_layer import OAEP
from hagroup.engine.stored_records import stored_records
from tests.support import plain
from tests.support.faulty import Load, engine
from tests.support.groups import PIN, GroupFixture, make_group, wait_until
from tests.support.newcomers import add, new_token, private, tamper
from tests.support.terminal import Terminal

ADMIN = Path(sys.executable).with_name("ha-admin")
DATA = b"data"
T = 30.0
OWN = ["hagroup domain key", "hagroup member key", "hagroup partition key"]


@pytest.fixture(scope="module")
def group(fast_folder: Path) -> GroupFixture:
    made = make_group(fast_folder / "domain", members=3)
    private(made.folder / "so-pin", "12345678")
    return made


@pytest.fixture
def session(group: GroupFixture) -> Iterator[Any]:
    lib = pkcs11.lib(str(group.toml))
    with lib.get_token(token_label="payments").open(rw=True, user_pin=PIN) as opened:
        wait_until(lambda: len(engine(opened).roster.serving()) == 3, "all serve", 60)
        yield opened
    lib.unload()


def rotate(group: GroupFixture, *options: str) -> subprocess.CompletedProcess[str]:
    return group.admin("domain", "rotate", "--so-pin-file", str(group.folder / "so-pin"), "--yes", *options)


def own(member: dict[str, Any]) -> list[str]:
    """The group's own on a token, manifests and records aside."""
    labels = [item["label"] for item in plain.objects(member, own=True)]
    return sorted(label for label in labels if label.startswith("hagroup "))


def names(group: GroupFixture) -> tuple[str, str]:
    found = json.loads(group.admin("domain", "show", "--json").stdout)
    return found["domain_key"], found["partition_key"]


def test_everything_under_a_running_application(group: GroupFixture, session: Any) -> None:
    _, signer = session.generate_keypair(KeyType.RSA, 2048, store=True, label="signer")
    secret = session.create_object(
        {
            Attribute.CLASS: ObjectClass.SECRET_KEY,
            Attribute.KEY_TYPE: KeyType.GENERIC_SECRET,
            Attribute.VALUE: b"thirteen byte",
            Attribute.TOKEN: True,
            Attribute.LABEL: "odd",
            Attribute.SIGN: True,
            Attribute.SENSITIVE: False,
            Attribute.EXTRACTABLE: True,
        }
    )
    note = session.create_object(
        {
            Attribute.CLASS: ObjectClass.DATA,
            Attribute.LABEL: "note",
            Attribute.TOKEN: True,
            Attribute.PRIVATE: True,
            Attribute.VALUE: b"private words",
        }
    )
    kept = session.generate_key(KeyType.AES, 256, label="in memory")
    session.generate_key(KeyType.AES, 256, store=True, label="to be destroyed")
    encrypted = kept.encrypt(bytes(16), mechanism=Mechanism.AES_ECB)
    expected = signer.sign(DATA, mechanism=Mechanism.SHA256_RSA_PKCS)
    shown = group.admin("domain", "show", "--json")
    assert shown.returncode == 0, shown.stderr
    before = json.loads(shown.stdout)
    assert before["rotated"] is None
    assert {one["returns"] for one in before["members"]} == {"by itself"}

    def work(number: int) -> None:
        if number == 12:
            session.generate_key(KeyType.AES, 128, store=True, label="made meanwhile")
            time.sleep(0.3)
        elif number == 13:
            note[Attribute.LABEL] = f"note {time.monotonic()}"
            time.sleep(0.1)
        else:
            assert signer.sign(DATA, mechanism=Mechanism.SHA256_RSA_PKCS) == expected
            time.sleep(0.05)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        began = time.monotonic()
        done = group.admin(*arguments)
        print(arguments, time.monotonic() - began, load.done())
        assert done.returncode == 0, done.stderr + done.stdout
        return done

    token = new_token(group, "hsm4")
    with Load(work, threads=14) as load:
        load.wait_for(50)
        added = add(group, "hsm4", token)
        assert added.returncode == 0, added.stderr
        run("member", "drain", "hsm1")
        run("member", "resume", "hsm1")
        done = rotate(group, "--json")
        load.wait_for(50)
        run("backup", "create", str(group.folder / "backup"))
        gone = session.get_key(label="to be destroyed")
        uid = gone.id.hex()
        gone.destroy()
        run("backup", "restore", str(group.folder / "backup"), "--resurrect", uid, "--yes")
        run("member", "remove", "hsm4", "--yes")
        load.wait_for(50)
    del group.members["hsm4"]
    assert done.returncode == 0, done.stderr + done.stdout
    assert not load.errors, load.errors[0]
    assert session.get_key(label="to be destroyed")
    told = json.loads(done.stdout)
    assert told["done"] == ["hsm1", "hsm2", "hsm3", "hsm4"]
    assert (
        (told["domain_key"], told["partition_key"]) == names(group) != (before["domain_key"], before["partition_key"])
    )
    wait_until(lambda: not engine(session).journal.owed(), "nothing is owed")
    made = sum(1 for _ in session.get_objects({Attribute.LABEL: "made meanwhile"}))
    assert made
    for member in group.members.values():
        assert own(member) == OWN, "one pair of keys"
        assert plain.labels(member).count("made meanwhile") == made
        assert plain.use(member, "sign", 3, "signer", DATA, "SHA256_RSA_PKCS") == expected
    assert kept.encrypt(bytes(16), mechanism=Mechanism.AES_ECB) == encrypted
    wait_until(lambda: len(engine(session).roster.serving()) == 3, "all serve")
    roster = engine(session).roster
    for name in list(group.members):  # what is kept in memory opens under the new keys, wherever it was made
        group.workers()[name].kill()
        assert kept.encrypt(bytes(16), mechanism=Mechanism.AES_ECB) == encrypted
        wait_until(lambda name=name: roster.members[name].serving, "it is back")
    assert secret[Attribute.VALUE] == b"thirteen byte"
    assert note[Attribute.VALUE] == b"private words"
    assert group.admin("verify").returncode == 0
    check_second_place(session)


def check_second_place(session: Any) -> None:
    """Every record on every token opens under the present keys, and holds an envelope under them."""
    group = engine(session)
    now = group.view.group
    live = {record.uid for record in group.journal.objects()}
    for record in group.journal.objects():
        assert record.envelope is None or generation(record.envelope) == (now.domain_key_id, now.partition_key_id)
    for member in group.roster.members.values():
        found = {}
        for record in stored_records(member.life.connection, member.life.keys, timeout=10):
            found[record.uid] = record
            if record.envelope is not None:
                assert generation(record.envelope) == (now.domain_key_id, now.partition_key_id)
        assert found.keys() == live


def test_a_member_that_was_away_takes_the_new_keys_before_it_serves(group: GroupFixture, session: Any) -> None:
    roster = engine(session).roster
    group.stop("hsm3")
    wait_until(lambda: roster.members["hsm3"].life is None, "it is noticed")
    for _ in range(2):  # twice: the second time it is two generations behind
        done = rotate(group)
        assert done.returncode == 1, done.stderr + done.stdout
        assert "hsm3 is away: it takes the new keys when it returns" in done.stdout
    session.generate_key(KeyType.AES, 128, store=True, label="made under the newest")
    group.bring_back("hsm3")
    wait_until(lambda: roster.members["hsm3"].serving, "it serves again", 60)
    wait_until(lambda: not engine(session).journal.owed(), "nothing is owed")
    wait_until(lambda: own(group.members["hsm3"]) == OWN, "the old keys are gone there")
    assert "made under the newest" in plain.labels(group.members["hsm3"])
    assert group.admin("verify").returncode == 0
    check_second_place(session)


KILLED = """
import os, sys
from hagroup.admin.cli import main
from hagroup.engine import domain_rotation
from hagroup.journal.sqlite import SqliteJournal
domain_rotation.BATCH = 1
method, after = sys.argv.pop(1), sys.argv.pop(1) == "after"
true = getattr(SqliteJournal, method)
def killed(*arguments, **keywords):
    if after:
        true(*arguments, **keywords)
    os.kill(os.getpid(), 9)
setattr(SqliteJournal, method, killed)
main()
"""


def test_killed_in_the_middle(group: GroupFixture, session: Any) -> None:
    """kill -9 between any two steps; the same command goes on, and programs go on meanwhile."""
    arguments = ["--config", group.toml, "domain", "rotate", "--so-pin-file", group.folder / "so-pin", "--yes"]
    journal = engine(session).journal
    first = journal.group().domain_key_id

    def kill(method: str, when: str) -> None:
        command = [sys.executable, "-c", KILLED, method, when, *arguments]
        done = subprocess.run(command, capture_output=True, timeout=120, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        session.generate_key(KeyType.AES, 128, store=True, label=f"{method} {when}")

    kill("begin_rotation", "before")  # the new keys are on the members, and nobody knows of them
    assert journal.group().domain_key_id == first
    kill("rewrap", "after")
    second = journal.group().domain_key_id
    assert second != first
    shown = group.admin("domain", "show")
    assert shown.returncode == 1 and "being changed" in shown.stdout
    kill("finish_rotation", "after")
    done = rotate(group, "--json")
    assert done.returncode == 0, done.stderr
    if json.loads(done.stdout)["resumed"]:  # else the running program had destroyed the old ones by itself
        assert journal.group().domain_key_id == second
    for member in group.members.values():
        assert own(member) == OWN
        assert {"begin_rotation before", "rewrap after", "finish_rotation after"} <= set(plain.labels(member))
    check_second_place(session)


def test_shares(group: GroupFixture, tmp_path: Path) -> None:
    """Two of three people and their words; typed unseen, or from files."""
    so_pin = ("--so-pin-file", str(group.folder / "so-pin"))
    folder = tmp_path / "shares"
    refused = group.admin("domain", "shares", "--shares", "2-of-3", *so_pin, "--yes")
    assert refused.returncode == 2 and "nothing was changed" in refused.stderr
    assert group.admin("domain", "shares", "--shares", "3-of-2", *so_pin, "--yes").returncode == 2
    done = group.admin("domain", "shares", "--shares", "2-of-3", "--shares-folder", str(folder), *so_pin, "--yes")
    assert done.returncode == 0, done.stderr
    files = sorted(folder.iterdir())
    assert len(files) == 6 and all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    assert all(len(file.read_text().splitlines()) == 2 for file in files)
    words = {file.name: file.read_text().splitlines()[1] for file in files}
    assert not any(text in done.stdout for text in words.values())

    def check(*chosen: str) -> subprocess.CompletedProcess[str]:
        named = [word for name in chosen for word in ("--share-file", str(folder / name))]
        return group.admin("domain", "shares", "--check", *named)

    partition = ("partition-key-share-1", "partition-key-share-2")
    assert check("domain-key-share-1", "domain-key-share-3", *partition).returncode == 0
    too_few = check("domain-key-share-1", *partition)
    assert too_few.returncode == 2 and "too few" in too_few.stderr

    terminal = Terminal([ADMIN, "--config", group.toml, "domain", "shares", "--check"])
    terminal.expect("domain key, share 1 (not shown)")
    terminal.send(words["domain-key-share-2"].replace(" ", "  ", 1) + " slip\n")
    terminal.expect("no share")
    terminal.send(words["domain-key-share-2"] + "\n")
    terminal.expect("domain key, share 2 of 2")
    terminal.send(words["domain-key-share-3"].upper() + "\n")
    terminal.expect("partition key, share 1")
    terminal.send(words["partition-key-share-3"] + "\n")
    terminal.expect("partition key, share 2 of 2")
    terminal.send(words["partition-key-share-1"] + "\n")
    assert terminal.end() == 0, terminal.text
    assert words["domain-key-share-2"].split()[2] not in terminal.text.split()


def test_sealed_with_shares_and_joined_from_them(group: GroupFixture, session: Any) -> None:
    folder = group.folder / "sealed-shares"
    terminal = Terminal(
        [
            ADMIN,
            "--config",
            group.toml,
            "domain",
            "rotate",
            "--sealed",
            "--shares",
            "2-of-2",
            "--so-pin-file",
            group.folder / "so-pin",
        ]
    )
    terminal.expect("Change both keys")
    terminal.send("y\n")
    sets: dict[str, list[str]] = {"domain key": [], "partition key": []}
    for what in sets:
        for number in (1, 2):
            seen = len(terminal.text)
            terminal.expect(f"{what}, share {number} of 2")
            wait_until(lambda seen=seen: terminal._read(0.05) and "press Enter" in terminal.text[seen:], "the words")
            page = terminal.text[terminal.text.rindex(f"{what}, share {number} of 2") :]
            sets[what].append(" ".join(word for word in re.findall(r"(?<=\s)\d+ ([a-z]{4,8})\b", page)))
            terminal.send("\n")
    assert terminal.end() == 0, terminal.text
    assert {len(words.split()) for one in sets.values() for words in one} == {33}
    folder.mkdir()
    options = []
    for what, shares in sets.items():
        for number, words in enumerate(shares):
            file = private(folder / f"{what[0]}{number}", f"group payments, {what}, share\n{words}\n")
            options += ["--share-file", str(file)]
    shown = json.loads(group.admin("domain", "show", "--json").stdout)
    assert {one["leave"] for one in shown["members"]} == {"by the shares only"}

    # the token is reset behind the group's back: its keys are gone, and only the shares bring them back
    tamper(
        group.members["hsm2"],
        "for label in ('hagroup partition key', 'hagroup member key'):\n"
        "    for item in session.get_objects({Attribute.LABEL: label}):\n        item.destroy()\n",
    )
    roster = engine(session).roster
    roster.members["hsm2"].life.connection.kill()
    wait_until(lambda: roster.members["hsm2"].state.value == "quarantined", "it is quarantined")
    by_people = group.admin("domain", "join", "hsm2", "--so-pin-file", str(group.folder / "so-pin"))
    assert by_people.returncode == 2 and "sealed" in by_people.stderr
    wrong = [word.replace("d1", "p1") for word in options]
    assert group.admin("domain", "join", "hsm2", *wrong).returncode == 2
    joined = group.admin("domain", "join", "hsm2", *options)
    assert joined.returncode == 0, joined.stderr
    wait_until(lambda: roster.members["hsm2"].serving, "it serves again", 60)
    assert group.admin("verify").returncode == 0


def test_the_user_alone_cannot_read_what_is_wrapped_for_a_token(group: GroupFixture, session: Any) -> None:
    """The pair stays on the token, and what is wrapped for it lies in the journal: neither gives the user anything."""
    name = "hsm1"
    life = engine(session).roster.members[name].life
    user = life.connection
    pair = transport.find(user, timeout=T)
    assert pair is not None
    (blob, _) = engine(session).view.group.rotation.wrapped[life.token.serial]
    key: Template = [(CKA.CLASS, pack_ulong(4)), (CKA.KEY_TYPE, pack_ulong(CKK.AES)), (CKA.TOKEN, pack_bool(False))]

    def unwrapped(sensitive: bool, extractable: bool, trusted: bool) -> Any:
        flags: Template = [
            (CKA.SENSITIVE, pack_bool(sensitive)),
            (CKA.EXTRACTABLE, pack_bool(extractable)),
            (CKA.WRAP_WITH_TRUSTED, pack_bool(trusted)),
            (CKA.ENCRYPT, pack_bool(True)),
        ]
        return user.unwrap(OAEP, pair.private, blob, [*key, *flags], timeout=T)

    for attempt in (
        lambda: user.decrypt(OAEP, pair.private, blob, timeout=T),
        lambda: user.set(pair.private, [(CKA.DECRYPT, pack_bool(True))], timeout=T),
        lambda: user.copy(pair.private, [(CKA.DECRYPT, pack_bool(True))], timeout=T),
        lambda: unwrapped(sensitive=False, extractable=True, trusted=True),
        lambda: unwrapped(sensitive=True, extractable=True, trusted=False),
    ):
        with pytest.raises(Ckr):
            attempt()
