"""Whether the event log is what it was when it was sealed: asked of every member that can be logged in to.

No engine runs for it: that would repair what it finds, and seal on.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from hagroup.config.model import GroupConfig, MemberConfig
from hagroup.config.pins import Pin
from hagroup.core.calls import Ckr, DeadlinePassed
from hagroup.core.records import GroupRecord
from hagroup.engine import manifest, sealing
from hagroup.engine.domain_keys import find_domain
from hagroup.engine.login import APPLICATION, log_in
from hagroup.engine.manifest import Manifest
from hagroup.engine.member import Member
from hagroup.engine.opening import CONNECTION_LOST, open_life
from hagroup.errors import HAError
from hagroup.journal.api import Journal
from hagroup.members import ModuleProblem

_EVERYTHING = 2**31


class SealChecked(msgspec.Struct, frozen=True, kw_only=True):
    """What the members say of the log's seal."""

    problems: list[str]
    asked: list[str]
    not_asked: dict[str, str]
    """Name to reason."""


def check(config: GroupConfig, journal: Journal, pins: Mapping[str, tuple[Pin, str, str]]) -> SealChecked:
    """:param pins: PIN, source and stamp of the members that may be logged in to; the others are not asked."""
    group = journal.group()
    shown: dict[str, tuple[int, bytes]] = {}
    problems: list[str] = []
    asked: list[str] = []
    not_asked: dict[str, str] = {}
    for member in config.members:
        if member.name not in pins:
            not_asked[member.name] = "it has no `pin` source; give --pin-file or --pin-env"
            continue
        try:
            fine, found = _ask(config, journal, group, member, pins[member.name])
        except (Ckr, DeadlinePassed, HAError, ModuleProblem, *CONNECTION_LOST) as error:
            not_asked[member.name] = str(error)
            continue
        asked.append(member.name)
        if not fine:
            problems.append(f'member "{member.name}" says that the event log\'s seal was not made by this group')
        if found is not None and found.sealed and found.epoch == group.epoch:
            shown[member.name] = (found.sealed, found.head)
    # Read last: what a running program seals meanwhile is newer than what was asked.
    group, events = journal.group(), journal.events(limit=_EVERYTHING)
    why = sealing.broken(events, group.serial, group.seal, shown)
    return SealChecked(problems=[*problems, *([why] if why else [])], asked=asked, not_asked=not_asked)


def _ask(
    config: GroupConfig, journal: Journal, group: GroupRecord, member: MemberConfig, pin: tuple[Pin, str, str]
) -> tuple[bool, Manifest | None]:
    timeout = config.timeouts.generate
    serials = {record.name: record.serial for record in journal.members()}
    life = open_life(member, journal, generation=1, timeout=timeout, serial=serials.get(member.name))
    try:
        secret, source, stamp = pin
        one = Member(member, rank=(0, 0), standby=False)
        log_in(journal, one, life, secret, source, stamp, automatic=source != APPLICATION, timeout=timeout)
        keys = find_domain(
            life.connection, group.domain_key_id, group.partition_key_id, member.wrap_mechanism, timeout=timeout
        )
        fine = group.seal is None or sealing.opens(life.connection, keys, group.seal, timeout=timeout)
        return fine, manifest.read(life.connection, keys, timeout=timeout)
    finally:
        life.connection.close()
