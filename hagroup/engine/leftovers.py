"""What a joining, a rotation or a creation left on members' tokens that its own end did not come to, or that a member
executed after it was given up. None of it does harm, and nobody else looks for it."""

from __future__ import annotations

from hagroup.config.logging import get_logger
from hagroup.core.attributes import CKA
from hagroup.core.calls import Ckr, DeadlinePassed
from hagroup.core.records import MemberRecord
from hagroup.engine import transport, unfinished
from hagroup.engine.domain_keys import DomainKeys, IntegrityAlarm
from hagroup.engine.group import GroupEngine
from hagroup.engine.member import Life
from hagroup.engine.opening import CONNECTION_LOST
from hagroup.engine.token_contents import TRANSPORT_LABEL, find_all

log = get_logger(__name__)

_LEASE = 60.0


def drop(group: GroupEngine) -> None:
    """From every member that is here; not while another administrator is at work, who may be using it."""
    lease = group.journal.acquire_lease("administration", ttl=_LEASE)
    if lease is None:
        return
    try:
        for record in list(group.view.members.values()):
            member = group.roster.members.get(record.name)
            life = None if member is None else member.life
            if life is None or life.keys is None:
                continue
            try:
                _drop(group, record, life, life.keys)
            except (Ckr, DeadlinePassed, IntegrityAlarm, *CONNECTION_LOST) as error:
                log.warning("member.left-untidy", member=record.name, reason=str(error))
    finally:
        group.journal.release_lease(lease)


def _drop(group: GroupEngine, record: MemberRecord, life: Life, keys: DomainKeys) -> None:
    timeout, connection = group.config.timeouts.generate, life.connection
    for handle in find_all(connection, [(int(CKA.LABEL), TRANSPORT_LABEL)], timeout=timeout):
        connection.destroy(handle, timeout=timeout)
    if unfinished.marked(connection, timeout=timeout).any:
        unfinished.clear(connection, (), timeout=timeout)
    pairs = transport.own(connection, timeout=timeout)
    if len(pairs) < 2:
        return
    # of several the journal's counts: new keys may be waiting for it
    expected = transport.open_public(connection, keys, record.serial, record.transport, timeout=timeout)
    kept = next((one for one in pairs if transport.read(connection, one, timeout=timeout) == expected), pairs[0])
    for handle in pairs:
        if handle != kept:
            connection.destroy(handle, timeout=timeout)
    pair = transport.own_public(connection, keys, record.serial, timeout=timeout)
    group.journal.set_member_facts(record.name, transport=pair)
