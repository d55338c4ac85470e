"""Emptying the whole group, for every backend."""

from __future__ import annotations

from msgspec.structs import replace

from hagroup.core.records import IntentKind, Membership
from hagroup.journal.changing import DELETED, abandon
from hagroup.journal.transaction import Transaction, Writer, one_transaction

CLEARED = "the group was cleared: what it holds of it is deleted before it serves again"


class Clearing(Writer):
    """The part of a journal that empties it."""

    @one_transaction
    def begin_clear(self) -> str:
        with self._write() as t:
            epoch = t.begin_epoch()
            t.update_identity(cleared=epoch)
            for member in t.members():
                if member.membership is Membership.ADMITTED:
                    t.put_member(replace(member, membership=Membership.OUT_OF_SYNC, reason=CLEARED, since=t.wall))
            t.touch_all()
            t.move_membership()
            return epoch

    @one_transaction
    def clear_some(self, limit: int = 200) -> list[bytes]:
        with self._write() as t:
            found = t.some_objects(limit)
            for uid in found:
                _clear(t, uid)
            return found


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
