"""What is known about attributes: which exist for a class, which are secret, which only generation sets, and which
changes PKCS#11 refuses.

Everything is packed as Cryptoki has it: a boolean is one byte, a number the machine's CK_ULONG; an attribute that is a
template of its own is msgpack of a list of ``[type, value]``, as members give it back.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping

import msgspec

from hagroup.core.ckr import CKR
from hagroup.core.numbers import CKA, CKA_VENDOR_DEFINED, CKK, CKM, CKO, CKU

__all__ = [
    "CKA",
    "CKK",
    "CKM",
    "CKO",
    "CKU",
    "Attributes",
    "attributes_of",
    "is_secret_component",
    "may_copy",
    "may_destroy",
    "may_set",
    "pack_bool",
    "pack_template",
    "pack_ulong",
    "unpack_bool",
    "unpack_template",
    "unpack_ulong",
]

Attributes = Mapping[int, bytes]

_ULONG = struct.Struct("@L")


def pack_bool(value: bool) -> bytes:
    return b"\x01" if value else b"\x00"


def unpack_bool(value: bytes) -> bool:
    return value not in (b"", b"\x00")


def pack_ulong(value: int) -> bytes:
    return _ULONG.pack(value)


def unpack_ulong(value: bytes) -> int:
    """:raises ValueError: this is no CK_ULONG."""
    if len(value) != _ULONG.size:
        raise ValueError(f"a number of {_ULONG.size} bytes was expected, there are {len(value)}")
    number: int = _ULONG.unpack(value)[0]
    return number


def pack_template(attributes: Collection[tuple[int, bytes]]) -> bytes:
    return msgspec.msgpack.encode([[int(number), value] for number, value in attributes])


def unpack_template(value: bytes) -> list[tuple[int, bytes]]:
    return msgspec.msgpack.decode(value, type=list[tuple[int, bytes]]) if value else []


# -- which attributes there are ----------------------------------------------------------------------------------------

_STORAGE = {CKA.CLASS, CKA.TOKEN, CKA.PRIVATE, CKA.MODIFIABLE, CKA.LABEL, CKA.COPYABLE, CKA.DESTROYABLE}
_KEY = {
    CKA.KEY_TYPE,
    CKA.ID,
    CKA.START_DATE,
    CKA.END_DATE,
    CKA.DERIVE,
    CKA.LOCAL,
    CKA.KEY_GEN_MECHANISM,
    CKA.ALLOWED_MECHANISMS,
}
_UNDISCLOSED = {
    CKA.SENSITIVE,
    CKA.EXTRACTABLE,
    CKA.ALWAYS_SENSITIVE,
    CKA.NEVER_EXTRACTABLE,
    CKA.WRAP_WITH_TRUSTED,
    CKA.UNWRAP_TEMPLATE,
    CKA.DERIVE_TEMPLATE,
}
_OF_CLASS: dict[int, set[CKA]] = {
    CKO.DATA: {CKA.APPLICATION, CKA.OBJECT_ID, CKA.VALUE},
    CKO.CERTIFICATE: {
        CKA.CERTIFICATE_TYPE,
        CKA.TRUSTED,
        CKA.CERTIFICATE_CATEGORY,
        CKA.CHECK_VALUE,
        CKA.START_DATE,
        CKA.END_DATE,
        CKA.PUBLIC_KEY_INFO,
        CKA.SUBJECT,
        CKA.ID,
        CKA.ISSUER,
        CKA.SERIAL_NUMBER,
        CKA.AC_ISSUER,
        CKA.OWNER,
        CKA.ATTR_TYPES,
        CKA.VALUE,
        CKA.URL,
        CKA.HASH_OF_SUBJECT_PUBLIC_KEY,
        CKA.HASH_OF_ISSUER_PUBLIC_KEY,
        CKA.NAME_HASH_ALGORITHM,
        CKA.JAVA_MIDP_SECURITY_DOMAIN,
    },
    CKO.PUBLIC_KEY: {
        *_KEY,
        CKA.SUBJECT,
        CKA.ENCRYPT,
        CKA.VERIFY,
        CKA.VERIFY_RECOVER,
        CKA.WRAP,
        CKA.TRUSTED,
        CKA.WRAP_TEMPLATE,
        CKA.PUBLIC_KEY_INFO,
        CKA.ENCAPSULATE,
        CKA.ENCAPSULATE_TEMPLATE,
    },
    CKO.PRIVATE_KEY: {
        *_KEY,
        *_UNDISCLOSED,
        CKA.SUBJECT,
        CKA.DECRYPT,
        CKA.SIGN,
        CKA.SIGN_RECOVER,
        CKA.UNWRAP,
        CKA.ALWAYS_AUTHENTICATE,
        CKA.PUBLIC_KEY_INFO,
        CKA.DECAPSULATE,
        CKA.DECAPSULATE_TEMPLATE,
    },
    CKO.SECRET_KEY: {
        *_KEY,
        *_UNDISCLOSED,
        CKA.ENCRYPT,
        CKA.DECRYPT,
        CKA.SIGN,
        CKA.VERIFY,
        CKA.WRAP,
        CKA.UNWRAP,
        CKA.CHECK_VALUE,
        CKA.TRUSTED,
        CKA.WRAP_TEMPLATE,
        CKA.VALUE_LEN,
    },
    CKO.DOMAIN_PARAMETERS: {CKA.KEY_TYPE, CKA.LOCAL},
}

_GROUP = {CKA.PRIME, CKA.SUBPRIME, CKA.BASE}
_GOST = {CKA.GOSTR3410_PARAMS, CKA.GOSTR3411_PARAMS, CKA.GOST28147_PARAMS}
_CURVE = {CKA.EC_PARAMS}
_COMPONENTS: dict[int, dict[int, set[CKA]]] = {
    CKO.PUBLIC_KEY: {
        CKK.RSA: {CKA.MODULUS, CKA.MODULUS_BITS, CKA.PUBLIC_EXPONENT},
        CKK.DSA: {*_GROUP, CKA.VALUE},
        CKK.DH: {CKA.PRIME, CKA.BASE, CKA.VALUE},
        CKK.X9_42_DH: {*_GROUP, CKA.VALUE},
        CKK.EC: {*_CURVE, CKA.EC_POINT},
        CKK.EC_EDWARDS: {*_CURVE, CKA.EC_POINT},
        CKK.EC_MONTGOMERY: {*_CURVE, CKA.EC_POINT},
        CKK.GOSTR3410: {*_GOST, CKA.VALUE},
    },
    CKO.PRIVATE_KEY: {
        CKK.RSA: {CKA.MODULUS, CKA.PUBLIC_EXPONENT},
        CKK.DSA: _GROUP,
        CKK.DH: {CKA.PRIME, CKA.BASE, CKA.VALUE_BITS},
        CKK.X9_42_DH: _GROUP,
        CKK.EC: _CURVE,
        CKK.EC_EDWARDS: _CURVE,
        CKK.EC_MONTGOMERY: _CURVE,
        CKK.GOSTR3410: _GOST,
    },
    CKO.DOMAIN_PARAMETERS: {
        CKK.DSA: {*_GROUP, CKA.PRIME_BITS, CKA.SUBPRIME_BITS},
        CKK.DH: {CKA.PRIME, CKA.BASE, CKA.PRIME_BITS},
        CKK.X9_42_DH: {*_GROUP, CKA.PRIME_BITS, CKA.SUBPRIME_BITS},
        CKK.EC: _CURVE,
    },
}
_OTHER_COMPONENTS: dict[int, set[CKA]] = {
    CKO.PUBLIC_KEY: {CKA.VALUE, CKA.PARAMETER_SET, *_CURVE, CKA.EC_POINT},
    CKO.PRIVATE_KEY: {CKA.PARAMETER_SET, *_CURVE},
}
"""Of a key type that is not listed: what later versions of PKCS#11 use."""

