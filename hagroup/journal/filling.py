"""What a SQLite journal begins with that takes the place of a lost one."""

from __future__ import annotations

from collections.abc import Collection

from msgspec.structs import replace

from hagroup.core.records import ObjectState, OwedKind, OwedRow
from hagroup.journal import rows
from hagroup.journal.api import Contents
from hagroup.journal.sqlite_transaction import SqliteTransaction


def fill(t: SqliteTransaction, contents: Contents, members: Collection[str]) -> None:
    """Into a journal that has these members and nothing else."""
    t.head.change = contents.change
    marks = ", ".join("?" * len(rows.OBJECT_WRITTEN.split(", ")))
    t.sql.executemany(
        f"INSERT INTO objects ({rows.OBJECT_WRITTEN}) VALUES ({marks})",
        [rows.from_object(replace(one, state=ObjectState.LIVE, intent=None)) for one in contents.records],
    )
    t.sql.executemany(
        f"INSERT INTO copies ({rows.COPY}) VALUES (?, ?, ?, ?)", [rows.from_copy(one) for one in contents.copies]
    )
    t.sql.executemany(
        "INSERT INTO tombstones VALUES (?, ?, ?, ?, ?)", [rows.from_tombstone(one) for one in contents.tombstones]
    )
    t.sql.executemany(
        "INSERT INTO events (time, kind, member, text, data) VALUES (?, ?, ?, ?, ?)",
        [(one.time, one.kind, one.member, one.text, rows.encode(one.data)) for one in contents.events],
    )
    held = {(one.member, one.uid) for one in contents.copies}
    t.insert_owed(
        [
            OwedRow(
                member=member,
                uid=record.uid,
                kind=OwedKind.INSTALL,
                revision=record.revision,
                owner=None,
                locators=(),
                reason=None,
                change=t.change,
                asked_before=True,
            )
            for record in contents.records
            for member in members
            if (member, record.uid) not in held
        ]
    )
    t.announce(members)
    t.head.live, t.head.tombstones = len(contents.records), len(contents.tombstones)
    t.touch_all()
