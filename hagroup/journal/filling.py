"""What a SQLite journal begins with that takes the place of another."""

from __future__ import annotations

from collections.abc import Sequence

from hagroup.core.records import ObjectState
from hagroup.journal import rows
from hagroup.journal.api import Contents
from hagroup.journal.moving import owed_at_first
from hagroup.journal.sqlite_transaction import SqliteTransaction


def fill(t: SqliteTransaction, contents: Contents, members: Sequence[str]) -> None:
    """Into a journal that has these members and nothing else."""
    t.head.change = contents.change
    marks = ", ".join("?" * len(rows.OBJECT_WRITTEN.split(", ")))
    t.sql.executemany(
        f"INSERT INTO objects ({rows.OBJECT_WRITTEN}) VALUES ({marks})",
        [rows.from_object(one) for one in contents.records],
    )
    t.sql.executemany(
        f"INSERT INTO copies ({rows.COPY}) VALUES (?, ?, ?, ?)", [rows.from_copy(one) for one in contents.copies]
    )
    t.sql.executemany(rows.INSERT_TOMBSTONE, [rows.from_tombstone(one) for one in contents.tombstones])
    t.sql.executemany(
        "INSERT INTO events (number, time, kind, member, text, data) VALUES (?, ?, ?, ?, ?, ?)",
        [
            (one.number or None, one.time, one.kind, one.member, one.text, rows.encode(one.data))
            for one in contents.events
        ],
    )
    t.insert_owed(owed_at_first(contents, members))
    for intent in contents.intents:
        t.add_intent(intent)
    for login in contents.logins:
        t.put_login(login)
    if contents.seal is not None:
        t.put_seal(contents.seal)
    if contents.rotation is not None:
        t.update_identity(rotation=contents.rotation)
    if contents.cleared:
        t.update_identity(cleared=contents.cleared)
    t.announce(members)
    t.head.live = sum(one.state is ObjectState.LIVE for one in contents.records)
    t.head.creating = len(contents.records) - t.head.live
    t.head.tombstones = len(contents.tombstones)
    t.touch_all()
