"""Other objects of the group with one value in one place (DESIGN.md 4.3: a tombstone condemns a UID, not a value).

A certificate is destroyed while a member is away, and imported again: on that member two objects look the same, and
one of them has to go. Which one cannot be told, so where there are more than there should be, all go and the live ones
are made anew; where there are not, none goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from hagroup.core.attributes import CKA, CKO, pack_ulong
from hagroup.core.calls import Handle
from hagroup.core.records import IntentKind, Locator, ObjectRecord, OwedKind, OwedRow
from hagroup.journal.api import Journal


class Occupied(Exception):
    """Somebody is just making an object of the same value there: nothing was destroyed, look again later."""


def others_at(journal: Journal, uid: bytes, locators: Iterable[Locator]) -> list[ObjectRecord]:
    """Live and creating objects other than ``uid`` whose locator is one of these, or is just becoming one.

    Ask *after* the member was searched: what was found there then has its record by now.
    """
    places = set(locators)
    found: dict[bytes, ObjectRecord] = {}
    becoming: dict[bytes, Locator] = {}
    for intent in journal.intents():  # first: what ends meanwhile is in the records by the time they are searched
        for other in intent.uids if intent.kind in (IntentKind.CREATE, IntentKind.SET) else ():
            record = journal.object(other)
            if record is not None:
                found[other] = record
                if intent.kind is IntentKind.SET:
                    becoming[other] = intent.outcome(record).locator
    for place in places:
        wanted: dict[int, bytes] = {CKA.CLASS: pack_ulong(place.object_class), CKA.LABEL: place.label}
        if place.id and place.object_class != CKO.DATA:
            wanted[CKA.ID] = place.id
        named = journal.object(place.id)  # ``member_id`` is a UID
        for record in [*journal.search(wanted), *([] if named is None else [named])]:
            found[record.uid] = record
    return [
        record
        for record in found.values()
        if record.uid != uid and (record.locator in places or becoming.get(record.uid) in places)
    ]


def destroyable(
    journal: Journal,
    member: str,
    handles: Sequence[Handle],
    others: Sequence[ObjectRecord],
    is_one: Callable[[Handle, ObjectRecord], bool],
) -> list[Handle]:
    """Which of ``handles``, found on ``member`` as one object's, may be destroyed although ``others`` may claim them.

    :param is_one: whether what is behind a handle has the value of a record.
    :raises Occupied: one of the others is just being made there.
    """
    claimants = [record for record in others if any(is_one(handle, record) for handle in handles)]
    if not claimants:
        return list(handles)
    there: list[ObjectRecord] = []
    for record in claimants:
        copies, owed = journal.placement(record.uid)
        row = owed.get(member)
        if row is not None and _under_way(journal, row):
            raise Occupied
        if member in copies:
            there.append(record)
    if len(handles) <= len(there):
        return []
    journal.owe([(member, record.uid, OwedKind.INSTALL) for record in there])
    return list(handles)


def _under_way(journal: Journal, row: OwedRow) -> bool:
    return any(one.doubt_since is None and journal.owner_alive(one.owner) for one in row.attempts)
