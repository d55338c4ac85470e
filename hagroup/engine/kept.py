"""What the group keeps once on each member's token, sealed: the manifest, the configuration. The highest one counts.

A new one is written before lower ones are destroyed, so at every instant one can be read, whoever is killed where.
"""

from __future__ import annotations

import hashlib
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from hagroup.core.attributes import CKA, CKO, pack_bool, pack_ulong
from hagroup.core.calls import Ckr, Handle, Template
from hagroup.core.ckr import CKR
from hagroup.engine.domain import DomainKeys, IntegrityAlarm, open_data, seal_data
from hagroup.engine.token_contents import APPLICATION, find_all
from hagroup.members.api import Connection

_OWN: Template = [(int(CKA.CLASS), pack_ulong(CKO.DATA)), (int(CKA.APPLICATION), APPLICATION)]
_ATTEMPTS = 5


class Ordered(Protocol):
    """Later ones compare greater; so do their marks, as texts."""

    @property
    def order(self) -> tuple[Any, ...]: ...
    @property
    def mark(self) -> str: ...


T = TypeVar("T", bound=Ordered)


class Kept(Generic[T]):
    """One kind of them: how it is found, sealed and read."""

    def __init__(self, name: str, kind: type[T]) -> None:
        self._purpose = name.encode()
        self._kind = kind
        self.label = f"hagroup:{name}:".encode()
        """What its CKA_LABEL begins with."""
        # Found by that alone: there is a record beside each object, and reading the labels of all would take as long.
        self._here: Template = [*_OWN, (int(CKA.OBJECT_ID), f"hagroup:{name}".encode())]

    def read(self, connection: Connection, keys: DomainKeys, *, timeout: float) -> T | None:
        """The highest authentic one on the token; None: there is none.

        Another process may put a newer one in the place of the one that was just found: so "none" is said only where
        nothing changed while it was looked for.
        """
        best = self._read_once(connection, keys, timeout=timeout)
        for _ in range(_ATTEMPTS):
            if best is not None:
                return best
            before = find_all(connection, _OWN, timeout=timeout)
            best = self._read_once(connection, keys, timeout=timeout)
            if best is None and sorted(before) == sorted(find_all(connection, _OWN, timeout=timeout)):
                return None
        if best is not None:
            return best
        raise Ckr(CKR.OBJECT_HANDLE_INVALID, "C_FindObjects")

    def write(self, connection: Connection, keys: DomainKeys, value: T, *, timeout: float) -> None:
        """Put the new one there, then destroy lower ones."""
        mine = self._create(connection, keys, value, timeout=timeout)
        stored = self._stored(connection, self._here, timeout=timeout)
        if len(stored) < 2:  # the first one, or what is there was written by an earlier hagroup
            stored = self._stored(connection, _OWN, timeout=timeout)
        equals = [label for label, _ in stored if label.startswith(_without_tie(mine))]
        for label, handle in stored:
            if label < max(equals, default=mine):
                _destroy(connection, handle, timeout=timeout)

    def reseal(self, connection: Connection, keys: DomainKeys, *, timeout: float) -> None:
        """The domain's keys were replaced: the newest one is written once more, and those before it go."""
        stored = self._stored(connection, _OWN, timeout=timeout)
        newest = self.read(connection, keys, timeout=timeout)
        if newest is None:
            return
        self._create(connection, keys, newest, timeout=timeout)
        for _, handle in stored:
            _destroy(connection, handle, timeout=timeout)

    def _create(self, connection: Connection, keys: DomainKeys, value: T, *, timeout: float) -> bytes:
        """Returns its label. No two have the same: of two that are equally high all processes keep the same one."""
        sealed = seal_data(connection, keys, self._purpose, msgspec.msgpack.encode(value), timeout=timeout)
        label = self.label + f"{value.mark}:{hashlib.sha256(sealed).hexdigest()[:8]}".encode()
        template: Template = [
            *self._here,
            (int(CKA.TOKEN), pack_bool(True)),
            (int(CKA.PRIVATE), pack_bool(True)),
            (int(CKA.LABEL), label),
            (int(CKA.VALUE), sealed),
        ]
        connection.create(template, timeout=timeout)
        return label

    def _stored(self, connection: Connection, search: Template, *, timeout: float) -> list[tuple[bytes, Handle]]:
        """(label, handle), newest first; objects that cannot be read are passed over."""
        found = []
        for handle in find_all(connection, search, timeout=timeout):
            values = _get(connection, handle, CKA.LABEL, timeout=timeout)
            label = b"" if values is None else values
            if label.startswith(self.label):
                found.append((label, handle))
        return sorted(found, reverse=True)

    def _read_once(self, connection: Connection, keys: DomainKeys, *, timeout: float) -> T | None:
        stored = self._stored(connection, self._here, timeout=timeout)
        stored = stored or self._stored(connection, _OWN, timeout=timeout)  # of an earlier hagroup
        best: T | None = None
        for _, handle in stored:
            sealed = _get(connection, handle, CKA.VALUE, timeout=timeout)
            if sealed is None:
                continue
            try:
                data = open_data(connection, keys, self._purpose, sealed, timeout=timeout)
                found = msgspec.msgpack.decode(data, type=self._kind)
            except (IntegrityAlarm, msgspec.DecodeError):
                continue
            if best is None or found.order > best.order:
                best = found
        return best


def _without_tie(label: bytes) -> bytes:
    return label.rpartition(b":")[0] + b":"


def _get(connection: Connection, handle: Handle, attribute: int, *, timeout: float) -> bytes | None:
    """None: the object went away meanwhile."""
    try:
        values, _ = connection.get(handle, [int(attribute)], timeout=timeout)
    except Ckr as error:
        if error.rv != CKR.OBJECT_HANDLE_INVALID:
            raise
        return None
    return values.get(attribute, b"")


def _destroy(connection: Connection, handle: Handle, *, timeout: float) -> None:
    try:
        connection.destroy(handle, timeout=timeout)
    except Ckr as error:
        if error.rv != CKR.OBJECT_HANDLE_INVALID:  # another process tidied up first
            raise
