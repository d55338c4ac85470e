"""Templates of one object's life: in the scratch session, in the record, and on a member's token (DESIGN.md 4.2)."""

from __future__ import annotations

from collections.abc import Mapping

from hagroup.core.attributes import (
    ANSWERED_ONLY,
    CKA,
    CKO,
    KEPT_IN_JOURNAL,
    TEMPLATES,
    attributes_of,
    is_secret_component,
    pack_bool,
    pack_template,
    pack_ulong,
    unpack_bool,
    unpack_template,
    unpack_ulong,
)
from hagroup.core.calls import Template
from hagroup.core.numbers import CKA_VENDOR_DEFINED
from hagroup.core.records import ObjectRecord

_UNDISCLOSED = (CKO.PRIVATE_KEY, CKO.SECRET_KEY)

_FREE = (CKA.MODIFIABLE, CKA.DESTROYABLE, CKA.COPYABLE, CKA.WRAP_WITH_TRUSTED)
"""What could stop the group from sealing, changing or ending a scratch object; PKCS#11's defaults do not."""

_LEFT_OUT_IF_DEFAULT: dict[int, bytes] = {
    CKA.COPYABLE: pack_bool(True),
    CKA.MODIFIABLE: pack_bool(True),
    CKA.WRAP_WITH_TRUSTED: pack_bool(False),
    CKA.ALWAYS_AUTHENTICATE: pack_bool(False),
    CKA.CERTIFICATE_CATEGORY: pack_ulong(0),
    CKA.JAVA_MIDP_SECURITY_DOMAIN: pack_ulong(0),
}

_EMPTY_IS_NOTHING = frozenset(
    {
        CKA.ALLOWED_MECHANISMS,
        CKA.SUBJECT,
        CKA.ISSUER,
        CKA.SERIAL_NUMBER,
        CKA.AC_ISSUER,
        CKA.OWNER,
        CKA.ATTR_TYPES,
        CKA.URL,
        CKA.HASH_OF_SUBJECT_PUBLIC_KEY,
        CKA.HASH_OF_ISSUER_PUBLIC_KEY,
        CKA.NAME_HASH_ALGORITHM,
        CKA.OBJECT_ID,
        CKA.APPLICATION,
        CKA.SUBPRIME,
        CKA.PUBLIC_KEY_INFO,
    }
)

_COMPONENTS = frozenset(
    {
        CKA.MODULUS,
        CKA.PUBLIC_EXPONENT,
        CKA.PRIME,
        CKA.SUBPRIME,
        CKA.BASE,
        CKA.EC_PARAMS,
        CKA.EC_POINT,
        CKA.GOSTR3410_PARAMS,
        CKA.GOSTR3411_PARAMS,
        CKA.GOST28147_PARAMS,
        CKA.PARAMETER_SET,
        CKA.VALUE,
    }
)
"""Part of the sealed key: not allowed in the template of C_UnwrapKey."""


def class_of(template: Template) -> int | None:
    for number, value in template:
        if number == CKA.CLASS and isinstance(value, bytes):
            return unpack_ulong(value)
    return None


def scratch_template(template: Template, *, object_class: int | None = None) -> Template:
    """What the application asked for, as a session object that can be sealed.

    :param object_class: for generation, where the template need not say it.
    """
    found = class_of(template)
    object_class = object_class if found is None else found
    undisclosed = object_class in _UNDISCLOSED
    overridden = {CKA.TOKEN, *_FREE, *KEPT_IN_JOURNAL, *((CKA.EXTRACTABLE,) if undisclosed else ())}
    scratch = [(number, value) for number, value in template if number not in overridden]
    scratch.append((CKA.TOKEN, pack_bool(False)))
    if undisclosed:
        scratch.append((CKA.EXTRACTABLE, pack_bool(True)))
    return scratch


