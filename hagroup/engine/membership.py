"""Members that come, rest and go while the group serves (DESIGN.md 4.6, 5).

Everything that can be refused is refused by :func:`preflight`, before anything is changed anywhere. A step that was
interrupted is completed by the same call again: what is there already is found, not made twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from hagroup.config import write
from hagroup.config.load import load
from hagroup.config.logging import get_logger
from hagroup.config.model import MemberConfig
from hagroup.config.pins import Pin
from hagroup.core.attributes import CKA
from hagroup.core.calls import Ckr, DeadlinePassed
from hagroup.core.records import MemberRecord, Membership, ObjectState, Role
from hagroup.engine import manifest, transport, unfinished
from hagroup.engine.challenge import DomainMember, challenge
from hagroup.engine.domain_keys import DomainKeys
from hagroup.engine.group import GroupEngine
from hagroup.engine.joining import drop, join_domain
from hagroup.engine.login import CKU_USER, PIN_ERRORS
from hagroup.engine.member import Life, Member
from hagroup.engine.opening import CONNECTION_LOST, open_life
from hagroup.engine.setup import NEEDED, default_extractable, held_keys, officer_of
from hagroup.engine.token_contents import inventory
from hagroup.errors import ConfigurationError, DomainMismatch, GroupUnavailable, HAError, MemberQuarantined
from hagroup.journal.api import Journal
from hagroup.members import ModuleProblem

log = get_logger(__name__)

NOT_CHANGED = "; nothing was changed"
BEING_REMOVED = "it is being removed: run the same `ha-admin member remove` again to complete it"
_ADMINISTRATION = 3600.0
JOIN_TIMEOUT = 600.0
"""Seconds that a member may take to be brought up to date; it goes on in the background of whoever runs after that."""


class Finding(msgspec.Struct, frozen=True):
    """One line of the pre-flight."""

    what: str
    text: str
    differs: bool = False
    """Not as on the other members: a person should know, and it is no reason to refuse."""


class Newcomer(msgspec.Struct, frozen=True):
    """A token that may join: connected, logged in, looked at."""

    config: MemberConfig
    life: Life
    keys: DomainKeys | None
    """The group's domain keys where it has them already."""
    default_extractable: bool
    findings: list[Finding]

    def side(self) -> DomainMember:
        return DomainMember(
            connection=self.life.connection, name=self.config.name, wrap_mechanism=self.config.wrap_mechanism
        )


@contextmanager
def alone(journal: Journal) -> Iterator[None]:
    """One administrator at a time for what takes several steps; a dead one's right ends at once.

    :raises GroupUnavailable: another one is at work.
    """
    lease = journal.acquire_lease("administration", ttl=_ADMINISTRATION)
    if lease is None:
        raise GroupUnavailable(
            f"another ha-admin is changing the group just now: try again when it is done{NOT_CHANGED}"
        )
    try:
        yield
    finally:
        journal.release_lease(lease)


# -- pre-flight ----------------------------------------------------------------------------------------------------


def sponsor(group: GroupEngine) -> tuple[Member, Life, DomainKeys]:
    """The member that speaks for the group.

    :raises GroupUnavailable: none serves.
    """
    for member in group.roster.serving():
        life = member.life
        if life is not None and life.keys is not None:
            return member, life, life.keys
    raise GroupUnavailable(f"no member of the group is in service and logged in to compare with{NOT_CHANGED}")


def connect_newcomer(journal: Journal, config: MemberConfig, pin: Pin, *, timeout: float) -> Life:
    """:raises GroupUnavailable, ConfigurationError: it cannot be reached, or refused its PIN (one attempt)."""
    try:
        life = open_life(config, journal, generation=1, timeout=timeout)
    except (Ckr, DeadlinePassed, ModuleProblem, HAError, *CONNECTION_LOST) as error:
        raise GroupUnavailable(f'member "{config.name}" cannot be used: {error}{NOT_CHANGED}') from error
    try:
        life.connection.login(CKU_USER, pin.reveal(), timeout=timeout)
    except Ckr as error:
        life.connection.kill()
        if error.rv in PIN_ERRORS:
            raise ConfigurationError(
                f'member "{config.name}" refused its user PIN ({error}); it was tried once{NOT_CHANGED}'
            ) from error
        raise GroupUnavailable(f'member "{config.name}": {error}{NOT_CHANGED}') from error
    except BaseException:
        life.connection.kill()
        raise
    life.logged_in = True
    return life


