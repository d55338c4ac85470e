"""Attribute tables, refused changes, and the templates of an object's life (core.attributes, core.templates)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hagroup.core.attributes import (
    ANSWERED_ONLY,
    CKA,
    CKK,
    CKO,
    attributes_of,
    is_secret_component,
    may_copy,
    may_destroy,
    may_set,
    pack_bool,
    pack_template,
    pack_ulong,
    unpack_bool,
    unpack_template,
    unpack_ulong,
)
from hagroup.core.calls import Template
from hagroup.core.ckr import CKR
from hagroup.core.records import ObjectRecord, ObjectState
from hagroup.core.templates import changed_on_member, final_attributes, install_template, scratch_template

YES, NO = pack_bool(True), pack_bool(False)

SECRET = {
    CKA.CLASS: pack_ulong(CKO.SECRET_KEY),
    CKA.KEY_TYPE: pack_ulong(CKK.AES),
    CKA.TOKEN: YES,
    CKA.PRIVATE: YES,
    CKA.LABEL: b"key",
    CKA.ID: b"1",
    CKA.SENSITIVE: YES,
    CKA.EXTRACTABLE: NO,
    CKA.MODIFIABLE: YES,
    CKA.COPYABLE: YES,
    CKA.DESTROYABLE: YES,
    CKA.WRAP_WITH_TRUSTED: NO,
    CKA.ENCRYPT: YES,
}
PRIVATE = {
    **{n: v for n, v in SECRET.items() if n != CKA.ENCRYPT},
    CKA.CLASS: pack_ulong(CKO.PRIVATE_KEY),
    CKA.KEY_TYPE: pack_ulong(CKK.RSA),
    CKA.SIGN: YES,
    CKA.MODULUS: b"\xc1" * 128,
    CKA.PUBLIC_EXPONENT: b"\x01\x00\x01",
}
DATA = {CKA.CLASS: pack_ulong(CKO.DATA), CKA.PRIVATE: NO, CKA.LABEL: b"d", CKA.APPLICATION: b"a", CKA.VALUE: b"v"}


def record(attributes: dict[CKA, bytes], **changes: object) -> ObjectRecord:
    fields: dict[str, object] = {
        "uid": b"u" * 16,
        "object_class": unpack_ulong(attributes[CKA.CLASS]),
        "key_type": unpack_ulong(attributes[CKA.KEY_TYPE]) if CKA.KEY_TYPE in attributes else None,
        "state": ObjectState.LIVE,
        "revision": 1,
        "attributes": {int(n): v for n, v in attributes.items()},
        **changes,
    }
    return ObjectRecord(**fields)  # type: ignore[arg-type]


# -- packing -----------------------------------------------------------------------------------------------------------


@given(st.integers(min_value=0, max_value=2**64 - 1), st.booleans())
def test_packing(number: int, flag: bool) -> None:
    assert unpack_ulong(pack_ulong(number)) == number
    assert unpack_bool(pack_bool(flag)) is flag


def test_a_number_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="8 bytes"):
        unpack_ulong(b"\0\0\0\0")


@given(st.lists(st.tuples(st.integers(min_value=0, max_value=2**32), st.binary(max_size=8)), max_size=4))
def test_nested_templates(template: list[tuple[int, bytes]]) -> None:
    assert unpack_template(pack_template(template)) == template
    assert unpack_template(b"") == []


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("object_class", list(CKO))
@pytest.mark.parametrize("key_type", [None, *CKK])
def test_no_secret_component_is_read(object_class: CKO, key_type: CKK | None) -> None:
    read = attributes_of(object_class, key_type)
    secret = {n for n in read if is_secret_component(object_class, key_type, n)}
    assert secret <= ({CKA.VALUE} if object_class == CKO.DATA else set())
    assert CKA.CLASS in read
    assert CKA.UNIQUE_ID not in read


def test_value_is_secret_where_it_is() -> None:
    assert is_secret_component(None, None, CKA.VALUE)
    assert is_secret_component(CKO.SECRET_KEY, CKK.AES, CKA.VALUE)
    assert is_secret_component(CKO.PRIVATE_KEY, CKK.EC, CKA.VALUE)
    assert is_secret_component(CKO.DATA, None, CKA.VALUE)
    assert is_secret_component(CKO.DATA, None, CKA.VALUE, private=True)
    assert not is_secret_component(CKO.DATA, None, CKA.VALUE, private=False)
    assert not is_secret_component(CKO.CERTIFICATE, None, CKA.VALUE)
    assert not is_secret_component(CKO.PUBLIC_KEY, CKK.DSA, CKA.VALUE)
    for number in (CKA.PRIVATE_EXPONENT, CKA.PRIME_1, CKA.PRIME_2, CKA.EXPONENT_1, CKA.EXPONENT_2, CKA.COEFFICIENT):
        assert is_secret_component(CKO.PUBLIC_KEY, CKK.RSA, number)
        assert is_secret_component(None, None, number)


# -- changes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "number", "value", "refusal"),
    [
        ({}, CKA.LABEL, b"new", None),
        ({}, CKA.ID, b"", None),
        ({}, CKA.ENCRYPT, NO, None),
        ({}, CKA.START_DATE, b"20240101", None),
        ({}, CKA.START_DATE, b"2024", CKR.ATTRIBUTE_VALUE_INVALID),
        ({}, CKA.ENCRYPT, b"\0\0", CKR.ATTRIBUTE_VALUE_INVALID),
        ({CKA.MODIFIABLE: NO}, CKA.LABEL, b"new", CKR.ACTION_PROHIBITED),
        ({CKA.MODIFIABLE: NO}, CKA.MODULUS, b"new", CKR.ACTION_PROHIBITED),
        ({}, CKA.SENSITIVE, NO, CKR.ATTRIBUTE_READ_ONLY),
        ({CKA.SENSITIVE: NO}, CKA.SENSITIVE, YES, None),
        ({}, CKA.EXTRACTABLE, YES, CKR.ATTRIBUTE_READ_ONLY),
        ({CKA.EXTRACTABLE: YES}, CKA.EXTRACTABLE, NO, None),
        ({}, CKA.WRAP_WITH_TRUSTED, YES, None),
        ({CKA.WRAP_WITH_TRUSTED: YES}, CKA.WRAP_WITH_TRUSTED, NO, CKR.ATTRIBUTE_READ_ONLY),
        ({CKA.COPYABLE: NO}, CKA.COPYABLE, YES, CKR.ATTRIBUTE_READ_ONLY),
        ({}, CKA.TRUSTED, YES, CKR.ATTRIBUTE_READ_ONLY),
        ({}, CKA.TOKEN, NO, CKR.ATTRIBUTE_READ_ONLY),
        ({}, CKA.PRIVATE, NO, CKR.ATTRIBUTE_READ_ONLY),
        ({}, CKA.CLASS, pack_ulong(CKO.DATA), CKR.ATTRIBUTE_READ_ONLY),
        ({}, CKA.KEY_TYPE, pack_ulong(CKK.DES3), CKR.ATTRIBUTE_READ_ONLY),
        ({}, CKA.MODIFIABLE, NO, CKR.ATTRIBUTE_READ_ONLY),
        ({}, CKA.DESTROYABLE, NO, CKR.ATTRIBUTE_READ_ONLY),
        ({}, CKA.VALUE, b"v", CKR.ATTRIBUTE_TYPE_INVALID),
        ({}, CKA.LOCAL, YES, CKR.ATTRIBUTE_READ_ONLY),
        ({}, CKA.VALUE_LEN, pack_ulong(1), CKR.ATTRIBUTE_READ_ONLY),
        ({}, CKA.MODULUS, b"m", CKR.ATTRIBUTE_TYPE_INVALID),
        ({}, CKA.UNIQUE_ID, b"m", CKR.ATTRIBUTE_TYPE_INVALID),
        ({}, 0x80000001, b"m", CKR.ATTRIBUTE_TYPE_INVALID),
        ({0x80000001: b"n"}, 0x80000001, b"m", None),
    ],
)
def test_what_may_be_set(change: dict[int, bytes], number: int, value: bytes, refusal: CKR | None) -> None:
    assert may_set({**SECRET, **change}, number, value) == refusal


def test_certificates_and_data_have_little_that_may_be_set() -> None:
    certificate = {CKA.CLASS: pack_ulong(CKO.CERTIFICATE), CKA.CERTIFICATE_TYPE: pack_ulong(0)}
    assert may_set(certificate, CKA.ISSUER, b"") is None
    assert may_set(certificate, CKA.SUBJECT, b"") == CKR.ATTRIBUTE_READ_ONLY
    assert may_set(DATA, CKA.LABEL, b"x") is None
    assert may_set(DATA, CKA.VALUE, b"x") == CKR.ATTRIBUTE_READ_ONLY
    assert may_set(DATA, CKA.APPLICATION, b"x") == CKR.ATTRIBUTE_READ_ONLY
    assert may_set(DATA, CKA.ID, b"x") == CKR.ATTRIBUTE_TYPE_INVALID


@pytest.mark.parametrize(
    ("change", "number", "value", "refusal"),
    [
        ({}, CKA.LABEL, b"new", None),
        ({}, CKA.TOKEN, NO, None),
        ({}, CKA.MODIFIABLE, NO, None),
        ({}, CKA.DESTROYABLE, NO, None),
        ({}, CKA.SENSITIVE, YES, None),
        ({}, CKA.SENSITIVE, NO, CKR.ATTRIBUTE_READ_ONLY),
        ({}, CKA.EXTRACTABLE, YES, CKR.ATTRIBUTE_READ_ONLY),
        ({CKA.EXTRACTABLE: YES}, CKA.EXTRACTABLE, NO, None),
        ({}, CKA.PRIVATE, NO, CKR.TEMPLATE_INCONSISTENT),
        ({CKA.PRIVATE: NO}, CKA.PRIVATE, YES, None),
        ({}, CKA.TRUSTED, YES, CKR.ATTRIBUTE_READ_ONLY),
        ({}, CKA.KEY_TYPE, pack_ulong(CKK.AES), None),
        ({}, CKA.KEY_TYPE, pack_ulong(CKK.DES3), CKR.ATTRIBUTE_READ_ONLY),
        ({}, CKA.MODULUS, b"x", CKR.ATTRIBUTE_TYPE_INVALID),
        ({CKA.COPYABLE: NO}, CKA.LABEL, b"new", CKR.ACTION_PROHIBITED),
        ({CKA.COPYABLE: NO}, None, b"", CKR.ACTION_PROHIBITED),
        ({CKA.MODIFIABLE: NO}, CKA.LABEL, b"new", CKR.ATTRIBUTE_READ_ONLY),
        ({CKA.MODIFIABLE: NO}, CKA.TOKEN, NO, None),
        ({CKA.MODIFIABLE: NO}, None, b"", None),
    ],
)
def test_what_may_be_copied(change: dict[int, bytes], number: int | None, value: bytes, refusal: CKR | None) -> None:
    assert may_copy({**SECRET, **change}, number, value) == refusal


def test_what_may_be_destroyed() -> None:
    assert may_destroy(SECRET) is None
    assert may_destroy({**SECRET, CKA.DESTROYABLE: NO}) == CKR.ACTION_PROHIBITED


# -- templates ---------------------------------------------------------------------------------------------------------


def test_a_scratch_object_can_always_be_sealed() -> None:
    asked: Template = [
        (CKA.CLASS, pack_ulong(CKO.SECRET_KEY)),
        (CKA.TOKEN, YES),
        (CKA.LABEL, b"x"),
        (CKA.SENSITIVE, YES),
        *[(n, NO) for n in (CKA.EXTRACTABLE, CKA.MODIFIABLE, CKA.COPYABLE, CKA.DESTROYABLE)],
        (CKA.WRAP_WITH_TRUSTED, YES),
        (CKA.START_DATE, b"20240101"),
        (CKA.UNWRAP_TEMPLATE, [(CKA.SENSITIVE, YES)]),
    ]
    scratch = dict(scratch_template(asked))
    assert scratch[CKA.TOKEN] == NO
    assert scratch[CKA.EXTRACTABLE] == YES
    assert scratch[CKA.SENSITIVE] == YES
    assert scratch[CKA.UNWRAP_TEMPLATE] == [(CKA.SENSITIVE, YES)]
    for number in (CKA.MODIFIABLE, CKA.COPYABLE, CKA.DESTROYABLE, CKA.WRAP_WITH_TRUSTED, CKA.START_DATE):
        assert number not in scratch


def test_public_objects_get_no_extractable() -> None:
    assert CKA.EXTRACTABLE not in dict(scratch_template([(CKA.CLASS, pack_ulong(CKO.PUBLIC_KEY))]))
    assert CKA.EXTRACTABLE not in dict(scratch_template([(CKA.LABEL, b"x")]))
    assert CKA.EXTRACTABLE in dict(scratch_template([(CKA.LABEL, b"x")], object_class=CKO.SECRET_KEY))


def test_what_the_virtual_slot_answers_is_what_was_asked_for() -> None:
    read = {
        **SECRET,
        CKA.TOKEN: NO,
        CKA.EXTRACTABLE: YES,
        CKA.NEVER_EXTRACTABLE: NO,
        CKA.ALWAYS_SENSITIVE: YES,
        CKA.LOCAL: YES,
        CKA.VALUE_LEN: pack_ulong(0),
    }
    asked: Template = [
        (CKA.CLASS, pack_ulong(CKO.SECRET_KEY)),
        (CKA.TOKEN, YES),
        (CKA.MODIFIABLE, NO),
        (CKA.END_DATE, b"20301231"),
        (CKA.VALUE_LEN, pack_ulong(32)),
        (0x80000009, b"vendor"),
    ]
    final = final_attributes(asked, read, default_extractable=False)
    assert final[CKA.TOKEN] == YES
    assert final[CKA.MODIFIABLE] == NO
    assert final[CKA.COPYABLE] == final[CKA.DESTROYABLE] == YES
    assert final[CKA.EXTRACTABLE] == NO
    assert final[CKA.NEVER_EXTRACTABLE] == NO
    assert final[CKA.ALWAYS_SENSITIVE] == YES
    assert final[CKA.START_DATE] == b""
    assert final[CKA.END_DATE] == b"20301231"
    assert final[CKA.VALUE_LEN] == pack_ulong(32)
    assert final[0x80000009] == b"vendor"
    assert all(type(number) is int for number in final)
    assert final_attributes(asked, read, default_extractable=True)[CKA.EXTRACTABLE] == YES
    read[CKA.SENSITIVE] = NO
    assert final_attributes(asked, read, default_extractable=True)[CKA.ALWAYS_SENSITIVE] == NO


def test_no_secret_gets_into_the_record() -> None:
    read = {**SECRET, CKA.VALUE: b"secret", CKA.SENSITIVE: NO}
    asked: Template = [(CKA.VALUE, b"secret"), (CKA.CLASS, pack_ulong(CKO.SECRET_KEY))]
    assert b"secret" not in final_attributes(asked, read, default_extractable=True).values()
    data: Template = [(CKA.VALUE, b"v")]
    assert CKA.VALUE in final_attributes(data, DATA, default_extractable=False)
    assert CKA.VALUE not in final_attributes(data, {**DATA, CKA.PRIVATE: YES}, default_extractable=False)


def test_the_template_for_a_member() -> None:
    attributes = {
        **PRIVATE,
        CKA.MODIFIABLE: NO,
        CKA.DESTROYABLE: NO,
        CKA.COPYABLE: NO,
        CKA.LOCAL: YES,
        CKA.START_DATE: b"20200101",
        CKA.SUBJECT: b"",
        CKA.ALLOWED_MECHANISMS: b"",
        CKA.UNWRAP_TEMPLATE: pack_template([(CKA.SENSITIVE, YES)]),
        CKA.DERIVE_TEMPLATE: pack_template([]),
    }
    template = install_template(record(attributes), token=True)
    numbers = [number for number, _ in template]
    assert numbers[:4] == [CKA.CLASS, CKA.KEY_TYPE, CKA.TOKEN, CKA.PRIVATE]
    assert template[-1] == (CKA.MODIFIABLE, NO)
    assert dict(template)[CKA.UNWRAP_TEMPLATE] == [(CKA.SENSITIVE, YES)]
    assert dict(template)[CKA.COPYABLE] == NO
    assert not set(numbers) & ANSWERED_ONLY
    left_out = {CKA.MODULUS, CKA.PUBLIC_EXPONENT, CKA.SUBJECT, CKA.ALLOWED_MECHANISMS, CKA.DERIVE_TEMPLATE}
    assert not set(numbers) & left_out
    assert len(numbers) == len(set(numbers))


def test_what_separates_two_on_a_member() -> None:
    assert dict(install_template(record(SECRET, member_id=b"m"), token=True))[CKA.ID] == b"m"
    data = dict(install_template(record(DATA, member_id=b"m"), token=False))
    assert data[CKA.OBJECT_ID] == b"m"
    assert CKA.ID not in data
    assert data[CKA.TOKEN] == NO
    assert data[CKA.VALUE] == b"v"


def test_what_of_a_change_members_carry_out() -> None:
    new = {CKA.LABEL: b"x", CKA.START_DATE: b"", CKA.DESTROYABLE: NO, CKA.ID: b"y"}
    assert changed_on_member(record(SECRET), new) == [(CKA.LABEL, b"x"), (CKA.ID, b"y")]
    assert changed_on_member(record(SECRET, member_id=b"m"), new) == [(CKA.LABEL, b"x")]
    assert changed_on_member(record(SECRET, answered_only=frozenset({CKA.LABEL, CKA.ID})), new) == []
