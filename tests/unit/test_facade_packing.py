"""Attributes are packed in Python, and what does not fit is refused before anything is sent."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from pkcs11 import Attribute, KeyType, ObjectClass
from pkcs11.attributes import AttributeMapper
from pkcs11.constants import DEFAULT
from pkcs11.exceptions import ArgumentsBad

from hagroup.errors import NotOnGroup
from hagroup.facade.packing import (
    as_bytes,
    as_pin,
    leaves_id_open,
    merge_templates,
    pack,
    pack_attribute,
    resolve_capabilities,
)

MAPPER = AttributeMapper()


def test_numbers_and_bytes_in_the_order_given() -> None:
    template = {Attribute.LABEL: "é", Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.TOKEN: True, Attribute.ID: b""}
    packed = pack(MAPPER, template)
    assert packed == [(3, "é".encode()), (0, struct.pack("@L", 4)), (1, b"\1"), (0x102, b"")]
    assert all(type(number) is int and type(value) is bytes for number, value in packed)


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        (Attribute.LABEL, b"x", AttributeError),
        (Attribute.ID, "abc", TypeError),
        (Attribute.VALUE_LEN, "16", struct.error),
        (Attribute.VALUE_LEN, -1, struct.error),
        (Attribute.CLASS, None, TypeError),
        (Attribute.START_DATE, "20300101", AttributeError),
        (Attribute.OWNER, b"x", NotImplementedError),
        (0xDEADBEEF, b"x", NotImplementedError),
        ("LABEL", "x", TypeError),
    ],
)
def test_the_mappers_own_error(key: Any, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        pack_attribute(MAPPER, key, value)


def test_a_mapper_that_does_not_give_bytes() -> None:
    mapper = AttributeMapper()
    mapper.register_handler(Attribute.ID, lambda value: value, lambda value: value)
    with pytest.raises(ArgumentsBad):
        pack_attribute(mapper, Attribute.ID, "text")
    assert pack_attribute(mapper, Attribute.ID, bytearray(b"1")) == (0x102, b"1")


@pytest.mark.parametrize("number", [-1, 2**64])
def test_a_number_that_is_no_attribute(number: int) -> None:
    mapper = AttributeMapper()
    mapper.register_handler(number, bytes, bytes)  # type: ignore[arg-type]
    with pytest.raises(ArgumentsBad):
        pack_attribute(mapper, number, b"")


def test_raw_nested_templates_are_refused() -> None:
    mapper = AttributeMapper()
    mapper.register_handler(Attribute.UNWRAP_TEMPLATE, bytes, bytes)
    with pytest.raises(NotOnGroup, match="memory"):
        pack_attribute(mapper, Attribute.UNWRAP_TEMPLATE, bytes(24))
    assert pack_attribute(mapper, Attribute.UNWRAP_TEMPLATE, b"") == (Attribute.UNWRAP_TEMPLATE, b"")


def test_merge() -> None:
    default = {Attribute.LABEL: "a", Attribute.TOKEN: False}
    assert merge_templates(default, {Attribute.LABEL: DEFAULT, Attribute.ID: b"1"}) == {
        Attribute.TOKEN: False,
        Attribute.ID: b"1",
    }
    assert merge_templates(default, None) == default
    assert default == {Attribute.LABEL: "a", Attribute.TOKEN: False}


@pytest.mark.parametrize(
    ("id_", "templates", "expected"),
    [
        (None, [None], True),
        (None, [{}, {Attribute.LABEL: "x"}], True),
        (b"", [None], False),
        (b"1", [None], False),
        (None, [None, {Attribute.ID: b""}], False),
        (None, [{0x102: b"1"}], False),
    ],
)
def test_id_left_open(id_: Any, templates: list[Any], expected: bool) -> None:
    assert leaves_id_open(id_, *templates) is expected


def test_capabilities() -> None:
    assert resolve_capabilities(KeyType.AES, 0) == 0
    with pytest.raises(ArgumentsBad):
        resolve_capabilities(KeyType.SEED, None)


@pytest.mark.parametrize("value", ["text", 1, None, [1]])
def test_data_is_bytes(value: Any) -> None:
    with pytest.raises(TypeError):
        as_bytes(value)


def test_pins_are_text() -> None:
    assert as_pin("1é") == "1é".encode()
    for value in (None, b"1234", 1234):
        with pytest.raises(AttributeError):
            as_pin(value)
