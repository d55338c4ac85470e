"""The sealed record of an object, kept beside it on the member's token: the second place of G1 (DESIGN.md 4.2).

A lost journal is rebuilt from these into a group that still replicates.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from hagroup.core.attributes import CKA, CKO, pack_bool, pack_ulong
from hagroup.core.calls import Ckr, Handle, Template
from hagroup.core.ckr import CKR
from hagroup.core.records import ObjectRecord
from hagroup.engine.domain_keys import DomainKeys, IntegrityAlarm, open_data, seal_data
from hagroup.engine.envelope import EnvelopeError, generation
from hagroup.engine.token_contents import APPLICATION, find_all
from hagroup.members.api import Connection

_LABEL = "hagroup:object:"
RECORD_LABEL = _LABEL.encode()
"""What their CKA_LABEL begins with."""


def _label(uid: bytes, revision: int) -> bytes:
    return f"{_LABEL}{uid.hex()}:{revision}".encode()


def _purpose(uid: bytes) -> bytes:
    return b"object:" + uid


def _find(connection: Connection, template: Template, *, timeout: float) -> list[Handle]:
    own: Template = [(int(CKA.CLASS), pack_ulong(CKO.DATA)), (int(CKA.APPLICATION), APPLICATION)]
    return find_all(connection, [*own, *template], timeout=timeout)


def store_record(connection: Connection, keys: DomainKeys, record: ObjectRecord, *, timeout: float) -> None:
    """Put the record there. CKA_OBJECT_ID is the UID, so that one search finds all revisions."""
    sealed = seal_data(connection, keys, _purpose(record.uid), msgspec.msgpack.encode(record), timeout=timeout)
    connection.create(
        [
            (int(CKA.CLASS), pack_ulong(CKO.DATA)),
            (int(CKA.TOKEN), pack_bool(True)),
            (int(CKA.PRIVATE), pack_bool(True)),
            (int(CKA.APPLICATION), APPLICATION),
            (int(CKA.OBJECT_ID), record.uid),
            (int(CKA.LABEL), _label(record.uid, record.revision)),
            (int(CKA.VALUE), sealed),
        ],
        timeout=timeout,
    )


def _contents(connection: Connection, *, timeout: float) -> Iterator[tuple[Handle, dict[int, bytes]]]:
    """What is read of each of the group's own data objects; one that is replaced meanwhile is passed over."""
    for handle in _find(connection, [], timeout=timeout):
        try:
            values, _ = connection.get(handle, [int(CKA.LABEL), int(CKA.OBJECT_ID), int(CKA.VALUE)], timeout=timeout)
        except Ckr as error:
            if error.rv != CKR.OBJECT_HANDLE_INVALID:
                raise
            continue
        yield handle, values


def has_its_record(connection: Connection, record: ObjectRecord, *, timeout: float) -> bool:
    """Whether the record of this revision, and of no other, is beside the object."""
    labels = []
    for handle in _find(connection, [(int(CKA.OBJECT_ID), record.uid)], timeout=timeout):
        try:
            values, _ = connection.get(handle, [int(CKA.LABEL)], timeout=timeout)
        except Ckr as error:
            if error.rv != CKR.OBJECT_HANDLE_INVALID:  # replaced meanwhile
                raise
            continue
        labels.append(values.get(CKA.LABEL))
    return labels == [_label(record.uid, record.revision)]


def older_records(
    connection: Connection, keys: DomainKeys, *, timeout: float
) -> tuple[list[tuple[Handle, bytes, int]], set[tuple[bytes, int]]]:
    """Records on the token that are, or whose envelope is, under keys that were replaced, as (handle, UID, revision);
    and, as (UID, revision), those that are not."""
    older, present = [], set()
    for handle, values in _contents(connection, timeout=timeout):
        label, uid = values.get(CKA.LABEL, b"").decode(errors="replace"), values.get(CKA.OBJECT_ID, b"")
        revision = label.rpartition(":")[2]
        if not label.startswith(_LABEL) or not revision.isdecimal():
            continue
        if _is_older(connection, keys, uid, values.get(CKA.VALUE, b""), timeout=timeout):
            older.append((handle, uid, int(revision)))
        else:
            present.add((uid, int(revision)))
    return older, present


def _is_older(connection: Connection, keys: DomainKeys, uid: bytes, sealed: bytes, *, timeout: float) -> bool:
    try:
        # without the replaced keys: what they are needed for is older
        present = msgspec.structs.replace(keys, older=None)
        record = msgspec.msgpack.decode(
            open_data(connection, present, _purpose(uid), sealed, timeout=timeout), type=ObjectRecord
        )
        return record.envelope is not None and generation(record.envelope) != (
            keys.domain_key_id,
            keys.partition_key_id,
        )
    except (IntegrityAlarm, EnvelopeError, msgspec.DecodeError):
        return True


def drop_records(connection: Connection, uid: bytes, *, timeout: float, but: int | None = None) -> None:
    """Destroy the records of an object; all, or all but one of one revision."""
    kept = False
    for handle in _find(connection, [(int(CKA.OBJECT_ID), uid)], timeout=timeout):
        try:
            if but is not None and not kept:
                values, _ = connection.get(handle, [int(CKA.LABEL)], timeout=timeout)
                if values.get(CKA.LABEL) == _label(uid, but):
                    kept = True
                    continue
            connection.destroy(handle, timeout=timeout)
        except Ckr as error:
            if error.rv != CKR.OBJECT_HANDLE_INVALID:  # somebody was faster
                raise


def stored_records(connection: Connection, keys: DomainKeys, *, timeout: float) -> Iterator[ObjectRecord]:
    """Every authentic record on the token, in no order; older revisions too."""
    for _, values in _contents(connection, timeout=timeout):
        if not values.get(CKA.LABEL, b"").startswith(RECORD_LABEL):
            continue
        try:
            purpose = _purpose(values.get(CKA.OBJECT_ID, b""))
            data = open_data(connection, keys, purpose, values.get(CKA.VALUE, b""), timeout=timeout)
            yield msgspec.msgpack.decode(data, type=ObjectRecord)
        except (IntegrityAlarm, msgspec.DecodeError):
            continue  # not ours, or damaged: another member has it
