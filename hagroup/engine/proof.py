"""Telling that an object on a member is the group's, and whole (DESIGN.md 4.4, G7).

A *fingerprint* compares without using the key: the public part where there is one, else a digest over salt and key made
inside the member by C_DigestKey. The public part says nothing about whether the private one is there, so an RSA private
key is also *proved by use*, checked with plain arithmetic.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from enum import StrEnum

from hagroup.core.attributes import CKA, CKK, CKM, CKO, pack_bool, pack_ulong, unpack_bool, unpack_ulong
from hagroup.core.calls import Ckr, Handle, SessionId, Template
from hagroup.core.ckr import CKR
from hagroup.core.records import Fingerprint, FingerprintKind, ObjectRecord
from hagroup.engine.domain_keys import scratch_session, throw_away_key
from hagroup.members.api import Connection

_SALT_LENGTH = 16

_PUBLIC_PART: dict[int, tuple[CKA, ...]] = {
    CKO.PUBLIC_KEY: (
        CKA.VALUE,
        CKA.MODULUS,
        CKA.PUBLIC_EXPONENT,
        CKA.PRIME,
        CKA.SUBPRIME,
        CKA.BASE,
        CKA.EC_PARAMS,
        CKA.EC_POINT,
    ),
    CKO.CERTIFICATE: (CKA.VALUE, CKA.CERTIFICATE_TYPE, CKA.URL),
    CKO.DOMAIN_PARAMETERS: (CKA.PRIME, CKA.SUBPRIME, CKA.BASE, CKA.EC_PARAMS),
    CKO.DATA: (CKA.APPLICATION, CKA.VALUE),
}
_PARAMETERS = (CKA.EC_PARAMS, CKA.PRIME, CKA.SUBPRIME, CKA.BASE)
_PAIR_GENERATION: dict[int, CKM] = {
    CKK.EC: CKM.EC_KEY_PAIR_GEN,
    CKK.EC_EDWARDS: CKM.EC_EDWARDS_KEY_PAIR_GEN,
    CKK.EC_MONTGOMERY: CKM.EC_MONTGOMERY_KEY_PAIR_GEN,
    CKK.DSA: CKM.DSA_KEY_PAIR_GEN,
    CKK.DH: CKM.DH_PKCS_KEY_PAIR_GEN,
}
_NUMBERS = (CKA.MODULUS, CKA.PUBLIC_EXPONENT, CKA.PRIME, CKA.SUBPRIME, CKA.BASE)

_CANNOT_DIGEST = frozenset(
    {
        CKR.KEY_INDIGESTIBLE,
        CKR.KEY_TYPE_INCONSISTENT,
        CKR.KEY_FUNCTION_NOT_PERMITTED,
        CKR.MECHANISM_INVALID,
        CKR.FUNCTION_NOT_SUPPORTED,
    }
)
_BROKEN = frozenset(
    {
        CKR.GENERAL_ERROR,
        CKR.FUNCTION_FAILED,
        CKR.KEY_SIZE_RANGE,
        CKR.MECHANISM_INVALID,
        CKR.ATTRIBUTE_VALUE_INVALID,
        CKR.ATTRIBUTE_TYPE_INVALID,
        CKR.DATA_INVALID,
        CKR.DATA_LEN_RANGE,
        CKR.ENCRYPTED_DATA_INVALID,
        CKR.ENCRYPTED_DATA_LEN_RANGE,
        CKR.WRAPPED_KEY_INVALID,
        CKR.WRAPPED_KEY_LEN_RANGE,
        CKR.UNWRAPPING_KEY_SIZE_RANGE,
    }
)
"""What members answer to the use of a half-made key (SoftHSM: MECHANISM_INVALID, GENERAL_ERROR)."""


class Proof(StrEnum):
    """Whether an object is the one recorded."""

    MATCH = "match"
    MISMATCH = "mismatch"
    UNPROVEN = "unproven"  # nothing contradicts it, but no use of it is permitted that would show it


# -- fingerprints ------------------------------------------------------------------------------------------------------


def _kind(object_class: int, key_type: int | None, private: bool) -> FingerprintKind:
    if object_class == CKO.DATA:
        return FingerprintKind.DIGEST if private else FingerprintKind.PUBLIC
    if object_class in _PUBLIC_PART or (object_class == CKO.PRIVATE_KEY and key_type == CKK.RSA):
        return FingerprintKind.PUBLIC
    return FingerprintKind.DIGEST if object_class in (CKO.SECRET_KEY, CKO.PRIVATE_KEY) else FingerprintKind.NONE


def _uniform(number: int, value: bytes) -> bytes:
    """The one way to write it: modules differ in leading zeros and in the wrapping of points."""
    if number in _NUMBERS:
        return value.lstrip(b"\0")
    if number == CKA.EC_POINT and len(value) > 2 and value[0] == 0x04:
        length, start = value[1], 2
        if length == 0x81:
            length, start = value[2], 3
        if len(value) == start + length:
            return value[start:]
    return value


def _read(
    connection: Connection, handle: Handle, numbers: tuple[CKA, ...], *, sid: SessionId, timeout: float
) -> dict[int, bytes]:
    values, _ = connection.get(handle, [int(number) for number in numbers], sid=sid, timeout=timeout)
    return values


def public_digest(values: Mapping[int, bytes], object_class: int) -> bytes:
    """SHA-256 over the public part, in the order of the attributes' numbers."""
    numbers = _PUBLIC_PART.get(object_class, (CKA.MODULUS,))
    digest = hashlib.sha256()
    for number in sorted(numbers):
        value = _uniform(number, values.get(number, b""))
        digest.update(number.to_bytes(8, "big") + len(value).to_bytes(8, "big") + value)
    return digest.digest()


