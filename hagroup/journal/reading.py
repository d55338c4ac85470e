"""Reading a SQLite journal. Each method is one read transaction, or one for each batch of an iterator."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from hagroup.core.records import (
    Changes,
    Copy,
    Event,
    GroupRecord,
    Intent,
    LoginRecord,
    MemberRecord,
    ObjectRecord,
    Observation,
    OwedRow,
    Tombstone,
)
from hagroup.journal import rows
from hagroup.journal.opened import Opened
from hagroup.journal.sealed import Sealed, Why
from hagroup.journal.sqlite_transaction import read_group, read_head, read_members, read_sealed

T = TypeVar("T")

BATCH = 256
_LISTED_AT_MOST = 10_000
"""More UIDs than that in one answer cost more than reading anew what is needed."""


class Reading(Opened):
    """The readers' part of :class:`SqliteJournal`."""

    def changes(self, since: int, epoch: str) -> Changes:
        def query(connection: sqlite3.Connection) -> Changes:
            head = read_head(connection)
            sealed = read_sealed(connection)
            if sealed is not None and sealed.why is Why.MOVED and not self._for_moving:
                raise sealed.refusal(f"sqlite:{self._database.path}")
            if epoch != head.epoch or since < head.moved_from or since > head.change:
                return Changes(change=head.change, uids=frozenset(), members=True, everything=True)
            found = connection.execute(
                "SELECT DISTINCT uid FROM moved WHERE change > ? LIMIT ?", (since, _LISTED_AT_MOST + 1)
            ).fetchall()
            if len(found) > _LISTED_AT_MOST:
                return Changes(change=head.change, uids=frozenset(), members=True, everything=True)
            uids = frozenset(row[0] for row in found)
            return Changes(change=head.change, uids=uids, members=head.members_change > since)

        return self._read(query)

    def sealed(self) -> Sealed | None:
        return self._read(read_sealed)

    def group(self) -> GroupRecord:
        return self._read(lambda connection: read_group(connection, read_head(connection)))

    def members(self) -> list[MemberRecord]:
        return self._read(read_members)

    def view(self) -> tuple[GroupRecord, list[MemberRecord]]:
        return self._read(lambda connection: (read_group(connection, read_head(connection)), read_members(connection)))

    def barrier(self) -> int:
        return self._read(lambda connection: read_head(connection).change)

    def counts(self) -> dict[str, int]:
        def query(connection: sqlite3.Connection) -> dict[str, int]:
            head = read_head(connection)
            return {
                "live": head.live,
                "creating": head.creating,
                "tombstones": head.tombstones,
                "intents": head.intents,
                "owed": head.owed,
            }

        return self._read(query)

    # -- objects -------------------------------------------------------------------------------------------------

    def object(self, uid: bytes) -> ObjectRecord | None:
        return self._read(lambda connection: _object(connection, uid))

    def placement(self, uid: bytes) -> tuple[dict[str, Copy], dict[str, OwedRow]]:
        return self._read(lambda connection: _placement(connection, uid))

    def object_with_placement(self, uid: bytes) -> tuple[ObjectRecord | None, dict[str, Copy], dict[str, OwedRow]]:
        return self._read(lambda connection: (_object(connection, uid), *_placement(connection, uid)))

    def search(self, attributes: Mapping[int, bytes]) -> list[ObjectRecord]:
        condition, values = _narrowest(attributes)

        def query(connection: sqlite3.Connection) -> list[ObjectRecord]:
            found = connection.execute(
                f"SELECT {rows.OBJECT} FROM objects WHERE {condition} AND +state = 'live' ORDER BY number", values
            )
            return [record for record in map(rows.to_object, found) if rows.matches(record, attributes)]

        return self._read(query)

    def objects(self) -> Iterator[ObjectRecord]:
        statement = f"SELECT {rows.OBJECT}, number FROM objects WHERE number > ? ORDER BY number LIMIT {BATCH}"
        return self._batches(statement, 0, rows.to_object)

    def copies(self, member: str) -> Iterator[Copy]:
        statement = (
            f"SELECT {rows.COPY}, uid FROM copies INDEXED BY copies_member "
            f"WHERE member = ?2 AND uid > ?1 ORDER BY uid LIMIT {BATCH}"
        )
        return self._batches(statement, b"", rows.to_copy, member)

    def _batches(self, statement: str, start: Any, convert: Callable[[rows.Row], T], *values: Any) -> Iterator[T]:
        """Rows in order of their last column, from after ``start``; no transaction is open between batches."""
        while True:
            after = start

            def query(connection: sqlite3.Connection, after: Any = after) -> list[rows.Row]:
                return connection.execute(statement, (after, *values)).fetchall()

            found = self._read(query)
            yield from map(convert, found)
            if len(found) < BATCH:
                return
            start = found[-1][-1]

    # -- what is owed, what is gone, what is under way -------------------------------------------------------------

    def owed(
        self, member: str | None = None, *, doubtful: bool | None = None, limit: int | None = None
    ) -> list[OwedRow]:
        conditions = {None: [], True: ["w.attempts IS NOT NULL"], False: ["w.attempts IS NULL"]}[doubtful]
        if member is not None:
            conditions.append("w.member = ?")
        where = " AND ".join(conditions) or "1"
        order = "ORDER BY w.change LIMIT ?"
        values = (*(() if member is None else (member,)), -1 if limit is None else limit)
        return self._read(lambda connection: rows.load_owed(connection, f"{where} {order}", values))

    def tombstone(self, uid: bytes) -> Tombstone | None:
        def query(connection: sqlite3.Connection) -> Tombstone | None:
            found = connection.execute("SELECT * FROM tombstones WHERE uid = ?", (uid,)).fetchone()
            return None if found is None else rows.to_tombstone(found)

        return self._read(query)

    def tombstones(self, *, since: int = 0) -> Iterator[Tombstone]:
        # Several share one change number (a pair given up), so batches go on from (change, UID).
        after: tuple[int, bytes] = (since + 1, b"")
        while True:
            values = after

            def query(connection: sqlite3.Connection, values: tuple[int, bytes] = values) -> list[rows.Row]:
                return connection.execute(
                    "SELECT * FROM tombstones WHERE (change, uid) > (?, ?) ORDER BY change, uid LIMIT ?",
                    (*values, BATCH),
                ).fetchall()

            found = self._read(query)
            yield from map(rows.to_tombstone, found)
            if len(found) < BATCH:
                return
            after = (found[-1][1], found[-1][0])

    def intents(self) -> list[Intent]:
        def query(connection: sqlite3.Connection) -> list[Intent]:
            found = connection.execute(
                "SELECT record, owner FROM intents INDEXED BY intents_open WHERE outcome IS NULL ORDER BY change"
            )
            return [rows.to_intent(row) for row in found]

        return self._read(query)

    # -- what was seen, tried and done -----------------------------------------------------------------------------

    def observations(self, member: str | None = None) -> list[Observation]:
        where, values = ("1", ()) if member is None else ("member = ?", (member,))
        statement = f"SELECT {rows.OBSERVATION} FROM observations WHERE {where} ORDER BY boot_time"
        found = self._read(lambda connection: connection.execute(statement, values).fetchall())
        return [rows.to_observation(row) for row in found]

    def lease_held(self, name: str) -> bool:
        statement = "SELECT owner, expires FROM leases WHERE name = ?"
        found = self._read(lambda connection: connection.execute(statement, (name,)).fetchone())
        owner, expires = found or (None, 0.0)
        return owner is not None and expires > self._clock.boot() and self.owner_alive(owner)

    def logins(self) -> list[LoginRecord]:
        statement = f"SELECT {rows.LOGIN} FROM logins ORDER BY member, source"
        return [rows.to_login(row) for row in self._read(lambda connection: connection.execute(statement).fetchall())]

    def events(self, *, limit: int = 100, since: int = 0) -> list[Event]:
        statement = "SELECT * FROM events WHERE number > ? ORDER BY number DESC LIMIT ?"
        found = self._read(lambda connection: connection.execute(statement, (since, limit)).fetchall())
        return [rows.to_event(row) for row in reversed(found)]


