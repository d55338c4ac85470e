"""Taking a member out of the group: first no process uses it, then nothing of the group is left on it, then it is gone
from the journal and from hagroup.toml. Interrupted anywhere, the same call completes it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import msgspec

from hagroup.config import write
from hagroup.config.load import load
from hagroup.config.logging import get_logger
from hagroup.config.model import GroupConfig
from hagroup.config.pins import Pin
from hagroup.core.calls import Ckr, DeadlinePassed
from hagroup.core.ckr import CKR
from hagroup.core.records import Fingerprint, Locator, MemberRecord, Membership, ObjectRecord, ObjectState, Role
from hagroup.engine import configuration, manifest, proof
from hagroup.engine.domain_keys import DOMAIN_LABEL, PARTITION_LABEL
from hagroup.engine.group import GroupEngine
from hagroup.engine.login import log_in
from hagroup.engine.member import Life, Member
from hagroup.engine.membership import BEING_REMOVED, NOT_CHANGED, listed, only_there, others_serve
from hagroup.engine.opening import CONNECTION_LOST, open_life
from hagroup.engine.token_contents import InventoryEntry, inventory
from hagroup.errors import ConfigurationError, HAError, JournalUnavailable
from hagroup.journal.api import Journal
from hagroup.members import ModuleProblem
from hagroup.members.api import Connection

log = get_logger(__name__)

GRACE = 1.0
"""Seconds for other processes' calls to come to their end before objects vanish under them; a longer one goes on
elsewhere."""


_SETTLING = 2.0


class Left(msgspec.Struct, frozen=True):
    """What became of a removed member's token."""

    destroyed: int
    strangers: int
    """Objects that were never the group's: they stay."""
    why_not: str | None
    """Why nothing was destroyed: it has to be done later."""


def remove(group: GroupEngine, name: str, pin: tuple[Pin, str, str] | None, *, keep: bool, lose: bool) -> Left:
    """Out of the group for good.

    :param pin: user PIN, its source and stamp; None: none at hand, so its token is left as it is.
    :param keep: leave keys and objects on its token (for a second group, or as an archive); its manifest and
        configuration go.
    :param lose: also where objects are on no other member.
    """
    record = listed(group, name)
    if record.reason != BEING_REMOVED:
        _refuse(group, name, lose=lose)
        if not record.draining:
            group.journal.update_member(name, draining=True)
        time.sleep(GRACE)
        group.journal.update_member(name, membership=Membership.QUARANTINED, reason=BEING_REMOVED)
        group.follow()
    left = _clear(group.config, group.journal, record, pin, keep=keep)
    group.journal.remove_member(name)
    group.journal.forget_cut_off(group.journal.cut_off(name))
    data = {} if left.why_not is None else {f"member:{name}": "to do"}
    group.journal.event("member removed", _told(left, record, keep=keep), member=name, data=data)
    if any(member.name == name for member in load(group.config.path).members):
        write.remove_member(group.config.path, name)
    group.follow()
    group.supervisor.keeper.keep()
    return left


def _told(left: Left, record: MemberRecord, *, keep: bool) -> str:
    if left.why_not is not None:
        return f"the group's keys and objects on its token ({record.serial}) have to be destroyed: {left.why_not}"
    if keep:
        return f"keys and objects stay on its token ({record.serial})"
    return f"{left.destroyed} objects of the group destroyed on its token ({record.serial})"


def forget(journal: Journal, name: str, *, lose: bool) -> None:
    """Out of the group by the journal alone: hagroup.toml does not have it (any more), so no program can start."""
    record = next(record for record in journal.members() if record.name == name)
    if not any(other.name != name and other.membership is Membership.ADMITTED for other in journal.members()):
        raise ConfigurationError(f'no other member than "{name}" is in the group: it would be lost{NOT_CHANGED}')
    _refuse_loss(journal, name, lose=lose)
    journal.remove_member(name)
    journal.forget_cut_off(journal.cut_off(name))
    left = Left(0, 0, "it is not in hagroup.toml")
    journal.event("member removed", _told(left, record, keep=False), member=name, data={f"member:{name}": "to do"})


def _refuse(group: GroupEngine, name: str, *, lose: bool) -> None:
    if not others_serve(group, name):
        raise ConfigurationError(f'no other member than "{name}" serves now: the group would be lost{NOT_CHANGED}')
    config = load(group.config.path)
    holders = sum(member.name != name and member.role is not Role.BACKUP for member in config.members)
    if holders < config.group.min_replicas:
        raise ConfigurationError(
            f"{config.path}: [group] min_replicas = {config.group.min_replicas} cannot be kept with the {holders} "
            f"members that would be left: lower it first{NOT_CHANGED}"
        )
    _refuse_loss(group.journal, name, lose=lose)


def _refuse_loss(journal: Journal, name: str, *, lose: bool) -> None:
    if lose:
        return
    deadline = time.monotonic() + _SETTLING
    while (alone := only_there(journal, name)) and time.monotonic() < deadline:
        time.sleep(0.1)  # programs may just be changing it
    if alone:
        shown = ", ".join(alone[:5]) + (" …" if len(alone) > 5 else "")
        raise ConfigurationError(
            f'{len(alone)} objects are up to date on no other member than "{name}" ({shown}): run `ha-admin sync` '
            f"first, or give --lose{NOT_CHANGED}"
        )