_SECRET = {
    CKA.PRIVATE_EXPONENT,
    CKA.PRIME_1,
    CKA.PRIME_2,
    CKA.EXPONENT_1,
    CKA.EXPONENT_2,
    CKA.COEFFICIENT,
    CKA.SEED,
}
"""Secret whatever the object is; VALUE is where the class makes it so."""

BY_GENERATION = frozenset(
    {
        CKA.LOCAL,
        CKA.KEY_GEN_MECHANISM,
        CKA.VALUE_LEN,
        CKA.VALUE_BITS,
        CKA.CHECK_VALUE,
        CKA.ALWAYS_SENSITIVE,
        CKA.NEVER_EXTRACTABLE,
        CKA.MODULUS_BITS,
        CKA.PRIME_BITS,
        CKA.SUBPRIME_BITS,
        CKA.UNIQUE_ID,
    }
)
"""Set by the token when it makes the object, and by nobody after; answered from the record."""

KEPT_IN_JOURNAL = frozenset({CKA.DESTROYABLE, CKA.START_DATE, CKA.END_DATE, CKA.TRUSTED})
"""Never set on members: DESTROYABLE would stop the group itself, TRUSTED is always false, and a private object whose
dates were set once cannot be read whole any more on SoftHSM (DESIGN.md 8, trap 7)."""

