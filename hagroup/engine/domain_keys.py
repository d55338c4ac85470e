"""The two keys of the cloning domain on one member, and the group's own data sealed under the partition key.

A module says only "general error" where something does not open, so that is told from a device in trouble by trying the
same on something fresh.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from pkcs11 import exceptions as p11

from hagroup.core.attributes import CKA, CKK, CKM, CKO, pack_bool, pack_ulong, unpack_bool
from hagroup.core.calls import Ckr, DeadlinePassed, Handle, Mechanism, MemberGone, SessionId, Template, WorkerFault
from hagroup.core.ckr import CKR
from hagroup.engine.envelope import NONCE_LENGTH
from hagroup.errors import DomainMismatch, HAError
from hagroup.members.api import Connection

DOMAIN_LABEL = b"hagroup domain key"
PARTITION_LABEL = b"hagroup partition key"
GIVEN_BY_JOIN = "`ha-admin domain join` gives it both keys"

_TAG_BITS = 128
_CHUNK = 256 * 1024

NOT_OPENED = frozenset(
    {
        CKR.GENERAL_ERROR,
        CKR.FUNCTION_FAILED,
        CKR.DATA_INVALID,
        CKR.DATA_LEN_RANGE,
        CKR.ENCRYPTED_DATA_INVALID,
        CKR.ENCRYPTED_DATA_LEN_RANGE,
        CKR.AEAD_DECRYPT_FAILED,
        CKR.WRAPPED_KEY_INVALID,
        CKR.WRAPPED_KEY_LEN_RANGE,
    }
)


class IntegrityAlarm(HAError, p11.EncryptedDataInvalid):
    """Something sealed does not open: it was tampered with, or the partition key differs. Nothing was made of it."""


class KeysMissing(DomainMismatch):
    """They were not found: they are not there, or the token is just going away."""


class DomainKeys(msgspec.Struct, frozen=True, kw_only=True):
    """Where one member has the domain's keys, in one generation of its connection."""

    domain: Handle
    partition: Handle
    domain_key_id: bytes
    partition_key_id: bytes
    wrap_mechanism: int = CKM.AES_KEY_WRAP_PAD
    """This module's number for RFC 5649."""
    older: DomainKeys | None = None
    """The keys that these replace, while there may be something under them."""

    def named(self, domain_key_id: bytes | None, partition_key_id: bytes) -> DomainKeys | None:
        """The pair of these names (None: whichever domain key), the replaced one too; None: neither is."""
        for keys in (self, self.older):
            if (
                keys is not None
                and keys.partition_key_id == partition_key_id
                and domain_key_id in (None, keys.domain_key_id)
            ):
                return keys
        return None

    @property
    def wrap(self) -> Mechanism:
        return (int(self.wrap_mechanism), None)


@contextmanager
def scratch_session(connection: Connection, *, timeout: float) -> Iterator[SessionId]:
    """A session whose objects, and ghosts of what failed, are gone when it ends."""
    sid = connection.open_session(timeout=timeout)
    try:
        yield sid
    finally:
        try:
            connection.close_session(sid, timeout=timeout)
        except (Ckr, MemberGone, WorkerFault, DeadlinePassed):
            pass  # its session is gone with the connection, or will be; the first error is the one to tell


# -- finding ------------------------------------------------------------------------------------------------------


def _find_key(connection: Connection, label: bytes, key_id: bytes, *, timeout: float) -> list[Handle]:
    template: Template = [
        (CKA.CLASS, pack_ulong(CKO.SECRET_KEY)),
        (CKA.TOKEN, pack_bool(True)),
        (CKA.LABEL, label),
        (CKA.ID, key_id),
    ]
    return connection.find(template, timeout=timeout)


def find_domain(
    connection: Connection,
    domain_key_id: bytes,
    partition_key_id: bytes,
    wrap_mechanism: int = CKM.AES_KEY_WRAP_PAD,
    *,
    timeout: float,
) -> DomainKeys:
    """The domain's keys on a member whose user is logged in. Their values are proved by the challenge, not here.

    :raises KeysMissing: one of them is.
    :raises DomainMismatch: one of them is there more than once.
    """
    found = {}
    for what, label, key_id in (
        ("domain key", DOMAIN_LABEL, domain_key_id),
        ("partition key", PARTITION_LABEL, partition_key_id),
    ):
        handles = _find_key(connection, label, key_id, timeout=timeout)
        if len(handles) != 1:
            state = "does not have" if not handles else f"has {len(handles)} objects that claim to be"
            raise (DomainMismatch if handles else KeysMissing)(
                f"the member {state} the group's {what} (CKA_ID {key_id.hex()}); {GIVEN_BY_JOIN}"
            )
        found[label] = handles[0]
    return DomainKeys(
        domain=found[DOMAIN_LABEL],
        partition=found[PARTITION_LABEL],
        domain_key_id=domain_key_id,
        partition_key_id=partition_key_id,
        wrap_mechanism=wrap_mechanism,
    )


