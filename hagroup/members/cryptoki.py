"""Cryptoki by ctypes: the structures, the function list, and functions that raise :class:`Ckr` unless CKR_OK.

Linux's binary interface: CK_ULONG is ``unsigned long`` and nothing is packed. ``ctypes`` releases the interpreter's
lock during each call, so calls on different sessions run side by side.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, TypeAlias

from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR

CKF_OS_LOCKING_OK = 0x2
CKF_RW_SESSION = 0x2
CKF_SERIAL_SESSION = 0x4
CKF_PROTECTED_AUTHENTICATION_PATH = 0x100
CKU_CONTEXT_SPECIFIC = 2
CKA_TOKEN = 0x1
CKF_ARRAY_ATTRIBUTE = 0x40000000
CK_UNAVAILABLE_INFORMATION = ctypes.c_ulong(-1).value

Function: TypeAlias = "Callable[..., int]"


class CkVersion(ctypes.Structure):
    _fields_ = [("major", ctypes.c_ubyte), ("minor", ctypes.c_ubyte)]

    def pair(self) -> tuple[int, int]:
        return self.major, self.minor


class CkInfo(ctypes.Structure):
    _fields_ = [
        ("cryptokiVersion", CkVersion),
        ("manufacturerID", ctypes.c_ubyte * 32),
        ("flags", ctypes.c_ulong),
        ("libraryDescription", ctypes.c_ubyte * 32),
        ("libraryVersion", CkVersion),
    ]


class CkSlotInfo(ctypes.Structure):
    _fields_ = [
        ("slotDescription", ctypes.c_ubyte * 64),
        ("manufacturerID", ctypes.c_ubyte * 32),
        ("flags", ctypes.c_ulong),
        ("hardwareVersion", CkVersion),
        ("firmwareVersion", CkVersion),
    ]


class CkTokenInfo(ctypes.Structure):
    _fields_ = [
        ("label", ctypes.c_ubyte * 32),
        ("manufacturerID", ctypes.c_ubyte * 32),
        ("model", ctypes.c_ubyte * 16),
        ("serialNumber", ctypes.c_ubyte * 16),
        ("flags", ctypes.c_ulong),
        ("ulMaxSessionCount", ctypes.c_ulong),
        ("ulSessionCount", ctypes.c_ulong),
        ("ulMaxRwSessionCount", ctypes.c_ulong),
        ("ulRwSessionCount", ctypes.c_ulong),
        ("ulMaxPinLen", ctypes.c_ulong),
        ("ulMinPinLen", ctypes.c_ulong),
        ("ulTotalPublicMemory", ctypes.c_ulong),
        ("ulFreePublicMemory", ctypes.c_ulong),
        ("ulTotalPrivateMemory", ctypes.c_ulong),
        ("ulFreePrivateMemory", ctypes.c_ulong),
        ("hardwareVersion", CkVersion),
        ("firmwareVersion", CkVersion),
        ("utcTime", ctypes.c_ubyte * 16),
    ]


class CkSessionInfo(ctypes.Structure):
    _fields_ = [
        ("slotID", ctypes.c_ulong),
        ("state", ctypes.c_ulong),
        ("flags", ctypes.c_ulong),
        ("ulDeviceError", ctypes.c_ulong),
    ]


class CkMechanismInfo(ctypes.Structure):
    _fields_ = [
        ("ulMinKeySize", ctypes.c_ulong),
        ("ulMaxKeySize", ctypes.c_ulong),
        ("flags", ctypes.c_ulong),
    ]


class CkAttribute(ctypes.Structure):
    _fields_ = [("type", ctypes.c_ulong), ("pValue", ctypes.c_void_p), ("ulValueLen", ctypes.c_ulong)]


class CkMechanism(ctypes.Structure):
    _fields_ = [
        ("mechanism", ctypes.c_ulong),
        ("pParameter", ctypes.c_void_p),
        ("ulParameterLen", ctypes.c_ulong),
    ]


class CkInitializeArgs(ctypes.Structure):
    """CK_C_INITIALIZE_ARGS. NSS reads one more pointer behind pReserved when that is set; it must be NULL."""

    _fields_ = [
        ("CreateMutex", ctypes.c_void_p),
        ("DestroyMutex", ctypes.c_void_p),
        ("LockMutex", ctypes.c_void_p),
        ("UnlockMutex", ctypes.c_void_p),
        ("flags", ctypes.c_ulong),
        ("pReserved", ctypes.c_char_p),
        ("nssReserved", ctypes.c_void_p),
    ]


class CkInterface(ctypes.Structure):
    _fields_ = [
        ("pInterfaceName", ctypes.c_char_p),
        ("pFunctionList", ctypes.c_void_p),
        ("flags", ctypes.c_ulong),
    ]


_U = ctypes.c_ulong
_IN = ctypes.c_char_p  # bytes that the module reads: the object's own memory, no copy
_P = ctypes.c_void_p  # structures, templates, and all that the module writes
_OUT = (_P, _P)  # buffer and its length

# Every function of CK_FUNCTION_LIST in the header's order with its arguments; ``None`` for those we never call.
_FUNCTIONS_2_40: tuple[tuple[str, tuple[Any, ...] | None], ...] = (
    ("C_Initialize", (_P,)),
    ("C_Finalize", (_P,)),
    ("C_GetInfo", (_P,)),
    ("C_GetFunctionList", None),
    ("C_GetSlotList", (ctypes.c_ubyte, _P, _P)),
    ("C_GetSlotInfo", (_U, _P)),
    ("C_GetTokenInfo", (_U, _P)),
    ("C_GetMechanismList", (_U, _P, _P)),
    ("C_GetMechanismInfo", (_U, _U, _P)),
    ("C_InitToken", (_U, _IN, _U, _IN)),
    ("C_InitPIN", (_U, _IN, _U)),
    ("C_SetPIN", (_U, _IN, _U, _IN, _U)),
    ("C_OpenSession", (_U, _U, _P, _P, _P)),
    ("C_CloseSession", (_U,)),
    ("C_CloseAllSessions", (_U,)),
    ("C_GetSessionInfo", (_U, _P)),
    ("C_GetOperationState", None),
    ("C_SetOperationState", None),
    ("C_Login", (_U, _U, _IN, _U)),
    ("C_Logout", (_U,)),
    ("C_CreateObject", (_U, _P, _U, _P)),
    ("C_CopyObject", (_U, _U, _P, _U, _P)),
    ("C_DestroyObject", (_U, _U)),
    ("C_GetObjectSize", None),
    ("C_GetAttributeValue", (_U, _U, _P, _U)),
    ("C_SetAttributeValue", (_U, _U, _P, _U)),
    ("C_FindObjectsInit", (_U, _P, _U)),
    ("C_FindObjects", (_U, _P, _U, _P)),
    ("C_FindObjectsFinal", (_U,)),
    ("C_EncryptInit", (_U, _P, _U)),
    ("C_Encrypt", (_U, _IN, _U, *_OUT)),
    ("C_EncryptUpdate", (_U, _IN, _U, *_OUT)),
    ("C_EncryptFinal", (_U, *_OUT)),
    ("C_DecryptInit", (_U, _P, _U)),
    ("C_Decrypt", (_U, _IN, _U, *_OUT)),
    ("C_DecryptUpdate", (_U, _IN, _U, *_OUT)),
    ("C_DecryptFinal", (_U, *_OUT)),
    ("C_DigestInit", (_U, _P)),
    ("C_Digest", (_U, _IN, _U, *_OUT)),
    ("C_DigestUpdate", (_U, _IN, _U)),
    ("C_DigestKey", (_U, _U)),
    ("C_DigestFinal", (_U, *_OUT)),
    ("C_SignInit", (_U, _P, _U)),
    ("C_Sign", (_U, _IN, _U, *_OUT)),
    ("C_SignUpdate", (_U, _IN, _U)),
    ("C_SignFinal", (_U, *_OUT)),
    ("C_SignRecoverInit", None),
    ("C_SignRecover", None),
    ("C_VerifyInit", (_U, _P, _U)),
    ("C_Verify", (_U, _IN, _U, _IN, _U)),
    ("C_VerifyUpdate", (_U, _IN, _U)),
    ("C_VerifyFinal", (_U, _IN, _U)),
    ("C_VerifyRecoverInit", None),
    ("C_VerifyRecover", None),
    ("C_DigestEncryptUpdate", None),
    ("C_DecryptDigestUpdate", None),
    ("C_SignEncryptUpdate", None),
    ("C_DecryptVerifyUpdate", None),
    ("C_GenerateKey", (_U, _P, _P, _U, _P)),
    ("C_GenerateKeyPair", (_U, _P, _P, _U, _P, _U, _P, _P)),
    ("C_WrapKey", (_U, _P, _U, _U, *_OUT)),
    ("C_UnwrapKey", (_U, _P, _U, _IN, _U, _P, _U, _P)),
    ("C_DeriveKey", (_U, _P, _U, _P, _U, _P)),
    ("C_SeedRandom", (_U, _IN, _U)),
    ("C_GenerateRandom", (_U, _P, _U)),
    ("C_GetFunctionStatus", None),
    ("C_CancelFunction", None),
    ("C_WaitForSlotEvent", None),
)

# What versions 3.0 and 3.2 append to the list, by position behind the 68 functions above.
_FUNCTIONS_3_0 = {3: ("C_SessionCancel", (_U, _U))}
_FUNCTIONS_3_2 = {
    24: ("C_EncapsulateKey", (_U, _P, _U, _P, _U, _P, _P, _P)),
    25: ("C_DecapsulateKey", (_U, _P, _U, _P, _U, _IN, _U, _P)),
}


def _checked(name: str, address: int | None, arguments: tuple[Any, ...]) -> Function:
    """The function at ``address``, raising Ckr for all but CKR_OK; modules leave NULL what they do not have."""
    if not address:

        def missing(*_: object) -> int:
            raise Ckr(CKR.FUNCTION_NOT_SUPPORTED, name)

        return missing
    function = ctypes.CFUNCTYPE(ctypes.c_ulong, *arguments)(address)

    def check(rv: int, _function: Any, _arguments: Any) -> int:
        if rv:
            raise Ckr(rv, name)
        return rv

    function.errcheck = check  # type: ignore[assignment, unused-ignore]
    return function


class NotCryptoki(Exception):
    """The shared library exports neither C_GetFunctionList nor C_GetInterface."""


class Cryptoki:
    """A loaded module's functions, by their own names as attributes."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library  # keeps the module loaded
        self._get_interface: Any = getattr(library, "C_GetInterface", None)
        if self._get_interface is not None:
            self._get_interface.argtypes = [_IN, _P, _P, _U]
            self._get_interface.restype = ctypes.c_ulong
        base = self._function_list() or self._interface(None)
        if not base:
            raise NotCryptoki
        self._bind(base, 0, dict(enumerate(_FUNCTIONS_2_40)))
        self.has_v30 = self._extend((3, 0), _FUNCTIONS_3_0)
        self.has_v32 = self._extend((3, 2), _FUNCTIONS_3_2)

    def __getattr__(self, name: str) -> Function:
        # Only reached for names that were never bound; says so to the type checker too.
        raise AttributeError(name)

    def _function_list(self) -> int | None:
        get_function_list: Any = getattr(self._library, "C_GetFunctionList", None)
        if get_function_list is None:
            return None
        get_function_list.restype = ctypes.c_ulong
        address = ctypes.c_void_p()
        rv = get_function_list(ctypes.byref(address))
        if rv:
            raise Ckr(rv, "C_GetFunctionList")
        return address.value

    def _interface(self, version: tuple[int, int] | None) -> int | None:
        """The function list of the "PKCS 11" interface of at least that version (None: the default one)."""
        if self._get_interface is None:
            return None
        interface = ctypes.POINTER(CkInterface)()
        wanted = None if version is None else ctypes.byref(CkVersion(*version))
        rv = self._get_interface(b"PKCS 11", wanted, ctypes.byref(interface), 0)
        if rv or not interface:
            return None
        address: int | None = interface.contents.pFunctionList
        # Some modules answer any version with their default interface; its own header says what it really is.
        if not address or CkVersion.from_address(address).pair() < (version or (2, 0)):
            return None
        return address

    def _bind(self, address: int, first: int, functions: dict[int, tuple[str, tuple[Any, ...] | None]]) -> None:
        pointer_size = ctypes.sizeof(ctypes.c_void_p)  # the version in front is padded to one pointer
        for position, (name, arguments) in functions.items():
            if arguments is not None:
                slot = address + pointer_size * (1 + first + position)
                setattr(self, name, _checked(name, ctypes.c_void_p.from_address(slot).value, arguments))

    def _extend(self, version: tuple[int, int], functions: dict[int, tuple[str, tuple[Any, ...]]]) -> bool:
        address = self._interface(version)
        if address:
            self._bind(address, len(_FUNCTIONS_2_40), dict(functions))
        else:
            for name, arguments in functions.values():
                setattr(self, name, _checked(name, None, arguments))
        return bool(address)
