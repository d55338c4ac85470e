"""Mechanisms and templates in memory, as a module sees them."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import pytest

from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.members import packing


def seen(pointer: Any) -> tuple[int, bytes]:
    """What a module finds behind a CK_MECHANISM pointer."""
    address = ctypes.cast(pointer, ctypes.c_void_p).value
    number, parameter, length = struct.unpack("@LPL", ctypes.string_at(address, 24))
    assert bool(parameter) == bool(length)
    return number, ctypes.string_at(parameter, length) if parameter else b""


def at(address: int, length: int) -> bytes:
    assert bool(address) == bool(length), "a pointer to nothing, or nothing behind a pointer"
    return ctypes.string_at(address, length) if length else b""


def test_plain_and_raw_parameters() -> None:
    assert seen(packing.mechanism([0x40, None])) == (0x40, b"")
    assert packing.mechanism([0x40, None]) is packing.mechanism([0x40, None])
    assert seen(packing.mechanism([0x1085, b"i" * 16])) == (0x1085, b"i" * 16)
    assert seen(packing.mechanism([0x1085, b""])) == (0x1085, b"")


@pytest.mark.parametrize("source", [None, b"", b"label"])
def test_oaep(source: bytes | None) -> None:
    pointer = packing.mechanism([9, ["oaep", 0x220, 1, source]])
    hash_, mgf, kind, address, length = struct.unpack("@LLLPL", seen(pointer)[1])
    assert (hash_, mgf, kind, at(address, length)) == (0x220, 1, 1, source or b"")


def test_pss() -> None:
    assert struct.unpack("@LLL", seen(packing.mechanism([13, ["pss", 0x250, 2, 32]]))[1]) == (0x250, 2, 32)


@pytest.mark.parametrize("context", [None, b"context"])
def test_eddsa(context: bytes | None) -> None:
    pointer = packing.mechanism([0x1057, ["eddsa", True, context]])
    prehash, length, address = struct.unpack("@BLP", seen(pointer)[1])
    assert (prehash, at(address, length)) == (1, context or b"")


def test_ecdh() -> None:
    pointer = packing.mechanism([0x1050, ["ecdh", 1, b"shared", b"public"]])
    kdf, shared_length, shared, public_length, public = struct.unpack("@LLPLP", seen(pointer)[1])
    assert (kdf, at(shared, shared_length), at(public, public_length)) == (1, b"shared", b"public")


def test_encrypt_data_derivations() -> None:
    pointer = packing.mechanism([0x1104, ["string", b"data"]])
    assert at(*struct.unpack("@PL", seen(pointer)[1])) == b"data"
    pointer = packing.mechanism([0x1105, ["cbc_data", b"i" * 16, b"d" * 32]])
    iv, address, length = struct.unpack("@16sPL", seen(pointer)[1])
    assert (iv, at(address, length)) == (b"i" * 16, b"d" * 32)


@pytest.mark.parametrize("aad", [None, b"", b"attributes"])
def test_gcm(aad: bytes | None) -> None:
    pointer = packing.mechanism([0x1087, ["gcm", b"n" * 12, aad, 128]])
    iv, iv_length, iv_bits, address, length, tag_bits = struct.unpack("@PLLPLL", seen(pointer)[1])
    assert (at(iv, iv_length), iv_bits, at(address, length), tag_bits) == (b"n" * 12, 96, aad or b"", 128)


def test_a_module_may_write_into_a_parameter() -> None:
    nonce = b"n" * 12
    pointer = packing.mechanism([0x1087, ["gcm", nonce, None, 128]])
    ctypes.memset(struct.unpack("@P", seen(pointer)[1][:8])[0], 0, 12)
    assert nonce == b"n" * 12


def test_ctr() -> None:
    pointer = packing.mechanism([0x1086, ["ctr", 32, b"c" * 16]])
    assert struct.unpack("@L16s", seen(pointer)[1]) == (32, b"c" * 16)


@pytest.mark.parametrize(
    "mech",
    [
        [1, ["ctr", 32, b"short"]],
        [1, ["gcm", b"n"]],
        [1, ["nothing"]],
        [1, []],
        [1, 5],
        [None, None, None],
        [1, ["pss", "secret", 1, 1]],
    ],
)
def test_what_does_not_fit_is_refused_without_its_values(mech: list[Any]) -> None:
    with pytest.raises(Ckr) as caught:
        packing.mechanism(mech)
    assert caught.value.rv == CKR.ARGUMENTS_BAD
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def attributes(array: Any, count: int) -> list[tuple[int, bytes]]:
    assert len(array) == count
    return [(a.type, at(a.pValue or 0, a.ulValueLen)) for a in array]


def test_template_keeps_its_order() -> None:
    wanted = [(3, b"label"), (1, b"\x01"), (0x102, b""), (0, bytes(8)), (3, b"again")]
    assert attributes(*packing.template(wanted)) == wanted
    assert attributes(*packing.template([])) == []


def test_nested_template() -> None:
    array, count = packing.template([(1, b"\x01"), (0x40000212, [[0x103, b"\x01"], [3, b"x"]]), (0x40000211, [])])
    assert attributes(array[:1], 1) == [(1, b"\x01")]
    inner = struct.unpack("@LPLLPL", at(array[1].pValue, array[1].ulValueLen))
    assert (inner[0], at(*inner[1:3]), inner[3], at(*inner[4:6])) == (0x103, b"\x01", 3, b"x")
    assert (array[2].pValue, array[2].ulValueLen, count) == (None, 0, 3)


@pytest.mark.parametrize("template", [[(3, "label")], [(3, 5)], [(3, None)], [("x", b"")], [(1,)], [(-1.5, b"")]])
def test_a_template_that_cannot_be_packed(template: list[Any]) -> None:
    with pytest.raises(Ckr) as caught:
        packing.template(template)
    assert caught.value.rv == CKR.ARGUMENTS_BAD