def delete_group(config: GroupConfig, journal: Journal, pins: Mapping[str, tuple[Pin, str, str]]) -> dict[str, Left]:
    """Nothing of the group is left on any token: its manifests, records and the domain's keys go. The journal and
    hagroup.toml are the caller's. Interrupted, the same call completes it.

    :param pins: user PIN, its source and stamp, by member.
    :returns: what became of each member's token; the group is deleted if none says ``why_not``.
    :raises ConfigurationError: it has objects still; nothing was changed.
    """
    counts = journal.counts()
    if counts["live"] or counts["creating"]:
        raise ConfigurationError(
            f"group {config.group.label} has {counts['live'] + counts['creating']} objects: destroy them first, with "
            f"`ha-admin clear`, or back them up{NOT_CHANGED}"
        )
    found = {}
    for record in journal.members():
        found[record.name] = _clear(config, journal, record, pins.get(record.name), keep=False)
        log.info("member.wiped", member=record.name, reason=found[record.name].why_not)
    return found


def _clear(
    group: GroupConfig, journal: Journal, record: MemberRecord, pin: tuple[Pin, str, str] | None, *, keep: bool
) -> Left:
    config = next((member for member in load(group.path).members if member.name == record.name), None)
    if config is None or pin is None:
        return Left(0, 0, "it is not in hagroup.toml" if config is None else "no PIN for it was at hand")
    timeout = group.timeouts.generate
    try:
        life = open_life(config, journal, generation=1, timeout=timeout, serial=record.serial)
    except JournalUnavailable:
        raise  # nothing is the matter with the member: the same command again completes it
    except (Ckr, DeadlinePassed, ModuleProblem, HAError, *CONNECTION_LOST) as error:
        return Left(0, 0, str(error))
    try:
        if life.token.serial != record.serial:
            return Left(0, 0, f"another token is in its place ({life.token.serial})")
        member = Member(config, rank=(0, 0), standby=False)
        log_in(journal, member, life, *pin, automatic=True, timeout=timeout)
        return _destroy_all(journal, record.name, life, keep=keep, timeout=timeout)
    except JournalUnavailable:
        raise
    except (Ckr, DeadlinePassed, HAError, *CONNECTION_LOST) as error:
        return Left(0, 0, str(error))
    finally:
        life.connection.close()


def _destroy_all(journal: Journal, name: str, life: Life, *, keep: bool, timeout: float) -> Left:
    entries = [entry for entry in inventory(life.connection, timeout=timeout) if entry.token]
    strangers = [entry for entry in entries if not entry.own and not entry.ghost]
    own = sorted((entry for entry in entries if entry.own), key=_order)
    if keep:
        shown = [entry for entry in own if entry.label.startswith((manifest.LABEL, configuration.LABEL))]
        _destroy(life.connection, shown, timeout=timeout)
        return Left(0, len(strangers), None)
    ours = _objects_of_the_group(journal, name, life.connection, strangers, timeout=timeout)
    _destroy(life.connection, ours, timeout=timeout)
    _destroy(life.connection, own, timeout=timeout)
    return Left(len(ours), len(strangers) - len(ours), None)


def _order(entry: InventoryEntry) -> int:
    """The domain's keys last: while they are there, the rest can be told to be the group's."""
    return (
        (DOMAIN_LABEL, PARTITION_LABEL).index(entry.label) + 1 if entry.label in (DOMAIN_LABEL, PARTITION_LABEL) else 0
    )


def _destroy(connection: Connection, entries: Iterable[InventoryEntry], *, timeout: float) -> None:
    for entry in entries:
        try:
            connection.destroy(entry.handle, timeout=timeout)
        except Ckr as error:
            if error.rv != CKR.OBJECT_HANDLE_INVALID:
                raise


def _objects_of_the_group(
    journal: Journal, name: str, connection: Connection, entries: Iterable[InventoryEntry], *, timeout: float
) -> list[InventoryEntry]:
    """By locator (present and former ones) and fingerprint; what the group destroyed, and may still be here, too."""
    by_locator: dict[Locator, list[InventoryEntry]] = {}
    for entry in entries:
        by_locator.setdefault(entry.locator, []).append(entry)
    wanted: list[tuple[set[Locator], Fingerprint]] = [
        (_locators(journal, name, record), record.fingerprint) for record in journal.objects()
    ]
    wanted += [(set(tombstone.locators), tombstone.fingerprint) for tombstone in journal.tombstones()]
    found: dict[int, InventoryEntry] = {}
    for locators, fingerprint in wanted:
        for locator in locators:
            for entry in by_locator.get(locator, []):
                same = proof.matches(connection, entry.handle, locator.object_class, fingerprint, timeout=timeout)
                if same is not False:
                    found[entry.handle] = entry
    return list(found.values())


def _locators(journal: Journal, name: str, record: ObjectRecord) -> set[Locator]:
    found = {record.locator}
    if record.state is ObjectState.LIVE:
        copies, owed = journal.placement(record.uid)
        if name in copies:
            found.add(copies[name].locator)
        if name in owed:
            found.update(owed[name].locators)
    return found