def _compute(
    connection: Connection,
    handle: Handle,
    object_class: int,
    kind: FingerprintKind,
    salt: bytes,
    *,
    sid: SessionId,
    timeout: float,
) -> bytes | None:
    """None: there is nothing to compare. The member cannot digest such keys, or the object is half-made: SoftHSM calls
    a key without value indigestible, and takes one whose value it was about to fill in for empty."""
    if kind is FingerprintKind.PUBLIC:
        numbers = _PUBLIC_PART.get(object_class, (CKA.MODULUS,))
        values = _read(connection, handle, numbers, sid=sid, timeout=timeout)
        whole = any(values.values()) or object_class == CKO.DATA
        return public_digest(values, object_class) if whole else None
    if object_class == CKO.DATA:
        values = _read(connection, handle, (CKA.VALUE, CKA.APPLICATION), sid=sid, timeout=timeout)
        application = values.get(CKA.APPLICATION, b"")
        salted = salt + len(application).to_bytes(8, "big") + application
        return hashlib.sha256(salted + values[CKA.VALUE]).digest() if CKA.VALUE in values else None
    try:
        value = connection.digest((int(CKM.SHA256), None), [salt, handle], sid=sid, timeout=timeout)
        return None if value == hashlib.sha256(salt).digest() else value
    except Ckr as error:
        if error.rv in _CANNOT_DIGEST or error.rv in _BROKEN:
            return None
        raise


def fingerprint(
    connection: Connection,
    handle: Handle,
    attributes: Mapping[int, bytes],
    *,
    salt: bytes | None = None,
    sid: SessionId = 0,
    timeout: float,
) -> Fingerprint:
    """How this object will be told from others; ``salt``: to compare with another one's fingerprint."""
    object_class = unpack_ulong(attributes[CKA.CLASS])
    key_type = unpack_ulong(attributes[CKA.KEY_TYPE]) if CKA.KEY_TYPE in attributes else None
    kind = _kind(object_class, key_type, unpack_bool(attributes.get(CKA.PRIVATE, b"\x01")))
    if kind is FingerprintKind.NONE:
        return Fingerprint(kind, b"", b"")
    if kind is FingerprintKind.PUBLIC:
        salt = b""
    elif not salt:
        salt = os.urandom(_SALT_LENGTH)
    value = _compute(connection, handle, object_class, kind, salt, sid=sid, timeout=timeout)
    if value is None:
        return Fingerprint(FingerprintKind.NONE, b"", b"")
    return Fingerprint(kind, salt, value)


def matches(
    connection: Connection,
    handle: Handle,
    object_class: int,
    expected: Fingerprint,
    *,
    sid: SessionId = 0,
    timeout: float,
) -> bool | None:
    """Whether the object has this fingerprint; None: there is nothing to compare, so it may be a half-made one."""
    if expected.kind is FingerprintKind.NONE:
        return None
    value = _compute(connection, handle, object_class, expected.kind, expected.salt, sid=sid, timeout=timeout)
    return None if value is None else value == expected.value