def preflight(group: GroupEngine, config: MemberConfig, life: Life) -> Newcomer:
    """Look at everything that could speak against a member, without changing anything anywhere.

    :raises DomainMismatch: it does not share both secrets (T 3.4.12, T 3.4.13); the text names the secret.
    :raises ConfigurationError: anything else that speaks against it.
    """
    timeout = group.config.timeouts.generate
    member, source, source_keys = sponsor(group)
    if group.view.group.rotation is not None and not group.view.group.rotation.finished:
        raise ConfigurationError(f"the domain's keys are being changed: complete `ha-admin domain rotate`{NOT_CHANGED}")
    _another_token(group, config, life)
    missing = [number for number in (*NEEDED, config.wrap_mechanism) if number not in life.mechanisms]
    if missing:
        names = ", ".join(f"0x{int(number):x}" for number in missing)
        raise ConfigurationError(
            f'member "{config.name}" lacks mechanisms that replication needs ({names}){NOT_CHANGED}'
        )
    side = DomainMember(connection=life.connection, name=config.name, wrap_mechanism=config.wrap_mechanism)
    keys = _own_keys(group, side, timeout=timeout)
    if keys is not None:
        speaker = DomainMember(
            connection=source.connection, name=member.name, wrap_mechanism=member.config.wrap_mechanism
        )
        _same_ids(config.name, keys, member.name, source_keys)
        try:
            challenge(speaker, source_keys, side, keys, timeout=timeout)
        except DomainMismatch as error:
            raise DomainMismatch(f"{error}{NOT_CHANGED}") from error
        found = manifest.read(life.connection, keys, timeout=timeout)
        if found is not None and found.group != group.serial:
            raise ConfigurationError(
                f'member "{config.name}" belongs to group {found.label} ({found.group}): remove it there first'
                f"{NOT_CHANGED}"
            )
    learnt = default_extractable(life, timeout=timeout)
    findings = [
        Finding("token", f"{life.token.label} ({life.token.serial}), {life.token.manufacturer} {life.token.model}"),
        Finding("PIN", "accepted"),
        Finding(
            "secrets",
            f'shares both with member "{member.name}" (challenged in both directions)'
            if keys is not None
            else f'has none yet: gets both from member "{member.name}", whose security officer is needed',
        ),
        *_compared(member, source, life, group.view.members[member.name].default_extractable, learnt),
        _space(group, life),
        *_strangers(life, timeout=timeout),
    ]
    return Newcomer(config, life, keys, learnt, findings)


def _another_token(group: GroupEngine, config: MemberConfig, life: Life) -> None:
    for record in group.view.members.values():
        if record.serial == life.token.serial and record.name != config.name:
            raise ConfigurationError(
                f'member "{config.name}" is the token of member "{record.name}" (serial number {record.serial}): give '
                f"it its own module, env or token_serial{NOT_CHANGED}"
            )


def _own_keys(group: GroupEngine, side: DomainMember, *, timeout: float) -> DomainKeys | None:
    """Its domain keys. Only a part of this group's own: what an interrupted joining left, as good as none."""
    found = []
    for keys in unfinished.whole_keys(side.connection, timeout=timeout).values():
        found += [name for _, name in keys]
    ours = (group.view.group.domain_key_id, group.view.group.partition_key_id)
    if len(found) == 1 and found[0] in ours:
        return None
    return held_keys(side, gone=_left_over(side, ours, timeout=timeout), timeout=timeout)


def _left_over(side: DomainMember, ours: tuple[bytes, bytes], *, timeout: float) -> set[bytes]:
    """Names of keys that were being made for another group when that was cut off."""
    pairs = unfinished.marked(side.connection, timeout=timeout).pairs
    return {name for pair in pairs - {ours} for name in pair}


def _same_ids(name: str, keys: DomainKeys, other: str, others: DomainKeys) -> None:
    differ = [
        what
        for what, same in (
            ("domain key", keys.domain_key_id == others.domain_key_id),
            ("partition secret", keys.partition_key_id == others.partition_key_id),
        )
        if not same
    ]
    if differ:
        raise DomainMismatch(
            f'member "{name}" does not share the domain of member "{other}": the {" and the ".join(differ)} '
            f"{'differs' if len(differ) == 1 else 'differ'} (it was made for another group){NOT_CHANGED}"
        )


