"""C_GetAttributeValue for many attributes at once, on tokens that fail all because of one."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import msgspec

from hagroup.core.calls import Ckr, Handle
from hagroup.core.ckr import CKR
from hagroup.members.cryptoki import CK_UNAVAILABLE_INFORMATION, CKF_ARRAY_ATTRIBUTE, CkAttribute, Function

# Some attributes could not be given; the others were (PKCS#11 v2.40 5.7, C_GetAttributeValue).
_PARTLY = frozenset({CKR.ATTRIBUTE_SENSITIVE, CKR.ATTRIBUTE_TYPE_INVALID, CKR.BUFFER_TOO_SMALL})

# About the object, the session or the token, not about one attribute.
_WHOLE = frozenset(
    {
        CKR.OBJECT_HANDLE_INVALID,
        CKR.KEY_HANDLE_INVALID,
        CKR.SESSION_HANDLE_INVALID,
        CKR.SESSION_CLOSED,
        CKR.USER_NOT_LOGGED_IN,
        CKR.CRYPTOKI_NOT_INITIALIZED,
        CKR.DEVICE_ERROR,
        CKR.DEVICE_MEMORY,
        CKR.DEVICE_REMOVED,
        CKR.HOST_MEMORY,
        CKR.TOKEN_NOT_PRESENT,
    }
)

_NESTED = frozenset(CKF_ARRAY_ATTRIBUTE | number for number in (0x211, 0x212, 0x213)) | {0x62A, 0x62B}
"""WRAP, UNWRAP, DERIVE, ENCAPSULATE and DECAPSULATE templates: the value is an array of CK_ATTRIBUTE."""

_MISSING = CK_UNAVAILABLE_INFORMATION


def attributes(
    function: Function, session: int, handle: Handle, types: Sequence[int]
) -> tuple[dict[int, bytes], dict[int, int]]:
    """Values by type, and return values for those that cannot be read.

    Two calls for a token that behaves: all the lengths, then all the values. What these leave open is asked for
    one by one. A nested template's value is msgpack of a list of ``[type, value]``.
    """
    flat = [number for number in types if number not in _NESTED]
    values = _together(function, session, handle, flat) if len(flat) > 1 else {}
    failures: dict[int, int] = {}
    for number in types:
        if number in values:
            continue
        read = _nested if number in _NESTED else _alone
        try:
            values[number] = read(function, session, handle, number)
        except Ckr as error:
            if error.rv in _WHOLE:
                raise
            failures[number] = error.rv
    return values, failures


def _array(fields: Sequence[tuple[int, int | None, int]]) -> ctypes.Array[CkAttribute]:
    return (CkAttribute * len(fields))(*[CkAttribute(*values) for values in fields])


def _call(function: Function, session: int, handle: Handle, array: ctypes.Array[CkAttribute]) -> int:
    """The return value, raised if it is about more than one attribute."""
    try:
        return function(session, handle, array, len(array))
    except Ckr as error:
        if error.rv in _WHOLE:
            raise
        return error.rv


def _together(function: Function, session: int, handle: Handle, types: list[int]) -> dict[int, bytes]:
    """What one token gives when it is asked for everything at once, perhaps nothing."""
    lengths = _array([(number, None, 0) for number in types])
    rv = _call(function, session, handle, lengths)
    if rv and rv not in _PARTLY:
        return {}
    # After a partial answer a length of 0 may also mean that the token stopped in front of this attribute.
    known = [(a.type, a.ulValueLen) for a in lengths if a.ulValueLen != _MISSING and (a.ulValueLen or not rv)]
    if not known:
        return {}
    buffers = [ctypes.create_string_buffer(length or 1) for _, length in known]
    array = _array(
        [(number, ctypes.addressof(buffer), length) for (number, length), buffer in zip(known, buffers, strict=True)]
    )
    if _call(function, session, handle, array):
        return {}
    return {
        attribute.type: ctypes.string_at(buffer, attribute.ulValueLen)
        for attribute, buffer in zip(array, buffers, strict=True)
        if attribute.ulValueLen != _MISSING
    }


def _length(function: Function, session: int, handle: Handle, number: int) -> int:
    array = _array([(number, None, 0)])
    function(session, handle, array, 1)
    length: int = array[0].ulValueLen
    if length == _MISSING:
        raise Ckr(CKR.ATTRIBUTE_TYPE_INVALID, "C_GetAttributeValue")
    return length


def _alone(function: Function, session: int, handle: Handle, number: int) -> bytes:
    length = _length(function, session, handle, number)
    if not length:
        return b""
    buffer = ctypes.create_string_buffer(length)
    array = _array([(number, ctypes.addressof(buffer), length)])
    function(session, handle, array, 1)
    return ctypes.string_at(buffer, array[0].ulValueLen)


def _nested(function: Function, session: int, handle: Handle, number: int) -> bytes:
    """An array attribute: its size, then the types and lengths in it, then its values."""
    count = _length(function, session, handle, number) // ctypes.sizeof(CkAttribute)
    inner = (CkAttribute * count)()
    outer = _array([(number, ctypes.addressof(inner) if count else None, ctypes.sizeof(inner))])
    buffers = []
    if count:
        function(session, handle, outer, 1)
        for attribute in inner:
            size = 0 if attribute.ulValueLen == _MISSING else attribute.ulValueLen
            buffers.append(ctypes.create_string_buffer(size or 1))
            attribute.pValue = ctypes.addressof(buffers[-1])
        outer[0].ulValueLen = ctypes.sizeof(inner)
        function(session, handle, outer, 1)
    return msgspec.msgpack.encode(
        [
            [attribute.type, ctypes.string_at(buffer, attribute.ulValueLen)]
            for attribute, buffer in zip(inner, buffers, strict=True)
        ]
    )