ANSWERED_ONLY = BY_GENERATION | KEPT_IN_JOURNAL

TEMPLATES = frozenset(
    {
        CKA.WRAP_TEMPLATE,
        CKA.UNWRAP_TEMPLATE,
        CKA.DERIVE_TEMPLATE,
        CKA.ENCAPSULATE_TEMPLATE,
        CKA.DECAPSULATE_TEMPLATE,
    }
)
"""Attributes whose value is a template."""

_BOOLEAN = frozenset(
    {
        CKA.TOKEN,
        CKA.PRIVATE,
        CKA.MODIFIABLE,
        CKA.COPYABLE,
        CKA.DESTROYABLE,
        CKA.TRUSTED,
        CKA.SENSITIVE,
        CKA.EXTRACTABLE,
        CKA.WRAP_WITH_TRUSTED,
        CKA.ENCRYPT,
        CKA.DECRYPT,
        CKA.SIGN,
        CKA.SIGN_RECOVER,
        CKA.VERIFY,
        CKA.VERIFY_RECOVER,
        CKA.WRAP,
        CKA.UNWRAP,
        CKA.DERIVE,
        CKA.ENCAPSULATE,
        CKA.DECAPSULATE,
    }
)

_MODIFIABLE = frozenset(
    {
        CKA.LABEL,
        CKA.ID,
        CKA.SUBJECT,
        CKA.START_DATE,
        CKA.END_DATE,
        CKA.DERIVE,
        CKA.ENCRYPT,
        CKA.DECRYPT,
        CKA.SIGN,
        CKA.SIGN_RECOVER,
        CKA.VERIFY,
        CKA.VERIFY_RECOVER,
        CKA.WRAP,
        CKA.UNWRAP,
        CKA.ENCAPSULATE,
        CKA.DECAPSULATE,
        CKA.SENSITIVE,
        CKA.EXTRACTABLE,
        CKA.WRAP_WITH_TRUSTED,
        CKA.COPYABLE,
        CKA.ISSUER,
        CKA.SERIAL_NUMBER,
        CKA.PUBLIC_KEY_INFO,
    }
)
"""What C_SetAttributeValue may change where the object has it (PKCS#11 v2.40, footnote 8 of its tables)."""

_CERTIFICATE_MODIFIABLE = frozenset({CKA.LABEL, CKA.ID, CKA.ISSUER, CKA.SERIAL_NUMBER})

_ONE_WAY = {CKA.SENSITIVE: True, CKA.EXTRACTABLE: False, CKA.WRAP_WITH_TRUSTED: True, CKA.COPYABLE: False}
"""The value from which there is no way back."""


