"""Which of the domain's keys a member holds, after a login; and how one that was away comes to new ones.

While the keys are being changed (``domain_rotation``) a member holds both pairs. One that was away when they were
changed finds the new ones in the journal, wrapped for its own transport key, and takes them before anything else.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from hagroup.config.logging import get_logger
from hagroup.core.records import GroupRecord, MemberRecord
from hagroup.engine import transport
from hagroup.engine.challenge import DomainMember, open_reference
from hagroup.engine.domain_keys import DomainKeys, find_domain
from hagroup.engine.enforcement import probe_enforcement
from hagroup.engine.envelope import EnvelopeError, generation
from hagroup.engine.joining import drop, receive
from hagroup.errors import DomainMismatch, GroupUnavailable
from hagroup.journal.api import Journal
from hagroup.members.api import Connection

log = get_logger(__name__)

_PATIENCE = 10.0
"""Seconds for which one process has the right to give a member its new keys; it takes milliseconds."""


def learn(
    journal: Journal,
    group: GroupRecord,
    member: MemberRecord,
    wrap_mechanism: int,
    connection: Connection,
    *,
    timeout: float,
    found: Callable[[DomainKeys], None] | None = None,
) -> DomainKeys:
    """The group's keys on a member whose user is logged in, each pair proved by its reference envelope (G9).

    :param found: called before they are proved, where there is no other pair: for what need not wait for the proof, but
        counts only after it.
    :raises DomainMismatch: it has not got them, and cannot come to them without people.
    :raises GroupUnavailable: another process is just giving it the new ones.
    """
    try:
        keys = find_domain(connection, group.domain_key_id, group.partition_key_id, wrap_mechanism, timeout=timeout)
    except DomainMismatch:
        if not _may_take(group, member, connection, timeout=timeout):
            raise
        keys = _take(journal, group, member, wrap_mechanism, connection, timeout=timeout)
    if found is not None and group.rotation is None:
        found(keys)
    open_reference(connection, keys, group.reference, timeout=timeout)
    return msgspec.structs.replace(keys, older=_older(group, wrap_mechanism, connection, timeout=timeout))


def _older(group: GroupRecord, wrap_mechanism: int, connection: Connection, *, timeout: float) -> DomainKeys | None:
    """The pair that was replaced last, where it still is on the member."""
    rotation = group.rotation
    if rotation is None:
        return None
    try:
        keys = find_domain(
            connection, rotation.domain_key_id, rotation.partition_key_id, wrap_mechanism, timeout=timeout
        )
        open_reference(connection, keys, rotation.reference, timeout=timeout)
    except DomainMismatch:
        return None
    return keys


def _may_take(group: GroupRecord, member: MemberRecord, connection: Connection, *, timeout: float) -> bool:
    rotation = group.rotation
    return (
        rotation is not None
        and member.serial in rotation.wrapped
        and transport.find(connection, timeout=timeout) is not None
    )


def _take(
    journal: Journal,
    group: GroupRecord,
    member: MemberRecord,
    wrap_mechanism: int,
    connection: Connection,
    *,
    timeout: float,
) -> DomainKeys:
    lease = journal.acquire_lease(f"keys/{member.name}", ttl=_PATIENCE)
    if lease is None:
        raise GroupUnavailable(f'member "{member.name}" is just being given the domain\'s new keys')
    try:
        pair = transport.find(connection, timeout=timeout)
        rotation = group.rotation
        assert pair is not None and rotation is not None
        ids = (group.domain_key_id, group.partition_key_id)
        side = DomainMember(connection=connection, name=member.name, wrap_mechanism=wrap_mechanism)
        enforcement = probe_enforcement(connection, wrap_mechanism, timeout=timeout)
        keys = receive(
            side, pair, enforcement, rotation.wrapped[member.serial], ids, sealed=rotation.sealed, timeout=timeout
        )
        try:
            open_reference(connection, keys, group.reference, timeout=timeout)
        except BaseException:
            drop(connection, [keys.domain, keys.partition], timeout=timeout)
            raise
    finally:
        journal.release_lease(lease)
    journal.event("domain keys taken", "it had been away when they were changed", member=member.name)
    log.info("member.new-keys", member=member.name)
    return keys


def current(keys: DomainKeys | None, group: GroupRecord) -> bool:
    """Whether these are the keys under which everything new is sealed."""
    return keys is not None and keys.domain_key_id == group.domain_key_id


def opens(keys: DomainKeys | None, envelope: bytes) -> bool:
    """Whether a member with these keys can open it, as far as its names tell."""
    try:
        return keys is not None and keys.named(*generation(envelope)) is not None
    except EnvelopeError:
        return False
