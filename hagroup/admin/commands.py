"""What each command of ``ha-admin`` does, apart from how it is asked for and shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from hagroup import bootstrap
from hagroup.admin import pins
from hagroup.admin.progress import going_down
from hagroup.config import write
from hagroup.config.load import load
from hagroup.config.model import GroupConfig, MemberConfig, SqliteUrl
from hagroup.config.pins import Pin, pin_source_identity, pin_source_stamp, read_pin_stamped
from hagroup.core.attributes import CKA, CKK, CKO
from hagroup.core.records import OwedKind
from hagroup.core.states import State
from hagroup.engine import leaving, leftovers, membership, replica
from hagroup.engine import setup as group_setup
from hagroup.engine import status as group_status
from hagroup.engine.group import GroupEngine
from hagroup.engine.login import APPLICATION, log_in
from hagroup.engine.member import Life, Member
from hagroup.engine.opening import open_life
from hagroup.errors import ConfigurationError, GroupUnavailable, JournalUnavailable
from hagroup.journal import Journal, open_journal
from hagroup.journal.clock import SystemClock

PinOptions = tuple[Path | None, str | None]
CKU_USER = 1


class SyncedMember(msgspec.Struct, frozen=True):
    name: str
    state: str
    finished: int
    """Owed changes that are done now."""
    owed: int
    """Those that are not."""
    reason: str | None = None
    """Why it is not in service."""


class Synced(msgspec.Struct, frozen=True):
    members: list[SyncedMember]
    reachable: bool
    in_sync: bool


class ObjectLine(msgspec.Struct, frozen=True):
    """One line of ``objects``."""

    object_class: str
    key_type: str | None
    label: str
    id: str
    note: str


def create(
    config: GroupConfig,
    *,
    new: bool,
    pin: PinOptions,
    so_pin: PinOptions,
    sealed: bool,
    confirm: Callable[[str], bool] | None,
    existing: Callable[[Mapping[str, int]], None],
) -> None:
    """``group create``.

    :param new: the configuration was made here: its file is written when the group is there.
    :param existing: is told how many objects members hold already; raises where that is a reason to stop.
    """
    path = config.path
    if config.group.serial is not None:
        raise ConfigurationError(
            f"{path}: [group] serial is set ({config.group.serial}): this group was created already; `ha-admin status` "
            "shows it"
        )
    given = user_pins(config, pin)
    officer = pins.read("SO PIN", file=so_pin[0], variable=so_pin[1])
    names = ", ".join(member.name for member in config.members)
    if confirm is not None and not confirm(f"Create group {config.group.label} of {names}?"):
        raise ConfigurationError("not confirmed (give --yes in scripts); nothing was changed")
    serial = group_setup.create_group(
        config, given, officer, sealed=sealed, clock=SystemClock(), existing=existing, new=new
    )
    print(f"group {config.group.label} ({serial}) created: {names}")
    if new:
        print(f"{path} is written")


def delete_group(path: Path, *, pin: PinOptions, confirm: Callable[[str, str], bool] | None) -> str:
    """``group delete``. Returns what was done, in one sentence."""
    config = load(path)
    if not isinstance(config.journal.url, SqliteUrl):
        raise ConfigurationError(
            f"{path}: [journal] url {config.journal.url}: only a group with a journal on this host"
        )
    label, journal_file = config.group.label, config.journal.url.path
    kept = journal_file.with_name(f"{journal_file.name}.deleted-{config.group.serial}")
    if config.group.serial is not None and kept.exists() and not journal_file.exists():
        write.drop_group_serial(path)  # the last step: an earlier attempt was stopped before it
        return f"group {label} ({config.group.serial}) is deleted; its journal is kept as {kept}"
    with opened_journal(config) as journal:
        given = stamped_pins(config, pin)
        question = f"This deletes group {label} and its keys on every member, for ever. Type its label to go on"
        if confirm is not None and not confirm(question, label):
            raise ConfigurationError("not confirmed (give --yes in scripts); nothing was changed")
        with membership.alone(journal):
            left = leaving.delete_group(config, journal, given)
        remains = "; ".join(f"{name}: {one.why_not}" for name, one in left.items() if one.why_not is not None)
        if remains:
            raise GroupUnavailable(f"not every member could be wiped ({remains}): run the same command again")
        journal.event("group deleted", f"nothing of it is left on {', '.join(left)}")
    Path(f"{journal_file}.view").unlink(missing_ok=True)
    journal_file.rename(kept)
    write.drop_group_serial(path)
    strangers = sum(one.strangers for one in left.values())
    also = f"; {strangers} objects that were not the group's are left on its members" if strangers else ""
    return f"group {label} ({config.group.serial}) is deleted{also}; its journal is kept as {kept}"


def user_pins(config: GroupConfig, options: PinOptions) -> dict[str, Pin]:
    """The user PIN of every member: its own source, else the one given for all."""
    found: dict[str, Pin] = {}
    given: Pin | None = None
    for member in config.members:
        if member.pin is not None:
            found[member.name] = read_pin_stamped(member.pin)[0]
            continue
        if given is None:
            given = pins.read("user PIN", file=options[0], variable=options[1])
        found[member.name] = given
    return found


def stamped_pins(config: GroupConfig, options: PinOptions) -> dict[str, tuple[Pin, str, str]]:
    """PIN, source and stamp for every member."""
    given = user_pins(config, options)
    return {
        member.name: (given[member.name], APPLICATION, "")
        if member.pin is None
        else (given[member.name], pin_source_identity(member.pin), pin_source_stamp(member.pin))
        for member in config.members
    }


@contextmanager
def opened_journal(config: GroupConfig) -> Iterator[Journal]:
    """The journal alone: for what needs no member."""
    if config.group.serial is None:
        raise ConfigurationError(
            f"{config.path}: the group was not created yet; run `ha-admin --config {config.path} group create`"
        )
    journal = open_journal(config.journal, clock=SystemClock())
    try:
        bootstrap.check_serial(config, journal.group())
        yield journal
    finally:
        journal.close()


def group_facts(path: Path) -> dict[str, object]:
    """``group show``; fields are added, never renamed."""
    config = load(path)
    with opened_journal(config) as journal:
        group, members = journal.view()
    return {
        "label": group.label,
        "serial": group.serial,
        "min_replicas": config.group.min_replicas,
        "degraded": config.group.degraded,
        "ha_only": config.group.ha_only,
        "recovery_mode": config.group.recovery_mode,
        "journal": str(config.journal.url),
        "epoch": group.epoch,
        "domain_key": group.domain_key_id.hex(),
        "partition_key": group.partition_key_id.hex(),
        "members": [member.name for member in members],
    }


def status(path: Path) -> group_status.Status:
    config = load(path)
    try:
        with opened_journal(config) as journal:
            return group_status.gather(config, journal)
    except JournalUnavailable as error:
        return group_status.without_journal(config, str(error))


def _logged_in(path: Path, options: PinOptions) -> GroupEngine:
    """The group with every reachable member logged in; closes it again where that fails."""
    group = bootstrap.open_group(path, one_first=False)
    try:
        if any(member.config.pin is None for member in group.roster.members.values()):
            given = pins.read("user PIN", file=options[0], variable=options[1])
            group.access.login(given.reveal())
        group.supervisor.settle()
    except BaseException:
        group.close()
        raise
    return group


def sync(path: Path, *, pin: PinOptions) -> Synced:
    """Work off what every reachable member owes."""
    group = _logged_in(path, pin)
    try:
        before = {name: len(group.journal.owed(name)) for name in group.view.members}
        with going_down("changes brought up to date", lambda: group.journal.counts()["owed"]):
            group.supervisor.sync_now()
        leftovers.drop(group)
        members = []
        for name in group.view.members:
            owed = len(group.journal.owed(name))
            member = group.roster.members.get(name)
            state = "not configured here" if member is None else member.state.value
            reason = None if member is None or member.serving else member.journal_behind or member.reason
            members.append(SyncedMember(name, state, max(0, before[name] - owed), owed, reason))
        there = [member for member in group.roster.members.values() if member.state is State.IN_SERVICE]
        return Synced(
            members=members,
            reachable=bool(there),
            in_sync=len(there) == len(members) and all(member.owed == 0 for member in members),
        )
    finally:
        group.close()


def journal_behind(path: Path, *, pin: PinOptions) -> str | None:
    """Why the journal must decide nothing: some member has seen more than it knows; None: it is not behind."""
    group = _logged_in(path, pin)
    try:
        return group.roster.journal_behind()
    finally:
        group.close()


def repair(path: Path, wrong: Mapping[str, Mapping[bytes, OwedKind]], *, pin: PinOptions) -> dict[str, str]:
    """Owe members what differs there, and work it off. Returns who could not be repaired, and why."""
    group = _logged_in(path, pin)
    left = {}
    try:
        for name, found in wrong.items():
            member = group.roster.members.get(name)
            life = None if member is None else member.life
            if member is None or life is None:
                left[name] = "it does not answer now"
            elif not group.supervisor.repair(member, life, found):
                left[name] = member.journal_behind or "it, or its journal, is not whole now; see `ha-admin status`"
        with going_down("objects repaired", lambda: group.journal.counts()["owed"]):
            group.supervisor.sync_now()
        return left
    finally:
        group.close()


def recover(path: Path, *, pin: PinOptions) -> Synced:
    """Reach every member now (this process begins with that), and work off what those that answer owe."""
    return sync(path, pin=pin)


def group_objects(path: Path) -> list[ObjectLine]:
    """The group's objects, from the journal."""
    with opened_journal(load(path)) as journal:
        return [
            _line(record.object_class, record.key_type, record.attributes, f"{record.uid.hex()} {record.state.value}")
            for record in journal.objects()
        ]


