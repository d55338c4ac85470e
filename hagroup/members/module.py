"""One vendor's module: loaded, initialised with locking, and the slot of the one token that the member is."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import msgspec

from hagroup.core import ckr
from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.members.api import MechanismInfo, ModuleInfo, TokenInfo
from hagroup.members.cryptoki import (
    CK_UNAVAILABLE_INFORMATION,
    CKF_OS_LOCKING_OK,
    CkInfo,
    CkInitializeArgs,
    CkMechanismInfo,
    CkSlotInfo,
    CkTokenInfo,
    Cryptoki,
    NotCryptoki,
)


class ModuleProblem(Exception):
    """A person must put something right (wrong file, no such token, ...): the text is one sentence that says what."""


class ConnectionSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is needed to start one member's module and to find its token. Paths are absolute."""

    name: str
    module: str
    env: dict[str, str] = {}
    token_serial: str | None = None
    token_label: str | None = None
    init_args: str | None = None
    lock_file: str | None = None


def text(padded: Any) -> str:
    """A blank-padded CK_UTF8CHAR array; some modules end it with NUL instead."""
    return bytes(padded).split(b"\0", 1)[0].decode("utf-8", "replace").rstrip(" ")


def load(path: str, name: str) -> Cryptoki:
    """Loads the module; a :class:`ModuleProblem` says why it cannot be."""
    if not os.path.isfile(path):
        raise ModuleProblem(f"member {name}: the module {path} does not exist")
    try:
        return Cryptoki(ctypes.CDLL(path))
    except OSError as error:
        raise ModuleProblem(f"member {name}: the module {path} cannot be loaded: {error}") from None
    except NotCryptoki:
        raise ModuleProblem(f"member {name}: {path} is not a PKCS#11 module (it has no C_GetFunctionList)") from None


class Slots:
    """An initialised module and the tokens in its slots."""

    def __init__(self, cryptoki: Cryptoki, settings: ConnectionSettings) -> None:
        self.cryptoki = cryptoki
        self.name = settings.name
        self._path = settings.module
        self._initialize(settings.init_args)

    def _initialize(self, init_args: str | None) -> None:
        reserved = None if init_args is None else init_args.encode()
        arguments = CkInitializeArgs(flags=CKF_OS_LOCKING_OK, pReserved=reserved)
        try:
            self.cryptoki.C_Initialize(ctypes.byref(arguments))
        except Ckr as error:
            if error.rv == CKR.CANT_LOCK:
                raise ModuleProblem(
                    f"member {self.name}: the module {self._path} cannot lock (CKR_CANT_LOCK), "
                    f"so it cannot be used from several threads"
                ) from None
            if error.rv != CKR.CRYPTOKI_ALREADY_INITIALIZED:
                raise
            # Somebody initialised it as it was loaded, and perhaps without locks (trap 1): ours must count.
            self.cryptoki.C_Finalize(None)
            self.cryptoki.C_Initialize(ctypes.byref(arguments))

    def finalize(self) -> None:
        """C_Finalize; what it answers changes nothing any more."""
        try:
            self.cryptoki.C_Finalize(None)
        except Ckr:
            pass

    def _slots(self) -> list[int]:
        count = ctypes.c_ulong()
        self.cryptoki.C_GetSlotList(1, None, ctypes.byref(count))
        count.value += 8  # a token may come in between
        slots = (ctypes.c_ulong * count.value)()
        self.cryptoki.C_GetSlotList(1, slots, ctypes.byref(count))
        return list(slots[: count.value])

    def tokens(self) -> tuple[list[tuple[int, TokenInfo]], list[str]]:
        """Slots with their tokens, and those whose token could not be read, with the reason."""
        tokens: list[tuple[int, TokenInfo]] = []
        unreadable: list[str] = []
        for slot in self._slots():
            try:
                tokens.append((slot, self._token_info(slot)))
            except Ckr as error:  # another slot's trouble is not ours, but it may be why ours is not found
                unreadable.append(f"slot {slot}: {ckr.name(error.rv)}")
        return tokens, unreadable

    def _token_info(self, slot_id: int) -> TokenInfo:
        info = CkTokenInfo()
        self.cryptoki.C_GetTokenInfo(slot_id, ctypes.byref(info))
        free, total = info.ulFreePrivateMemory, info.ulTotalPrivateMemory
        return TokenInfo(
            label=text(info.label),
            manufacturer=text(info.manufacturerID),
            model=text(info.model),
            serial=text(info.serialNumber),
            flags=info.flags,
            hardware_version=info.hardwareVersion.pair(),
            firmware_version=info.firmwareVersion.pair(),
            min_pin_len=info.ulMinPinLen,
            max_pin_len=info.ulMaxPinLen,
            free_private_memory=None if free == CK_UNAVAILABLE_INFORMATION else free,
            total_private_memory=None if total == CK_UNAVAILABLE_INFORMATION else total or None,
        )


