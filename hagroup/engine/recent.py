"""What a token's own progress does not vouch for (DESIGN.md 4.6): "a token's backlog starts at its own ``low``".

A token that was put back to an earlier state shows an earlier manifest, but only tombstones and attribute changes move
that one's ``high``. What was created since is missing there, and no row in the journal says so. So in each new life all
that moved since the ``low`` of the token's own manifest is looked for; then the manifest is brought up to date.
"""

from __future__ import annotations

from hagroup.core.records import OBJECT_MISSING, OBJECT_REAPPEARED, Copy, ObjectRecord, OwedKind
from hagroup.engine import about, manifest, replica
from hagroup.engine.member import Life, Member
from hagroup.engine.roster import Roster
from hagroup.engine.stored_records import has_its_record
from hagroup.engine.twins import others_at
from hagroup.engine.view import View
from hagroup.journal.api import Journal

_FIRST_REVISION = 1
MOST = 200
"""Looking for more objects than this one by one costs more than a full inventory."""
STEP = 64
"""The manifest's ``low`` follows the journal's in steps of so many changes: each is a write to the token."""


def moved_since_low(journal: Journal, view: View, life: Life) -> list[bytes] | None:
    """UIDs of what has to be looked for in this life; None: too many, or another epoch."""
    moved = journal.changes(life.manifest_low, view.group.epoch)
    return None if moved.everything or len(moved.uids) > MOST else sorted(moved.uids)


def missing_of(
    journal: Journal, member: Member, life: Life, uids: list[bytes], *, with_record: bool, timeout: float
) -> list[tuple[str, bytes, OwedKind]]:
    """Rows for what the journal has on the member and is not there as it should be, or is there although it was
    destroyed.

    What is still being created counts as well: whoever brings it to life counts the members that confirmed it.

    :param with_record: whether sealed records are kept beside objects.
    """
    rows = []
    for uid in uids:
        record, copies, owed = journal.object_with_placement(uid)
        if member.name in owed:
            continue
        if record is not None:
            copy = copies.get(member.name)
            if (
                copy is not None
                and not _is_there(journal, life, record, with_record=with_record, timeout=timeout)
                and is_as_before(journal, member.name, uid, copy)
            ):
                rows.append((member.name, uid, OwedKind.INSTALL))
            continue
        tombstone = journal.tombstone(uid)
        if tombstone is not None and replica.locate(
            life.connection, tombstone.locators, tombstone.fingerprint, {}, timeout=timeout
        ):
            rows.append((member.name, uid, OwedKind.DESTROY))
    return rows


def is_as_before(journal: Journal, name: str, uid: bytes, copy: Copy | None) -> bool:
    """The object is still to be, and nobody made, changed or lost it on that member since its copy there was read:
    whoever does owes it first, and confirms another copy."""
    record, copies, owed = journal.object_with_placement(uid)
    return record is not None and name not in owed and copies.get(name) == copy


def _is_there(journal: Journal, life: Life, record: ObjectRecord, *, with_record: bool, timeout: float) -> bool:
    """Once, and as it should be.

    An object has its record for as long as it is there (:func:`replica.install`), unless it was changed: then the token
    may have been put back to the middle of that.
    """
    found = replica.locate(life.connection, [record.locator], record.fingerprint, record.attributes, timeout=timeout)
    if len(found) != 1:
        return len(found) > 1 and bool(others_at(journal, record.uid, [record.locator]))
    if record.revision == _FIRST_REVISION:
        return True
    return replica.agrees(life.connection, found[0], record, timeout=timeout) and (
        not with_record or has_its_record(life.connection, record, timeout=timeout)
    )


def may_be_hidden(roster: Roster, journal: Journal, member: Member, life: Life, uid: bytes) -> bool:
    """Another process may have made it since this life began: then the next life looks for it."""
    record = journal.object(uid)
    return record is not None and record.change > life.began and roster.look_again(member, life, uid)


def report(journal: Journal, name: str, rows: list[tuple[str, bytes, OwedKind]]) -> None:
    """Tell what is about to be repaired: the watchdog hands it on to people."""
    back = [uid for _, uid, kind in rows if kind is OwedKind.DESTROY]
    lost = [uid for _, uid, kind in rows if kind is not OwedKind.DESTROY]
    if lost:
        text = f"objects that it lost, or has otherwise than the group: {len(lost)}; they are made anew there"
        journal.event(OBJECT_MISSING, text, member=name, data=about.known(journal, lost))
    if back:
        text = f"objects that were destroyed and are there again: {len(back)}; they are destroyed once more"
        journal.event(OBJECT_REAPPEARED, text, member=name, data=about.known(journal, back))


def raise_low(view: View, member: Member, life: Life, low: int, *, timeout: float) -> None:
    """Everything up to ``low`` is finished on this member: its manifest shows it from now on."""
    assert life.keys is not None
    with member.manifest_lock:
        shown = manifest.compose(view.group, view.members, low=low, high=life.manifest_high)
        manifest.write(life.connection, life.keys, shown, timeout=timeout)
        life.manifest_low = low
