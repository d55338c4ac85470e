"""Everything that is on a token, read raw: ghosts and objects that cannot be read must not stop it (DESIGN.md 8, 4)."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from hagroup.core.attributes import CKA, CKO, pack_ulong, unpack_bool, unpack_ulong
from hagroup.core.calls import Ckr, Handle, Template
from hagroup.core.ckr import CKR
from hagroup.core.records import Locator
from hagroup.engine.domain_keys import DOMAIN_LABEL, PARTITION_LABEL
from hagroup.members.api import Connection

APPLICATION = b"hagroup"
"""CKA_APPLICATION of the data objects that are the group's own."""
OWN_LABEL = b"hagroup:"
"""What the CKA_LABEL of these begins with."""
TRANSPORT_LABEL = b"hagroup transport key"
MEMBER_KEY_LABEL = b"hagroup member key"
"""The private key by which the token receives the domain's keys."""

_READ = (
    CKA.CLASS,
    CKA.KEY_TYPE,
    CKA.ID,
    CKA.LABEL,
    CKA.TOKEN,
    CKA.PRIVATE,
    CKA.APPLICATION,
    CKA.OBJECT_ID,
)
_ATTEMPTS = 5


class InventoryEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One object as it was found."""

    handle: Handle
    object_class: int | None
    key_type: int | None
    id: bytes
    label: bytes
    token: bool
    private: bool
    ghost: bool
    """No class, or not on the token: what a failed or unfinished call left. The session objects of this connection
    look the same; nothing tells them apart but asking on a connection that made none."""
    own: bool
    """One of the group's own: domain keys, transport keys, manifests, records."""

    @property
    def locator(self) -> Locator:
        return Locator(
            object_class=-1 if self.object_class is None else self.object_class,
            key_type=self.key_type,
            id=self.id,
            label=self.label,
        )


def _number(values: dict[int, bytes], attribute: int) -> int | None:
    try:
        return unpack_ulong(values[attribute])
    except (KeyError, ValueError):
        return None


def _is_own(object_class: int | None, values: dict[int, bytes]) -> bool:
    label = values.get(CKA.LABEL, b"")
    if object_class == CKO.DATA:
        return values.get(CKA.APPLICATION) == APPLICATION and label.startswith(OWN_LABEL)
    return label in (DOMAIN_LABEL, PARTITION_LABEL, TRANSPORT_LABEL, MEMBER_KEY_LABEL)


def find_all(connection: Connection, template: Template, *, timeout: float) -> list[Handle]:
    """A search that is repeated where a hit vanishes meanwhile: SoftHSM fails it then (DESIGN.md 8, trap 8)."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return connection.find(template, timeout=timeout)
        except Ckr as error:
            if error.rv != CKR.OBJECT_HANDLE_INVALID:
                raise
    return connection.find(template, timeout=timeout)


def inventory(
    connection: Connection, *, timeout: float, kinds: Collection[tuple[int, int | None]] | None = None
) -> list[InventoryEntry]:
    """All objects that this login shows; with ``kinds``, only those of these classes and key types."""
    if kinds is None:
        handles = find_all(connection, [], timeout=timeout)
    else:
        handles = []
        for kind, key_type in kinds:
            template: Template = [(int(CKA.CLASS), pack_ulong(kind))]
            if key_type is not None:
                template.append((int(CKA.KEY_TYPE), pack_ulong(key_type)))
            handles += find_all(connection, template, timeout=timeout)
    entries = []
    for handle in handles:
        try:
            values, _ = connection.get(handle, [int(number) for number in _READ], timeout=timeout)
        except Ckr as error:
            if error.rv != CKR.OBJECT_HANDLE_INVALID:
                raise
            continue  # gone meanwhile
        object_class = _number(values, CKA.CLASS)
        token = unpack_bool(values.get(CKA.TOKEN, b""))
        entries.append(
            InventoryEntry(
                handle=handle,
                object_class=object_class,
                key_type=_number(values, CKA.KEY_TYPE),
                id=values.get(CKA.OBJECT_ID if object_class == CKO.DATA else CKA.ID, b""),
                label=values.get(CKA.LABEL, b""),
                token=token,
                private=unpack_bool(values.get(CKA.PRIVATE, b"\x01")),
                ghost=object_class is None or not token,
                own=_is_own(object_class, values),
            )
        )
    return entries
