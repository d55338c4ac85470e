"""A journal that was lost, or is behind the group, is made anew from members, manifests and mirror (DESIGN.md 4.6).

Nothing on a token is changed here. The new journal begins a new epoch in which every member is out of sync: each goes
through a full inventory before it serves.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from hagroup import journal as journals
from hagroup.config.logging import get_logger
from hagroup.config.model import GroupConfig, JournalSection, MemberConfig, SqliteUrl
from hagroup.config.pins import Pin
from hagroup.core.attributes import CKO
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
from hagroup.engine import configuration, manifest, transport
from hagroup.engine.about import label_of
from hagroup.engine.challenge import DomainMember, challenge, reference_envelope
from hagroup.engine.configuration import Configuration
from hagroup.engine.consistency import JOURNAL_REBUILT
from hagroup.engine.domain_keys import DomainKeys
from hagroup.engine.login import CKU_USER, PIN_ERRORS
from hagroup.engine.manifest import Manifest
from hagroup.engine.member import Life
from hagroup.engine.opening import CONNECTION_LOST, open_life
from hagroup.engine.setup import default_extractable, held_keys
from hagroup.engine.stored_records import stored_records
from hagroup.engine.token_contents import inventory
from hagroup.errors import ConfigurationError, DomainMismatch, GroupUnavailable, HAError
from hagroup.journal import SqliteJournal
from hagroup.journal.api import Contents, Journal
from hagroup.journal.epoch import new_epoch
from hagroup.journal.mirror import Mirror
from hagroup.journal.sqlite import fold, set_aside
from hagroup.members import ModuleProblem

log = get_logger(__name__)

REBUILT = "the journal was rebuilt: a full inventory comes before it serves"
_EVERYTHING = 2**31
COMMAND = "ha-admin journal rebuild"
"""Completes one that was cut off. (Whoever else began it can too.)"""
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


class Reached(msgspec.Struct, frozen=True, kw_only=True):
    """A member that was logged in to, and knows a group."""

    life: Life
    keys: DomainKeys
    manifest: Manifest
    configuration: Configuration | None
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
    """Make the journal. One that is there is kept under another name: what it knows can be read until the new one takes
    its place, so that after an interruption the same call comes to the same.

    :param keep: UIDs of doubtful objects that are taken over all the same.
    :raises GroupUnavailable: no member that knows the group answered.
    :raises ConfigurationError, DomainMismatch: they are another group's, or a PIN was refused; nothing was changed.
    """
    reached: dict[str, Reached] = {}
    away: dict[str, str] = {}
    timeout = config.timeouts.generate
    try:
        for member in config.members:  # one after the other: a wrong PIN must not be tried on a second member
            one = reach(member, pins[member.name], timeout=timeout)
            if isinstance(one, str):
                away[member.name] = one
            else:
                reached[member.name] = one
        return rebuild_from(config, reached, away, former=former, keep=keep, clock=clock)
    finally:
        for one in reached.values():
            one.life.connection.close()


def reach(member: MemberConfig, pin: Pin, *, timeout: float) -> Reached | str:
    """What a member knows of its group; why it tells nothing.

    :raises ConfigurationError: it refused the PIN (one attempt).
    """
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
        text = configuration.read(life.connection, keys, timeout=timeout)
        records = list(stored_records(life.connection, keys, timeout=timeout))
        done = True
        return Reached(life=life, keys=keys, manifest=shown, configuration=text, records=records)
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


def rebuild_from(
    config: GroupConfig,
    reached: dict[str, Reached],
    away: dict[str, str],
    *,
    former: tuple[Former, list[Event], str] | None,
    keep: Collection[bytes],
    clock: Clock,
) -> Rebuilt:
    """:func:`rebuild`, from members that were reached."""
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
    not_replicable = _not_replicable(reached, found, stones, timeout=config.timeouts.generate)
    first, one = next((name, one) for name, one in reached.items() if name in newest.members)
    reference = reference_envelope(one.life.connection, one.keys, timeout=config.timeouts.generate)
    members = _members(config, reached, newest, clock)
    aside = _make(
        config.journal, newest, one.keys, members, reference, contents, readable=former is not None, clock=clock
    )
    log.info("journal.rebuilt", objects=len(found.records), by=first)
    return Rebuilt(
        group=newest.group,
        objects=len(found.records),
        tombstones=len(stones),
        members={name: f"{len(one.records)} records" for name, one in reached.items()},
        away=away,
        doubtful=[{"uid": record.uid.hex(), "label": label_of(record), "why": why} for record, why in found.doubtful],
        not_replicable=not_replicable,
        unknown=_unknown(newest, reached, former is not None or config.journal.mirror is not None),
        aside=aside,
    )


def _make(
    section: JournalSection,
    newest: Manifest,
    keys: DomainKeys,
    members: Sequence[MemberRecord],
    reference: bytes,
    contents: Contents,
    *,
    readable: bool,
    clock: Clock,
) -> str | None:
    """What is there makes way, and is kept: where."""
    make: dict[str, Any] = {
        "label": newest.label,
        "serial": newest.group,
        "members": members,
        "domain_key_id": keys.domain_key_id,
        "partition_key_id": keys.partition_key_id,
        "reference": reference,
        "clock": clock,
    }
    if isinstance(section.url, SqliteUrl):
        path = section.url.path
        aside = _aside(path, clock)
        foldable = readable and aside is not None and fold(path)
        if aside is not None and not foldable:
            set_aside(path, aside)
        SqliteJournal.create(path, aside=aside if foldable else None, contents=contents, **make)
        return None if aside is None else str(aside)
    there, epoch = journals.EtcdJournal.set_aside(section, COMMAND, new_epoch(contents.epoch_before)) or (None, None)
    contents = msgspec.structs.replace(contents, epoch=epoch or new_epoch(contents.epoch_before))
    journals.EtcdJournal.create(section, contents=contents, command=COMMAND, **make)
    made = journals.EtcdJournal.open(section, clock=clock, for_moving=True)
    made.open_up()
    made.close()
    return there


def _aside(path: Path, clock: Clock) -> Path | None:
    """Where the journal that is there goes; None: there is none."""
    if not path.exists() and not Path(f"{path}-wal").exists():
        return None
    first = f"{path}.replaced-{int(clock.wall())}"
    names = itertools.chain([first], (f"{first}.{number}" for number in itertools.count(2)))
    return next(Path(name) for name in names if not os.path.lexists(name))


def newest_of(reached: Iterable[Reached]) -> Manifest:
    """The highest manifest, with the newest membership that any of them or of the configurations shows."""
    found = list(reached)
    newest = max((one.manifest for one in found), key=lambda shown: shown.order)
    shown: list[Manifest | Configuration] = [one.manifest for one in found]
    shown += [one.configuration for one in found if one.configuration is not None]
    members = max(shown, key=lambda one: (one.group == newest.group, one.epoch, one.revision, one is newest)).members
    return msgspec.structs.replace(newest, members=members)


def _newest(config: GroupConfig, reached: Mapping[str, Reached], away: Mapping[str, str]) -> Manifest:
    if not reached:
        why = "; ".join(f"{name}: {reason}" for name, reason in away.items())
        raise GroupUnavailable(f"no member that knows the group answered ({why}); nothing was changed")
    for name, one in reached.items():
        if config.group.serial not in (None, one.manifest.group):
            raise ConfigurationError(
                f'member "{name}" belongs to group {one.manifest.label} ({one.manifest.group}), and {config.path} is '
                f"of group {config.group.label} ({config.group.serial}); nothing was changed"
            )
    newest = newest_of(reached.values())
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


def _same_domain(config: GroupConfig, reached: Mapping[str, Reached]) -> None:
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


def _evidence(one: Reached) -> Evidence:
    return Evidence(epoch=one.manifest.epoch, seen=max(one.manifest.high, one.manifest.low), records=one.records)


def _stone(uid: bytes, clock: Clock) -> Tombstone:
    """Of the mirror: that there was an object, and that it was destroyed; not where it may be found."""
    nothing = Fingerprint(FingerprintKind.NONE, b"", b"")
    return Tombstone(uid=uid, change=0, time=clock.wall(), locators=(), fingerprint=nothing)


def _event(config: GroupConfig, found: Found, clock: Clock) -> Event:
    text = f"from members and manifests: {len(found.records)} objects, {len(found.doubtful)} doubtful"
    return Event(number=0, time=clock.wall(), kind=JOURNAL_REBUILT, member=None, text=text, data={})


def _members(config: GroupConfig, reached: Mapping[str, Reached], newest: Manifest, clock: Clock) -> list[MemberRecord]:
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


def _not_replicable(
    reached: Mapping[str, Reached], found: Found, stones: Iterable[Tombstone], *, timeout: float
) -> list[str]:
    """Keys that no envelope is known of, and objects on the tokens that neither a record nor a tombstone tells of."""
    told = [
        f"key {label_of(record)!r} ({record.uid.hex()}): its record has no envelope"
        for record in found.records
        if record.envelope is None and record.object_class in _KEYS
    ]
    known = {record.locator for record in [*found.records, *(record for record, _ in found.doubtful)]}
    known.update(locator for stone in stones for locator in stone.locators)
    for name, one in reached.items():
        for entry in inventory(one.life.connection, timeout=timeout):
            if not (entry.own or entry.ghost or entry.locator in known):
                label = entry.label.decode(errors="replace")
                told.append(f"an object labelled {label!r} on {name}: no record tells of it (`sync --adopt` takes it)")
    return told


def _unknown(newest: Manifest, reached: Mapping[str, Reached], more: bool) -> list[str]:
    told = [
        f"what only {name} holds is not known, nor what was destroyed while it was away"
        for name in newest.members
        if name not in reached
    ]
    if not more:
        told.append("what was destroyed before now is not known by name: an object that a person put back is not told")
    return told
