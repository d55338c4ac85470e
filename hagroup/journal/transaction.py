"""One write transaction over a SQLite journal's tables: rows in, rows out, and the counters kept.

What others have to notice goes through here, so that no writer can forget the change number, the view number, the
list of what moved, or a counter.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from hagroup.core.records import Copy, Intent, Lease, Locator, MemberRecord, ObjectRecord, OwedKind, OwedRow, Tombstone
from hagroup.journal import rows, rules, schema
from hagroup.journal.api import LeaseLost, StaleMembership
from hagroup.journal.rules import Asker, Situation

OPEN = "outcome IS NULL"


class Head(msgspec.Struct):
    """The one row of ``head``, in the order of its columns after ``only``."""

    epoch: str
    boot: str
    membership_revision: int
    change: int
    view: int
    moved_from: int
    members_change: int
    live: int
    creating: int
    tombstones: int
    intents: int
    owed: int


_HEAD = ", ".join(Head.__struct_fields__)
_SET_HEAD = ", ".join(f"{name} = ?" for name in Head.__struct_fields__)


def read_head(connection: sqlite3.Connection) -> Head:
    return Head(*connection.execute(f"SELECT {_HEAD} FROM head").fetchone())


class Transaction:
    """Inside BEGIN IMMEDIATE ... COMMIT, for one owner."""

    def __init__(
        self, connection: sqlite3.Connection, *, owner: str, now: float, wall: float, alive: Callable[[str], bool]
    ) -> None:
        self.sql = connection
        self.owner = owner
        self.now = now
        self.wall = wall
        self.alive = alive
        self.head = read_head(connection)
        self._was = msgspec.structs.replace(self.head)
        self._changed = False
        self._noticed = False
        self._moved: set[bytes] = set()

    # -- numbers -------------------------------------------------------------------------------------------------

    @property
    def change(self) -> int:
        """This transaction's change number (taken when first asked for)."""
        if not self._changed:
            self._changed = True
            self.head.change += 1
        return self.head.change

    def touch(self, uid: bytes) -> None:
        """The object's record, copies or owed rows move."""
        self._moved.add(uid)

    def touch_members(self) -> None:
        self.head.members_change = self.change

    def touch_all(self) -> None:
        """So much moves that it is not listed one by one."""
        self.head.moved_from = self.change

    def notice(self) -> None:
        """Others look again, although no change number moves."""
        self._noticed = True

    def finish(self) -> int | None:
        """Write the counters. The new view number, or None where there is nothing to notice."""
        if self._moved:
            change = self.change
            self.sql.executemany("INSERT INTO moved VALUES (?, ?)", [(change, uid) for uid in self._moved])
        if self._changed and self.head.change % schema.MOVED_TRIM == 0:
            self._trim()
        if not self._changed and not self._noticed:
            if self.head != self._was:
                raise AssertionError("a counter moved without a change number")
            return None
        self.head.view += 1
        self.sql.execute(f"UPDATE head SET {_SET_HEAD}", msgspec.structs.astuple(self.head))
        return self.head.view

    def _trim(self) -> None:
        oldest = self.head.change - schema.MOVED_KEPT
        if oldest > self.head.moved_from:
            self.sql.execute("DELETE FROM moved WHERE change <= ?", (oldest,))
            self.head.moved_from = oldest
        closed = self.head.change - schema.CLOSED_KEPT
        if closed > 0:
            before = f"{closed:016x}"
            self.sql.execute("DELETE FROM intents WHERE id < ? AND outcome IS NOT NULL", (before,))

    # -- conditions ----------------------------------------------------------------------------------------------

    def expect_membership(self, revision: int) -> None:
        if revision != self.head.membership_revision:
            raise StaleMembership(f"membership revision {revision}, now {self.head.membership_revision}")

    def expect_lease(self, lease: Lease | None) -> None:
        if lease is None:
            return
        found = self.sql.execute("SELECT owner, token, expires FROM leases WHERE name = ?", (lease.name,)).fetchone()
        if found is None or found[:2] != (lease.owner, lease.token) or lease.owner != self.owner:
            raise LeaseLost(f"lease {lease.name} is held by another")
        if found[2] <= self.now:
            raise LeaseLost(f"lease {lease.name} ran out")

    # -- objects, copies -----------------------------------------------------------------------------------------

    def object(self, uid: bytes) -> ObjectRecord | None:
        found = self.sql.execute(f"SELECT {rows.OBJECT} FROM objects WHERE uid = ?", (uid,)).fetchone()
        return None if found is None else rows.to_object(found)

    def update_object(self, record: ObjectRecord) -> None:
        columns = ", ".join(f"{name} = ?" for name in rows.OBJECT_WRITTEN.split(", "))
        self.sql.execute(f"UPDATE objects SET {columns} WHERE uid = ?", (*rows.from_object(record), record.uid))
        self.touch(record.uid)

    def copies(self, uid: bytes) -> dict[str, Copy]:
        found = self.sql.execute(f"SELECT {rows.COPY} FROM copies WHERE uid = ?", (uid,))
        return {row[0]: rows.to_copy(row) for row in found}

    def copy(self, member: str, uid: bytes) -> Copy | None:
        found = self.sql.execute(
            f"SELECT {rows.COPY} FROM copies WHERE uid = ? AND member = ?", (uid, member)
        ).fetchone()
        return None if found is None else rows.to_copy(found)

    def situation(self, uid: bytes) -> Situation:
        """What there is of the object, for a rule."""
        record = self.object(uid)
        if record is None or record.intent is None or record.state != "live":
            return Situation(record)
        return Situation(record, record.revision + 1)

    def tombstone(self, uid: bytes) -> Tombstone | None:
        found = self.sql.execute("SELECT * FROM tombstones WHERE uid = ?", (uid,)).fetchone()
        return None if found is None else rows.to_tombstone(found)

    # -- owed rows -----------------------------------------------------------------------------------------------

    def asker(self, worker: str | None) -> Asker:
        return Asker(self.owner, worker, self.change, self.now)

    def owed_of(self, uid: bytes) -> dict[str, OwedRow]:
        return {row.member: row for row in rows.load_owed(self.sql, "w.uid = ?", (uid,))}

    def owed(self, member: str, uid: bytes) -> OwedRow | None:
        found = rows.load_owed(self.sql, "w.uid = ? AND w.member = ?", (uid, member))
        return found[0] if found else None

    def insert_owed(self, new: Sequence[OwedRow]) -> None:
        marks = ", ".join("?" * 11)
        self.sql.executemany(
            f"INSERT INTO owed ({rows.OWED_WRITTEN}) VALUES ({marks})", [rows.from_owed(row) for row in new]
        )
        self.head.owed += len(new)
        self._moved.update(row.uid for row in new)

    def put_owed(self, before: OwedRow | None, after: OwedRow | None) -> None:
        """Bring a row from what was read to what it becomes."""
        if before == after:
            return
        if before is None:
            assert after is not None
            self.insert_owed([after])
            return
        key = (before.uid, before.member)
        self.touch(before.uid)
        if after is None:
            self.sql.execute("DELETE FROM owed WHERE uid = ? AND member = ?", key)
            self.head.owed -= 1
            return
        columns = ", ".join(f"{name} = ?" for name in rows.OWED_WRITTEN.split(", "))
        self.sql.execute(f"UPDATE owed SET {columns} WHERE uid = ? AND member = ?", (*rows.from_owed(after), *key))

    def apply(self, member: str, uid: bytes, before: OwedRow | None, outcome: rules.Outcome) -> bool:
        """Write down what a rule decided."""
        after = outcome.row
        if before is None and after is not None and after.kind is OwedKind.DESTROY:
            stone = self.tombstone(uid)
            if stone is not None:
                after = msgspec.structs.replace(after, locators=rules.merged(after.locators, stone.locators))
        self.put_owed(before, after)
        if outcome.copy is not None:
            self.sql.execute(
                f"INSERT INTO copies ({rows.COPY}) VALUES (?, ?, ?, ?) ON CONFLICT (uid, member) DO UPDATE SET "
                "revision = excluded.revision, locator = excluded.locator",
                rows.from_copy(outcome.copy),
            )
            self.touch(uid)
        if outcome.forget_copy:
            gone = self.sql.execute("DELETE FROM copies WHERE uid = ? AND member = ?", (uid, member))
            if gone.rowcount:
                self.touch(uid)
        return outcome.accepted

    def bury(self, record: ObjectRecord, extra: Iterable[Locator]) -> tuple[Tombstone, dict[str, OwedRow]]:
        """Tombstone in place of the record; every copy and owed row becomes ``destroy``."""
        uid = record.uid
        copies, owed = self.copies(uid), self.owed_of(uid)
        everywhere = rules.merged(
            (record.locator,),
            extra,
            *((copy.locator,) for copy in copies.values()),
            *(row.locators for row in owed.values()),
        )
        stone = Tombstone(
            uid=uid, change=self.change, time=self.wall, locators=everywhere, fingerprint=record.fingerprint
        )
        self.sql.execute("INSERT INTO tombstones VALUES (?, ?, ?, ?, ?)", rows.from_tombstone(stone))
        self.sql.execute("DELETE FROM objects WHERE uid = ?", (uid,))
        self.head.tombstones += 1
        if record.state == "live":
            self.head.live -= 1
        else:
            self.head.creating -= 1
        self.touch(uid)
        condemned = {}
        for member in dict.fromkeys([*owed, *copies]):
            before = owed.get(member)
            known = rules.merged((record.locator,), extra, (copies[member].locator,) if member in copies else ())
            row = before or rules.new_row(member, uid, OwedKind.DESTROY, self.change)
            condemned[member] = rules.condemned(row, known, self.change, self.alive)
            self.put_owed(before, condemned[member])
        self.announce(condemned)
        return stone, condemned

    # -- intents, members ----------------------------------------------------------------------------------------

    def intent(self, id_: str | None) -> tuple[Intent, str | None] | None:
        """The intent and its outcome (None: open)."""
        found = self.sql.execute("SELECT record, owner, outcome FROM intents WHERE id = ?", (id_,)).fetchone()
        return None if found is None else (rows.to_intent(found), found[2])

    def add_intent(self, intent: Intent) -> None:
        self.sql.execute(
            "INSERT INTO intents VALUES (?, ?, ?, NULL, ?)",
            (intent.id, intent.change, intent.owner, rows.encode(intent)),
        )
        self.head.intents += 1

    def close_intent(self, intent: Intent, outcome: str) -> None:
        """Its outcome is remembered, for an owner that was stopped in between; its secrets' envelope is not."""
        kept = msgspec.structs.replace(intent, new_envelope=None, new_attributes=None)
        self.sql.execute(
            "UPDATE intents SET outcome = ?, record = ? WHERE id = ?", (outcome, rows.encode(kept), intent.id)
        )
        self.head.intents -= 1

    def members(self) -> list[MemberRecord]:
        return read_members(self.sql)

    def member(self, name: str) -> MemberRecord | None:
        found = self.sql.execute(f"SELECT {rows.MEMBER} FROM members WHERE name = ?", (name,)).fetchone()
        return None if found is None else rows.to_member(found)

    def put_member(self, member: MemberRecord) -> None:
        self.sql.execute(
            "UPDATE members SET record = ?, low = ?, announced = ?, confirmed = ? WHERE name = ?",
            (*rows.from_member(member), member.name),
        )
        self.touch_members()

    def announce(self, names: Iterable[str]) -> None:
        """Their manifests may show this transaction's change from now on."""
        change = self.change
        self.sql.executemany("UPDATE members SET announced = ? WHERE name = ?", [(change, name) for name in names])
        self.touch_members()

    def one(self, statement: str, *values: Any) -> Any:
        """First column of the first row; None where there is no row."""
        found = self.sql.execute(statement, values).fetchone()
        return None if found is None else found[0]


def read_members(connection: sqlite3.Connection) -> list[MemberRecord]:
    found = connection.execute(f"SELECT {rows.MEMBER} FROM members ORDER BY position")
    return [rows.to_member(row) for row in found]
