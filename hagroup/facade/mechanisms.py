"""Mechanism and parameter, as python-pkcs11 takes them, into the forms that members lay out (core/calls.py).

The order of the cases, the defaults and the types of the errors are those of python-pkcs11's ``MechanismWithParam``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from pkcs11.defaults import DEFAULT_MECHANISM_PARAMS
from pkcs11.exceptions import ArgumentsBad
from pkcs11.mechanisms import CTRParams, GCMParams, KeyType, Mechanism

from hagroup.core import calls
from hagroup.errors import NotOnGroup
from hagroup.facade.packing import as_bytes

_ULONG_MAX = 2**64 - 1
_AES_ECB_ENCRYPT_DATA = int(Mechanism.AES_ECB_ENCRYPT_DATA)


def _ulong(value: Any) -> int:
    number = operator.index(value)
    if not 0 <= number <= _ULONG_MAX:
        raise OverflowError("value does not fit CK_ULONG")
    return int(number)


def _optional(value: Any) -> bytes | None:
    return None if value is None else as_bytes(value)


def _oaep(param: Any) -> list[Any]:
    if param is None:
        param = DEFAULT_MECHANISM_PARAMS[Mechanism.RSA_PKCS_OAEP]
    hash_, mgf, source = param
    return ["oaep", _ulong(hash_), _ulong(mgf), _optional(source)]


def _pss(param: Any) -> list[Any]:
    if param is None:  # all PSS mechanisms have the same defaults
        param = DEFAULT_MECHANISM_PARAMS[Mechanism.RSA_PKCS_PSS]
    hash_, mgf, salt_length = param
    return ["pss", _ulong(hash_), _ulong(mgf), _ulong(salt_length)]


def _eddsa(param: Any) -> list[Any] | None:
    if param is None:
        return None
    prehash, context = param
    return ["eddsa", bool(prehash), _optional(context)]


def _ecdh(param: Any) -> list[Any]:
    kdf, shared, public = param
    return ["ecdh", _ulong(kdf), _optional(shared), as_bytes(public)]


def _cbc_data(param: Any) -> list[Any]:
    iv, data = param
    iv = as_bytes(iv)[:16]
    if len(iv) < 16:
        raise IndexError(f"the initialisation vector must have 16 bytes, not {len(iv)}")  # as python-pkcs11 does
    return ["cbc_data", iv, as_bytes(data)]


def _gcm(param: Any) -> list[Any]:
    if not isinstance(param, GCMParams):
        raise TypeError("`mechanism_param` must be GCMParams.")
    return ["gcm", as_bytes(param.nonce), _optional(param.aad), _ulong(param.tag_bits)]


def _ctr(param: Any) -> list[Any]:
    if not isinstance(param, CTRParams):
        raise TypeError("`mechanism_param` must be CTRParams.")
    nonce = as_bytes(param.nonce)
    return ["ctr", (16 - len(nonce)) * 8, nonce + b"\x00" * (15 - len(nonce)) + b"\x01"]


_FORMS: dict[int, Callable[[Any], list[Any] | None]] = {
    Mechanism.RSA_PKCS_OAEP: _oaep,
    Mechanism.RSA_PKCS_PSS: _pss,
    Mechanism.SHA1_RSA_PKCS_PSS: _pss,
    Mechanism.SHA224_RSA_PKCS_PSS: _pss,
    Mechanism.SHA256_RSA_PKCS_PSS: _pss,
    Mechanism.SHA384_RSA_PKCS_PSS: _pss,
    Mechanism.SHA512_RSA_PKCS_PSS: _pss,
    Mechanism.EDDSA: _eddsa,
    Mechanism.ECDH1_DERIVE: _ecdh,
    Mechanism.ECDH1_COFACTOR_DERIVE: _ecdh,
    Mechanism.AES_CBC_ENCRYPT_DATA: _cbc_data,
    Mechanism.AES_GCM: _gcm,
    Mechanism.AES_CTR: _ctr,
}

# Structures that hold pointers: size and the places of the pointers. As raw bytes they would name memory of this
# process, and a member that follows them dies (then the next one).
_POINTERS: dict[int, tuple[int, tuple[int, ...]]] = {
    Mechanism.RSA_PKCS_OAEP: (40, (24,)),
    Mechanism.EDDSA: (24, (16,)),
    Mechanism.ECDH1_DERIVE: (40, (16, 32)),
    Mechanism.ECDH1_COFACTOR_DERIVE: (40, (16, 32)),
    Mechanism.AES_GCM: (48, (0, 24)),
    Mechanism.AES_CBC_ENCRYPT_DATA: (32, (16,)),
    Mechanism.DES_ECB_ENCRYPT_DATA: (16, (0,)),
    Mechanism.DES3_ECB_ENCRYPT_DATA: (16, (0,)),
    Mechanism.DES_CBC_ENCRYPT_DATA: (24, (8,)),
    Mechanism.DES3_CBC_ENCRYPT_DATA: (24, (8,)),
}


def _raw(number: int, param: bytes) -> bytes:
    """The escape hatch for parameters that python-pkcs11 does not know: bytes as they are."""
    size, places = _POINTERS.get(number, (0, ()))
    if size and len(param) == size and any(any(param[place : place + 8]) for place in places):
        raise NotOnGroup(
            f"{Mechanism(number)!r}: these raw parameters hold an address in this process, which means nothing "
            "to the members of a group; give them as a tuple or as parameter object"
        )
    return bytes(param)


def mechanism_with_param(
    key: Any, defaults: Mapping[KeyType, Mechanism], mechanism: Any, param: Any
) -> calls.Mechanism:
    """``key`` is what has a ``key_type``; it is asked for it only where the mechanism was left open."""
    if mechanism is None:
        try:
            mechanism = defaults[key.key_type]
        except KeyError:
            raise ArgumentsBad("No default mechanism for this key type. Please specify `mechanism`.") from None
    if not isinstance(mechanism, Mechanism):
        raise ArgumentsBad("`mechanism` must be a Mechanism.")
    number = int(mechanism)
    if number == _AES_ECB_ENCRYPT_DATA:
        return number, ["string", as_bytes(param)]
    if isinstance(param, bytes):
        return number, _raw(number, param)
    form = _FORMS.get(number)
    if form is not None:
        return number, form(param)
    if param is None:
        return number, None
    raise ArgumentsBad("Unexpected argument to mechanism_param")


class OfKeyType:
    """Stands for a key in :func:`mechanism_with_param` where there is none yet."""

    __slots__ = ("key_type",)

    def __init__(self, key_type: KeyType | None) -> None:
        self.key_type = key_type
