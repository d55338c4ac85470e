"""``ha-admin clear`` (issue 4; T 4.4.2): the whole group is empty, and stays so, whoever runs or was away."""

from __future__ import annotations

import json
import sqlite3
import sys
from pathlib import Path

import pytest

import hagroup as pkcs11
from hagroup import KeyType
from tests.support import plain
from tests.support.faulty import engine
from tests.support.groups import PIN, GroupFixture, make_group, wait_until
from tests.support.terminal import Terminal

ADMIN = Path(sys.executable).with_name("ha-admin")


@pytest.fixture(scope="module")
def group(fast_folder: Path) -> GroupFixture:
    return make_group(fast_folder / "cleared", members=3)


def test_nothing_comes_back(group: GroupFixture) -> None:
    lib = pkcs11.lib(str(group.toml))
    with lib.get_token(token_label="payments").open(rw=True, user_pin=PIN) as session:
        wait_until(lambda: len(engine(session).roster.serving()) == 3, "all serve")
        session.generate_keypair(KeyType.RSA, 2048, store=True, label="signer")
        key = session.generate_key(KeyType.AES, 256, store=True, label="key")
        session.create_object(
            {
                pkcs11.Attribute.CLASS: pkcs11.ObjectClass.DATA,
                pkcs11.Attribute.LABEL: "note",
                pkcs11.Attribute.TOKEN: True,
                pkcs11.Attribute.VALUE: b"x",
            }
        )
        wait_until(lambda: not engine(session).journal.owed(), "all on all")
        group.stop("hsm3")
        session.generate_key(KeyType.AES, 256, store=True, label="while away")

        refused = group.admin("clear")
        assert refused.returncode == 2 and "nothing was changed" in refused.stderr
        assert len(list(session.get_objects())) == 5

        done = group.admin("clear", "--yes", "--json")
        assert done.returncode == 1, done.stderr + done.stdout
        told = json.loads(done.stdout)
        assert told["objects"] == 5
        assert sorted(told["emptied"]) == ["hsm1", "hsm2"]
        assert list(told["later"]) == ["hsm3"]
        for name in ("hsm1", "hsm2"):
            assert plain.labels(group.members[name]) == []
        assert list(session.get_objects()) == [], "the running program sees it"
        with pytest.raises(pkcs11.exceptions.PKCS11Error):
            key.encrypt(bytes(16), mechanism=pkcs11.Mechanism.AES_ECB)
        session.generate_key(KeyType.AES, 128, store=True, label="new life")

        group.bring_back("hsm3")
        roster = engine(session).roster
        wait_until(lambda: roster.members["hsm3"].serving, "the member that was away serves again", 60)
        wait_until(lambda: not engine(session).journal.owed(), "nothing is owed")
        for name in group.members:
            assert plain.labels(group.members[name]) == ["new life"], name
    lib.unload()
    verified = group.admin("verify")
    assert verified.returncode == 0, verified.stdout
    assert group.admin("status").returncode == 0


def test_what_the_journal_did_not_know_goes_too(group: GroupFixture) -> None:
    """A journal that was behind: the group's own record beside an object tells that it was the group's."""
    lib = pkcs11.lib(str(group.toml))
    with lib.get_token(token_label="payments").open(rw=True, user_pin=PIN) as session:
        session.generate_key(KeyType.AES, 256, store=True, label="forgotten")
        session.generate_key(KeyType.AES, 256, store=True, label="known")
        wait_until(lambda: not engine(session).journal.owed(), "all on all")
    lib.unload()
    with sqlite3.connect(group.folder / "journal.db") as journal:
        (uid,) = journal.execute("SELECT uid FROM objects WHERE label = ?", (b"forgotten",)).fetchone()
        for table in ("objects", "copies", "owed"):
            journal.execute(f"DELETE FROM {table} WHERE uid = ?", (uid,))
        journal.execute("UPDATE head SET live = live - 1")
    terminal = Terminal([ADMIN, "--config", group.toml, "clear"])
    terminal.expect("Type its label")
    terminal.send("paymnts\n")
    assert terminal.end() == 2, terminal.text
    terminal = Terminal([ADMIN, "--config", group.toml, "clear"])
    terminal.expect("Type its label")
    terminal.send("payments\n")
    assert terminal.end() == 0, terminal.text
    for member in group.members.values():
        assert plain.labels(member) == []
