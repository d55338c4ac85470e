"""The inner layer of an envelope: keys wrapped under the domain key, directly or by way of a carrier (DESIGN.md 5).

A *carrier* is a throw-away key that goes along, wrapped under the domain key. Three things need one:

- a key that is not SENSITIVE: what the domain key itself unwraps is SENSITIVE for ever (its UNWRAP_TEMPLATE);
- the VALUE of a private data object, which is no key;
- a secret whose length is not a multiple of 8: SoftHSM 2.6 wraps it right but leaves RFC 5649's padding on it when it
  unwraps, which makes it another key without any error. RSA-OAEP keeps the length, so there the carrier is an RSA key.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from hagroup.core.attributes import CKA, CKK, CKM, CKO, pack_bool, pack_ulong, unpack_bool, unpack_ulong
from hagroup.core.calls import Ckr, Handle, Mechanism, SessionId, Template
from hagroup.core.ckr import CKR
from hagroup.core.records import ObjectRecord
from hagroup.engine.domain_keys import (
    CARRIER,
    NOT_OPENED,
    DomainKeys,
    IntegrityAlarm,
    decrypt,
    encrypt,
    scratch_session,
    throw_away_key,
)
from hagroup.engine.envelope import NONCE_LENGTH, Carrier, Content
from hagroup.errors import DomainMismatch
from hagroup.members.api import Connection

OAEP: Mechanism = (int(CKM.RSA_PKCS_OAEP), ["oaep", int(CKM.SHA_1), 1, None])
"""SHA-1 without a label: the one form that SoftHSM has. OAEP does not need its hash to be free of collisions."""

_CARRIER_BITS = 2048
_SHA256: Mechanism = (int(CKM.SHA256), None)
_WHOLE_BLOCKS = frozenset({CKK.AES, CKK.DES, CKK.DES2, CKK.DES3})
"""Secret keys of these types are a multiple of 8 bytes long."""

_RSA_CARRIER: Template = [
    (int(CKA.CLASS), pack_ulong(CKO.PRIVATE_KEY)),
    (int(CKA.KEY_TYPE), pack_ulong(CKK.RSA)),
    (int(CKA.TOKEN), pack_bool(False)),
    (int(CKA.PRIVATE), pack_bool(True)),
    (int(CKA.SENSITIVE), pack_bool(True)),
    (int(CKA.EXTRACTABLE), pack_bool(True)),
    (int(CKA.UNWRAP), pack_bool(True)),
]


def _unwrap(
    connection: Connection, keys: DomainKeys, wrapped: bytes, template: Template, *, sid: SessionId, timeout: float
) -> Handle:
    """:raises DomainMismatch: the member's domain key is another one."""
    try:
        return connection.unwrap(keys.wrap, keys.domain, wrapped, template, sid=sid, timeout=timeout)
    except Ckr as error:
        if error.rv not in NOT_OPENED:
            raise
        with scratch_session(connection, timeout=timeout) as trial:
            key = throw_away_key(connection, sid=trial, timeout=timeout)
            fresh = connection.wrap(keys.wrap, keys.domain, key, sid=trial, timeout=timeout)
            connection.unwrap(keys.wrap, keys.domain, fresh, CARRIER, sid=trial, timeout=timeout)
        raise DomainMismatch(
            "the inner layer of an envelope does not open although the outer one did: "
            "this member has another domain key"
        ) from error


