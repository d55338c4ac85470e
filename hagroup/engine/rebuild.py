"""A journal that was lost, or is behind the group, is made anew from members, manifests and mirror (DESIGN.md 4.6).

Nothing on a token is changed here. The new journal begins a new epoch in which every member is out of sync: each goes
through a full inventory before it serves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from hagroup.config.logging import get_logger
from hagroup.config.model import GroupConfig, JournalSection, MemberConfig, SqliteUrl
from hagroup.config.pins import Pin
from hagroup.core.attributes import CKA, CKO
from hagroup.core.calls import Ckr, DeadlinePassed
from hagroup.core.clock import Clock
from hagroup.core.rebuilding import Evidence, Former, Found, conclude
from hagroup.core.records import (
    Event,
    Fingerprint,
    FingerprintKind,
    MemberRecord,
    Membership,
    ObjectRecord,
    ObjectState,
    Tombstone,
)
from hagroup.engine import manifest, transport
from hagroup.engine.challenge import DomainMember, challenge, reference_envelope
from hagroup.engine.consistency import JOURNAL_REBUILT
from hagroup.engine.domain_keys import DomainKeys
from hagroup.engine.login import CKU_USER, PIN_ERRORS
from hagroup.engine.manifest import Manifest
from hagroup.engine.member import Life
from hagroup.engine.roster import CONNECTION_LOST, open_life
from hagroup.engine.setup import default_extractable, held_keys
from hagroup.engine.stored_records import stored_records
from hagroup.engine.token_contents import inventory
from hagroup.errors import ConfigurationError, DomainMismatch, GroupUnavailable, HAError
from hagroup.journal import EtcdJournal, create_journal, open_for_moving
from hagroup.journal.api import Contents, Journal
from hagroup.journal.epoch import new_epoch
from hagroup.journal.mirror import Mirror
from hagroup.journal.sqlite import set_aside
from hagroup.members import ModuleProblem

log = get_logger(__name__)

REBUILT = "the journal was rebuilt: a full inventory comes before it serves"
_EVERYTHING = 2**31
_COMMAND = "ha-admin journal rebuild"
_KEYS = (CKO.PRIVATE_KEY, CKO.SECRET_KEY)


class Rebuilt(msgspec.Struct, frozen=True, kw_only=True):
    """What was found, and what cannot be known; fields are added, never renamed."""

    group: str
    """Its serial number."""
    objects: int
    tombstones: int
    members: dict[str, str]
    """Name to what it contributed."""
    away: dict[str, str]
    """Name to the reason why it contributed nothing."""
    doubtful: list[dict[str, str]]
    """Neither taken over nor destroyed: ``uid``, ``label``, ``why``."""
    not_replicable: list[str]
    unknown: list[str]
    """What cannot be known, in sentences."""
    aside: str | None
    """Where the journal that was there is now."""


class _Reached(msgspec.Struct, frozen=True, kw_only=True):
    life: Life
    keys: DomainKeys
    manifest: Manifest
    records: list[ObjectRecord]


def former_of(journal: Journal) -> tuple[Former, list[Event], str]:
    """What an older state of the journal knows, its events and its epoch."""
    names = [member.name for member in journal.members()]
    copies: dict[bytes, set[str]] = {}
    for name in names:
        for copy in journal.copies(name):
            copies.setdefault(copy.uid, set()).add(name)
    records = [record for record in journal.objects() if record.state is ObjectState.LIVE]
    former = Former(records=records, copies=copies, tombstones=list(journal.tombstones()))
    return former, journal.events(limit=_EVERYTHING), journal.group().epoch


def rebuild(
    config: GroupConfig,
    pins: Mapping[str, Pin],
    *,
    former: tuple[Former, list[Event], str] | None,
    keep: Collection[bytes],
    clock: Clock,
) -> Rebuilt:
    """Make the journal. One that is there is moved aside, as the last step but one; interrupted, nothing is lost.

    :param keep: UIDs of doubtful objects that are taken over all the same.
    :raises GroupUnavailable: no member that knows the group answered.
    :raises ConfigurationError, DomainMismatch: they are another group's, or a PIN was refused; nothing was changed.
    """
    reached: dict[str, _Reached] = {}
    away: dict[str, str] = {}
    timeout = config.timeouts.generate
    try:
        for member in config.members:  # one after the other: a wrong PIN must not be tried on a second member
            one = _reach(member, pins[member.name], timeout=timeout)
            if isinstance(one, str):
                away[member.name] = one
            else:
                reached[member.name] = one
        return _rebuild(config, reached, away, former, keep, clock)
    finally:
        for one in reached.values():
            one.life.connection.close()


def _reach(member: MemberConfig, pin: Pin, *, timeout: float) -> _Reached | str:
    life: Life | None = None
    done = False
    try:
        life = open_life(member, None, generation=1, timeout=timeout)
        life.connection.login(CKU_USER, pin.reveal(), timeout=timeout)
        side = DomainMember(connection=life.connection, name=member.name, wrap_mechanism=member.wrap_mechanism)
        keys = held_keys(side, timeout=timeout)
        if keys is None:
            return "it holds no keys of a domain"
        shown = manifest.read(life.connection, keys, timeout=timeout)
        if shown is None:
            return "it has no manifest of a group"
        records = list(stored_records(life.connection, keys, timeout=timeout))
        done = True
        return _Reached(life=life, keys=keys, manifest=shown, records=records)
    except Ckr as error:
        if error.rv in PIN_ERRORS:
            raise ConfigurationError(
                f'member "{member.name}" refused its user PIN ({error}); no other member was tried after it and '
                "nothing was changed"
            ) from error
        return str(error)
    except (DeadlinePassed, ModuleProblem, HAError, *CONNECTION_LOST) as error:
        return str(error)
    finally:
        if life is not None and not done:
            life.connection.close()


def _rebuild(
    config: GroupConfig,
    reached: dict[str, _Reached],
    away: dict[str, str],
    former: tuple[Former, list[Event], str] | None,
    keep: Collection[bytes],
    clock: Clock,
) -> Rebuilt:
    newest = _newest(config, reached, away)
    _same_domain(config, reached)
    mirrored, destroyed = ([], []) if config.journal.mirror is None else Mirror(config.journal.mirror).read()
    known, events, epoch = former or (Former(), [], "")
    buried = {stone.uid for stone in known.tombstones}
    stones = [*known.tombstones, *(_stone(uid, clock) for uid in destroyed if uid not in buried)]
    found = conclude(
        {name: _evidence(one) for name, one in reached.items()},
        msgspec.structs.replace(known, tombstones=stones),
        mirrored,
        keep,
    )
    contents = Contents(
        epoch_before=max(newest.epoch, epoch),
        change=found.change,
        records=[msgspec.structs.replace(one, state=ObjectState.LIVE, intent=None) for one in found.records],
        copies=[copy for copy in found.copies if copy.member in newest.members],
        tombstones=stones,
        events=[*(msgspec.structs.replace(one, number=0) for one in events), _event(config, found, clock)],
    )
    not_replicable = _not_replicable(reached, found, timeout=config.timeouts.generate)
    first, one = next((name, one) for name, one in reached.items() if name in newest.members)
    reference = reference_envelope(one.life.connection, one.keys, timeout=config.timeouts.generate)
    members = _members(config, reached, newest, clock)
    aside, contents = _set_aside(config.journal, contents, clock)
    create_journal(
        config.journal,
        label=newest.label,
        serial=newest.group,
        members=members,
        domain_key_id=one.keys.domain_key_id,
        partition_key_id=one.keys.partition_key_id,
        reference=reference,
        contents=contents,
        command=_COMMAND,
        clock=clock,
    )
    made = open_for_moving(config.journal, clock=clock)
    made.open_up()
    made.close()
    log.info("journal.rebuilt", objects=len(found.records), by=first)
    return Rebuilt(
        group=newest.group,
        objects=len(found.records),
        tombstones=len(stones),
        members={name: f"{len(one.records)} records" for name, one in reached.items()},
        away=away,
        doubtful=[{"uid": record.uid.hex(), "label": _label(record), "why": why} for record, why in found.doubtful],
        not_replicable=not_replicable,
        unknown=_unknown(newest, reached, former is not None or config.journal.mirror is not None),
        aside=aside,
    )


def _set_aside(section: JournalSection, contents: Contents, clock: Clock) -> tuple[str | None, Contents]:
    """What is there makes way, and is kept: where, and what its place is taken by."""
    if isinstance(section.url, SqliteUrl):
        path = section.url.path
        if not path.exists() and not path.with_name(f"{path.name}-wal").exists():
            return None, contents
        return str(set_aside(path, f"replaced-{int(clock.wall())}")), contents
    epoch = new_epoch(contents.epoch_before)
    aside, epoch = EtcdJournal.set_aside(section, _COMMAND, epoch) or (None, epoch)
    return aside, msgspec.structs.replace(contents, epoch=epoch)


def _newest(config: GroupConfig, reached: Mapping[str, _Reached], away: Mapping[str, str]) -> Manifest:
    if not reached:
        why = "; ".join(f"{name}: {reason}" for name, reason in away.items())
        raise GroupUnavailable(f"no member that knows the group answered ({why}); nothing was changed")
    for name, one in reached.items():
        if config.group.serial not in (None, one.manifest.group):
            raise ConfigurationError(
                f'member "{name}" belongs to group {one.manifest.label} ({one.manifest.group}), and {config.path} is '
                f"of group {config.group.label} ({config.group.serial}); nothing was changed"
            )
    newest = max((one.manifest for one in reached.values()), key=lambda found: found.order)
    configured = {member.name for member in config.members}
    for name, serial in newest.members.items():
        if name not in configured:
            raise ConfigurationError(
                f"{config.path}: the group has a member {name!r} (serial number {serial}) that this file does not "
                "have: it is older than the group; add its [[member]] section; nothing was changed"
            )
        if name in reached and reached[name].life.token.serial != serial:
            raise ConfigurationError(
                f'member "{name}" is the token {reached[name].life.token.serial}, the group\'s is {serial}; correct '
                "its [[member]] section; nothing was changed"
            )
    if not set(newest.members) & set(reached):
        raise GroupUnavailable("none of the members that answered is in the group any more; nothing was changed")
    return newest


def _same_domain(config: GroupConfig, reached: Mapping[str, _Reached]) -> None:
    """:raises DomainMismatch: the members do not share both secrets."""
    wraps = {member.name: member.wrap_mechanism for member in config.members}
    sides = [
        (DomainMember(connection=one.life.connection, name=name, wrap_mechanism=wraps[name]), one.keys)
        for name, one in reached.items()
    ]
    for other in sides[1:]:
        try:
            challenge(*sides[0], *other, timeout=config.timeouts.generate)
        except DomainMismatch as error:
            raise DomainMismatch(f"{error}; nothing was changed") from error


def _evidence(one: _Reached) -> Evidence:
    return Evidence(epoch=one.manifest.epoch, seen=max(one.manifest.high, one.manifest.low), records=one.records)


def _stone(uid: bytes, clock: Clock) -> Tombstone:
    """Of the mirror: that there was an object, and that it was destroyed; not where it may be found."""
    nothing = Fingerprint(FingerprintKind.NONE, b"", b"")
    return Tombstone(uid=uid, change=0, time=clock.wall(), locators=(), fingerprint=nothing)


def _event(config: GroupConfig, found: Found, clock: Clock) -> Event:
    text = f"from members and manifests: {len(found.records)} objects, {len(found.doubtful)} doubtful"
    return Event(number=0, time=clock.wall(), kind=JOURNAL_REBUILT, member=None, text=text, data={})


def _label(record: ObjectRecord) -> str:
    return record.attributes.get(CKA.LABEL, b"").decode(errors="replace")


def _members(
    config: GroupConfig, reached: Mapping[str, _Reached], newest: Manifest, clock: Clock
) -> list[MemberRecord]:
    timeout = config.timeouts.generate
    records = []
    for member in config.members:
        if member.name not in newest.members:
            continue
        one = reached.get(member.name)
        records.append(
            MemberRecord(
                name=member.name,
                serial=newest.members[member.name],
                role=member.role,
                membership=Membership.OUT_OF_SYNC,
                reason=REBUILT,
                since=clock.wall(),
                default_extractable=False if one is None else default_extractable(one.life, timeout=timeout),
                transport=b""
                if one is None
                else transport.own_public(one.life.connection, one.keys, one.life.token.serial, timeout=timeout),
            )
        )
    return records


def _not_replicable(reached: Mapping[str, _Reached], found: Found, *, timeout: float) -> list[str]:
    """Keys that no envelope is known of, and objects on the tokens that no record tells of."""
    told = [
        f"key {_label(record)!r} ({record.uid.hex()}): its record has no envelope"
        for record in found.records
        if record.envelope is None and record.object_class in _KEYS
    ]
    known = {record.locator for record in [*found.records, *(record for record, _ in found.doubtful)]}
    for name, one in reached.items():
        for entry in inventory(one.life.connection, timeout=timeout):
            if not (entry.own or entry.ghost or entry.locator in known):
                label = entry.label.decode(errors="replace")
                told.append(f"an object labelled {label!r} on {name}: no record tells of it (`sync --adopt` takes it)")
    return told


def _unknown(newest: Manifest, reached: Mapping[str, _Reached], more: bool) -> list[str]:
    told = [
        f"what only {name} holds is not known, nor what was destroyed while it was away"
        for name in newest.members
        if name not in reached
    ]
    if not more:
        told.append("what was destroyed before now is not known by name: an object that a person put back is not told")
    return told
