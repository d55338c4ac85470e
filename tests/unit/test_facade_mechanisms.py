"""Mechanisms and parameters: python-pkcs11's defaults, conversions and errors."""

from __future__ import annotations

from typing import Any

import pytest
from pkcs11 import MGF, ArgumentsBad, CTRParams, GCMParams, KeyType, Mechanism
from pkcs11.defaults import DEFAULT_DERIVE_MECHANISMS, DEFAULT_ENCRYPT_MECHANISMS, DEFAULT_SIGN_MECHANISMS
from pkcs11.mechanisms import KDF

from hagroup.core.calls import Mechanism as Call
from hagroup.errors import NotOnGroup
from hagroup.facade.mechanisms import OfKeyType, mechanism_with_param
from hagroup.members import packing

M = Mechanism


def convert(mechanism: Any, param: Any = None, key_type: KeyType | None = None) -> Call:
    return mechanism_with_param(OfKeyType(key_type), DEFAULT_ENCRYPT_MECHANISMS, mechanism, param)


@pytest.mark.parametrize(
    ("mechanism", "param", "expected"),
    [
        (M.SHA256_RSA_PKCS, None, None),
        (M.AES_CBC_PAD, b"i" * 16, b"i" * 16),
        (M.RSA_PKCS_OAEP, None, ["oaep", M.SHA_1, MGF.SHA1, None]),
        (M.RSA_PKCS_OAEP, (M.SHA256, MGF.SHA256, b"label"), ["oaep", M.SHA256, MGF.SHA256, b"label"]),
        (M.SHA512_RSA_PKCS_PSS, None, ["pss", M.SHA_1, MGF.SHA1, 20]),
        (M.RSA_PKCS_PSS, (M.SHA256, MGF.SHA256, 32), ["pss", M.SHA256, MGF.SHA256, 32]),
        (M.EDDSA, None, None),
        (M.EDDSA, (False, None), ["eddsa", False, None]),
        (M.EDDSA, (True, b"c"), ["eddsa", True, b"c"]),
        (M.ECDH1_DERIVE, (KDF.NULL, None, b"point"), ["ecdh", KDF.NULL, None, b"point"]),
        (M.ECDH1_COFACTOR_DERIVE, (KDF.SHA1, b"s", b"p"), ["ecdh", KDF.SHA1, b"s", b"p"]),
        (M.AES_ECB_ENCRYPT_DATA, b"data", ["string", b"data"]),
        (M.AES_CBC_ENCRYPT_DATA, (b"i" * 20, b"data"), ["cbc_data", b"i" * 16, b"data"]),
        (M.AES_GCM, GCMParams(b"n" * 12, b"aad", 96), ["gcm", b"n" * 12, b"aad", 96]),
        (M.AES_GCM, GCMParams(b"n"), ["gcm", b"n", None, 128]),
        (M.AES_CTR, CTRParams(b"n" * 12), ["ctr", 32, b"n" * 12 + b"\0\0\0\1"]),
        (M.AES_CTR, CTRParams(b"n" * 15), ["ctr", 8, b"n" * 15 + b"\1"]),
    ],
)
def test_forms(mechanism: Mechanism, param: Any, expected: Any) -> None:
    number, form = convert(mechanism, param)
    assert (number, form) == (int(mechanism), expected)
    assert type(number) is int
    if isinstance(form, list):
        assert all(type(field) in (int, bytes, str, bool, type(None)) for field in form), "workers get plain values"
    packing.mechanism((number, form))  # what a member makes of it


@pytest.mark.parametrize(
    ("mechanism", "param", "error"),
    [
        (0x40, None, ArgumentsBad),
        ("SHA256", None, ArgumentsBad),
        (M.AES_GCM, None, TypeError),
        (M.AES_GCM, (b"n", None, 128), TypeError),
        (M.AES_CTR, None, TypeError),
        (M.AES_ECB_ENCRYPT_DATA, None, TypeError),
        (M.AES_CBC_ENCRYPT_DATA, None, TypeError),
        (M.AES_CBC_ENCRYPT_DATA, (b"i" * 15, b"d"), IndexError),
        (M.ECDH1_DERIVE, None, TypeError),
        (M.ECDH1_DERIVE, (KDF.NULL, None), ValueError),
        (M.ECDH1_DERIVE, (KDF.NULL, None, "text"), TypeError),
        (M.RSA_PKCS_PSS, (M.SHA256, MGF.SHA256), ValueError),
        (M.RSA_PKCS_PSS, (M.SHA256, MGF.SHA256, -1), OverflowError),
        (M.RSA_PKCS_PSS, (M.SHA256, "mgf", 1), TypeError),
        (M.RSA_PKCS_OAEP, (M.SHA256, MGF.SHA256, "text"), TypeError),
        (M.SHA256_RSA_PKCS, 5, ArgumentsBad),
        (M.AES_CBC, bytearray(16), ArgumentsBad),
        (M.AES_CBC, "text", ArgumentsBad),
    ],
)
def test_errors(mechanism: Any, param: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        convert(mechanism, param)


def test_defaults_follow_the_key() -> None:
    assert convert(None, b"i" * 16, KeyType.AES) == (M.AES_CBC_PAD, b"i" * 16)
    aes = OfKeyType(KeyType.AES)
    assert mechanism_with_param(aes, DEFAULT_SIGN_MECHANISMS, None, None) == (M.AES_MAC, None)
    with pytest.raises(ArgumentsBad, match="No default mechanism"):
        mechanism_with_param(aes, DEFAULT_DERIVE_MECHANISMS, None, None)


def test_the_key_type_is_not_asked_for_where_it_is_not_needed() -> None:
    assert mechanism_with_param(object(), DEFAULT_SIGN_MECHANISMS, M.RSA_PKCS, None) == (M.RSA_PKCS, None)


def test_other_numbers() -> None:
    vendor = int.__new__(Mechanism, 0x80000123)
    vendor._value_, vendor._name_ = 0x80000123, "VENDOR"
    assert convert(vendor, b"raw") == (0x80000123, b"raw")


def test_raw_parameters_without_addresses_go_through_and_others_do_not() -> None:
    oaep = bytes(24) + bytes(8) + bytes(8)
    assert convert(M.RSA_PKCS_OAEP, oaep) == (M.RSA_PKCS_OAEP, oaep)
    with pytest.raises(NotOnGroup, match="address"):
        convert(M.RSA_PKCS_OAEP, bytes(24) + b"\1" * 8 + bytes(8))
    with pytest.raises(NotOnGroup):
        convert(M.DES3_CBC_ENCRYPT_DATA, bytes(8) + b"\1" * 16)