_VALUE: dict[int, tuple[CKA, ...]] = {
    CKO.DATA: (CKA.APPLICATION, CKA.VALUE, CKA.OBJECT_ID),
    CKO.CERTIFICATE: (CKA.VALUE, CKA.URL),
    CKO.PUBLIC_KEY: _PUBLIC_PART[CKO.PUBLIC_KEY],
}
_PRIVATE_VALUE: dict[int | None, CKA] = {
    CKK.RSA: CKA.MODULUS,
    CKK.EC: CKA.EC_PARAMS,
    CKK.DSA: CKA.PRIME,
    CKK.DH: CKA.PRIME,
}


def is_empty(
    connection: Connection, handle: Handle, object_class: int, key_type: int | None, *, timeout: float
) -> bool:
    """Whether it is nothing but a shell: SoftHSM makes that first, and then fills in what makes an object of it.

    The member has to show that the value is empty. Where it only does not show the value, nothing is known.
    """
    if object_class == CKO.SECRET_KEY:
        salt = os.urandom(_SALT_LENGTH)
        try:
            value = connection.digest((int(CKM.SHA256), None), [salt, handle], timeout=timeout)
        except Ckr as error:
            if error.rv in _CANNOT_DIGEST or error.rv in _BROKEN:
                return False  # nothing is known of it
            raise
        return value == hashlib.sha256(salt).digest()
    numbers = _VALUE.get(object_class, ())
    if object_class == CKO.PRIVATE_KEY and key_type in _PRIVATE_VALUE:
        numbers = (_PRIVATE_VALUE[key_type],)
    shown = _read(connection, handle, numbers, sid=0, timeout=timeout) if numbers else {}
    return bool(shown) and not any(shown.values())


# -- proof -------------------------------------------------------------------------------------------------------------


def prove(connection: Connection, handle: Handle, record: ObjectRecord, *, sid: SessionId = 0, timeout: float) -> Proof:
    """Whether the object on the member is the recorded one, whole."""
    same = matches(connection, handle, record.object_class, record.fingerprint, sid=sid, timeout=timeout)
    if same is False:
        return Proof.MISMATCH
    if record.object_class == CKO.PRIVATE_KEY and record.key_type == CKK.RSA:
        return _RsaUse(connection, handle, record, sid, timeout).prove()
    if same:
        return Proof.MATCH
    if record.fingerprint.kind is FingerprintKind.NONE:
        return Proof.UNPROVEN
    if record.fingerprint.kind is FingerprintKind.DIGEST and not _can_digest(connection, record, timeout=timeout):
        return Proof.UNPROVEN
    return Proof.MISMATCH


def _can_digest(connection: Connection, record: ObjectRecord, *, timeout: float) -> bool:
    """Whether the member digests keys of this kind at all, tried with a fresh one."""
    if record.object_class == CKO.DATA:
        return True
    with scratch_session(connection, timeout=timeout) as sid:
        try:
            key = _fresh_key(connection, record, sid, timeout)
            connection.digest((int(CKM.SHA256), None), [key], sid=sid, timeout=timeout)
        except Ckr:
            return False
    return True


def _fresh_key(connection: Connection, record: ObjectRecord, sid: SessionId, timeout: float) -> Handle:
    if record.object_class == CKO.SECRET_KEY:
        return throw_away_key(connection, sid=sid, timeout=timeout)
    mechanism = _PAIR_GENERATION.get(record.key_type or 0)
    if mechanism is None:
        raise Ckr(CKR.MECHANISM_INVALID, "C_GenerateKeyPair")
    session = (int(CKA.TOKEN), pack_bool(False))
    parameters = [(int(n), record.attributes[n]) for n in _PARAMETERS if record.attributes.get(n)]
    pair = connection.generate_pair((int(mechanism), None), [session, *parameters], [session], sid=sid, timeout=timeout)
    return pair[1]


_DIGEST_INFO = {
    CKM.SHA256_RSA_PKCS: ("sha256", bytes.fromhex("3031300d060960864801650304020105000420")),
    CKM.SHA384_RSA_PKCS: ("sha384", bytes.fromhex("3041300d060960864801650304020205000430")),
    CKM.SHA512_RSA_PKCS: ("sha512", bytes.fromhex("3051300d060960864801650304020305000440")),
    CKM.SHA1_RSA_PKCS: ("sha1", bytes.fromhex("3021300906052b0e03021a05000414")),
}
_SIGN = (*_DIGEST_INFO, CKM.RSA_PKCS, CKM.RSA_X_509)
_DECRYPT = (CKM.RSA_PKCS, CKM.RSA_X_509)


