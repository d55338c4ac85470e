"""What counts as a ghost on a token: only what the token itself shows to be without a value is destroyed."""

from __future__ import annotations

from typing import Any, cast

import msgspec
import pytest

from hagroup.core.attributes import CKA, CKK, CKO
from hagroup.engine.ghosts import _is_ghost
from hagroup.engine.token_contents import InventoryEntry
from hagroup.members.api import Connection

ENTRY = InventoryEntry(
    handle=1,
    object_class=int(CKO.PRIVATE_KEY),
    key_type=int(CKK.RSA),
    id=b"",
    label=b"",
    token=True,
    private=True,
    ghost=False,
    own=False,
)


class Shows:
    """A connection to a token that shows these values, and no others."""

    def __init__(self, values: dict[int, bytes]) -> None:
        self._values = values

    def get(self, handle: int, types: list[int], **_: Any) -> tuple[dict[int, bytes], dict[int, int]]:
        return {number: self._values[number] for number in types if number in self._values}, {}


def is_ghost(values: dict[int, bytes], shown: frozenset[bytes] = frozenset(), **changes: Any) -> bool:
    entry = msgspec.structs.replace(ENTRY, **changes)
    names = {(int(CKO.PRIVATE_KEY), b"of the group")}
    return _is_ghost(cast("Connection", Shows(values)), entry, set(), names, shown, 1.0)


@pytest.mark.parametrize("label", [b"", b"of the group"])
def test_a_key_whose_value_is_not_shown_stays(label: bytes) -> None:
    assert not is_ghost({}, label=label)


@pytest.mark.parametrize("label", [b"", b"of the group"])
def test_one_that_is_shown_to_be_empty_goes(label: bytes) -> None:
    assert is_ghost({CKA.MODULUS: b""}, label=label)
    assert not is_ghost({CKA.MODULUS: b"\x01"}, label=label)


def test_a_stranger_stays_whatever_it_shows() -> None:
    assert not is_ghost({CKA.MODULUS: b""}, label=b"somebody's")


def test_data_under_our_label_that_is_not_ours_stays() -> None:
    data = {"object_class": int(CKO.DATA), "key_type": None, "label": b"hagroup:notes"}
    assert not is_ghost({CKA.VALUE: b"kept"}, **data)
    assert is_ghost({CKA.VALUE: b"", CKA.APPLICATION: b"", CKA.OBJECT_ID: b""}, **data)


def test_our_own_without_its_value_goes() -> None:
    data = {"object_class": int(CKO.DATA), "key_type": None, "label": b"hagroup:manifest:1", "own": True}
    assert is_ghost({CKA.VALUE: b"", CKA.APPLICATION: b"hagroup"}, **data)
    assert not is_ghost({CKA.VALUE: b"sealed", CKA.APPLICATION: b"hagroup"}, **data)


def test_our_own_that_was_cut_off_before_it_said_what_it_is_goes() -> None:
    whole = {CKA.VALUE: b"sealed", CKA.APPLICATION: b"hagroup"}
    data = {"object_class": int(CKO.DATA), "key_type": None, "own": True}
    assert is_ghost(whole, label=b"hagroup:object:00ff:1", **data)
    assert is_ghost(whole, label=b"hagroup:manifest:1", shown=frozenset({b"hagroup:manifest"}), **data)
    # an earlier hagroup wrote them without: then there is no other one of its kind
    assert not is_ghost(whole, label=b"hagroup:manifest:1", shown=frozenset({b"hagroup:configuration"}), **data)
