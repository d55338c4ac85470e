"""What was told, kept in the journal's event log: who takes over goes on from there, and tells nothing twice."""

from __future__ import annotations

from collections.abc import Sequence

from hagroup.core.records import Lease
from hagroup.core.watch import DELIVERED, Told, WatchEvent
from hagroup.engine.told import KIND, as_data, told_in
from hagroup.journal.api import Journal

_SEARCHED = 5000
"""Newest events of the journal that are searched."""


def recall(journal: Journal) -> Told:
    """What was told last; an empty one where there is none."""
    return told_in(journal.events(limit=_SEARCHED))


def remember(journal: Journal, told: Told, events: Sequence[WatchEvent], *, lease: Lease) -> None:
    """Durable when it returns. Comes before the telling, with what is to be told, so that a crash loses nothing.

    :param lease: of the active watchdog, under which all this is told.
    """
    text = "; ".join(event.text for event in events) or DELIVERED
    member = events[0].member if len(events) == 1 else None
    journal.event(KIND, text, member=member, data=as_data(told, lease))