def member_objects(path: Path, name: str, *, pin: PinOptions) -> list[ObjectLine]:
    """What one member's own token holds, read from it and from nothing else."""
    config = load(path)
    member = next((member for member in config.members if member.name == name), None)
    if member is None:
        known = ", ".join(member.name for member in config.members)
        raise ConfigurationError(f"{path} has no member {name!r}; its members are: {known}")
    timeout = config.timeouts.generate
    with opened_journal(config) as journal:
        serials = {record.name: record.serial for record in journal.members()}
        life = open_life(member, journal, generation=1, timeout=timeout, serial=serials.get(name))
        try:
            secret = user_pins(msgspec.structs.replace(config, members=(member,)), pin)[name]
            _log_in(journal, member, life, secret, timeout=timeout)
            entries = replica.inventory(life.connection, timeout=timeout)
        finally:
            life.connection.close()
    return [
        _line(
            entry.locator.object_class,
            entry.locator.key_type,
            {CKA.LABEL: entry.locator.label, CKA.ID: entry.locator.id},
            "hagroup's own" if entry.own else "not readable" if entry.ghost else "",
        )
        for entry in entries
    ]


def _log_in(journal: Journal, config: MemberConfig, life: Life, pin: Pin, *, timeout: float) -> None:
    """As programs do it: what was refused from a PIN source is not tried again (G10)."""
    member = Member(config, rank=(0, 0), standby=False)
    source, stamp = APPLICATION, ""
    if config.pin is not None:
        source, stamp = pin_source_identity(config.pin), pin_source_stamp(config.pin)
    log_in(journal, member, life, pin, source, stamp, automatic=config.pin is not None, timeout=timeout)


def _line(object_class: int, key_type: int | None, attributes: dict[int, bytes], note: str) -> ObjectLine:
    return ObjectLine(
        _name(CKO, object_class),
        None if key_type is None else _name(CKK, key_type),
        attributes.get(CKA.LABEL, b"").decode(errors="replace"),
        attributes.get(CKA.ID, b"").hex(),
        note,
    )


def _name(kind: Callable[[int], object], number: int) -> str:
    try:
        return str(getattr(kind(number), "name", number)).lower().replace("_", " ")
    except ValueError:
        return f"0x{number:x}"


__all__: Sequence[str] = ("GroupUnavailable", "create", "group_objects", "member_objects", "status", "sync")
