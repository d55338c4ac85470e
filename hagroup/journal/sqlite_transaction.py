"""One write transaction over a SQLite journal's tables: rows in, rows out, and the counters kept."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from hagroup.core.records import (
    Copy,
    GroupRecord,
    Intent,
    Lease,
    LoginRecord,
    LoginState,
    MemberRecord,
    ObjectRecord,
    ObjectState,
    Observation,
    OwedKind,
    OwedRow,
    Rotation,
    Seal,
    Tombstone,
)
from hagroup.journal import rows, schema
from hagroup.journal.epoch import new_epoch
from hagroup.journal.sealed import Sealed
from hagroup.journal.transaction import Transaction, Trying

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


def read_sealed(connection: sqlite3.Connection) -> Sealed | None:
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'sealed'").fetchone():
        return None  # made by an earlier version, and not opened by this one yet
    found = connection.execute("SELECT sealed FROM sealed").fetchone()
    return None if found is None else msgspec.msgpack.decode(found[0], type=Sealed)


class SqliteTransaction(Transaction):
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

    # -- the whole -----------------------------------------------------------------------------------------------

    @property
    def sealed(self) -> Sealed | None:
        return read_sealed(self.sql)

    def seal(self, sealed: Sealed | None) -> None:
        self.sql.execute("DELETE FROM sealed")
        if sealed is not None:
            self.sql.execute("INSERT INTO sealed VALUES (1, ?)", (rows.encode(sealed),))
        self.touch_all()

    def under_way(self) -> bool:
        rows_ = rows.load_owed(self.sql, "w.attempts IS NOT NULL", ())
        return self.head.intents > 0 or any(a.doubt_since is None for row in rows_ for a in row.attempts)

    # -- numbers -------------------------------------------------------------------------------------------------

    @property
    def change(self) -> int:
        """Taken when first asked for."""
        if not self._changed:
            self._changed = True
            self.head.change += 1
        return self.head.change

    @property
    def membership_revision(self) -> int:
        return self.head.membership_revision

    def touch(self, uid: bytes) -> None:
        self._moved.add(uid)

    def touch_members(self) -> None:
        self.head.members_change = self.change

    def touch_all(self) -> None:
        self.head.moved_from = self.change

    def notice(self) -> None:
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

    # -- objects, copies -----------------------------------------------------------------------------------------

    def object(self, uid: bytes) -> ObjectRecord | None:
        found = self.sql.execute(f"SELECT {rows.OBJECT} FROM objects WHERE uid = ?", (uid,)).fetchone()
        return None if found is None else rows.to_object(found)

    def insert_objects(self, records: Sequence[ObjectRecord]) -> None:
        marks = ", ".join("?" * len(rows.OBJECT_WRITTEN.split(", ")))
        self.sql.executemany(
            f"INSERT INTO objects ({rows.OBJECT_WRITTEN}) VALUES ({marks})", map(rows.from_object, records)
        )
        self.head.creating += len(records)
        self._moved.update(record.uid for record in records)

    def some_objects(self, limit: int) -> list[bytes]:
        return [uid for (uid,) in self.sql.execute("SELECT uid FROM objects ORDER BY number LIMIT ?", (limit,))]

    def set_live(self, uid: bytes) -> None:
        self.sql.execute(
            "UPDATE objects SET state = 'live', intent = NULL, change = ? WHERE uid = ?", (self.change, uid)
        )
        self.head.creating -= 1
        self.head.live += 1
        self.touch(uid)

    def others_in_place(self, record: ObjectRecord) -> Iterable[ObjectRecord]:
        found = self.sql.execute(
            f"SELECT {rows.OBJECT} FROM objects WHERE label IS ? AND uid != ?",
            (record.attributes.get(rows.LABEL), record.uid),
        )
        return [other for other in map(rows.to_object, found) if other.locator == record.locator]

    def has_twin(self, record: ObjectRecord) -> bool:
        digest = rows.twin_digest(record.fingerprint, record.locator)
        return self.one("SELECT 1 FROM objects WHERE twin = ?", digest) is not None

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

    def put_copy(self, copy: Copy) -> None:
        self.sql.execute(
            f"INSERT INTO copies ({rows.COPY}) VALUES (?, ?, ?, ?) ON CONFLICT (uid, member) DO UPDATE SET "
            "revision = excluded.revision, locator = excluded.locator",
            rows.from_copy(copy),
        )
        self.touch(copy.uid)

    def drop_copy(self, member: str, uid: bytes) -> None:
        if self.sql.execute("DELETE FROM copies WHERE uid = ? AND member = ?", (uid, member)).rowcount:
            self.touch(uid)

    def entomb(self, record: ObjectRecord, stone: Tombstone) -> None:
        self.sql.execute(rows.INSERT_TOMBSTONE, rows.from_tombstone(stone))
        self.sql.execute("DELETE FROM objects WHERE uid = ?", (record.uid,))
        self.head.tombstones += 1
        if record.state is ObjectState.LIVE:
            self.head.live -= 1
        else:
            self.head.creating -= 1
        self.touch(record.uid)

    def tombstone(self, uid: bytes) -> Tombstone | None:
        found = self.sql.execute("SELECT * FROM tombstones WHERE uid = ?", (uid,)).fetchone()
        return None if found is None else rows.to_tombstone(found)

    # -- owed rows -----------------------------------------------------------------------------------------------

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

    def hinders(self, member: str, barrier: int, limit: int) -> list[OwedRow]:
        return rows.load_owed(
            self.sql,
            "w.member = ? AND w.change <= ? AND w.attempts IS NULL AND w.reason IS NULL ORDER BY w.change LIMIT ?",
            (member, barrier, limit),
        )

    # -- intents, members ----------------------------------------------------------------------------------------

    def intent(self, id_: str | None) -> tuple[Intent, str | None] | None:
        found = self.sql.execute("SELECT record, owner, outcome FROM intents WHERE id = ?", (id_,)).fetchone()
        return None if found is None else (rows.to_intent(found), found[2])

    def add_intent(self, intent: Intent) -> None:
        self.sql.execute(
            "INSERT INTO intents VALUES (?, ?, ?, NULL, ?)",
            (intent.id, intent.change, intent.owner, rows.encode(intent)),
        )
        self.head.intents += 1

    def close_intent(self, intent: Intent, outcome: str) -> None:
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

    def adopt(self, intent: Intent) -> None:
        self.sql.execute("UPDATE intents SET owner = ? WHERE id = ?", (self.owner, intent.id))

    def insert_member(self, member: MemberRecord) -> None:
        position = self.one("SELECT COALESCE(MAX(position), 0) + 1 FROM members")
        record, low, announced, confirmed = rows.from_member(member)
        self.sql.execute(
            "INSERT INTO members VALUES (?, ?, ?, ?, ?, ?)",
            (member.name, position, record, low, announced, confirmed),
        )
        self.touch_members()

    def drop_member(self, name: str) -> None:
        self.head.owed -= self.sql.execute("DELETE FROM owed WHERE member = ?", (name,)).rowcount
        for table, column in (
            ("copies", "member"),
            ("logins", "member"),
            ("observations", "member"),
            ("members", "name"),
        ):
            self.sql.execute(f"DELETE FROM {table} WHERE {column} = ?", (name,))

    def owe_everything(self, member: str) -> None:
        # NULL locators: the record's own. One statement, whatever the number of objects.
        owed = self.sql.execute(
            f"INSERT INTO owed ({rows.OWED_WRITTEN}) "
            "SELECT uid, ?, ?, revision, NULL, ?, 0, 0, NULL, NULL, NULL FROM objects",
            (member, OwedKind.INSTALL.value, self.change),
        )
        self.head.owed += owed.rowcount

    def move_membership(self) -> int:
        self.touch_members()
        self.head.membership_revision += 1
        return self.head.membership_revision

    def group(self) -> GroupRecord:
        return read_group(self.sql, self.head)

    def update_identity(self, **values: str | bytes | Rotation) -> None:
        for column, value in values.items():
            kept = rows.encode(value) if isinstance(value, Rotation) else value
            self.sql.execute(f"UPDATE identity SET {column} = ?", (kept,))

    def begin_epoch(self) -> str:
        self.head.epoch = new_epoch(self.head.epoch)
        return self.head.epoch

    # -- leases, observations, logins, events --------------------------------------------------------------------

    def lease(self, name: str) -> tuple[str | None, int, float] | None:
        found = self.sql.execute("SELECT owner, token, expires FROM leases WHERE name = ?", (name,)).fetchone()
        return None if found is None else (found[0], found[1], found[2])

    def put_lease(self, lease: Lease) -> None:
        values = (lease.name, lease.owner, lease.token, lease.expires)
        self.sql.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)", values)

    def free_lease(self, name: str) -> None:
        self.sql.execute("UPDATE leases SET owner = NULL WHERE name = ?", (name,))

    def observation(self, member: str, observer: str) -> Observation | None:
        found = self.sql.execute(
            f"SELECT {rows.OBSERVATION} FROM observations WHERE member = ? AND observer = ?", (member, observer)
        ).fetchone()
        return None if found is None else rows.to_observation(found)

    def put_observation(self, seen: Observation) -> None:
        self.sql.execute(
            "INSERT OR REPLACE INTO observations VALUES (?, ?, ?, ?, ?, ?)",
            (seen.member, seen.observer, seen.site, seen.ok, seen.kind, seen.boot_time),
        )

    def logins(self) -> list[Trying]:
        found = self.sql.execute(f"SELECT {rows.LOGIN}, before FROM logins ORDER BY member, source")
        return [(rows.to_login(row), None if row[6] is None else rows.to_login_before(row[6])) for row in found]

    def put_login(self, record: LoginRecord, before: LoginRecord | None = None) -> None:
        kept = rows.encode(before) if record.state is LoginState.TRYING else None
        values = (record.member, record.source, record.stamp, record.state.value, record.owner, record.boot_time, kept)
        self.sql.execute("INSERT OR REPLACE INTO logins VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def drop_login(self, member: str, source: str) -> None:
        self.sql.execute("DELETE FROM logins WHERE member = ? AND source = ?", (member, source))

    def add_event(self, kind: str, text: str, member: str | None, data: dict[str, str]) -> None:
        self.sql.execute(
            "INSERT INTO events (time, kind, member, text, data) VALUES (?, ?, ?, ?, ?)",
            (self.wall, kind, member, text, rows.encode(data)),
        )

    def put_seal(self, seal: Seal) -> None:
        self.sql.execute("INSERT OR REPLACE INTO seal VALUES (1, ?)", (rows.encode(seal),))

    def announce(self, names: Iterable[str]) -> None:
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


def read_group(connection: sqlite3.Connection, head: Head) -> GroupRecord:
    label, serial, domain, partition, reference, cleared, rotation = connection.execute(
        "SELECT label, serial, domain_key_id, partition_key_id, reference, cleared, rotation FROM identity"
    ).fetchone()
    return GroupRecord(
        seal=_read_seal(connection),
        label=label,
        serial=serial,
        epoch=head.epoch,
        membership_revision=head.membership_revision,
        change=head.change,
        domain_key_id=domain,
        partition_key_id=partition,
        reference=reference,
        cleared=cleared,
        rotation=None if rotation is None else rows.to_rotation(rotation),
    )


def _read_seal(connection: sqlite3.Connection) -> Seal | None:
    try:
        found = connection.execute("SELECT seal FROM seal").fetchone()
    except sqlite3.OperationalError:  # made by an earlier hagroup, and opened for reading only
        return None
    return None if found is None else rows.to_seal(found[0])