def wrap_key(
    connection: Connection,
    keys: DomainKeys,
    sid: SessionId,
    handle: Handle,
    attributes: Mapping[int, bytes],
    *,
    timeout: float,
) -> Content:
    """The content of the envelope of a key with these final attributes."""
    sensitive = unpack_bool(attributes.get(CKA.SENSITIVE, b"\x01"))
    whole = _whole_blocks(attributes)
    if whole and sensitive:
        return Content(wrapped=connection.wrap(keys.wrap, keys.domain, handle, sid=sid, timeout=timeout))
    with scratch_session(connection, timeout=timeout) as inner:
        if whole is None:
            whole = _comes_back_whole(connection, keys, handle, attributes, sid=inner, timeout=timeout)
        if not whole:
            return _wrap_by_rsa(connection, keys, handle, sid=inner, timeout=timeout)
        if sensitive:
            return Content(wrapped=connection.wrap(keys.wrap, keys.domain, handle, sid=inner, timeout=timeout))
        carrier = throw_away_key(connection, sid=inner, timeout=timeout)
        return Content(
            wrapped=connection.wrap(keys.wrap, keys.domain, carrier, sid=inner, timeout=timeout),
            carrier=Carrier.AES,
            carried=connection.wrap(keys.wrap, carrier, handle, sid=inner, timeout=timeout),
        )


def _whole_blocks(attributes: Mapping[int, bytes]) -> bool | None:
    """Whether the padding of RFC 5649 does not matter; None: the length is not known (SoftHSM does not know that of
    what it unwrapped)."""
    if CKA.KEY_TYPE not in attributes or unpack_ulong(attributes.get(CKA.CLASS, pack_ulong(0))) != CKO.SECRET_KEY:
        return True  # a private key's structure says where it ends
    if unpack_ulong(attributes[CKA.KEY_TYPE]) in _WHOLE_BLOCKS:
        return True
    length = unpack_ulong(attributes.get(CKA.VALUE_LEN, pack_ulong(0)))
    return length % 8 == 0 if length else None


def _comes_back_whole(
    connection: Connection,
    keys: DomainKeys,
    handle: Handle,
    attributes: Mapping[int, bytes],
    *,
    sid: SessionId,
    timeout: float,
) -> bool:
    """Whether wrapping and unwrapping leaves the key as it is."""
    carrier = throw_away_key(connection, sid=sid, timeout=timeout)
    wrapped = connection.wrap(keys.wrap, carrier, handle, sid=sid, timeout=timeout)
    template: Template = [(int(n), attributes[n]) for n in (CKA.CLASS, CKA.KEY_TYPE)]
    template += [(int(CKA.TOKEN), pack_bool(False)), (int(CKA.SENSITIVE), pack_bool(True))]
    again = connection.unwrap(keys.wrap, carrier, wrapped, template, sid=sid, timeout=timeout)
    return _same(connection, handle, again, sid=sid, timeout=timeout) is True


def _wrap_by_rsa(
    connection: Connection, keys: DomainKeys, handle: Handle, *, sid: SessionId, timeout: float
) -> Content:
    public, private = connection.generate_pair(
        (int(CKM.RSA_PKCS_KEY_PAIR_GEN), None),
        [
            (int(CKA.TOKEN), pack_bool(False)),
            (int(CKA.MODULUS_BITS), pack_ulong(_CARRIER_BITS)),
            (int(CKA.PUBLIC_EXPONENT), b"\x01\x00\x01"),
            (int(CKA.WRAP), pack_bool(True)),
        ],
        [item for item in _RSA_CARRIER if item[0] not in (CKA.CLASS, CKA.KEY_TYPE)],
        sid=sid,
        timeout=timeout,
    )
    try:
        carried = connection.wrap(OAEP, public, handle, sid=sid, timeout=timeout)
    except Ckr as error:
        if error.rv in (CKR.KEY_SIZE_RANGE, CKR.GENERAL_ERROR, CKR.FUNCTION_FAILED, CKR.DATA_LEN_RANGE):
            # Longer than the carrier's modulus takes (214 bytes), and no multiple of 8.
            raise Ckr(CKR.KEY_NOT_WRAPPABLE, "C_WrapKey") from error
        raise
    wrapped = connection.wrap(keys.wrap, keys.domain, private, sid=sid, timeout=timeout)
    return Content(wrapped=wrapped, carrier=Carrier.RSA, carried=carried)


