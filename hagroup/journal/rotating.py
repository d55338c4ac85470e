"""Changing the domain's keys, for every backend. What it is for: ``engine/domain_rotation.py``."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from hagroup.core.records import Rotation
from hagroup.journal.transaction import Transaction, Writer, one_transaction


class Rotating(Writer):
    """The part of a journal that goes over to other domain keys."""

    @one_transaction
    def begin_rotation(
        self, *, domain_key_id: bytes, partition_key_id: bytes, reference: bytes, rotation: Rotation
    ) -> None:
        with self._write() as t:
            group = t.group()
            if group.rotation is not None and not group.rotation.finished:
                raise ValueError("the rotation before is not finished")
            if (group.domain_key_id, group.partition_key_id) != (rotation.domain_key_id, rotation.partition_key_id):
                raise ValueError("the keys that are to be replaced are not the present ones")
            t.update_identity(
                domain_key_id=domain_key_id, partition_key_id=partition_key_id, reference=reference, rotation=rotation
            )
            t.move_membership()

    @one_transaction
    def rewrap(self, envelopes: Sequence[tuple[bytes, int, bytes, bytes]]) -> list[bool]:
        with self._write() as t:
            return [_rewrap(t, *one) for one in envelopes]

    @one_transaction
    def finish_rotation(self) -> None:
        with self._write() as t:
            rotation = t.group().rotation
            if rotation is None or rotation.finished:
                return
            t.update_identity(rotation=replace(rotation, finished=True))
            t.move_membership()


def _rewrap(t: Transaction, uid: bytes, revision: int, before: bytes, after: bytes) -> bool:
    record = t.object(uid)
    if record is None or (record.revision, record.envelope) != (revision, before):
        return False
    t.update_object(replace(record, envelope=after))
    return True
