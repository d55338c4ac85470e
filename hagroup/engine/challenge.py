"""Proving that two members share both secrets of the domain (G9; T 3.4.12, T 3.4.13)."""

from __future__ import annotations

import os

import msgspec

from hagroup.core.attributes import CKA, CKK, CKM, CKO
from hagroup.core.calls import Ckr, Handle, Mechanism, SessionId
from hagroup.core.ckr import CKR
from hagroup.core.records import ObjectRecord, ObjectState
from hagroup.engine.domain import open_envelope, seal
from hagroup.engine.domain_keys import CARRIER, DomainKeys, IntegrityAlarm, scratch_session, throw_away_key
from hagroup.errors import DomainMismatch
from hagroup.members.api import Connection

NO_DIGEST = (CKR.KEY_INDIGESTIBLE, CKR.FUNCTION_NOT_SUPPORTED, CKR.MECHANISM_INVALID)
"""What a member answers that cannot digest a key."""
_SHA256: Mechanism = (int(CKM.SHA256), None)


class DomainMember(msgspec.Struct, frozen=True, kw_only=True):
    """A member that has, or gets, the domain's keys; its user is logged in."""

    connection: Connection
    name: str
    wrap_mechanism: int = CKM.AES_KEY_WRAP_PAD


_TRIAL_UID = b"hagroup trial".ljust(16, b"\0")


def _trial_record(attributes: dict[int, bytes], envelope: bytes | None = None) -> ObjectRecord:
    return ObjectRecord(
        uid=_TRIAL_UID,
        object_class=CKO.SECRET_KEY,
        key_type=CKK.AES,
        state=ObjectState.LIVE,
        revision=0,
        attributes=attributes,
        envelope=envelope,
    )


def _digest(connection: Connection, sid: SessionId, salt: bytes, key: Handle, *, timeout: float) -> bytes:
    """Empty where the member cannot."""
    try:
        return connection.digest(_SHA256, [salt, key], sid=sid, timeout=timeout)
    except Ckr as error:
        if error.rv in NO_DIGEST:
            return b""
        raise


def reference_envelope(connection: Connection, keys: DomainKeys, *, timeout: float) -> bytes:
    """An envelope of a throw-away key, with what tells that it was opened right: opens only with both keys (G9)."""
    salt = os.urandom(16)
    with scratch_session(connection, timeout=timeout) as sid:
        key = throw_away_key(connection, sid=sid, timeout=timeout)
        digest = _digest(connection, sid, salt, key, timeout=timeout)
        attributes = {int(CKA.LABEL): salt, int(CKA.CHECK_VALUE): digest}
        envelope = seal(
            connection,
            keys,
            sid,
            key,
            uid=_TRIAL_UID,
            revision=0,
            object_class=CKO.SECRET_KEY,
            key_type=CKK.AES,
            attributes=attributes,
            timeout=timeout,
        )
    return msgspec.msgpack.encode([salt, digest, envelope])


def open_reference(connection: Connection, keys: DomainKeys, reference: bytes, *, timeout: float) -> None:
    """Prove a member's keys by a reference envelope.

    :raises DomainMismatch: a key of the domain differs; the text says which.
    """
    try:
        salt, digest, envelope = msgspec.msgpack.decode(reference, type=tuple[bytes, bytes, bytes])
    except msgspec.DecodeError:
        raise IntegrityAlarm("the reference envelope is damaged") from None
    record = _trial_record({int(CKA.LABEL): salt, int(CKA.CHECK_VALUE): digest}, envelope)
    with scratch_session(connection, timeout=timeout) as sid:
        try:
            key = open_envelope(connection, keys, sid, record, CARRIER, timeout=timeout)
        except IntegrityAlarm as error:
            raise DomainMismatch(
                "the partition secret differs: the outer layer of an envelope that a member of the group made does not "
                "open on this one"
            ) from error
        found = _digest(connection, sid, salt, key, timeout=timeout)
    if digest and found and found != digest:
        raise DomainMismatch("the domain key differs: an envelope opens on this member to another key")


def challenge(
    one: DomainMember, one_keys: DomainKeys, other: DomainMember, other_keys: DomainKeys, *, timeout: float
) -> None:
    """Prove that two members share both secrets: each opens what the other sealed.

    :raises DomainMismatch: they do not; the text says which members and which secret (T 3.4.12, T 3.4.13).
    """
    for sender, sender_keys, receiver, receiver_keys in (
        (one, one_keys, other, other_keys),
        (other, other_keys, one, one_keys),
    ):
        reference = reference_envelope(sender.connection, sender_keys, timeout=timeout)
        try:
            open_reference(receiver.connection, receiver_keys, reference, timeout=timeout)
        except DomainMismatch as error:
            raise DomainMismatch(
                f'member "{receiver.name}" does not share the domain of member "{sender.name}": {error}'
            ) from error