def _object(connection: sqlite3.Connection, uid: bytes) -> ObjectRecord | None:
    found = connection.execute(f"SELECT {rows.OBJECT} FROM objects WHERE uid = ?", (uid,)).fetchone()
    return None if found is None else rows.to_object(found)


def _placement(connection: sqlite3.Connection, uid: bytes) -> tuple[dict[str, Copy], dict[str, OwedRow]]:
    found = connection.execute(f"SELECT {rows.COPY} FROM copies WHERE uid = ?", (uid,))
    copies = {row[0]: rows.to_copy(row) for row in found}
    return copies, {row.member: row for row in rows.load_owed(connection, "w.uid = ?", (uid,))}


def _narrowest(attributes: Mapping[int, bytes]) -> tuple[str, tuple[Any, ...]]:
    """The condition with the best index. Without statistics SQLite would take class and key type: two columns."""
    id_, label = attributes.get(rows.ID), attributes.get(rows.LABEL)
    if id_ and label is not None:
        return "cka_id = ? AND label = ?", (id_, label)
    if id_:
        return "cka_id = ?", (id_,)
    if label:
        return "label = ?", (label,)
    conditions = ["1"]
    values: list[Any] = []
    for column, type_ in (("class", rows.CLASS), ("key_type", rows.KEY_TYPE)):
        packed = attributes.get(type_)
        if packed is not None and len(packed) == 8:
            conditions.append(f"{column} = ?")
            values.append(rows.signed(int.from_bytes(packed, sys.byteorder)))
    return " AND ".join(conditions), tuple(values)
