"""Giving the domain's keys to one member that is configured and has not got them: new, reset, or away for too long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hagroup.config.model import MemberConfig
from hagroup.config.pins import Pin
from hagroup.core.records import Membership
from hagroup.engine import membership, renewal, shares, transport
from hagroup.engine.challenge import DomainMember, challenge, concerns_domain, open_reference
from hagroup.engine.domain_keys import DomainKeys, find_domain, is_sealed, scratch_session
from hagroup.engine.enforcement import probe_enforcement
from hagroup.engine.group import GroupEngine
from hagroup.engine.joining import import_domain, join_domain
from hagroup.engine.login import log_in
from hagroup.engine.member import Life, Member
from hagroup.engine.opening import open_life
from hagroup.engine.setup import officer_of
from hagroup.errors import ConfigurationError, DomainMismatch, GroupUnavailable


@contextmanager
def reached(group: GroupEngine, config: MemberConfig, pin: tuple[Pin, str, str]) -> Iterator[Life]:
    """The member with its user logged in, in a connection of its own (the group's may be quarantined)."""
    timeout = group.config.timeouts.generate
    record = group.view.members.get(config.name)
    life = open_life(config, group.journal, generation=1, timeout=timeout, serial=record.serial if record else None)
    try:
        known = Member(config, rank=(0, 0), standby=False)
        log_in(group.journal, known, life, *pin, automatic=config.pin is not None, timeout=timeout)
        yield life
    finally:
        life.connection.close()


def held(group: GroupEngine, config: MemberConfig, life: Life) -> DomainKeys | None:
    """Both keys where it has them already, proved."""
    now, timeout = group.view.group, group.config.timeouts.generate
    try:
        keys = find_domain(
            life.connection, now.domain_key_id, now.partition_key_id, config.wrap_mechanism, timeout=timeout
        )
        open_reference(life.connection, keys, now.reference, timeout=timeout)
    except DomainMismatch:
        return None
    return keys


def complete(group: GroupEngine, config: MemberConfig, life: Life, keys: DomainKeys) -> bool:
    """What is left to do where an earlier :func:`give` was cut off after the keys had arrived. False: nothing is."""
    record = group.view.members.get(config.name)
    if record is None or record.membership is not Membership.QUARANTINED or not concerns_domain(record.reason):
        return False
    _settle(group, config, life, keys)
    return True


def give(
    group: GroupEngine, config: MemberConfig, life: Life, *, so_pin: Pin | None, secrets: tuple[bytes, bytes] | None
) -> None:
    """From a member that has them, with its security officer; or from the secrets that people put together.

    :raises DomainMismatch: the shares are not this group's, or the keys are sealed; nothing was changed.
    """
    now, timeout = group.view.group, group.config.timeouts.generate
    side = DomainMember(connection=life.connection, name=config.name, wrap_mechanism=config.wrap_mechanism)
    ids = (now.domain_key_id, now.partition_key_id)
    if secrets is not None:
        shares.prove(side, secrets, now.reference, ids, timeout=timeout)
        keys = _from_secrets(group, side, secrets, ids, timeout=timeout)
    else:
        speaker, source, source_keys = membership.sponsor(group)
        if so_pin is None:
            raise ConfigurationError(f'the SO PIN of member "{speaker.name}" is needed{membership.NOT_CHANGED}')
        officer = officer_of(speaker.config, source, so_pin, journal=group.journal, timeout=timeout)
        from_side = DomainMember(
            connection=source.connection, name=speaker.name, wrap_mechanism=speaker.config.wrap_mechanism
        )
        try:
            keys = join_domain(from_side, source_keys, officer.connection, side, timeout=timeout)
        finally:
            officer.connection.close()
    _settle(group, config, life, keys)


def _settle(group: GroupEngine, config: MemberConfig, life: Life, keys: DomainKeys) -> None:
    """It has both keys: the journal keeps its transport key, others that nobody names go, and it may serve again."""
    now, timeout = group.view.group, group.config.timeouts.generate
    record = group.view.members.get(config.name)
    if record is not None:
        pair = transport.own_public(life.connection, keys, life.token.serial, timeout=timeout)
        group.journal.set_member_facts(config.name, transport=pair)
    if now.rotation is None or now.rotation.finished:
        names = {now.domain_key_id, now.partition_key_id}
        renewal.drop_unknown(life.connection, names, timeout=timeout)
    group.journal.event("domain joined", "it was given both keys of the domain", member=config.name)
    if record is not None and record.membership is Membership.QUARANTINED:
        membership.release(group.journal, config.name)


def _from_secrets(
    group: GroupEngine, side: DomainMember, secrets: tuple[bytes, bytes], ids: tuple[bytes, bytes], *, timeout: float
) -> DomainKeys:
    try:
        speaker, source, source_keys = membership.sponsor(group)
    except GroupUnavailable:
        speaker = None
        sealed = True
    else:
        sealed = is_sealed(source.connection, source_keys, timeout=timeout)
    enforcement = probe_enforcement(side.connection, side.wrap_mechanism, timeout=timeout)
    with scratch_session(side.connection, timeout=timeout) as sid:
        transport.find_or_make(side.connection, enforcement, sid=sid, sealed=sealed, timeout=timeout)
    keys = import_domain(side, *secrets, ids, sealed=sealed, timeout=timeout)
    if speaker is not None:
        other = DomainMember(
            connection=source.connection, name=speaker.name, wrap_mechanism=speaker.config.wrap_mechanism
        )
        challenge(other, source_keys, side, keys, timeout=timeout)
    return keys
