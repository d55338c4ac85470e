"""``lib()``: a group's configuration gives the virtual slot, any other path goes to python-pkcs11."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, cast

import pkcs11
from pkcs11.exceptions import MultipleTokensReturned, NoSuchToken, TokenNotPresent, TokenNotRecognised

from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.engine import api
from hagroup.errors import ConfigurationError, NotOnGroup
from hagroup.facade.errors import raises_pkcs11
from hagroup.facade.session import Session
from hagroup.facade.slots import (
    CRYPTOKI_VERSION,
    LIBRARY_VERSION,
    MANUFACTURER,
    VIRTUAL_SLOT,
    EndedSession,
    MemberSlot,
    Slot,
    Token,
)

if TYPE_CHECKING:
    from pkcs11._pkcs11 import lib as PlainLibrary  # noqa: N812 - a class there

CONFIG_VARIABLE = "HAGROUP_CONFIG"
CONFIG_FILE = "hagroup.toml"

# Taken now: a program may put this package in pkcs11's place.
_plain_lib = pkcs11.lib
_plain_unload = pkcs11.unload


class GroupLibrary:
    """A group in place of a module: what ``pkcs11.lib`` offers, for the virtual slot."""

    so: str
    """The path that it was opened with."""
    manufacturer_id = MANUFACTURER
    library_version = LIBRARY_VERSION
    cryptoki_version = CRYPTOKI_VERSION

    def __init__(self, so: str) -> None:
        self.so = so
        self._group: api.Group | None = None
        self._changing = threading.RLock()
        self._sessions: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()
        self.initialize()

    @property
    def library_description(self) -> str:
        return "HA group" if self._group is None else f"HA group {self._group.label}"

    @property
    def initialized(self) -> bool:
        return self._group is not None

    @property
    def group(self) -> api.Group:
        """The group itself (hagroup's own)."""
        if self._group is None:
            raise Ckr(CKR.CRYPTOKI_NOT_INITIALIZED, "C_GetInfo")
        return self._group

    # -- life ----------------------------------------------------------------------------------------------
    def initialize(self) -> None:
        """Opens the group; nothing where it is open already."""
        from hagroup.bootstrap import open_group  # here: looking at hagroup's names must not load the whole engine

        with self._changing:
            if self._group is None:
                self._group = open_group(self.so)

    def finalize(self) -> None:
        """Closes the group; sessions of before are invalid from now on."""
        with self._changing:
            group, self._group = self._group, None
            for reference in self._sessions.valuerefs():
                session = reference()
                if session is not None:
                    session.engine = cast(api.Session, EndedSession(self, session.engine))
            self._sessions.clear()
            if group is not None:
                group.close()

    def reinitialize(self) -> None:
        with self._changing:
            self.finalize()
            self.initialize()

    def unload(self) -> None:
        self.finalize()

    def track(self, session: Session) -> None:
        """Remembers an open session, to end it with the library (hagroup's own)."""
        self._sessions[session.handle] = session

    def renew_after_fork(self) -> None:
        self._changing = threading.RLock()  # another thread of the parent may have held it

    # -- slots and tokens ----------------------------------------------------------------------------------
    @raises_pkcs11
    def get_slots(self, token_present: bool = False) -> list[Slot]:
        """The virtual slot, then the members if the configuration says ``ha_only = false``. A member's slot number is
        its place in the file, whoever is connected."""
        group = self.group
        slots: list[Slot] = [Slot(self, VIRTUAL_SLOT, f"HA group {group.label}")]
        for place, member in enumerate(group.member_slots(), VIRTUAL_SLOT + 1):
            if member.token is not None or not token_present:
                slots.append(MemberSlot(self, place, member))
        return slots

    def get_tokens(
        self,
        token_label: str | None = None,
        token_serial: bytes | None = None,
        token_flags: Any = None,
        slot_flags: Any = None,
        mechanisms: Iterable[Any] | None = None,
    ) -> Iterator[Token]:
        """Tokens that match; ``mechanisms``: those that have all of them."""
        wanted = None if mechanisms is None else {int(mechanism) for mechanism in mechanisms}
        for slot in self.get_slots():
            try:
                token = slot.get_token()
                if (
                    (token_label is None or token.label == token_label)
                    and (token_serial is None or token.serial == token_serial)
                    and (token_flags is None or token.flags & token_flags)
                    and (slot_flags is None or slot.flags & slot_flags)
                    and (wanted is None or wanted <= slot.get_mechanisms())
                ):
                    yield token
            except (TokenNotPresent, TokenNotRecognised):
                continue

    def get_token(self, **kwargs: Any) -> Token:
        """The one token that matches."""
        tokens = self.get_tokens(**kwargs)
        token = next(tokens, None)
        if token is None:
            raise NoSuchToken(f"No token matching {kwargs}")
        if next(tokens, None) is not None:
            raise MultipleTokensReturned(f"More than 1 token matches {kwargs}")
        return token

    @raises_pkcs11
    def wait_for_slot_event(self, blocking: bool = True) -> NoReturn:
        """The virtual slot never changes: nothing to report, and nothing to wait for."""
        if not blocking:
            raise Ckr(CKR.NO_EVENT, "C_WaitForSlotEvent")
        raise NotOnGroup(
            "the virtual slot's token is always present, so that this would wait for ever; what happens to the members "
            "is in `ha-admin status` and in the watchdog's notifications"
        )

    def __str__(self) -> str:
        return "\n".join(
            (
                f"Library: {self.so}",
                f"Manufacturer ID: {self.manufacturer_id}",
                f"Library Description: {self.library_description}",
                "Cryptoki Version: {}.{}".format(*self.cryptoki_version),
                "Library Version: {}.{}".format(*self.library_version),
            )
        )

    def __repr__(self) -> str:
        return f"<hagroup.lib ({self.so})>"


_libraries: dict[str, GroupLibrary] = {}
_opening = threading.Lock()


def _renew_after_fork() -> None:
    global _opening
    _opening = threading.Lock()
    for library in _libraries.values():
        library.renew_after_fork()


os.register_at_fork(after_in_child=_renew_after_fork)


def _config_path(so: str | os.PathLike[str] | None) -> str | None:
    """The group's configuration file that ``so`` means; None: it is a module for python-pkcs11."""
    if so is None:
        named = os.environ.get(CONFIG_VARIABLE)
        if not named:
            raise ConfigurationError(
                f"lib() was called without a path and {CONFIG_VARIABLE} is not set: give the path of a {CONFIG_FILE}"
            )
        return os.path.join(named, CONFIG_FILE) if os.path.isdir(named) else named
    path = os.fspath(so)
    if os.path.isdir(path):
        path = os.path.join(path, CONFIG_FILE)
        return path if os.path.exists(path) else None
    return path if path.endswith(".toml") else None


def lib(so: str | os.PathLike[str] | None = None) -> GroupLibrary | PlainLibrary:
    """The library at ``so``: a ``hagroup.toml`` (or the folder that holds one) is a group, anything else a module.

    Without a path, ``HAGROUP_CONFIG`` names the configuration. One object for one configuration in a process, opened
    again if it was finalized.
    """
    path = _config_path(so)
    if path is None:
        return _plain_lib(os.fspath(so) if so is not None else "")
    resolved = os.path.realpath(path)
    with _opening:
        library = _libraries.get(resolved)
        if library is None:
            library = _libraries[resolved] = GroupLibrary(path)
        elif not library.initialized:
            library.initialize()
        return library


def unload(so: str | os.PathLike[str] | None = None) -> None:
    """Forgets a library: what was opened with it ends."""
    path = _config_path(so)
    if path is None:
        _plain_unload(os.fspath(so) if so is not None else "")
        return
    with _opening:
        library = _libraries.pop(os.path.realpath(path), None)
    if library is not None:
        library.unload()
