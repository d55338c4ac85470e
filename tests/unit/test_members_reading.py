"""C_GetAttributeValue on modules that fail in their various ways."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.members.reading import attributes

MISSING = ctypes.c_ulong(-1).value


class Object:
    """One object in a module; ``refuse`` gives the return value for an attribute that it does not give."""

    def __init__(self, values: dict[int, bytes], refuse: dict[int, int] | None = None) -> None:
        self.values = values
        self.refuse = refuse or {}
        self.calls = 0
        self.bulk_fails_with = 0
        self.stops_at_the_first = False

    def __call__(self, session: int, handle: int, array: Any, count: int) -> int:
        self.calls += 1
        rv = 0
        if count > 1 and self.bulk_fails_with:
            raise Ckr(self.bulk_fails_with, "C_GetAttributeValue")
        for attribute in array:
            one = self.refuse.get(attribute.type, 0)
            if attribute.type not in self.values and not one:
                one = CKR.ATTRIBUTE_TYPE_INVALID
            if one:
                rv = one
                attribute.ulValueLen = MISSING
                if self.stops_at_the_first:
                    break
                continue
            value = self.values[attribute.type]
            if attribute.pValue:
                assert attribute.ulValueLen >= len(value)
                ctypes.memmove(attribute.pValue, value, len(value))
            attribute.ulValueLen = len(value)
        if rv:
            raise Ckr(rv, "C_GetAttributeValue")
        return 0


VALUES = {0: bytes(8), 1: b"\x01", 3: b"label", 0x102: b""}


def test_two_calls_for_everything() -> None:
    obj = Object(VALUES)
    assert attributes(obj, 1, 2, list(VALUES)) == (VALUES, {})
    assert obj.calls == 2
    assert attributes(obj, 1, 2, []) == ({}, {})
    assert attributes(obj, 1, 2, [3]) == ({3: b"label"}, {})


@pytest.mark.parametrize("stops", [False, True])
def test_each_refusal_has_its_own_return_value(stops: bool) -> None:
    obj = Object(VALUES, {0x11: CKR.ATTRIBUTE_SENSITIVE})
    obj.stops_at_the_first = stops
    values, failures = attributes(obj, 1, 2, [0, 0x11, 0x161, 3, 0x102, 1])
    assert values == VALUES
    assert failures == {0x11: CKR.ATTRIBUTE_SENSITIVE, 0x161: CKR.ATTRIBUTE_TYPE_INVALID}


def test_one_by_one_where_all_fail_because_of_one() -> None:
    obj = Object(VALUES, {0x110: CKR.GENERAL_ERROR})
    obj.bulk_fails_with = CKR.GENERAL_ERROR
    assert attributes(obj, 1, 2, [*VALUES, 0x110]) == (VALUES, {0x110: CKR.GENERAL_ERROR})


@pytest.mark.parametrize("rv", [CKR.OBJECT_HANDLE_INVALID, CKR.SESSION_HANDLE_INVALID, CKR.DEVICE_ERROR])
@pytest.mark.parametrize("types", [[0], [0, 1]])
def test_what_is_not_about_an_attribute_is_raised(rv: int, types: list[int]) -> None:
    obj = Object(VALUES, {0: rv, 1: rv})
    with pytest.raises(Ckr) as caught:
        attributes(obj, 1, 2, types)
    assert caught.value.rv == rv
    assert obj.calls == 1
