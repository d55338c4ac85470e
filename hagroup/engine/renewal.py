"""After the domain's keys were changed: on one member nothing stays under the replaced ones, then these go.

Each member is done by whoever has it first, the command itself or, for one that was away, the next program that runs.
"""

from __future__ import annotations

import msgspec

from hagroup.config.logging import get_logger
from hagroup.core.attributes import CKA, CKO, pack_bool, pack_ulong
from hagroup.core.calls import Ckr, Handle, Template
from hagroup.core.ckr import CKR
from hagroup.core.records import ObjectState
from hagroup.engine import manifest, transport
from hagroup.engine.domain_keys import DOMAIN_LABEL, PARTITION_LABEL
from hagroup.engine.holding import current
from hagroup.engine.member import Life, Member
from hagroup.engine.stored_records import older_records, store_record
from hagroup.engine.token_contents import find_all
from hagroup.engine.view import View
from hagroup.journal.api import Journal
from hagroup.members.api import Connection

log = get_logger(__name__)


def due(view: View, life: Life) -> bool:
    """The journal needs the replaced keys no more, and this member may have them still."""
    rotation = view.group.rotation
    return rotation is not None and rotation.finished and not life.keys_renewed and current(life.keys, view.group)


def renew(journal: Journal, view: View, member: Member, life: Life, *, timeout: float) -> None:
    """Seal anew what the group keeps on the token, then destroy the replaced keys. Cut off anywhere, it is done again.

    Call it under the member's resync lease.
    """
    keys = life.keys
    assert keys is not None
    group = view.group
    outdated = _outdated(life.connection, group.domain_key_id, group.partition_key_id, timeout=timeout)
    if outdated:
        _records(journal, life, timeout=timeout)
        with member.manifest_lock:
            manifest.reseal(life.connection, keys, timeout=timeout)
        pair = transport.own_public(life.connection, keys, life.token.serial, timeout=timeout)
        journal.set_member_facts(member.name, transport=pair)
        for handle in outdated:
            _destroy(life.connection, handle, timeout=timeout)
        journal.event("domain keys replaced", "the old ones are destroyed on its token", member=member.name)
        log.info("member.old-keys-destroyed", member=member.name)
    life.keys = msgspec.structs.replace(keys, older=None)
    life.keys_renewed = True


def _records(journal: Journal, life: Life, *, timeout: float) -> None:
    """The sealed records beside the objects, as the journal has them now. Where the journal has another revision or
    nothing, the member owes that, and what is there goes with it."""
    assert life.keys is not None
    for handle, uid, revision in older_records(life.connection, life.keys, timeout=timeout):
        record = journal.object(uid)
        if record is None or record.state is not ObjectState.LIVE or record.revision != revision:
            continue
        store_record(life.connection, life.keys, record, timeout=timeout)
        _destroy(life.connection, handle, timeout=timeout)


def _outdated(connection: Connection, domain_key_id: bytes, partition_key_id: bytes, *, timeout: float) -> list[Handle]:
    """Keys of the domain on the token other than the present ones, from whichever rotation."""
    found = []
    for label, present in ((DOMAIN_LABEL, domain_key_id), (PARTITION_LABEL, partition_key_id)):
        template: Template = [
            (int(CKA.CLASS), pack_ulong(CKO.SECRET_KEY)),
            (int(CKA.TOKEN), pack_bool(True)),
            (int(CKA.LABEL), label),
        ]
        for handle in find_all(connection, template, timeout=timeout):
            values, _ = connection.get(handle, [int(CKA.ID)], timeout=timeout)
            if values.get(CKA.ID) != present:
                found.append(handle)
    return found


def drop_unknown(connection: Connection, known: set[bytes], *, timeout: float) -> None:
    """Keys of the domain that no rotation names: what one left that was cut off before it was recorded."""
    for label in (DOMAIN_LABEL, PARTITION_LABEL):
        for handle in find_all(connection, [(int(CKA.LABEL), label)], timeout=timeout):
            values, _ = connection.get(handle, [int(CKA.ID)], timeout=timeout)
            if values.get(CKA.ID) not in known:
                _destroy(connection, handle, timeout=timeout)


def _destroy(connection: Connection, handle: Handle, *, timeout: float) -> None:
    try:
        connection.destroy(handle, timeout=timeout)
    except Ckr as error:
        if error.rv != CKR.OBJECT_HANDLE_INVALID:  # somebody was faster
            raise