def _compared(member: Member, source: Life, life: Life, extractable: bool, learnt: bool) -> list[Finding]:
    lacking = sorted(set(source.mechanisms) - set(life.mechanisms))
    found = [
        Finding("mechanisms", f'all {len(source.mechanisms)} that member "{member.name}" has')
        if not lacking
        else Finding(
            "mechanisms",
            f'{len(lacking)} of member "{member.name}"\'s are missing ('
            + ", ".join(f"0x{n:x}" for n in lacking)
            + "): "
            "calls with these go elsewhere, and the virtual slot lists them no more",
            differs=True,
        )
    ]
    for what, ours, theirs in (
        ("EXTRACTABLE of keys made without it", extractable, learnt),
        ("shortest PIN", source.token.min_pin_len, life.token.min_pin_len),
        ("longest PIN", source.token.max_pin_len, life.token.max_pin_len),
        ("firmware", source.token.firmware_version, life.token.firmware_version),
        ("model", source.token.model, life.token.model),
    ):
        if ours != theirs:
            text = f'{what}: {_shown(theirs)}, on member "{member.name}" {_shown(ours)}'
            found.append(Finding("policy", text, differs=True))
    if len(found) == 1:
        found.append(Finding("policies", f'as on member "{member.name}"'))
    return found


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ".".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _space(group: GroupEngine, life: Life) -> Finding:
    objects = group.journal.counts()["live"]
    free = life.token.free_private_memory
    if free is None:
        return Finding("space", f"the token does not tell; {objects} objects have to fit")
    return Finding("space", f"{free} bytes free for {objects} objects")


def _strangers(life: Life, *, timeout: float) -> list[Finding]:
    there = [entry for entry in inventory(life.connection, timeout=timeout) if not entry.own and not entry.ghost]
    if not there:
        return []
    text = f"{len(there)} objects are on it already: they stay there; `ha-admin sync --adopt` can take them over"
    return [Finding("objects", text, differs=True)]


# -- coming ----------------------------------------------------------------------------------------------------------


def join(group: GroupEngine, newcomer: Newcomer, so_pin: Pin | None) -> None:
    """Give it both secrets where it has none, write it into hagroup.toml, and list it in the journal as joining.

    :param so_pin: of the member that speaks for the group; needed where the newcomer has no domain keys.
    """
    timeout = group.config.timeouts.generate
    config = newcomer.config
    member, source, source_keys = sponsor(group)
    given: DomainKeys | None = None
    ours = (source_keys.domain_key_id, source_keys.partition_key_id)
    gone = _left_over(newcomer.side(), ours, timeout=timeout)
    unfinished.clear(newcomer.life.connection, gone, timeout=timeout)
    if newcomer.keys is None:
        if so_pin is None:
            raise ConfigurationError(f'the SO PIN of member "{member.name}" is needed{NOT_CHANGED}')
        speaker = DomainMember(
            connection=source.connection, name=member.name, wrap_mechanism=member.config.wrap_mechanism
        )
        officer = officer_of(member.config, source, so_pin, journal=group.journal, timeout=timeout)
        try:
            given = join_domain(speaker, source_keys, officer.connection, newcomer.side(), timeout=timeout)
        finally:
            officer.connection.close()
    try:
        if not any(there.name == config.name for there in load(group.config.path).members):
            write.append_member(group.config.path, config)
    except BaseException:
        if given is not None:
            drop(newcomer.life.connection, [given.domain, given.partition], timeout=timeout)
        raise
    if config.name not in {record.name for record in group.journal.members()}:
        serial, keys = newcomer.life.token.serial, given or newcomer.keys
        assert keys is not None
        pair = transport.own_public(newcomer.life.connection, keys, serial, timeout=timeout)
        group.journal.add_member(
            MemberRecord(
                name=config.name,
                serial=serial,
                role=config.role,
                membership=Membership.JOINING,
                default_extractable=newcomer.default_extractable,
                transport=pair,
            )
        )
        group.journal.event("member added", f"as {config.role.value}, joining", member=config.name)
    log.info("member.listed", member=config.name)


def bring_in(group: GroupEngine, name: str, *, timeout: float = JOIN_TIMEOUT) -> None:
    """Return when the journal admits the member: by this process's work, or by that of another one that was first.

    :raises MemberQuarantined: it needs a person. :raises GroupUnavailable: it does not come.
    """
    deadline = time.monotonic() + timeout
    failures = 0
    while True:
        group.follow()
        record = group.view.members.get(name)
        if record is None:
            raise ConfigurationError(f'member "{name}" was removed meanwhile')
        if record.membership is Membership.ADMITTED:
            group.supervisor.keeper.keep()
            return
        if record.membership is Membership.QUARANTINED:
            raise MemberQuarantined(f'member "{name}" is quarantined: {record.reason}')
        group.supervisor.settle()
        group.supervisor.sync_now()
        member = group.roster.members.get(name)
        if member is None or member.life is None:
            failures += 1
        if time.monotonic() > deadline or failures > _PATIENCE:
            why = None if member is None else member.reason
            raise GroupUnavailable(
                f'member "{name}" is listed as {record.membership.value} but could not be brought up to date'
                f"{f' ({why})' if why else ''}; run the same command again to complete it"
            )
        group.roster.wait_for_change(0.2, lambda: _admitted(group, name))