class _RsaUse:
    """Use of an RSA private key, checked with modulus and public exponent of the record."""

    def __init__(
        self, connection: Connection, handle: Handle, record: ObjectRecord, sid: SessionId, timeout: float
    ) -> None:
        self._connection = connection
        self._handle = handle
        self._record = record
        self._sid = sid
        self._timeout = timeout
        self._modulus = int.from_bytes(record.attributes.get(CKA.MODULUS, b""), "big")
        self._exponent = int.from_bytes(record.attributes.get(CKA.PUBLIC_EXPONENT, b""), "big")
        self._length = (self._modulus.bit_length() + 7) // 8

    def _may(self, flag: CKA) -> bool:
        return unpack_bool(self._record.attributes.get(flag, b"\x00"))

    def prove(self) -> Proof:
        if not self._modulus or not self._exponent or self._may(CKA.ALWAYS_AUTHENTICATE):
            return Proof.UNPROVEN  # an ALWAYS_AUTHENTICATE key asks for the PIN at each use
        usable = set(self._connection.mechanisms(timeout=self._timeout))
        allowed = self._record.attributes.get(CKA.ALLOWED_MECHANISMS, b"")
        if allowed:
            usable &= {unpack_ulong(allowed[start : start + 8]) for start in range(0, len(allowed), 8)}
        for flag, mechanisms, use in (
            (CKA.SIGN, _SIGN, self._sign),
            (CKA.DECRYPT, _DECRYPT, self._decrypt),
            (CKA.UNWRAP, (CKM.RSA_PKCS,), self._unwrap),
        ):
            mechanism = next((one for one in mechanisms if one in usable), None)
            if not self._may(flag) or mechanism is None:
                continue
            try:
                return Proof.MATCH if use(mechanism) else Proof.MISMATCH
            except Ckr as error:
                if error.rv in _BROKEN:
                    return Proof.MISMATCH
                if error.rv not in (CKR.KEY_FUNCTION_NOT_PERMITTED, CKR.KEY_TYPE_INCONSISTENT):
                    raise
        return Proof.UNPROVEN

    def _padded(self, kind: int, data: bytes) -> bytes:
        """PKCS#1 v1.5: block type 1 (signature) or 2 (encryption)."""
        length = self._length - len(data) - 3
        filling = b"\xff" * length if kind == 1 else bytes(1 + secrets.randbelow(255) for _ in range(length))
        return bytes([0, kind]) + filling + b"\0" + data

    def _public(self, block: bytes) -> bytes:
        return pow(int.from_bytes(block, "big"), self._exponent, self._modulus).to_bytes(self._length, "big")

    def _sign(self, mechanism: CKM) -> bool:
        data = os.urandom(24)
        if mechanism in _DIGEST_INFO:
            name, prefix = _DIGEST_INFO[mechanism]
            expected = self._padded(1, prefix + hashlib.new(name, data).digest())
        elif mechanism == CKM.RSA_X_509:
            data = expected = b"\0" + os.urandom(self._length - 1)
        else:
            expected = self._padded(1, data)
        signature = self._connection.sign(
            (int(mechanism), None), self._handle, data, sid=self._sid, timeout=self._timeout
        )
        return int.from_bytes(signature, "big") < self._modulus and self._public(signature) == expected

    def _decrypt(self, mechanism: CKM) -> bool:
        if mechanism == CKM.RSA_X_509:
            expected = block = b"\0" + os.urandom(self._length - 1)
        else:
            expected = os.urandom(24)
            block = self._padded(2, expected)
        plain = self._connection.decrypt(
            (int(mechanism), None), self._handle, self._public(block), sid=self._sid, timeout=self._timeout
        )
        return plain.rjust(len(expected), b"\0") == expected

    def _unwrap(self, mechanism: CKM) -> bool:
        value, salt = os.urandom(16), os.urandom(_SALT_LENGTH)
        template: Template = [
            (CKA.CLASS, pack_ulong(CKO.SECRET_KEY)),
            (CKA.KEY_TYPE, pack_ulong(CKK.AES)),
            (CKA.TOKEN, pack_bool(False)),
            (CKA.SENSITIVE, pack_bool(True)),
        ]
        wrapped = self._public(self._padded(2, value))
        key = self._connection.unwrap(
            (int(mechanism), None), self._handle, wrapped, template, sid=self._sid, timeout=self._timeout
        )
        try:
            digest = self._connection.digest((int(CKM.SHA256), None), [salt, key], sid=self._sid, timeout=self._timeout)
        finally:
            self._connection.destroy(key, sid=self._sid, timeout=self._timeout)
        return digest == hashlib.sha256(salt + value).digest()