def final_attributes(template: Template, read: Mapping[int, bytes], *, default_extractable: bool) -> dict[int, bytes]:
    """What the virtual slot will answer.

    :param template: what the application gave.
    :param read: what was read from the scratch object.
    :param default_extractable: what a member makes EXTRACTABLE if the application does not say.
    """
    object_class = unpack_ulong(read[CKA.CLASS])
    key_type = unpack_ulong(read[CKA.KEY_TYPE]) if CKA.KEY_TYPE in read else None
    kind = attributes_of(object_class, key_type)
    given = {int(n): v if isinstance(v, bytes) else pack_template(v) for n, v in template}
    attributes = {int(number): value for number, value in read.items()}
    attributes |= {
        int(n): pack_bool(n not in (CKA.TOKEN, CKA.WRAP_WITH_TRUSTED)) for n in (CKA.TOKEN, *_FREE) if n in kind
    }
    attributes |= {int(n): b"" for n in (CKA.START_DATE, CKA.END_DATE) if n in kind}
    if CKA.EXTRACTABLE in kind:
        attributes[int(CKA.EXTRACTABLE)] = pack_bool(default_extractable)
    for number, value in given.items():
        overridden = number == CKA.TOKEN or number in _FREE or number in KEPT_IN_JOURNAL or number == CKA.EXTRACTABLE
        if number >= CKA_VENDOR_DEFINED or (overridden and number in kind):
            attributes[number] = value
    if CKA.VALUE_LEN in given and not any(attributes.get(CKA.VALUE_LEN, b"\x01")):
        attributes[int(CKA.VALUE_LEN)] = given[CKA.VALUE_LEN]  # SoftHSM forgets it when it unwraps
    if CKA.NEVER_EXTRACTABLE in kind:
        sensitive = unpack_bool(attributes.get(CKA.SENSITIVE, b""))
        always = sensitive and unpack_bool(attributes.get(CKA.ALWAYS_SENSITIVE, b""))
        attributes[int(CKA.ALWAYS_SENSITIVE)] = pack_bool(always)
        attributes[int(CKA.NEVER_EXTRACTABLE)] = pack_bool(False)  # it left a member, sealed
    private = unpack_bool(attributes.get(CKA.PRIVATE, b"\x01"))
    return {
        number: value
        for number, value in sorted(attributes.items())
        if not is_secret_component(object_class, key_type, number, private=private)
    }


def install_template(record: ObjectRecord, *, token: bool) -> Template:
    """The template that makes the object on a member: for C_UnwrapKey (private and secret keys) or C_CreateObject.

    Attributes that make no sense there, or that only generation sets, are left out; MODIFIABLE comes last, since a
    template is applied in order (DESIGN.md 8, trap 7). The VALUE of a private data object is the caller's to add.
    """
    unwrapped = record.object_class in _UNDISCLOSED
    attributes = {number: value for number, value in record.attributes.items() if number not in record.answered_only}
    if record.object_class != CKO.PRIVATE_KEY:
        attributes.pop(CKA.PUBLIC_KEY_INFO, None)  # follows from the public key itself
    attributes[CKA.CLASS] = pack_ulong(record.object_class)
    attributes[CKA.TOKEN] = pack_bool(token)
    if record.key_type is not None:
        attributes[CKA.KEY_TYPE] = pack_ulong(record.key_type)
    if record.member_id is not None:
        attributes[CKA.OBJECT_ID if record.object_class == CKO.DATA else CKA.ID] = record.member_id
    first = (CKA.CLASS, CKA.KEY_TYPE, CKA.CERTIFICATE_TYPE, CKA.TOKEN, CKA.PRIVATE)
    template: Template = [(int(number), attributes[number]) for number in first if number in attributes]
    for number, value in sorted(attributes.items()):
        if (
            number in first
            or number in ANSWERED_ONLY
            or number == CKA.MODIFIABLE
            or (unwrapped and number in _COMPONENTS)
        ):
            continue
        if _LEFT_OUT_IF_DEFAULT.get(number) == value or (not value and number in _EMPTY_IS_NOTHING):
            continue
        if number in TEMPLATES:
            nested = unpack_template(value)
            if nested:
                template.append((int(number), list(nested)))
            continue
        template.append((int(number), value))
    if not unpack_bool(attributes.get(CKA.MODIFIABLE, b"\x01")):
        template.append((int(CKA.MODIFIABLE), pack_bool(False)))
    return template


def changed_on_member(record: ObjectRecord, new: Mapping[int, bytes]) -> Template:
    """The part of an attribute change that members carry out; the rest is the record's alone."""
    skipped = {*ANSWERED_ONLY, *record.answered_only}
    if record.member_id is not None:
        skipped.add(CKA.OBJECT_ID if record.object_class == CKO.DATA else CKA.ID)
    return [(int(number), value) for number, value in sorted(new.items()) if number not in skipped]