_PATIENCE = 20


def _admitted(group: GroupEngine, name: str) -> bool:
    group.view.refresh()
    record = group.view.members.get(name)
    return record is not None and record.membership is Membership.ADMITTED


# -- resting, and coming back ------------------------------------------------------------------------------------------


def listed(group: GroupEngine, name: str) -> MemberRecord:
    """:raises ConfigurationError: there is none of that name."""
    group.follow()
    record = group.view.members.get(name)
    if record is None:
        raise _unknown(name, group.view.members)
    return record


def others_serve(group: GroupEngine, name: str) -> bool:
    """Whether a member other than this one could serve: admitted, not draining, not a backup, and here now."""
    return any(
        member.name != name and member.life is not None and member.life.keys is not None
        for member in group.roster.serving()
    )


def drain(group: GroupEngine, name: str) -> None:
    """No process begins a call there any more; calls in progress come to their end, and it is kept up to date."""
    record = listed(group, name)
    if not others_serve(group, name):
        raise ConfigurationError(f'no other member than "{name}" serves now: the group would stand still{NOT_CHANGED}')
    if not record.draining:
        group.journal.update_member(name, draining=True)
        group.journal.event("member draining", "taken out of service by an administrator", member=name)


def release(journal: Journal, name: str) -> str:
    """A person says that a member is right again: from draining or quarantine back, refused logins forgotten. Needs no
    PIN; returns what follows."""
    records = {record.name: record for record in journal.members()}
    if name not in records:
        raise _unknown(name, records)
    record = records[name]
    journal.forget_login(name)
    if record.membership is not Membership.QUARANTINED and not record.draining:
        return f"member {name} was not out of use; its PIN will be tried again"
    # It may have missed anything: the next client compares everything on its token before it serves.
    again = Membership.OUT_OF_SYNC if record.membership is Membership.QUARANTINED else None
    journal.update_member(name, membership=again, draining=False, reason="resumed by a person")
    was = f"quarantined: {record.reason}" if again else "draining"
    journal.event("member resumed", f"a person says that it is right again; it was {was}", member=name)
    if again is None:
        return f"member {name} serves again"
    return f"member {name} is brought up to date by the next program that runs, or by `ha-admin sync`"


def set_role(journal: Journal, path: Path, name: str, role: Role) -> bool:
    """In the journal (what counts) and in hagroup.toml (what people read). False: it had it already."""
    records = {record.name: record for record in journal.members()}
    if name not in records:
        raise _unknown(name, records)
    record = records[name]
    if role is not Role.ACTIVE and not any(
        other.name != name and other.role is Role.ACTIVE and other.membership is Membership.ADMITTED
        for other in records.values()
    ):
        raise ConfigurationError(f'no other member than "{name}" is active{NOT_CHANGED}')
    config = load(path)
    holders = sum(member.name != name and member.role is not Role.BACKUP for member in config.members)
    if role is Role.BACKUP and holders < config.group.min_replicas:
        raise ConfigurationError(
            f"[group] min_replicas is {config.group.min_replicas}, and {holders} members that are no backups would be "
            f"left{NOT_CHANGED}"
        )
    if record.role is not role:
        journal.update_member(name, role=role)
        journal.event("member role", f"{record.role.value} to {role.value}", member=name)
    written = next((member for member in load(path).members if member.name == name), None)
    if written is not None and written.role is not role:
        write.set_member_role(path, name, role)
    return record.role is not role


def _unknown(name: str, members: Iterable[str]) -> ConfigurationError:
    return ConfigurationError(f"the group has no member {name!r}; its members are: {', '.join(members)}")


def only_there(journal: Journal, name: str) -> list[str]:
    """Labels of live objects that no other member has in their current revision; one that is just being removed, and
    may be half empty, does not count."""
    others = {record.name for record in journal.members() if record.reason != BEING_REMOVED} - {name}
    alone = []
    for record in journal.objects():
        if record.state is not ObjectState.LIVE:
            continue
        copies, owed = journal.placement(record.uid)
        if not any(
            other in others and copy.revision == record.revision and other not in owed for other, copy in copies.items()
        ):
            alone.append(record.attributes.get(CKA.LABEL, b"").decode(errors="replace") or record.uid.hex())
    return alone
