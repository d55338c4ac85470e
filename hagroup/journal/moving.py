"""A journal's whole content: read for one that takes its place, and the steps of a move, for every backend.

What a move takes along is what a crash of every program at that instant would leave: open intents and rows that may
still be executed by members go with the rest, and are finished or undone by whoever opens the new journal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import asdict, replace

from hagroup.core.records import Attempt, GroupRecord, MemberRecord, OwedKind, OwedRow
from hagroup.errors import JournalUnavailable
from hagroup.journal.api import Contents, Journal
from hagroup.journal.epoch import new_epoch
from hagroup.journal.sealed import Sealed, Why
from hagroup.journal.transaction import Writer, one_transaction

_EVERYTHING = 2**31
_BEGINNING = 1
"""The change number of all that a journal begins with: numbers of another backend mean nothing in it."""


class Moving(Writer):
    """The part of a journal that lets another take its place. For one who opened it ``for_moving``."""

    @one_transaction
    def begin_move(self, to: str, *, at_once: bool = False) -> Sealed | None:
        """From here on nothing is changed in it. May be done twice.

        :param at_once: else None where some change is just under way: whoever waits for a member's answer could not
            tell it any more, and it would be in doubt for long.
        """
        with self._write() as t:
            if t.sealed is None and not at_once and t.under_way():
                return None
            found = t.sealed or Sealed(Why.MOVING, to, new_epoch(t.group().epoch))
            t.seal(found)
            return found

    @one_transaction
    def end_move(self) -> None:
        """For good."""
        with self._write() as t:
            if t.sealed is not None:
                t.seal(replace(t.sealed, why=Why.MOVED))

    @one_transaction
    def open_up(self) -> None:
        """It is complete: it takes changes from here on. May be done twice."""
        with self._write() as t:
            if t.sealed is not None and t.sealed.why is Why.MAKING:
                t.seal(None)

    @one_transaction
    def cancel_move(self) -> None:
        with self._write() as t:
            if t.sealed is not None and t.sealed.why is not Why.MOVING:
                raise JournalUnavailable(f"the journal was moved to {t.sealed.other} already: nothing was changed")
            t.seal(None)


def everything(journal: Journal, epoch: str) -> tuple[GroupRecord, list[MemberRecord], Contents]:
    """What the journal holds, as a new one in that epoch begins with."""
    group, members = journal.view()
    kept = [replace(one, low=0, announced=0, confirmed=0) for one in members]
    contents = Contents(
        epoch_before=group.epoch,
        epoch=epoch,
        change=_BEGINNING,
        seal=group.seal,
        rotation=group.rotation,
        cleared=group.cleared,
        **{name: list(items) for name, items in _parts(journal, members).items()},  # type: ignore[arg-type]
    )
    return group, kept, contents


def _parts(journal: Journal, members: Iterable[MemberRecord]) -> dict[str, Iterable[object]]:
    """The lists of :class:`Contents`; what there is most of is read when it is asked for."""
    return {
        "records": (replace(one, change=_BEGINNING) for one in journal.objects()),
        "copies": (copy for member in members for copy in journal.copies(member.name)),
        "tombstones": (replace(one, change=_BEGINNING) for one in journal.tombstones()),
        "owed": map(_moved, journal.owed()),
        "intents": (replace(one, change=_BEGINNING) for one in journal.intents()),
        "logins": journal.logins(),
        "events": journal.events(limit=_EVERYTHING),
    }


def _moved(row: OwedRow) -> OwedRow:
    """Numbers of attempts tell them apart from others in the row, and come from changes: none like these comes."""
    attempts = tuple(replace(one, number=-place) for place, one in enumerate(row.attempts, 1))
    return replace(row, change=_BEGINNING, attempts=attempts)


class Digest(Struct, frozen=True, kw_only=True):
    """By which two journals are compared without holding both in memory."""

    sums: dict[str, tuple[int, int]]
    """Of each list: how many, and a sum over their digests that does not depend on their order."""
    head: tuple[object, ...]
    group: tuple[object, ...]


def digest_of(group: GroupRecord, members: Sequence[MemberRecord], contents: Contents) -> Digest:
    """Of what was read by :func:`everything`."""
    lists = {name: value for name, value in asdict(contents).items() if isinstance(value, list)}
    head = (contents.seal, contents.rotation, contents.cleared)
    return Digest(sums=_sums(lists), head=head, group=(group.serial, contents.epoch, *members))


def digest(journal: Journal) -> Digest:
    """The same, of a journal that is read piece by piece."""
    group, members = journal.view()
    kept = (replace(one, low=0, announced=0, confirmed=0) for one in members)
    head = (group.seal, group.rotation, group.cleared)
    return Digest(sums=_sums(_parts(journal, members)), head=head, group=(group.serial, group.epoch, *kept))


def difference(one: Digest, other: Digest) -> str | None:
    """What two journals do not agree in; None: they hold the same."""
    if one.group != other.group:
        return "group, epoch or members"
    for name, (count, total) in other.sums.items():
        if one.sums[name] != (count, total):
            return f"{name}: {one.sums[name][0]} and {count}"
    return None if one.head == other.head else "the head"


def _sums(lists: Mapping[str, Iterable[object]]) -> dict[str, tuple[int, int]]:
    found = {}
    for name, items in lists.items():
        count = total = 0
        for item in items:
            count += 1
            total += int.from_bytes(hashlib.sha256(_shown(item).encode()).digest(), "big")
        found[name] = (count, total)
    return found


def _shown(item: object) -> str:
    if isinstance(item, OwedRow):
        # Another host's boot times are told as of when they were first seen.
        attempts = tuple(_timeless(one) for one in item.attempts)
        item = replace(item, locators=tuple(sorted(item.locators, key=repr)), attempts=attempts)
    return repr(item)


def _timeless(one: Attempt) -> Attempt:
    return replace(one, asked=0.0, doubt_since=None if one.doubt_since is None else 0.0)


def owed_at_first(contents: Contents, members: Sequence[str]) -> list[OwedRow]:
    """The rows that a journal begins with: those that are known, or one for each object that a member may not have."""
    if contents.owed is not None:
        return contents.owed
    held = {(one.member, one.uid) for one in contents.copies}
    return [
        OwedRow(
            member=member,
            uid=record.uid,
            kind=OwedKind.INSTALL,
            revision=record.revision,
            owner=None,
            locators=(),
            reason=None,
            change=contents.change + 1,
            asked_before=True,
        )
        for record in contents.records
        for member in members
        if (member, record.uid) not in held
    ]
