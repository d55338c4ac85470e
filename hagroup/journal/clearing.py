"""Emptying the whole group, in a SQLite journal."""

from __future__ import annotations

from msgspec.structs import replace

from hagroup.core.records import IntentKind, Membership
from hagroup.journal import rows
from hagroup.journal.changing import DELETED, abandon
from hagroup.journal.epoch import new_epoch
from hagroup.journal.membership import moved_membership
from hagroup.journal.opened import Opened
from hagroup.journal.transaction import Transaction

CLEARED = "the group was cleared: what it holds of it is deleted before it serves again"


class Clearing(Opened):
    """The part of :class:`SqliteJournal` that empties it."""

    def begin_clear(self) -> str:
        with self._write() as t:
            t.head.epoch = new_epoch(t.head.epoch)
            t.sql.execute("UPDATE identity SET cleared = ?", (t.head.epoch,))
            for member in t.members():
                if member.membership is Membership.ADMITTED:
                    t.put_member(replace(member, membership=Membership.OUT_OF_SYNC, reason=CLEARED, since=t.wall))
            t.touch_all()
            moved_membership(t)
            return t.head.epoch

    def clear_some(self, limit: int = 200) -> list[bytes]:
        with self._write() as t:
            found = t.sql.execute(f"SELECT {rows.OBJECT} FROM objects ORDER BY number LIMIT ?", (limit,)).fetchall()
            for record in map(rows.to_object, found):
                _clear(t, record.uid)
            return [rows.to_object(row).uid for row in found]


def _clear(t: Transaction, uid: bytes) -> None:
    record = t.object(uid)
    if record is None:
        return  # it went with the other half of a pair
    opened = t.intent(record.intent)
    if opened is None or opened[1] is not None:
        t.bury(record, ())
    elif opened[0].kind is IntentKind.CREATE:
        abandon(t, opened[0])
    else:
        t.close_intent(opened[0], DELETED)
        t.bury(record, (opened[0].outcome(record).locator,))