class Module(Slots):
    """An initialised module and the member's slot in it."""

    def __init__(self, cryptoki: Cryptoki, settings: ConnectionSettings) -> None:
        super().__init__(cryptoki, settings)
        try:
            self.slot_id = self._find_slot(settings.token_serial, settings.token_label)
            self.info = self._module_info()
        except BaseException:
            self.finalize()
            raise

    def _find_slot(self, serial: str | None, label: str | None) -> int:
        """The slot whose token has this serial number and label (those that are given)."""
        tokens, unreadable = self.tokens()
        wanted = [
            slot
            for slot, token in tokens
            if (serial is None or token.serial == serial) and (label is None or token.label == label)
        ]
        if len(wanted) == 1:
            return wanted[0]
        asked = " and ".join([f'label "{label}"'] * (label is not None) + [f"serial {serial}"] * (serial is not None))
        there = ", ".join([f'"{token.label}" (serial {token.serial})' for _, token in tokens] + unreadable)
        if wanted:
            raise ModuleProblem(
                f"member {self.name}: {len(wanted)} tokens of {self._path} match {asked or 'no condition'}: "
                f"{there}; name the one by token_serial"
            )
        raise ModuleProblem(
            f"member {self.name}: {self._path} has no token with {asked or 'any name'}; "
            f"it has: {there or 'none at all'}"
        )

    def _module_info(self) -> ModuleInfo:
        info = CkInfo()
        self.cryptoki.C_GetInfo(ctypes.byref(info))
        slot = CkSlotInfo()
        self.cryptoki.C_GetSlotInfo(self.slot_id, ctypes.byref(slot))
        return ModuleInfo(
            manufacturer=text(info.manufacturerID),
            description=text(info.libraryDescription),
            library_version=info.libraryVersion.pair(),
            cryptoki_version=info.cryptokiVersion.pair(),
            slot_id=self.slot_id,
            slot_description=text(slot.slotDescription),
            slot_manufacturer=text(slot.manufacturerID),
            slot_flags=slot.flags,
            has_v30=self.cryptoki.has_v30,
            has_v32=self.cryptoki.has_v32,
        )

    def token_info(self) -> TokenInfo:
        return self._token_info(self.slot_id)

    def mechanisms(self) -> dict[int, MechanismInfo]:
        count = ctypes.c_ulong()
        self.cryptoki.C_GetMechanismList(self.slot_id, None, ctypes.byref(count))
        numbers = (ctypes.c_ulong * count.value)()
        self.cryptoki.C_GetMechanismList(self.slot_id, numbers, ctypes.byref(count))
        found = {}
        info = CkMechanismInfo()
        for number in numbers[: count.value]:
            try:
                self.cryptoki.C_GetMechanismInfo(self.slot_id, number, ctypes.byref(info))
            except Ckr as error:
                if error.rv != CKR.MECHANISM_INVALID:
                    raise
                continue  # listed, but this token does not do it
            found[number] = MechanismInfo(info.ulMinKeySize, info.ulMaxKeySize, info.flags)
        return found
