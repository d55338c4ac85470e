"""What the making of a domain or a group that was cut off left, so that the same command again completes it.

The keys of a new domain go to one member after the other. A mark on each token names them before the first is there,
and is taken away when the last one is: what a mark names, and not every member has, belongs to no group and goes. Else
half a domain could only be told from the rest of another group by people, with each member's own tools.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping

import msgspec

from hagroup.config.model import GroupConfig, SqliteUrl
from hagroup.core.attributes import CKA, CKK, CKO, pack_bool, pack_ulong
from hagroup.core.calls import Ckr, DeadlinePassed, Handle, MemberGone, Template, WorkerFault
from hagroup.core.clock import Clock
from hagroup.core.records import Membership
from hagroup.engine.domain_keys import DOMAIN_LABEL, PARTITION_LABEL, DomainKeys
from hagroup.engine.proof import is_empty
from hagroup.engine.token_contents import APPLICATION, OWN_LABEL, find_all
from hagroup.errors import JournalUnavailable
from hagroup.journal import Journal, open_journal
from hagroup.members.api import Connection

_LABEL = OWN_LABEL + b"unfinished:"
_OWN: Template = [(int(CKA.CLASS), pack_ulong(CKO.DATA)), (int(CKA.APPLICATION), APPLICATION)]
_MARKS: Template = [*_OWN, (int(CKA.OBJECT_ID), b"hagroup:unfinished")]
"""Found by that alone: there is a record beside each object of a group, and reading the labels of all takes long."""
CREATED = "group created"
"""The event that ends a creation."""


# -- on a token --------------------------------------------------------------------------------------------------------


def mark(connection: Connection, ids: tuple[bytes, bytes], *, timeout: float) -> None:
    """Keys with these names are being made."""
    names = b"".join(ids)
    connection.create(
        [
            *_MARKS,
            (int(CKA.TOKEN), pack_bool(True)),
            (int(CKA.PRIVATE), pack_bool(True)),
            (int(CKA.LABEL), _LABEL + names.hex().encode()),
            (int(CKA.VALUE), names),
        ],
        timeout=timeout,
    )


class Marked(msgspec.Struct, frozen=True):
    """What the marks on a token say."""

    any: bool
    pairs: frozenset[tuple[bytes, bytes]]
    """Names of keys that were being made. None where a group shows itself on the token: its keys are in use."""


def marked(connection: Connection, *, timeout: float) -> Marked:
    found = _read(connection, _MARKS, CKA.VALUE, timeout=timeout)
    if not found:
        return Marked(False, frozenset())
    labels = _read(connection, _OWN, CKA.LABEL, timeout=timeout)
    if any(label.startswith(OWN_LABEL) and not label.startswith(_LABEL) for label in labels):
        return Marked(True, frozenset())
    return Marked(True, frozenset((names[: len(names) // 2], names[len(names) // 2 :]) for names in found))


def _read(connection: Connection, template: Template, attribute: CKA, *, timeout: float) -> list[bytes]:
    """One attribute of all that are found."""
    values = []
    for handle in find_all(connection, template, timeout=timeout):
        found, _ = connection.get(handle, [int(attribute)], timeout=timeout)
        values.append(found.get(attribute, b""))
    return values


@contextlib.contextmanager
def marked_while(connection: Connection, ids: tuple[bytes, bytes], *, timeout: float) -> Iterator[None]:
    """While keys with these names come to one member: they are there whole when the block is left, or go with it."""
    gone: Collection[bytes] = ids
    try:
        mark(connection, ids, timeout=timeout)
        yield
        gone = ()
    finally:
        with contextlib.suppress(Ckr, MemberGone, WorkerFault, DeadlinePassed):  # the same command does it then
            clear(connection, gone, timeout=timeout)


def whole_keys(connection: Connection, *, timeout: float) -> dict[bytes, list[tuple[Handle, bytes]]]:
    """The same without those that a write that was cut off left empty."""

    def whole(handle: Handle) -> bool:
        return not is_empty(connection, handle, CKO.SECRET_KEY, CKK.AES, timeout=timeout)

    there = keys_of_domains(connection, timeout=timeout)
    return {label: [key for key in keys if whole(key[0])] for label, keys in there.items()}


def keys_of_domains(connection: Connection, *, timeout: float) -> dict[bytes, list[tuple[Handle, bytes]]]:
    """(handle, CKA_ID) of all that are called domain key, and partition key."""
    found: dict[bytes, list[tuple[Handle, bytes]]] = {DOMAIN_LABEL: [], PARTITION_LABEL: []}
    for label, keys in found.items():
        template: Template = [
            (int(CKA.CLASS), pack_ulong(CKO.SECRET_KEY)),
            (int(CKA.TOKEN), pack_bool(True)),
            (int(CKA.LABEL), label),
        ]
        for handle in connection.find(template, timeout=timeout):
            values, _ = connection.get(handle, [int(CKA.ID)], timeout=timeout)
            keys.append((handle, values.get(CKA.ID, b"")))
    return found


def clear(connection: Connection, gone: Collection[bytes], *, timeout: float) -> None:
    """Destroy keys with these names, those that are empty, and then all marks."""
    for keys in keys_of_domains(connection, timeout=timeout).values():
        for handle, name in keys:
            if name in gone or is_empty(connection, handle, CKO.SECRET_KEY, CKK.AES, timeout=timeout):
                connection.destroy(handle, timeout=timeout)
    for handle in find_all(connection, _MARKS, timeout=timeout):
        connection.destroy(handle, timeout=timeout)


# -- the journal -------------------------------------------------------------------------------------------------------


def begun(
    config: GroupConfig, serials: Mapping[str, str], keys: Mapping[str, DomainKeys], *, clock: Clock
) -> Journal | None:
    """The journal that an earlier attempt made of just this group, in which nothing has happened yet; opened."""
    if isinstance(config.journal.url, SqliteUrl) and not config.journal.url.path.exists():
        return None
    try:
        journal = open_journal(config.journal, clock=clock)
    except JournalUnavailable:
        return None  # there is none, or making one says why it cannot be used
    if _is_begun(journal, config, serials, keys):
        return journal
    journal.close()
    return None


def _is_begun(
    journal: Journal, config: GroupConfig, serials: Mapping[str, str], keys: Mapping[str, DomainKeys]
) -> bool:
    group, members = journal.view()
    names = {(one.domain_key_id, one.partition_key_id) for one in keys.values()}
    return (
        group.label == config.group.label
        and {member.name: member.serial for member in members} == dict(serials)
        and all(member.membership is Membership.ADMITTED for member in members)
        and set(keys) == set(serials)
        and names == {(group.domain_key_id, group.partition_key_id)}
        and not any(journal.counts().values())
        and all(event.kind == CREATED for event in journal.events())
    )
