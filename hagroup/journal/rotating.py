"""Changing the domain's keys, in a SQLite journal. What it is for: ``engine/domain_rotation.py``."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from hagroup.core.records import Rotation
from hagroup.journal import rows
from hagroup.journal.membership import moved_membership
from hagroup.journal.opened import Opened
from hagroup.journal.transaction import Transaction


class Rotating(Opened):
    """The part of :class:`SqliteJournal` that goes over to other domain keys."""

    def begin_rotation(
        self, *, domain_key_id: bytes, partition_key_id: bytes, reference: bytes, rotation: Rotation
    ) -> None:
        with self._write() as t:
            group = self._group(t.sql)
            if group.rotation is not None and not group.rotation.finished:
                raise ValueError("the rotation before is not finished")
            if (group.domain_key_id, group.partition_key_id) != (rotation.domain_key_id, rotation.partition_key_id):
                raise ValueError("the keys that are to be replaced are not the present ones")
            t.sql.execute(
                "UPDATE identity SET domain_key_id = ?, partition_key_id = ?, reference = ?, rotation = ?",
                (domain_key_id, partition_key_id, reference, rows.encode(rotation)),
            )
            moved_membership(t)

    def rewrap(self, envelopes: Sequence[tuple[bytes, int, bytes, bytes]]) -> list[bool]:
        with self._write() as t:
            return [_rewrap(t, *one) for one in envelopes]

    def finish_rotation(self) -> None:
        with self._write() as t:
            rotation = self._group(t.sql).rotation
            if rotation is None or rotation.finished:
                return
            t.sql.execute("UPDATE identity SET rotation = ?", (rows.encode(replace(rotation, finished=True)),))
            moved_membership(t)


def _rewrap(t: Transaction, uid: bytes, revision: int, before: bytes, after: bytes) -> bool:
    done = t.sql.execute(
        "UPDATE objects SET envelope = ? WHERE uid = ? AND revision = ? AND envelope = ?",
        (after, uid, revision, before),
    )
    if done.rowcount:
        t.touch(uid)
    return bool(done.rowcount)
