"""Function lists of modules old and new, made of Python functions."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.members.cryptoki import CkInterface, Cryptoki, NotCryptoki

_kept: list[Any] = []


def function_list(version: tuple[int, int], entries: int, functions: dict[int, Any]) -> int:
    """A CK_FUNCTION_LIST in memory; ``functions`` by position, NULL elsewhere."""
    memory = (ctypes.c_void_p * (entries + 1))()
    header = ctypes.cast(memory, ctypes.POINTER(ctypes.c_ubyte))
    header[0], header[1] = version
    for position, function in functions.items():
        memory[position + 1] = ctypes.cast(function, ctypes.c_void_p).value
    _kept.extend([memory, functions])
    return ctypes.addressof(memory)


_GETTER = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.POINTER(ctypes.c_void_p))
_INTERFACE = ctypes.CFUNCTYPE(
    ctypes.c_ulong, ctypes.c_char_p, ctypes.POINTER(ctypes.c_ubyte), ctypes.POINTER(ctypes.c_void_p), ctypes.c_ulong
)
_NO_ARGUMENT = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_void_p)


def get_function_list(address: int) -> Any:
    def get(pointer: Any) -> int:
        pointer[0] = address
        return 0

    return _GETTER(get)


def get_interface(lists: dict[tuple[int, int] | None, int]) -> Any:
    """``None`` is what a module gives for any version that it does not have, if it gives anything."""

    def get(name: bytes, version: Any, pointer: Any, flags: int) -> int:
        wanted = (version[0], version[1]) if version else None
        address = lists.get(wanted, lists.get(None, 0))
        if name != b"PKCS 11" or not address:
            return int(CKR.ARGUMENTS_BAD)
        interface = CkInterface(b"PKCS 11", address, 0)
        _kept.append(interface)
        pointer[0] = ctypes.addressof(interface)
        return 0

    return _INTERFACE(get)


def finalize(rv: int) -> Any:
    return _NO_ARGUMENT(lambda _: rv)


def test_version_2_40() -> None:
    library: Any = SimpleNamespace(C_GetFunctionList=get_function_list(function_list((2, 40), 68, {1: finalize(0)})))
    c = Cryptoki(library)
    assert (c.has_v30, c.has_v32) == (False, False)
    assert c.C_Finalize(None) == 0
    for call in (lambda: c.C_GetInfo(None), lambda: c.C_EncapsulateKey(1), lambda: c.C_SessionCancel(1, 0)):
        with pytest.raises(Ckr) as caught:
            call()
        assert caught.value.rv == CKR.FUNCTION_NOT_SUPPORTED


def test_return_values_are_raised_with_the_functions_name() -> None:
    functions = {1: finalize(0x80000123)}
    library: Any = SimpleNamespace(C_GetFunctionList=get_function_list(function_list((2, 40), 68, functions)))
    with pytest.raises(Ckr, match="C_Finalize: CKR 0x80000123") as caught:
        Cryptoki(library).C_Finalize(None)
    assert caught.value.rv == 0x80000123


def test_versions_3_by_interface_alone() -> None:
    encapsulate = ctypes.CFUNCTYPE(ctypes.c_ulong, *[ctypes.c_void_p] * 8)(lambda *_: 0x54321)
    cancel = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)(lambda session, flags: session + flags)
    # Positions in the structures of the standard's header: 68 + 3, 68 + 24.
    lists = {
        None: function_list((2, 40), 68, {1: finalize(0)}),
        (3, 0): function_list((3, 0), 92, {1: finalize(1), 71: cancel}),
        (3, 2): function_list((3, 2), 104, {1: finalize(2), 92: encapsulate}),
    }
    library: Any = SimpleNamespace(C_GetInterface=get_interface(lists))
    c = Cryptoki(library)
    assert (c.has_v30, c.has_v32) == (True, True)
    assert c.C_Finalize(None) == 0
    for call, rv in ((lambda: c.C_SessionCancel(5, 6), 11), (lambda: c.C_EncapsulateKey(*[1, None] * 4), 0x54321)):
        with pytest.raises(Ckr) as caught:
            call()
        assert caught.value.rv == rv


def test_a_module_that_answers_every_version_with_its_own() -> None:
    library: Any = SimpleNamespace(C_GetInterface=get_interface({None: function_list((3, 0), 92, {1: finalize(0)})}))
    c = Cryptoki(library)
    assert (c.has_v30, c.has_v32) == (True, False)


def test_no_module_at_all() -> None:
    library: Any = SimpleNamespace()
    with pytest.raises(NotCryptoki):
        Cryptoki(library)
