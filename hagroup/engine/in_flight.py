"""Which owed rows some thread of this process is working on now.

The journal knows who claimed a row, not whether he still remembers it. A row that this process claimed and that no
thread of it works on any more (adopted with a dead process's intent; or the journal could not be reached when the
outcome was to be told) would belong to a living owner for ever.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

Row = tuple[str, bytes]
"""(member, UID)."""


class InFlight:
    """Counts the threads at work on each row. ``begin`` comes before the row is claimed, ``end`` after its outcome was
    told; so a row seen as claimed by this process *before* it is found missing here was lost track of."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: Counter[Row] = Counter()

    def begin(self, rows: Iterable[Row]) -> None:
        with self._lock:
            self._rows.update(rows)

    def take(self, rows: Iterable[Row]) -> list[Row]:
        """Begin those that nobody works on; the others are left to whoever does."""
        with self._lock:
            free = [row for row in dict.fromkeys(rows) if row not in self._rows]
            self._rows.update(free)
            return free

    def end(self, rows: Iterable[Row]) -> None:
        with self._lock:
            for row in rows:
                self._rows[row] -= 1
                if self._rows[row] <= 0:
                    del self._rows[row]

    def __contains__(self, row: Row) -> bool:
        return row in self._rows

    def renew_after_fork(self) -> None:
        """In the child: nobody works on anything."""
        self._lock = threading.Lock()
        self._rows.clear()
