"""The event log (issue 3, 7): somebody changes, removes, reorders or cuts off events in the journal's file."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hagroup.admin.commands import stamped_pins
from hagroup.config.load import load
from hagroup.engine import consistency, seal_check
from hagroup.journal import open_journal
from tests.support.groups import GroupFixture, make_group


@pytest.fixture(scope="module")
def sealed(fast_folder: Path) -> GroupFixture:
    group = make_group(fast_folder / "events", members=2)
    journal = open_journal(load(group.toml).journal)
    for number in range(5):
        journal.event("note", f"action {number}")
    journal.close()
    done = group.admin("sync")
    assert done.returncode == 0, done.stderr + done.stdout
    assert group.admin("journal", "note", "not sealed yet").returncode == 0
    return group


@pytest.fixture
def file(sealed: GroupFixture) -> Iterator[sqlite3.Connection]:
    """The journal's file in somebody's hands, put back after the test."""
    path = sealed.folder / "journal.db"
    connection = sqlite3.connect(path, isolation_level=None)
    kept = list(connection.execute("SELECT * FROM events")), list(connection.execute("SELECT * FROM seal"))
    yield connection
    for table, rows in zip(("events", "seal"), kept, strict=True):
        connection.execute(f"DELETE FROM {table}")
        marks = ", ".join("?" * len(rows[0]))
        connection.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
    connection.close()


def verify(group: GroupFixture) -> tuple[int, str]:
    done = group.admin("journal", "verify")
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


def problems(group: GroupFixture) -> list[str]:
    """What the command would tell, without the cost of its process."""
    config = load(group.toml)
    journal = open_journal(config.journal)
    try:
        return seal_check.check(config, journal, stamped_pins(config, (None, None))).problems
    finally:
        journal.close()


def test_untouched(sealed: GroupFixture) -> None:
    status, text = verify(sealed)
    found = json.loads(sealed.admin("journal", "verify", "--json").stdout)
    assert status == 0, text
    assert found["sealed"] == found["events"] - 1 >= 6
    assert found["asked"] == ["hsm1", "hsm2"]
    assert f"events up to {found['sealed']} of {found['events']} are sealed; members hsm1, hsm2 were asked" in text


def cut(file: sqlite3.Connection, *, seal: bool) -> None:
    file.execute("DELETE FROM events WHERE number > 3")
    if seal:
        file.execute("DELETE FROM seal")


def swap(file: sqlite3.Connection) -> None:
    first, second = file.execute("SELECT time, kind, member, text, data FROM events WHERE number IN (2, 3)").fetchall()
    statement = "UPDATE events SET time = ?, kind = ?, member = ?, text = ?, data = ? WHERE number = ?"
    file.execute(statement, (*second, 2))
    file.execute(statement, (*first, 3))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda file: file.execute("UPDATE events SET text = 'nothing' WHERE number = 2"), "up to"),
        (lambda file: file.execute("UPDATE events SET member = 'hsm2' WHERE number = 3"), "up to"),
        (lambda file: file.execute("DELETE FROM events WHERE number = 3"), "up to"),
        (swap, "up to"),
        (lambda file: cut(file, seal=False), "was cut off"),
        (lambda file: cut(file, seal=True), "was cut off"),
    ],
    ids=["changed", "changed member", "removed", "reordered", "truncated", "truncated with its seal"],
)
def test_each_change_is_told(
    sealed: GroupFixture, file: sqlite3.Connection, change: Callable[[sqlite3.Connection], object], told: str
) -> None:
    change(file)
    (text,) = problems(sealed)
    assert text.startswith("the event log") and told in text, text


def alarm(group: GroupFixture) -> list[str]:
    """What the watchdog is told after something happened, and a program looked."""
    journal = open_journal(load(group.toml).journal)
    try:
        journal.event("note", "something to seal")
        assert group.admin("sync").returncode == 0
        return consistency.event_log(journal)
    finally:
        journal.close()


def test_a_broken_log_is_told_once_not_sealed_on_and_over_when_it_is_put_right(
    sealed: GroupFixture, file: sqlite3.Connection
) -> None:
    """Put right: members say again that the seal fits all events that it covers. Then it may be broken once more."""
    (text,) = file.execute("SELECT text FROM events WHERE number = 2").fetchone()
    for turn in (1, 2):
        before = file.execute("SELECT seal FROM seal").fetchall()
        file.execute("UPDATE events SET text = 'nothing' WHERE number = 2")
        for _ in range(2 if turn == 1 else 1):
            assert len(alarm(sealed)) == 1
        assert file.execute("SELECT seal FROM seal").fetchall() == before
        file.execute("UPDATE events SET text = ? WHERE number = 2", (text,))
        assert alarm(sealed) == problems(sealed) == []
        assert file.execute("SELECT seal FROM seal").fetchall() != before
    kinds = [kind for (kind,) in file.execute("SELECT kind FROM events WHERE kind LIKE 'event log%' ORDER BY number")]
    assert kinds == ["event log broken", "event log whole again"] * 2


def test_a_seal_by_somebody_else(sealed: GroupFixture, file: sqlite3.Connection) -> None:
    """A chain that fits, and a seal that no member of this group made."""
    import msgspec

    from hagroup.core.records import Seal

    (kept,) = file.execute("SELECT seal FROM seal").fetchone()
    seal = msgspec.msgpack.decode(kept, type=Seal)
    forged = msgspec.structs.replace(seal, mac=seal.mac[:-1] + bytes([seal.mac[-1] ^ 1]))
    file.execute("UPDATE seal SET seal = ?", (msgspec.msgpack.encode(forged),))
    status, text = verify(sealed)
    assert status == 1
    assert 'member "hsm1" says that the event log\'s seal was not made by this group' in text
