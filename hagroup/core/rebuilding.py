"""What can be known of a group whose journal was lost, decided from what its members and the mirror still show.

Neither loses nor resurrects by a guess: an object that one member holds and another one, which had seen later changes,
does not, may have been destroyed while the first was away, or never have fitted on the second. It is *doubtful*: it
stays where it is, is not served, and a person decides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from hagroup.core.records import Copy, ObjectRecord, Tombstone


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What one reachable member shows."""

    epoch: str
    """Of its manifest; empty: it has none."""
    seen: int
    """Newest change number that its manifest shows."""
    records: list[ObjectRecord]


class Former(msgspec.Struct, frozen=True, kw_only=True):
    """What an older state of the journal, or the mirror, knows."""

    records: list[ObjectRecord] = []
    copies: Mapping[bytes, Collection[str]] = {}
    """Members that had an object, by its UID; the mirror does not know."""
    tombstones: list[Tombstone] = []


class Found(msgspec.Struct, frozen=True, kw_only=True):
    records: list[ObjectRecord]
    copies: list[Copy]
    doubtful: list[tuple[ObjectRecord, str]]
    """With the reason, as a sentence."""
    change: int


def conclude(
    members: Mapping[str, Evidence], former: Former, mirrored: Sequence[ObjectRecord], keep: Collection[bytes]
) -> Found:
    """:param mirrored: records of the mirror: who is there was not destroyed. :param keep: UIDs that a person vouches
    for."""
    newest: dict[bytes, ObjectRecord] = {}
    for record in [*former.records, *mirrored, *(one for member in members.values() for one in member.records)]:
        before = newest.get(record.uid)
        if before is None or before.revision <= record.revision:
            newest[record.uid] = record
    dead = {stone.uid for stone in former.tombstones}
    sure = {record.uid for record in mirrored} | set(keep)
    held = {name: {record.uid: record.revision for record in one.records} for name, one in members.items()}
    latest = max((member.epoch for member in members.values()), default="")
    result = Found(
        records=[],
        copies=[],
        doubtful=[],
        change=max(
            [0]
            + [record.change for record in newest.values()]
            + [stone.change for stone in former.tombstones]
            + [one.seen for one in members.values()]
        ),
    )
    for record in sorted(newest.values(), key=lambda one: (one.change, one.uid)):
        if record.uid in dead:
            continue
        why = "" if record.uid in sure else _doubt(record, members, former, held, latest)
        if why:
            result.doubtful.append((record, why))
            continue
        result.records.append(record)
        result.copies.extend(
            Copy(member=name, uid=record.uid, revision=record.revision, locator=record.locator)
            for name in members
            if held[name].get(record.uid) == record.revision
        )
    return result


def _doubt(
    record: ObjectRecord,
    members: Mapping[str, Evidence],
    former: Former,
    held: Mapping[str, Mapping[bytes, int]],
    latest: str,
) -> str:
    holders = [name for name in members if record.uid in held[name]]
    had = former.copies.get(record.uid, ())
    for name, one in members.items():
        if name in holders:
            continue
        if name in had:
            return f"{name} had it and has it no more: it was destroyed since, or lost there"
        if one.epoch == latest and holders and one.seen >= record.change:
            return (
                f"{', '.join(holders)} has it and {name}, which saw later changes, has not: it was destroyed while "
                "the first was away, or the second never took it"
            )
    return ""
