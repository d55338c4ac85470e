"""Ghosts: what a write that was cut off leaves on a token, an object without a value (DESIGN.md 8, traps 3 and 4).

SoftHSM makes an object in steps: a file, the class, every attribute with its default (so it is not on the token yet),
the template, at last the value. And it fills in defaults where some are missing when somebody reads. So after a crash
any of these states may be found.
"""

from __future__ import annotations

from collections.abc import Collection

from hagroup.config.logging import get_logger
from hagroup.core.attributes import CKA, CKO
from hagroup.core.calls import Ckr, Handle
from hagroup.core.ckr import CKR
from hagroup.core.records import Locator
from hagroup.engine.proof import is_empty
from hagroup.engine.stored_records import RECORD_LABEL
from hagroup.engine.token_contents import OWN_LABEL, InventoryEntry, inventory
from hagroup.journal.api import Journal
from hagroup.members.api import Connection

log = get_logger(__name__)


def sweep(
    connection: Connection, journal: Journal, member: str, *, mine: Collection[bytes] = (), timeout: float
) -> bool:
    """Destroy the ghosts on a token. False: not now, somebody is writing there, and one may be what he writes.

    :param mine: UIDs of rows that the caller claimed, and has asked for nothing yet.

    The order counts: what was a ghost before nobody was found writing, and is one still, will not become an object.
    """
    found = _ghosts(connection, journal, timeout)
    if not found:
        return True
    if journal.being_changed(member):
        return False
    for row in journal.owed(member):
        if row.uid not in mine and any(
            one.doubt_since is None and journal.owner_alive(one.owner) for one in row.attempts
        ):
            return False
    for handle in found & _ghosts(connection, journal, timeout):
        try:
            connection.destroy(handle, timeout=timeout)
            log.warning("member.ghost-destroyed", member=member)
        except Ckr as error:
            if error.rv != CKR.OBJECT_HANDLE_INVALID:  # else somebody was faster
                raise
    return True


def _ghosts(connection: Connection, journal: Journal, timeout: float) -> set[Handle]:
    locators = {record.locator for record in journal.objects()}
    names = {(one.object_class, one.label) for one in locators}
    names |= {(one.object_class, one.label) for tombstone in journal.tombstones() for one in tombstone.locators}
    entries = inventory(connection, timeout=timeout)
    shown = {entry.id for entry in entries if entry.own and entry.object_class == CKO.DATA and entry.id}
    return {entry.handle for entry in entries if _is_ghost(connection, entry, locators, names, shown, timeout)}


def _is_ghost(
    connection: Connection,
    entry: InventoryEntry,
    locators: Collection[Locator],
    names: Collection[tuple[int, bytes]],
    shown: Collection[bytes],
    timeout: float,
) -> bool:
    """:param locators: of the group's objects; whether these are whole is another question (``Replicator.install``).
    :param names: class and label of those, and of what was destroyed.
    :param shown: CKA_OBJECT_ID of the group's own data objects there: what each of them is.
    """
    if entry.object_class is None:
        return True
    ours = entry.label.startswith(OWN_LABEL) or (entry.object_class, entry.label) in names
    if entry.token and entry.label and not ours:
        return False  # a stranger: others put it there, and may see more of it
    if (entry.own and entry.id) or entry.locator in locators:
        return False
    try:
        if entry.own and entry.object_class == CKO.DATA:
            if entry.label.startswith((RECORD_LABEL, *(one + b":" for one in shown))):
                return True  # CKA_OBJECT_ID is written last: it was cut off before that
            return connection.get(entry.handle, [int(CKA.VALUE)], timeout=timeout)[0].get(CKA.VALUE) == b""
        return is_empty(connection, entry.handle, entry.object_class, entry.key_type, timeout=timeout)
    except Ckr as error:
        if error.rv in (CKR.OBJECT_HANDLE_INVALID, CKR.KEY_HANDLE_INVALID):
            return False  # gone meanwhile
        raise
