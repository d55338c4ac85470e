"""Times of attempts that other hosts wrote, as this host may use them.

Boot times of two hosts cannot be compared, and wall clocks are not to be trusted. So what another host wrote counts
from when this process saw it first: never earlier than it was, and the late window only becomes longer.
"""

from __future__ import annotations

from collections.abc import Collection

from msgspec.structs import replace

from hagroup.core.clock import Clock
from hagroup.core.records import Attempt, OwedRow
from hagroup.journal.etcd_keys import Document


class SeenTimes:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seen: dict[tuple[bytes, str, int, bool], float] = {}

    def localised(self, document: Document) -> Document:
        if document.boot == self._clock.boot_id() or not any(row.attempts for row in document.owed.values()):
            return document
        return replace(document, owed={name: self._row(row) for name, row in document.owed.items()})

    def _row(self, row: OwedRow) -> OwedRow:
        return replace(row, attempts=tuple(self._attempt(row, one) for one in row.attempts))

    def _attempt(self, row: OwedRow, one: Attempt) -> Attempt:
        def first(doubtful: bool) -> float:
            return self._seen.setdefault((row.uid, row.member, one.number, doubtful), self._clock.boot())

        return replace(one, asked=first(False), doubt_since=None if one.doubt_since is None else first(True))

    def forget(self, uids: Collection[bytes]) -> None:
        """Nothing is owed for them any more."""
        for key in [key for key in self._seen if key[0] in uids]:
            del self._seen[key]
