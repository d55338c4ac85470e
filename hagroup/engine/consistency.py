"""Whether the journal agrees with itself: what ``ha-admin journal verify`` looks at."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec

from hagroup.core.records import EVENT_LOG_BROKEN, EVENT_LOG_WHOLE, Event, ObjectState, OwedKind
from hagroup.journal.api import Journal

_EVERYTHING = 2**31
JOURNAL_REBUILT = "journal rebuilt"
"""Kind of the event with which a journal that was made anew begins its own chain: what was wrong before is over."""


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked at; fields are added, never renamed."""

    objects: int
    tombstones: int
    owed: int
    events: int
    sealed: int
    """Number of the last event that the seal covers."""
    problems: list[str]


def broken_events(events: list[Event], *, after: int = 0) -> list[str]:
    """What is wrong with the event log after that number, in one sentence each: numbers that are missing."""
    return [
        f"event {before.number + 1} is missing: {behind.number} follows {before.number}"
        for before, behind in pairwise(events)
        if behind.number != before.number + 1 and behind.number > after
    ]


def event_log(journal: Journal) -> list[str]:
    """The watchdog's question: what is wrong with the event log as a whole, now. Whoever seals it checks the seals
    before it and says in the log itself what was wrong with them.

    :raises JournalUnavailable: it cannot be read.
    """
    events = journal.events(limit=_EVERYTHING)
    return broken_events(events) + open_findings(events)


def open_findings(events: Sequence[Event]) -> list[str]:
    """What was said to be wrong with the sealed events, and is not over: they were not put back, nor the journal made
    anew."""
    over = max((event.number for event in events if event.kind in (JOURNAL_REBUILT, EVENT_LOG_WHOLE)), default=0)
    return [event.text for event in events if event.kind == EVENT_LOG_BROKEN and event.number > over]


def check(journal: Journal) -> Checked:
    """A running application may change the journal meanwhile: what it just did is looked at again."""
    problems: list[str] = []
    names = {member.name for member in journal.members()}
    seal = journal.group().seal
    events = journal.events(limit=_EVERYTHING)
    sealed = 0 if seal is None else seal.number
    problems += broken_events(events, after=sealed)  # up to the seal, the seal's check tells
    objects = {record.uid: record for record in journal.objects()}
    tombstones = {tombstone.uid for tombstone in journal.tombstones()}
    for uid, record in objects.items():
        if uid in tombstones and journal.object(uid) is not None:
            problems.append(f"object {uid.hex()} has a record and a tombstone")
        copies, owed = journal.placement(uid)
        lacking = names - set(copies) - set(owed)
        if record.state is ObjectState.LIVE and lacking and journal.object(uid) is not None:
            problems.append(f"object {uid.hex()} is neither on {', '.join(sorted(lacking))} nor owed there")
    rows = journal.owed()
    for row in rows:
        there = journal.object(row.uid) is not None
        gone = journal.tombstone(row.uid) is not None
        if row.kind is OwedKind.DESTROY and not gone:
            problems.append(f"{row.member} owes the end of {row.uid.hex()}, which was not destroyed")
        elif row.kind is not OwedKind.DESTROY and not there and not gone:
            problems.append(f"{row.member} owes {row.uid.hex()}, which does not exist")
        if row.member not in names and row.member not in {member.name for member in journal.members()}:
            problems.append(f"{row.member} owes {row.uid.hex()} and is no member")
    return Checked(
        objects=len(objects),
        tombstones=len(tombstones),
        owed=len(rows),
        events=len(events),
        sealed=sealed,
        problems=problems,
    )