def unwrap_key(
    connection: Connection, keys: DomainKeys, sid: SessionId, content: Content, template: Template, *, timeout: float
) -> Handle:
    """Make the key of an envelope's content with this template.

    :raises DomainMismatch: the member's domain key is another one.
    """
    if content.carrier is None:
        return _unwrap(connection, keys, content.wrapped, template, sid=sid, timeout=timeout)
    rsa = content.carrier is Carrier.RSA
    with scratch_session(connection, timeout=timeout) as inner:
        kind = _RSA_CARRIER if rsa else CARRIER
        carrier = _unwrap(connection, keys, content.wrapped, kind, sid=inner, timeout=timeout)
        mechanism = OAEP if rsa else keys.wrap
        return connection.unwrap(mechanism, carrier, content.carried, template, sid=sid, timeout=timeout)


def rewrap(
    connection: Connection,
    before: DomainKeys,
    after: DomainKeys,
    content: Content,
    record: ObjectRecord,
    *,
    timeout: float,
) -> Content:
    """The same key (or carrier) under another domain key; it was compared with the one before.

    :raises IntegrityAlarm: what came out is another key, so nothing may take the old one's place.
    """
    if content.carrier is None:
        kind: Template = [
            (int(CKA.CLASS), pack_ulong(record.object_class)),
            (int(CKA.KEY_TYPE), pack_ulong(record.key_type or 0)),
            (int(CKA.TOKEN), pack_bool(False)),
            (int(CKA.PRIVATE), pack_bool(True)),
            (int(CKA.SENSITIVE), pack_bool(True)),
            (int(CKA.EXTRACTABLE), pack_bool(True)),
        ]
    else:
        kind = _RSA_CARRIER if content.carrier is Carrier.RSA else CARRIER
    with scratch_session(connection, timeout=timeout) as sid:
        key = _unwrap(connection, before, content.wrapped, kind, sid=sid, timeout=timeout)
        wrapped = connection.wrap(after.wrap, after.domain, key, sid=sid, timeout=timeout)
        again = _unwrap(connection, after, wrapped, kind, sid=sid, timeout=timeout)
        if _same(connection, key, again, sid=sid, timeout=timeout) is False:
            raise IntegrityAlarm(f"the key of object {record.uid.hex()} is another one under the new domain key")
    return Content(wrapped=wrapped, carrier=content.carrier, carried=content.carried)


def _same(connection: Connection, one: Handle, other: Handle, *, sid: SessionId, timeout: float) -> bool | None:
    """None: the member cannot digest such a key."""
    salt = os.urandom(16)
    try:
        first, second = (connection.digest(_SHA256, [salt, key], sid=sid, timeout=timeout) for key in (one, other))
    except Ckr as error:
        if error.rv in (CKR.KEY_INDIGESTIBLE, CKR.FUNCTION_NOT_SUPPORTED, CKR.MECHANISM_INVALID):
            return None
        raise
    return first == second


def wrap_value(connection: Connection, keys: DomainKeys, value: bytes, *, timeout: float) -> Content:
    """The content of the envelope of a private data object."""
    with scratch_session(connection, timeout=timeout) as inner:
        carrier = throw_away_key(connection, sid=inner, timeout=timeout)
        wrapped = connection.wrap(keys.wrap, keys.domain, carrier, sid=inner, timeout=timeout)
        nonce, sealed = encrypt(connection, carrier, value, b"", sid=inner, timeout=timeout)
    return Content(wrapped=wrapped, carrier=Carrier.AES, carried=nonce + sealed)


def unwrap_value(connection: Connection, keys: DomainKeys, content: Content, *, timeout: float) -> bytes | None:
    """None: it does not open."""
    with scratch_session(connection, timeout=timeout) as inner:
        carrier = _unwrap(connection, keys, content.wrapped, CARRIER, sid=inner, timeout=timeout)
        nonce, sealed = content.carried[:NONCE_LENGTH], content.carried[NONCE_LENGTH:]
        return decrypt(connection, carrier, nonce, sealed, b"", sid=inner, timeout=timeout)
