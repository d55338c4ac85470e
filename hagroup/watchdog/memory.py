"""What was told, kept in the journal's event log: who takes over goes on from there, and tells nothing twice.

Whoever was stopped and wakes up may still write what it had told before another one took over. So each entry has the
number of the lease under which it was told (it grows with every holder), and of a lower one nothing is believed.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from hagroup.config.logging import get_logger
from hagroup.core.records import Event, Lease
from hagroup.core.watch import DELIVERED, Told, WatchEvent
from hagroup.engine.consistency import JOURNAL_REBUILT
from hagroup.journal.api import Journal

log = get_logger(__name__)

KIND = "watchdog"
_TOLD, _FENCE = "told", "lease"
_SEARCHED = 5000
"""Newest events of the journal that are searched."""


def recall(journal: Journal) -> Told:
    """What was told last; an empty one where there is none."""
    newest: Event | None = None
    for event in reversed(journal.events(limit=_SEARCHED)):
        if event.kind == KIND and _TOLD in event.data and (newest is None or _fence(event) > _fence(newest)):
            newest = event
        if event.kind == JOURNAL_REBUILT and newest is not None:
            break  # its leases begin anew
    if newest is None:
        return Told()
    try:
        return msgspec.json.decode(newest.data[_TOLD], type=Told)
    except msgspec.DecodeError as error:  # of another version: what is wrong now is told once more
        log.warning("watchdog.memory-not-read", reason=str(error))
        return Told()


def _fence(event: Event) -> int:
    return int(event.data.get(_FENCE, "0"))


def remember(journal: Journal, told: Told, events: Sequence[WatchEvent], *, lease: Lease) -> None:
    """Durable when it returns. Comes before the telling, with what is to be told, so that a crash loses nothing.

    :param lease: of the active watchdog, under which all this is told.
    """
    text = "; ".join(event.text for event in events) or DELIVERED
    member = events[0].member if len(events) == 1 else None
    data = {_TOLD: msgspec.json.encode(told).decode(), _FENCE: str(lease.token)}
    journal.event(KIND, text, member=member, data=data)
