"""What was told, kept in the journal's event log: who takes over goes on from there, and tells nothing twice."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from hagroup.config.logging import get_logger
from hagroup.core.watch import Told, WatchEvent
from hagroup.journal.api import Journal

log = get_logger(__name__)

KIND = "watchdog"
_SEARCHED = 5000
"""Newest events of the journal that are searched."""


def recall(journal: Journal) -> Told:
    """The newest that was written; an empty one where there is none."""
    for event in reversed(journal.events(limit=_SEARCHED)):
        if event.kind == KIND and "told" in event.data:
            try:
                return msgspec.json.decode(event.data["told"], type=Told)
            except msgspec.DecodeError as error:  # of another version: what is wrong now is told once more
                log.warning("watchdog.memory-not-read", reason=str(error))
                return Told()
    return Told()


def remember(journal: Journal, told: Told, events: Sequence[WatchEvent]) -> None:
    """Durable when it returns. Comes before the telling, with what is to be told, so that a crash loses nothing."""
    text = "; ".join(event.text for event in events) or "all of the above was delivered"
    member = events[0].member if len(events) == 1 else None
    journal.event(KIND, text, member=member, data={"told": msgspec.json.encode(told).decode()})
