"""After the domain's keys were changed: on one member nothing stays under the replaced ones, then these go.

Each member is done by whoever has it first, the command itself or, for one that was away, the next program that runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import msgspec

from hagroup.config.logging import get_logger
from hagroup.core.attributes import CKA, CKO, pack_bool, pack_ulong
from hagroup.core.calls import Ckr, Handle, Template
from hagroup.core.ckr import CKR
from hagroup.core.records import ObjectState
from hagroup.engine import configuration, manifest, transport
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
    return (
        rotation is not None
        and rotation.finished
        and life.keys_renewed != view.group.domain_key_id
        and current(life.keys, view.group)
    )


def renew(journal: Journal, view: View, member: Member, life: Life, *, timeout: float) -> None:
    """Seal anew what the group keeps on the token, then destroy the replaced keys. Cut off anywhere, it is done again.

    Call it under the member's resync lease.
    """
    view.refresh(always=True)
    group, keys = view.group, life.keys
    if not due(view, life) or keys is None or group.rotation is None:
        return  # the next change of keys has begun meanwhile
    former = {name for pair in group.rotation.former for name in pair}
    outdated = _named(life.connection, former, timeout=timeout)
    if outdated:
        _records(journal, life, timeout=timeout)
        with member.manifest_lock:
            manifest.reseal(life.connection, keys, timeout=timeout)
            configuration.reseal(life.connection, keys, timeout=timeout)
        pair = transport.own_public(life.connection, keys, life.token.serial, timeout=timeout)
        journal.set_member_facts(member.name, transport=pair)
        for handle in outdated:
            _destroy(life.connection, handle, timeout=timeout)
        journal.event("domain keys replaced", "the old ones are destroyed on its token", member=member.name)
        log.info("member.old-keys-destroyed", member=member.name)
    life.keys = msgspec.structs.replace(keys, older=None)
    life.keys_renewed = group.domain_key_id


def _records(journal: Journal, life: Life, *, timeout: float) -> None:
    """The sealed records beside the objects, as the journal has them now. Where the journal has another revision or
    nothing, the member owes that, and what is there goes with it."""
    assert life.keys is not None
    older, present = older_records(life.connection, life.keys, timeout=timeout)
    for handle, uid, revision in older:
        record = journal.object(uid)
        if record is None or record.state is not ObjectState.LIVE or record.revision != revision:
            continue
        if (uid, revision) not in present:  # else this was cut off between the two
            store_record(life.connection, life.keys, record, timeout=timeout)
            present.add((uid, revision))
        _destroy(life.connection, handle, timeout=timeout)


def _named(connection: Connection, names: Collection[bytes], *, timeout: float) -> list[Handle]:
    """Keys of the domain on the token with these names. Never "all others": the next ones may just be handed out."""
    return [handle for handle, name in _keys(connection, timeout=timeout) if name in names]


def _keys(connection: Connection, *, timeout: float) -> Iterator[tuple[Handle, bytes]]:
    for label in (DOMAIN_LABEL, PARTITION_LABEL):
        template: Template = [
            (int(CKA.CLASS), pack_ulong(CKO.SECRET_KEY)),
            (int(CKA.TOKEN), pack_bool(True)),
            (int(CKA.LABEL), label),
        ]
        for handle in find_all(connection, template, timeout=timeout):
            try:
                values, _ = connection.get(handle, [int(CKA.ID)], timeout=timeout)
            except Ckr as error:
                if error.rv != CKR.OBJECT_HANDLE_INVALID:  # another process was faster
                    raise
                continue
            yield handle, values.get(CKA.ID, b"")


def drop_unknown(connection: Connection, known: Collection[bytes], *, timeout: float) -> None:
    """Keys of the domain that no rotation names: what one left that was cut off before it was recorded.

    Only for who has the right of administration: else they may just be handed out.
    """
    for handle, name in list(_keys(connection, timeout=timeout)):
        if name not in known:
            _destroy(connection, handle, timeout=timeout)


def _destroy(connection: Connection, handle: Handle, *, timeout: float) -> None:
    try:
        connection.destroy(handle, timeout=timeout)
    except Ckr as error:
        if error.rv != CKR.OBJECT_HANDLE_INVALID:  # somebody was faster
            raise
