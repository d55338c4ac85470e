"""Ghosts: what a write that was cut off leaves on a token, an object without anything (DESIGN.md 8, traps 3 and 4)."""

from __future__ import annotations

from collections.abc import Collection

from hagroup.config.logging import get_logger
from hagroup.core.attributes import CKA
from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.engine.token_contents import inventory
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
    entries = inventory(connection, timeout=timeout)
    found = [entry.handle for entry in entries if entry.object_class is None]
    if not found:
        return True
    for row in journal.owed(member):
        if row.uid not in mine and any(
            one.doubt_since is None and journal.owner_alive(one.owner) for one in row.attempts
        ):
            return False
    for handle in found:
        try:
            values, _ = connection.get(handle, [int(CKA.CLASS)], timeout=timeout)
            if CKA.CLASS not in values:
                connection.destroy(handle, timeout=timeout)
                log.warning("member.ghost-destroyed", member=member)
        except Ckr as error:
            if error.rv != CKR.OBJECT_HANDLE_INVALID:  # else somebody was faster
                raise
    return True
