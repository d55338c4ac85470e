"""Envelopes, made and opened inside a member (DESIGN.md 5).

The outer layer is AES-GCM under the partition key, the inner one RFC 5649 under the domain key. Where the outer layer
does not open, somebody tampered or the partition key differs; where the inner one does not, the domain key differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from hagroup.core.attributes import CKO
from hagroup.core.calls import Handle, SessionId, Template
from hagroup.core.records import ObjectRecord
from hagroup.engine import envelope as form
from hagroup.engine.domain_keys import DomainKeys, IntegrityAlarm, decrypt, encrypt, find_domain, open_data, seal_data
from hagroup.engine.envelope import Content, Envelope, EnvelopeError, Header
from hagroup.engine.inner_layer import rewrap, unwrap_key, unwrap_value, wrap_key, wrap_value
from hagroup.errors import DomainMismatch
from hagroup.members.api import Connection

__all__ = [
    "DomainKeys",
    "IntegrityAlarm",
    "find_domain",
    "open_data",
    "open_envelope",
    "open_private_data",
    "reseal",
    "seal",
    "seal_data",
    "seal_private_data",
]


def _header(keys: DomainKeys, *, uid: bytes, revision: int, object_class: int, key_type: int | None) -> Header:
    return Header(
        domain_key_id=keys.domain_key_id,
        partition_key_id=keys.partition_key_id,
        uid=uid,
        revision=revision,
        object_class=object_class,
        key_type=key_type,
    )


def _close(
    connection: Connection,
    keys: DomainKeys,
    header: Header,
    content: Content,
    attributes: Mapping[int, bytes],
    *,
    sid: SessionId,
    timeout: float,
) -> bytes:
    associated = header.associated_data(attributes)
    nonce, sealed = encrypt(connection, keys.partition, content.encode(), associated, sid=sid, timeout=timeout)
    return Envelope(header=header, nonce=nonce, sealed=sealed).encode()


def _open_outer(
    connection: Connection, keys: DomainKeys, envelope: bytes, record: ObjectRecord, *, sid: SessionId, timeout: float
) -> tuple[DomainKeys, Content]:
    """With the keys that it is under: those that were replaced, perhaps."""
    try:
        read = form.decode(envelope)
    except EnvelopeError as error:
        raise IntegrityAlarm(f"the envelope of object {record.uid.hex()} cannot be read: {error}") from error
    keys = keys.named(read.header.domain_key_id, read.header.partition_key_id) or _other_keys(keys, read.header)
    expected = _header(
        keys,
        uid=record.uid,
        revision=record.revision,
        object_class=record.object_class,
        key_type=record.key_type,
    )
    if read.header != expected:
        raise IntegrityAlarm(
            f"the envelope kept for object {record.uid.hex()} revision {record.revision} is of object "
            f"{read.header.uid.hex()} revision {read.header.revision}: envelopes were exchanged"
        )
    opened = decrypt(
        connection,
        keys.partition,
        read.nonce,
        read.sealed,
        expected.associated_data(record.attributes),
        sid=sid,
        timeout=timeout,
    )
    if opened is None:
        raise IntegrityAlarm(
            f"the outer layer of the envelope of object {record.uid.hex()} does not open: it or the object's "
            "attributes were tampered with, or this member's partition key is another one"
        )
    try:
        return keys, form.decode_content(opened)
    except EnvelopeError as error:
        raise IntegrityAlarm(f"the envelope of object {record.uid.hex()}: {error}") from error


def _other_keys(keys: DomainKeys, header: Header) -> NoReturn:
    if header.partition_key_id != keys.partition_key_id:
        raise DomainMismatch(
            f"the envelope was sealed under partition key {header.partition_key_id.hex()}, the member has "
            f"{keys.partition_key_id.hex()}"
        )
    raise DomainMismatch(
        f"the envelope was sealed under domain key {header.domain_key_id.hex()}, the member has "
        f"{keys.domain_key_id.hex()}"
    )


# -- keys -------------------------------------------------------------------------------------------------------------


def seal(
    connection: Connection,
    keys: DomainKeys,
    sid: SessionId,
    handle: Handle,
    *,
    uid: bytes,
    revision: int,
    object_class: int,
    key_type: int | None,
    attributes: Mapping[int, bytes],
    timeout: float,
) -> bytes:
    """The envelope of a key (an extractable one) that is in this member."""
    header = _header(keys, uid=uid, revision=revision, object_class=object_class, key_type=key_type)
    content = wrap_key(connection, keys, sid, handle, attributes, timeout=timeout)
    return _close(connection, keys, header, content, attributes, sid=sid, timeout=timeout)


def reseal(
    connection: Connection,
    keys: DomainKeys,
    envelope: bytes,
    *,
    old: ObjectRecord,
    uid: bytes,
    revision: int,
    attributes: Mapping[int, bytes],
    timeout: float,
    sid: SessionId = 0,
) -> bytes:
    """The envelope for the next revision, or for a copy: a new outer layer around the same content. Where it is under
    keys that were replaced, the inner layer is renewed too, inside the member."""
    found, content = _open_outer(connection, keys, envelope, old, sid=sid, timeout=timeout)
    if found is not keys:
        content = rewrap(connection, found, keys, content, old, timeout=timeout)
    header = _header(keys, uid=uid, revision=revision, object_class=old.object_class, key_type=old.key_type)
    return _close(connection, keys, header, content, attributes, sid=sid, timeout=timeout)


def open_envelope(
    connection: Connection,
    keys: DomainKeys,
    sid: SessionId,
    record: ObjectRecord,
    template: Template,
    *,
    timeout: float,
) -> Handle:
    """Make the key of a record on this member, with this template.

    :raises IntegrityAlarm: the outer layer does not open. :raises DomainMismatch: the inner one does not.
    """
    found, content = _open_outer(connection, keys, record.envelope or b"", record, sid=sid, timeout=timeout)
    return unwrap_key(connection, found, sid, content, template, timeout=timeout)


# -- data ---------------------------------------------------------------------------------------------------------


def seal_private_data(
    connection: Connection,
    keys: DomainKeys,
    sid: SessionId,
    value: bytes,
    *,
    uid: bytes,
    revision: int,
    attributes: Mapping[int, bytes],
    timeout: float,
) -> bytes:
    """The envelope of a private data object: its VALUE under a throw-away key that travels with it (G8)."""
    header = _header(keys, uid=uid, revision=revision, object_class=CKO.DATA, key_type=None)
    content = wrap_value(connection, keys, value, timeout=timeout)
    return _close(connection, keys, header, content, attributes, sid=sid, timeout=timeout)


def open_private_data(connection: Connection, keys: DomainKeys, record: ObjectRecord, *, timeout: float) -> bytes:
    """The VALUE of a private data object."""
    found, content = _open_outer(connection, keys, record.envelope or b"", record, sid=0, timeout=timeout)
    value = unwrap_value(connection, found, content, timeout=timeout)
    if value is None:
        raise IntegrityAlarm(f"the value of data object {record.uid.hex()} does not open")
    return value
