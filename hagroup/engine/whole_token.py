"""All of a token against the journal: what differs is owed (DESIGN.md 4.6).

Others go on meanwhile, and a large token takes a while to read. So only what the journal says before it is read, and
still says when all was compared, is held against what the token shows: what was made, changed or destroyed between is
the business of who did it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from hagroup.config.logging import get_logger
from hagroup.core.records import Copy, Locator, ObjectRecord, ObjectState, OwedKind, OwedRow, Tombstone
from hagroup.engine import recent, replica
from hagroup.engine.member import Life, Member
from hagroup.engine.roster import Roster
from hagroup.engine.stored_records import RECORD_LABEL
from hagroup.engine.token_contents import InventoryEntry
from hagroup.journal.api import Journal

log = get_logger(__name__)

_AT_ONCE = 500


def owe_what_differs(
    roster: Roster, journal: Journal, member: Member, life: Life, *, with_record: bool, timeout: float
) -> bool:
    """Nothing on the token is changed.

    :param with_record: whether sealed records are kept beside objects. Where a mirror had them, none is there yet.
    False: the token went away meanwhile, or is looked at again, and nothing is concluded from what it did not show.
    """
    return _Comparison(roster, journal, member, life, with_record, timeout).owe()


class _Comparison:
    def __init__(
        self, roster: Roster, journal: Journal, member: Member, life: Life, with_record: bool, timeout: float
    ) -> None:
        self._roster, self._journal, self._member, self._life = roster, journal, member, life
        self._wants_record, self._timeout = with_record, timeout
        owed = {row.uid for row in journal.owed(member.name)}
        self._settled: Mapping[bytes, Copy] = {
            copy.uid: copy for copy in journal.copies(member.name) if copy.uid not in owed
        }
        self._buried = {stone.uid for stone in journal.tombstones() if stone.uid not in owed}
        self._entries = replica.inventory(life.connection, timeout=timeout)  # after that was read
        self._with_record = {one.id for one in self._entries if one.own and one.label.startswith(RECORD_LABEL)}
        self._by_locator: dict[Locator, list[int]] = {}
        for entry in self._entries:
            if not entry.own and not entry.ghost:
                self._by_locator.setdefault(entry.locator, []).append(entry.handle)

    def owe(self) -> bool:
        journal, name = self._journal, self._member.name
        found = [*self._to_be_looked_for(), *self._lacking(), *self._back()]
        if found and not self._roster.is_still_whole(self._member, self._life):
            return False
        rows = [(name, uid, kind) for uid, kind in found if self._is_still_so(uid, kind)]
        lost = [uid for _, uid, kind in rows if kind is OwedKind.INSTALL and uid in self._settled]
        hidden = [recent.may_be_hidden(self._roster, journal, self._member, self._life, uid) for uid in lost]
        if any(hidden):
            return False
        back = [row for row in rows if row[2] is OwedKind.DESTROY]
        if back:
            recent.report(journal, name, back)
        for start in range(0, len(rows), _AT_ONCE):
            journal.owe(rows[start : start + _AT_ONCE], reason=None)
        log.info("member.inventory", member=name, objects=len(self._entries), owed=len(rows))
        return True

    def _is_still_so(self, uid: bytes, kind: OwedKind) -> bool:
        record, _, owed = self._journal.object_with_placement(uid)
        row = owed.get(self._member.name)
        if kind is OwedKind.DESTROY:
            return record is None and row is None
        if row is not None:
            return self._is_left(row)
        return recent.is_as_before(self._journal, self._member.name, uid, self._settled.get(uid))

    def _to_be_looked_for(self) -> Iterator[tuple[bytes, OwedKind]]:
        """Owed already, from an earlier membership: looked for before it is made. Or a change of what is not there:
        were it taken back, the member would count as having the object."""
        for row in self._journal.owed(self._member.name):
            record = self._journal.object(row.uid)
            there = record is not None and record.locator in self._by_locator
            if record is not None and self._is_left(row) and (there or row.kind is OwedKind.SET):
                yield row.uid, OwedKind.INSTALL

    def _is_left(self, row: OwedRow) -> bool:
        """Not just being made by somebody."""
        return row.kind is OwedKind.SET or not any(
            one.doubt_since is None and self._journal.owner_alive(one.owner) for one in row.attempts
        )

    def _lacking(self) -> Iterator[tuple[bytes, OwedKind]]:
        """One that is being created too: whoever brings it to life counts the members that confirmed it."""
        owed = {row.uid for row in self._journal.owed(self._member.name)}
        for record in self._journal.objects():
            wanted = record.state is ObjectState.LIVE or record.uid in self._settled
            if wanted and record.uid not in owed and not self._has_it(record):
                yield record.uid, OwedKind.INSTALL

    def _has_it(self, record: ObjectRecord) -> bool:
        if self._wants_record and record.uid not in self._with_record:
            return False
        connection = self._life.connection
        matching = [
            handle
            for handle in self._by_locator.get(record.locator, ())
            if replica.is_this(connection, handle, record, timeout=self._timeout)
        ]
        return len(matching) == 1 and replica.agrees(connection, matching[0], record, timeout=self._timeout)

    def _back(self) -> Iterator[tuple[bytes, OwedKind]]:
        """Destroyed, and there (again): the object, or its sealed record alone, where the token was put back to the
        middle of its making."""
        live = {record.locator for record in self._journal.objects()}
        strangers = [entry for entry in self._entries if not (entry.own or entry.ghost or entry.locator in live)]
        for stone in self._journal.tombstones():
            if stone.uid in self._buried and (
                stone.uid in self._with_record
                or any(locator in self._by_locator for locator in stone.locators)
                or self._was_called_otherwise(stone, strangers)
            ):
                yield stone.uid, OwedKind.DESTROY

    def _was_called_otherwise(self, stone: Tombstone, strangers: Iterable[InventoryEntry]) -> bool:
        """A restored token may hold an object that was destroyed since, under a label or id that it had before."""
        kinds = {(locator.object_class, locator.key_type) for locator in stone.locators}
        return any(
            replica.has_fingerprint(self._life.connection, entry, stone.fingerprint, timeout=self._timeout)
            for entry in strangers
            if (entry.object_class, entry.key_type) in kinds
        )
