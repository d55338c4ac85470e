"""Lays out mechanisms and templates in memory as C structures.

What is returned keeps everything it points to alive. Values are copied: a module may write into a mechanism's
parameter (an IV that it chose itself, say), and Python's bytes must never change.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.members.cryptoki import CkAttribute, CkMechanism

_CKZ_DATA_SPECIFIED = 1
_ATTRIBUTE = struct.Struct("@LPL")


class _Oaep(ctypes.Structure):
    _fields_ = [
        ("hashAlg", ctypes.c_ulong),
        ("mgf", ctypes.c_ulong),
        ("source", ctypes.c_ulong),
        ("pSourceData", ctypes.c_void_p),
        ("ulSourceDataLen", ctypes.c_ulong),
    ]


class _Pss(ctypes.Structure):
    _fields_ = [("hashAlg", ctypes.c_ulong), ("mgf", ctypes.c_ulong), ("sLen", ctypes.c_ulong)]


class _Eddsa(ctypes.Structure):
    _fields_ = [
        ("phFlag", ctypes.c_ubyte),
        ("ulContextDataLen", ctypes.c_ulong),
        ("pContextData", ctypes.c_void_p),
    ]


class _Ecdh1(ctypes.Structure):
    _fields_ = [
        ("kdf", ctypes.c_ulong),
        ("ulSharedDataLen", ctypes.c_ulong),
        ("pSharedData", ctypes.c_void_p),
        ("ulPublicDataLen", ctypes.c_ulong),
        ("pPublicData", ctypes.c_void_p),
    ]


class _StringData(ctypes.Structure):
    _fields_ = [("pData", ctypes.c_void_p), ("ulLen", ctypes.c_ulong)]


class _AesCbcEncryptData(ctypes.Structure):
    _fields_ = [("iv", ctypes.c_ubyte * 16), ("pData", ctypes.c_void_p), ("length", ctypes.c_ulong)]


class _Gcm(ctypes.Structure):
    _fields_ = [
        ("pIv", ctypes.c_void_p),
        ("ulIvLen", ctypes.c_ulong),
        ("ulIvBits", ctypes.c_ulong),
        ("pAAD", ctypes.c_void_p),
        ("ulAADLen", ctypes.c_ulong),
        ("ulTagBits", ctypes.c_ulong),
    ]


class _AesCtr(ctypes.Structure):
    _fields_ = [("ulCounterBits", ctypes.c_ulong), ("cb", ctypes.c_ubyte * 16)]


class _Memory:
    """Copies of byte strings with addresses, alive as long as this object."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def place(self, data: bytes | None) -> tuple[int | None, int]:
        """Address and length; NULL for nothing, never a pointer to nowhere."""
        if not data:
            return None, 0
        buffer = ctypes.create_string_buffer(data, len(data))
        self.kept.append(buffer)
        return ctypes.addressof(buffer), len(data)


def _block(data: bytes) -> Any:
    if len(data) != 16:
        raise ValueError("a block of 16 bytes is needed")
    return (ctypes.c_ubyte * 16).from_buffer_copy(data)


def _oaep(memory: _Memory, hash_: int, mgf: int, source: bytes | None) -> ctypes.Structure:
    return _Oaep(hash_, mgf, _CKZ_DATA_SPECIFIED, *memory.place(source))


def _pss(_: _Memory, hash_: int, mgf: int, salt_length: int) -> ctypes.Structure:
    return _Pss(hash_, mgf, salt_length)


def _eddsa(memory: _Memory, prehash: bool, context: bytes | None) -> ctypes.Structure:
    address, length = memory.place(context)
    return _Eddsa(bool(prehash), length, address)


def _ecdh(memory: _Memory, kdf: int, shared: bytes | None, public: bytes) -> ctypes.Structure:
    shared_address, shared_length = memory.place(shared)
    public_address, public_length = memory.place(public)
    return _Ecdh1(kdf, shared_length, shared_address, public_length, public_address)


def _string(memory: _Memory, data: bytes) -> ctypes.Structure:
    return _StringData(*memory.place(data))


def _cbc_data(memory: _Memory, iv: bytes, data: bytes) -> ctypes.Structure:
    return _AesCbcEncryptData(_block(iv), *memory.place(data))


def _gcm(memory: _Memory, nonce: bytes, aad: bytes | None, tag_bits: int) -> ctypes.Structure:
    address, length = memory.place(nonce)
    return _Gcm(address, length, length * 8, *memory.place(aad), tag_bits)


def _ctr(_: _Memory, counter_bits: int, counter_block: bytes) -> ctypes.Structure:
    return _AesCtr(counter_bits, _block(counter_block))


_FORMS: dict[str, Callable[..., ctypes.Structure]] = {
    "oaep": _oaep,
    "pss": _pss,
    "eddsa": _eddsa,
    "ecdh": _ecdh,
    "string": _string,
    "cbc_data": _cbc_data,
    "gcm": _gcm,
    "ctr": _ctr,
}

# A mechanism without parameter is never written to, so that one copy serves all calls.
_plain: dict[int, Any] = {}


def mechanism(mech: Sequence[Any]) -> Any:
    """A pointer to CK_MECHANISM for ``(number, parameter)`` (core/calls.py, MechanismParam)."""
    try:
        number, parameter = mech
        if parameter is None:
            known = _plain.get(number)
            if known is None:
                known = _plain[number] = ctypes.byref(CkMechanism(number, None, 0))
            return known
        memory = _Memory()
        if isinstance(parameter, bytes):
            laid_out = CkMechanism(number, *memory.place(parameter))
        else:
            form, *fields = parameter
            structure = _FORMS[form](memory, *fields)
            laid_out = CkMechanism(number, ctypes.addressof(structure), ctypes.sizeof(structure))
            memory.kept.append(structure)
    except (TypeError, ValueError, KeyError):
        # What the caller gave does not fit; its values must not come into a text.
        raise Ckr(CKR.ARGUMENTS_BAD, "mechanism parameter") from None
    laid_out.memory = memory
    return ctypes.byref(laid_out)


def _attributes(attributes: Iterable[Any], memory: _Memory) -> tuple[Any, int]:
    laid_out = bytearray()
    count = 0
    for kind, value in attributes:
        if isinstance(value, bytes):
            address, length = memory.place(value)
        else:
            inner, inner_count = _attributes(value, memory)
            memory.kept.append(inner)
            address = ctypes.addressof(inner) if inner_count else None
            length = inner_count * ctypes.sizeof(CkAttribute)
        laid_out += _ATTRIBUTE.pack(kind, address or 0, length)
        count += 1
    return (CkAttribute * count).from_buffer_copy(laid_out), count


def template(attributes: Iterable[Any]) -> tuple[Any, int]:
    """An array of CK_ATTRIBUTE, in the order given, and its length."""
    memory = _Memory()
    try:
        array, count = _attributes(attributes, memory)
    except (TypeError, ValueError, struct.error):
        raise Ckr(CKR.ARGUMENTS_BAD, "template") from None
    array.memory = memory
    return array, count
