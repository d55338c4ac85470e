"""What the active watchdog told last, as the journal's event log has it.

Whoever was stopped and wakes up may still write what it had told before another one took over. So each entry has the
number of the lease under which it was told (it grows with every holder), and of a lower one nothing is believed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from hagroup.config.logging import get_logger
from hagroup.core.moves import JOURNAL_MOVED
from hagroup.core.records import Event, Lease
from hagroup.core.watch import Told
from hagroup.engine.consistency import JOURNAL_REBUILT

log = get_logger(__name__)

KIND = "watchdog"
_TOLD, _FENCE = "told", "lease"


def told_in(events: Sequence[Event]) -> Told:
    """What the newest of these events says that counts; an empty one where there is none."""
    newest: Event | None = None
    for event in reversed(events):
        if event.kind == KIND and _TOLD in event.data and (newest is None or _fence(event) > _fence(newest)):
            newest = event
        if event.kind in (JOURNAL_REBUILT, JOURNAL_MOVED) and newest is not None:
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


def as_data(told: Told, lease: Lease) -> Mapping[str, str]:
    """Data of an event that :func:`told_in` reads."""
    return {_TOLD: msgspec.json.encode(told).decode(), _FENCE: str(lease.token)}