def is_sealed(connection: Connection, keys: DomainKeys, *, timeout: float) -> bool:
    """Whether the domain's keys cannot leave this member."""
    values, _ = connection.get(keys.domain, [int(CKA.EXTRACTABLE)], timeout=timeout)
    return not unpack_bool(values.get(CKA.EXTRACTABLE, b"\0"))


# -- encryption inside the member ---------------------------------------------------------------------------------


def _gcm(nonce: bytes, associated: bytes) -> Mechanism:
    return (int(CKM.AES_GCM), ["gcm", nonce, associated, _TAG_BITS])


def encrypt(
    connection: Connection, key: Handle, data: bytes, associated: bytes, *, sid: SessionId, timeout: float
) -> tuple[bytes, bytes]:
    """(nonce, ciphertext). The nonce is random: 2**32 messages are safe under one key."""
    nonce = os.urandom(NONCE_LENGTH)
    return nonce, connection.encrypt(_gcm(nonce, associated), key, data, sid=sid, timeout=timeout)


def decrypt(
    connection: Connection,
    key: Handle,
    nonce: bytes,
    data: bytes,
    associated: bytes,
    *,
    sid: SessionId,
    timeout: float,
) -> bytes | None:
    """None: it does not open, and the key and the member are well."""
    try:
        return connection.decrypt(_gcm(nonce, associated), key, data, sid=sid, timeout=timeout)
    except Ckr as error:
        if error.rv not in NOT_OPENED:
            raise
        fresh = os.urandom(NONCE_LENGTH)
        trial = connection.encrypt(_gcm(fresh, b"trial"), key, b"trial", sid=sid, timeout=timeout)
        connection.decrypt(_gcm(fresh, b"trial"), key, trial, sid=sid, timeout=timeout)
        return None


CARRIER: Template = [
    (CKA.CLASS, pack_ulong(CKO.SECRET_KEY)),
    (CKA.KEY_TYPE, pack_ulong(CKK.AES)),
    (CKA.TOKEN, pack_bool(False)),
    (CKA.PRIVATE, pack_bool(True)),
    (CKA.SENSITIVE, pack_bool(True)),
    (CKA.EXTRACTABLE, pack_bool(True)),
    (CKA.ENCRYPT, pack_bool(True)),
    (CKA.DECRYPT, pack_bool(True)),
    (CKA.WRAP, pack_bool(True)),
    (CKA.UNWRAP, pack_bool(True)),
]


def throw_away_key(connection: Connection, *, sid: SessionId, timeout: float) -> Handle:
    """An AES-256 session key that can be sealed."""
    template: Template = [*CARRIER, (CKA.VALUE_LEN, pack_ulong(32))]
    return connection.generate((int(CKM.AES_KEY_GEN), None), template, sid=sid, timeout=timeout)


# -- data ---------------------------------------------------------------------------------------------------------


class _SealedData(msgspec.Struct, frozen=True, array_like=True):
    partition_key_id: bytes
    chunks: list[tuple[bytes, bytes]]


def _place(keys: DomainKeys, purpose: bytes, index: int, count: int) -> bytes:
    return msgspec.msgpack.encode(["hagroup data", 1, keys.partition_key_id, purpose, index, count])


def seal_data(connection: Connection, keys: DomainKeys, purpose: bytes, data: bytes, *, timeout: float) -> bytes:
    """Seal what the group itself keeps (manifests, records) under the partition key, for this purpose only."""
    parts = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)] or [b""]
    chunks = [
        encrypt(connection, keys.partition, part, _place(keys, purpose, index, len(parts)), sid=0, timeout=timeout)
        for index, part in enumerate(parts)
    ]
    return msgspec.msgpack.encode(_SealedData(keys.partition_key_id, chunks))


def open_data(connection: Connection, keys: DomainKeys, purpose: bytes, data: bytes, *, timeout: float) -> bytes:
    """:raises IntegrityAlarm: foreign, damaged, sealed for another purpose or under another partition key."""
    try:
        sealed = msgspec.msgpack.decode(data, type=_SealedData)
    except (msgspec.DecodeError, msgspec.ValidationError):
        raise IntegrityAlarm("this was not sealed by hagroup, or it is damaged") from None
    found = keys.named(None, sealed.partition_key_id)
    if found is None:
        raise IntegrityAlarm(f"this was sealed under another partition key ({sealed.partition_key_id.hex()})")
    parts = []
    for index, (nonce, chunk) in enumerate(sealed.chunks):
        place = _place(found, purpose, index, len(sealed.chunks))
        part = decrypt(connection, found.partition, nonce, chunk, place, sid=0, timeout=timeout)
        if part is None:
            raise IntegrityAlarm("what was sealed under the partition key does not open: it was tampered with")
        parts.append(part)
    if not parts:
        raise IntegrityAlarm("this was not sealed by hagroup, or it is damaged")
    return b"".join(parts)