def attributes_of(object_class: int, key_type: int | None) -> frozenset[CKA]:
    """The attributes that objects of this kind have and that may be read for the record: no secret component, but
    VALUE of data objects (see :func:`is_secret_component`)."""
    found = _STORAGE | _OF_CLASS.get(object_class, set())
    if key_type is not None and object_class in _COMPONENTS:
        other = _OTHER_COMPONENTS.get(object_class, set())
        found = found | _COMPONENTS[object_class].get(key_type, other)
    return frozenset(found)


def is_secret_component(
    object_class: int | None, key_type: int | None, number: int, *, private: bool | None = None
) -> bool:
    """Whether this attribute is never recorded, whatever SENSITIVE says. What is not known counts as the worst."""
    if number in _SECRET:
        return True
    if number != CKA.VALUE:
        return False
    if object_class == CKO.DATA:
        return private is not False
    return object_class not in (CKO.PUBLIC_KEY, CKO.CERTIFICATE, CKO.DOMAIN_PARAMETERS)


# -- what C_SetAttributeValue, C_CopyObject and C_DestroyObject refuse -------------------------------------------------


def _kind(attributes: Attributes) -> tuple[int, int | None]:
    object_class = unpack_ulong(attributes[CKA.CLASS])
    return object_class, unpack_ulong(attributes[CKA.KEY_TYPE]) if CKA.KEY_TYPE in attributes else None


def _has(attributes: Attributes, number: int) -> bool:
    object_class, key_type = _kind(attributes)
    return number in attributes or number in attributes_of(object_class, key_type) or number in _SECRET


def _flag(attributes: Attributes, number: int, default: bool) -> bool:
    return unpack_bool(attributes[number]) if number in attributes else default


def _one_way(attributes: Attributes, number: int) -> bool:
    """It has the value already from which there is no way back."""
    end = _ONE_WAY.get(CKA(number)) if number in _ONE_WAY else None
    return end is not None and _flag(attributes, number, not end) is end


def _malformed(number: int, value: bytes) -> bool:
    if number in _BOOLEAN:
        return len(value) != 1
    return number in (CKA.START_DATE, CKA.END_DATE) and len(value) not in (0, 8)


def may_set(attributes: Attributes, number: int, value: bytes) -> CKR | None:
    """Why C_SetAttributeValue must refuse; None: ask the members (which may refuse more)."""
    if not _flag(attributes, CKA.MODIFIABLE, True):
        return CKR.ACTION_PROHIBITED
    if not _has(attributes, number):
        return CKR.ATTRIBUTE_TYPE_INVALID
    if number >= CKA_VENDOR_DEFINED:
        return None
    certificate = _kind(attributes)[0] == CKO.CERTIFICATE
    if number not in (_CERTIFICATE_MODIFIABLE if certificate else _MODIFIABLE) or _one_way(attributes, number):
        return CKR.ATTRIBUTE_READ_ONLY
    if _malformed(number, value):
        return CKR.ATTRIBUTE_VALUE_INVALID
    return None


def may_copy(attributes: Attributes, number: int | None = None, value: bytes = b"") -> CKR | None:
    """Why C_CopyObject must refuse this attribute in its template (``None``: why it must refuse at all)."""
    if not _flag(attributes, CKA.COPYABLE, True):
        return CKR.ACTION_PROHIBITED
    if number is None:
        return None
    if not _has(attributes, number):
        return CKR.ATTRIBUTE_TYPE_INVALID
    if _malformed(number, value):
        return CKR.ATTRIBUTE_VALUE_INVALID
    if number == CKA.TOKEN or (attributes.get(number) == value and number != CKA.VALUE):
        return None
    if not _flag(attributes, CKA.MODIFIABLE, True):
        return CKR.ATTRIBUTE_READ_ONLY
    if number == CKA.PRIVATE:
        return None if unpack_bool(value) else CKR.TEMPLATE_INCONSISTENT
    if number in (CKA.MODIFIABLE, CKA.DESTROYABLE) or number >= CKA_VENDOR_DEFINED:
        return None
    return may_set(attributes, number, value)


def may_destroy(attributes: Attributes) -> CKR | None:
    """Why C_DestroyObject must refuse."""
    return None if _flag(attributes, CKA.DESTROYABLE, True) else CKR.ACTION_PROHIBITED
