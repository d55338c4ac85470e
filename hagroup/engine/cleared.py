"""What a token of an epoch before the group was emptied still holds (DESIGN.md 4.6: deleted before it serves).

The journal has a tombstone for all that it knew when it was cleared, and a member owes their destruction like any
other. This is for the rest: objects that the group made and this journal never knew, or knows no more (it had been
restored from an older state). Their sealed records beside them tell what they are.
"""

from __future__ import annotations

from hagroup.config.logging import get_logger
from hagroup.core.calls import Handle
from hagroup.core.records import ObjectRecord
from hagroup.engine import replica
from hagroup.engine.member import Life, Member
from hagroup.engine.stored_records import stored_records
from hagroup.engine.twins import Occupied, destroyable, others_at
from hagroup.engine.view import View
from hagroup.journal.api import Journal

log = get_logger(__name__)


def sweep(journal: Journal, view: View, member: Member, life: Life, *, timeout: float) -> None:
    """Destroy what the token's own records tell of and the journal does not know. Only on a token whose manifest shows
    an epoch from before the group was cleared."""
    if not life.manifest_epoch or life.manifest_epoch >= view.group.cleared:
        return
    assert life.keys is not None
    for record in list(stored_records(life.connection, life.keys, timeout=timeout)):
        if journal.object(record.uid) is None and journal.tombstone(record.uid) is None:
            _remove(journal, member.name, life, record, timeout=timeout)
            log.warning("member.leftover-destroyed", member=member.name, uid=record.uid.hex())


def _remove(journal: Journal, name: str, life: Life, record: ObjectRecord, *, timeout: float) -> None:
    def choose(found: list[Handle]) -> list[Handle]:
        others = others_at(journal, record.uid, [record.locator])
        try:
            return destroyable(journal, name, found, others, is_one) if found else []
        except Occupied:
            return []  # the same value is just being made there, for the group as it is now

    def is_one(handle: Handle, other: ObjectRecord) -> bool:
        return replica.is_this(life.connection, handle, other, timeout=timeout)

    replica.remove(
        life.connection,
        record.uid,
        [record.locator],
        record.fingerprint,
        record.attributes,
        timeout=timeout,
        choose=choose,
    )
