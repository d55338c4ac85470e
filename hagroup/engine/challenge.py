"""Proving that two members share both secrets of the domain (G9; T 3.4.12, T 3.4.13)."""

from __future__ import annotations

import os

import msgspec

from hagroup.core.attributes import CKA, CKK, CKM, CKO
from hagroup.core.calls import Ckr, Handle, Mechanism, SessionId
from hagroup.core.ckr import CKR
from hagroup.core.records import ObjectRecord, ObjectState
from hagroup.engine.domain import open_envelope, seal
from hagroup.engine.domain_keys import (
    CARRIER,
    GIVEN_BY_JOIN,
    DomainKeys,
    IntegrityAlarm,
    decrypt,
    encrypt,
    scratch_session,
    throw_away_key,
)
from hagroup.engine.envelope import NONCE_LENGTH
from hagroup.engine.proof import is_empty
from hagroup.errors import DomainMismatch
from hagroup.members.api import Connection

NO_DIGEST = (CKR.KEY_INDIGESTIBLE, CKR.FUNCTION_NOT_SUPPORTED, CKR.MECHANISM_INVALID)
"""What a member answers that cannot digest a key."""
_SHA256: Mechanism = (int(CKM.SHA256), None)
_PARTITION_DIFFERS, _DOMAIN_DIFFERS = "the partition secret differs", "the domain key differs"


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


class _Reference(msgspec.Struct, frozen=True, array_like=True):
    salt: bytes
    check: bytes
    """Tells that the key came out right: the salt sealed under it (one call to open), or a digest."""
    envelope: bytes
    sealed: bool = False
    """False: written by an earlier hagroup, ``check`` is a digest over salt and key."""

    @property
    def attributes(self) -> dict[int, bytes]:
        return {int(CKA.LABEL): self.salt, int(CKA.CHECK_VALUE): self.check}


def reference_envelope(connection: Connection, keys: DomainKeys, *, timeout: float) -> bytes:
    """An envelope of a throw-away key, with what tells that it was opened right: opens only with both keys (G9)."""
    salt = os.urandom(16)
    with scratch_session(connection, timeout=timeout) as sid:
        key = throw_away_key(connection, sid=sid, timeout=timeout)
        check = b"".join(encrypt(connection, key, salt, b"", sid=sid, timeout=timeout))
        unsealed = _Reference(salt, check, b"", sealed=True)
        envelope = seal(
            connection,
            keys,
            sid,
            key,
            uid=_TRIAL_UID,
            revision=0,
            object_class=CKO.SECRET_KEY,
            key_type=CKK.AES,
            attributes=unsealed.attributes,
            timeout=timeout,
        )
    return msgspec.msgpack.encode(msgspec.structs.replace(unsealed, envelope=envelope))


def open_reference(connection: Connection, keys: DomainKeys, reference: bytes, *, timeout: float) -> None:
    """Prove a member's keys by a reference envelope. Every start of a program waits for these calls: three.

    :raises DomainMismatch: a key of the domain differs; the text says which.
    """
    try:
        made = msgspec.msgpack.decode(reference, type=_Reference)
    except msgspec.DecodeError:
        raise IntegrityAlarm("the reference envelope is damaged") from None
    record = _trial_record(made.attributes, made.envelope)
    with scratch_session(connection, timeout=timeout) as sid:
        try:
            key = open_envelope(connection, keys, sid, record, CARRIER, timeout=timeout)
        except Ckr:
            _expect_whole(connection, keys, timeout=timeout)
            raise
        except IntegrityAlarm as error:
            raise DomainMismatch(
                f"{_PARTITION_DIFFERS}: the outer layer of an envelope that a member of the group made does not "
                "open on this one"
            ) from error
        right = _is_right(connection, sid, key, made, timeout=timeout)
    if not right:
        raise DomainMismatch(f"{_DOMAIN_DIFFERS}: an envelope opens on this member to another key")


def concerns_domain(reason: str | None) -> bool:
    """Whether a member is out of use for the domain's keys, which it lacked or had others of."""
    return any(text in (reason or "") for text in (GIVEN_BY_JOIN, _PARTITION_DIFFERS, _DOMAIN_DIFFERS))


def _expect_whole(connection: Connection, keys: DomainKeys, *, timeout: float) -> None:
    """:raises DomainMismatch: one of them is what a write that was cut off left."""
    for what, handle in (("domain key", keys.domain), ("partition key", keys.partition)):
        if is_empty(connection, handle, CKO.SECRET_KEY, CKK.AES, timeout=timeout):
            raise DomainMismatch(f"the member's {what} is empty (making it was cut off); {GIVEN_BY_JOIN}")


def _is_right(connection: Connection, sid: SessionId, key: Handle, made: _Reference, *, timeout: float) -> bool:
    """Whether the key that came out is the one that was put in."""
    if made.sealed:
        nonce, sealed = made.check[:NONCE_LENGTH], made.check[NONCE_LENGTH:]
        return decrypt(connection, key, nonce, sealed, b"", sid=sid, timeout=timeout) == made.salt
    found = _digest(connection, sid, made.salt, key, timeout=timeout)
    return not made.check or not found or found == made.check


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
