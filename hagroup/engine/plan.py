"""What a resync would do, and why: read from the journal alone; nothing is changed, no member is asked."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from hagroup.core.attributes import CKA
from hagroup.core.records import Copy, MemberRecord, Membership, OwedKind, OwedRow
from hagroup.journal.api import Journal


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to be done on one member; fields are added, never renamed."""

    member: str
    action: str
    """``install``, ``set``, ``destroy``, ``inventory`` or ``finish``."""
    uid: str | None
    label: str
    reason: str


def plan(journal: Journal) -> list[Step]:
    """In the order in which it would be done: members one after the other, deletes first."""
    steps = [
        Step(
            member="group",
            action="finish",
            uid=intent.uids[0].hex(),
            label=_label(journal, intent.uids[0]),
            reason=f"a process died, or is at work, in the middle of a {intent.kind.value}: finished, or undone whole",
        )
        for intent in journal.intents()
    ]
    order = {OwedKind.DESTROY: 0, OwedKind.INSTALL: 1, OwedKind.SET: 2}
    for member in journal.members():
        if member.membership in (Membership.JOINING, Membership.OUT_OF_SYNC):
            why = member.reason or "it is joining"
            reason = f"{why}: everything on its token is compared before it serves"
            steps.append(Step(member=member.name, action="inventory", uid=None, label="", reason=reason))
        rows = sorted(journal.owed(member.name), key=lambda row: (order[row.kind], row.change))
        steps += [_step(journal, member, row) for row in rows]
    return steps


def _step(journal: Journal, member: MemberRecord, row: OwedRow) -> Step:
    copies, _ = journal.placement(row.uid)
    return Step(
        member=member.name,
        action=row.kind.value,
        uid=row.uid.hex(),
        label=_label(journal, row.uid, row),
        reason=_reason(journal, member, row, copies.get(member.name)),
    )


def _label(journal: Journal, uid: bytes, row: OwedRow | None = None) -> str:
    record = journal.object(uid)
    if record is not None:
        return record.attributes.get(CKA.LABEL, b"").decode(errors="replace")
    if row is not None and row.locators:
        return row.locators[0].label.decode(errors="replace")
    return ""


def _reason(journal: Journal, member: MemberRecord, row: OwedRow, copy: Copy | None) -> str:
    if row.settled:
        return "done; an older call without an answer may still execute, so it is looked at again"
    if row.kind is OwedKind.DESTROY:
        tombstone = journal.tombstone(row.uid)
        when = "" if tombstone is None else f" at {_time(tombstone.time)}"
        reason = f"destroyed on the group{when}"
    elif row.kind is OwedKind.SET:
        reason = f"attributes changed: revision {row.revision}, it has {copy.revision if copy else 'none'}"
    elif member.membership is Membership.JOINING:
        reason = "the member is joining"
    elif copy is not None:
        reason = "lost or damaged there: made anew"
    else:
        reason = "made while the member did not take it"
    if row.reason:
        reason += f"; refused there: {row.reason}"
    elif row.doubt_since is not None:
        reason += "; it was asked and did not answer"
    elif member.membership is Membership.QUARANTINED:
        reason += "; not before the member is resumed"
    return reason


def _time(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%d %H:%M UTC")
