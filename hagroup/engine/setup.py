"""Creating a group (DESIGN.md 5): the cloning domain on every member, the journal, the manifests.

Everything that can be refused is refused before anything is changed; what fails in the middle is taken back.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import msgspec

from hagroup.config.load import load
from hagroup.config.logging import get_logger
from hagroup.config.model import GroupConfig, MemberConfig, SqliteUrl
from hagroup.config.pins import Pin
from hagroup.config.write import refuse_present, set_group_serial, write_new
from hagroup.core.attributes import CKA, CKM, CKO, pack_bool, pack_ulong, unpack_bool
from hagroup.core.calls import Ckr, DeadlinePassed, Template
from hagroup.core.clock import Clock
from hagroup.core.records import GroupRecord, MemberRecord, Membership
from hagroup.engine import configuration, ghosts, manifest, transport, unfinished
from hagroup.engine.challenge import DomainMember, challenge, reference_envelope
from hagroup.engine.domain_keys import DOMAIN_LABEL, PARTITION_LABEL, DomainKeys, is_sealed
from hagroup.engine.joining import drop, generate_domain, join_domain
from hagroup.engine.login import CKU_SO, CKU_USER, PIN_ERRORS
from hagroup.engine.member import Life
from hagroup.engine.one_step import one_step
from hagroup.engine.opening import CONNECTION_LOST, open_life
from hagroup.engine.shares import random_secrets
from hagroup.engine.token_contents import inventory
from hagroup.errors import (
    ConfigurationError,
    DomainMismatch,
    GroupUnavailable,
    HAError,
    JournalMismatch,
    JournalUnavailable,
)
from hagroup.journal import Journal, create_journal, open_journal
from hagroup.members import ModuleProblem

log = get_logger(__name__)

NEEDED = (CKM.AES_KEY_GEN, CKM.AES_GCM, CKM.RSA_PKCS_KEY_PAIR_GEN, CKM.RSA_PKCS_OAEP, CKM.SHA256)
"""Mechanisms without which a member cannot take part; its wrap mechanism comes on top."""


def create_group(
    config: GroupConfig,
    pins: Mapping[str, Pin],
    so_pin: Pin,
    *,
    sealed: bool,
    clock: Clock,
    existing: Callable[[Mapping[str, int]], None] = lambda found: None,
    new: bool = False,
) -> str:
    """Make the group. Returns its serial number, which was also written into the configuration.

    :param pins: user PIN of each member.
    :param so_pin: SO PIN of the member that speaks for the others: the first, or the first with keys of a domain.
    :param existing: is told how many objects members hold already, where some do, before anything is changed.
    :param new: the configuration's file is not there yet: it is written when all else is done.
    :raises ConfigurationError: a member cannot take part; nothing was changed.
    :raises DomainMismatch: members belong to different cloning domains already; nothing was changed.
    """
    timeout = config.timeouts.generate
    with _alone(config, new=new), _opened(config, pins, timeout=timeout) as lives:
        keys, left = _held(config, lives, timeout=timeout)
        serials = {name: life.token.serial for name, life in lives.items()}
        begun = unfinished.begun(config, serials, keys, clock=clock)
        if begun is None:
            _refuse_journal(config)
        else:
            begun.close()
        if sealed:
            _expect_sealed(lives, keys, timeout=timeout)
        if found := _objects_already(lives, timeout=timeout):
            existing(found)
        _officer_agrees(config, lives, keys, so_pin, timeout=timeout)
        _clear(lives, left, timeout=timeout)
        if begun is not None:
            return _complete(config, lives, keys, clock, timeout=timeout, new=new)
        made: dict[str, DomainKeys] = {}
        try:
            _domain(config, lives, keys, made, so_pin, sealed=sealed, timeout=timeout)
            _make_journal(config, lives, keys | made, clock, timeout=timeout)
        except BaseException:
            if not _there_is_a_journal(config, clock):
                _take_back(lives, made, timeout=timeout)
            raise
        return _complete(config, lives, keys | made, clock, timeout=timeout, new=new)


@contextmanager
def _alone(config: GroupConfig, *, new: bool = False) -> Iterator[None]:
    """One at a time makes a group of these members: who fails takes back what is there, also another one's.

    :raises GroupUnavailable: another one is making it. :raises ConfigurationError: it was made meanwhile.
    """
    folder = os.open(config.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if new:
            refuse_present(config.path)
        elif load(config.path).group.serial is not None:
            raise ConfigurationError(f"{config.path}: this group was created meanwhile; `ha-admin status` shows it")
        yield
    except BlockingIOError:
        raise GroupUnavailable(
            f"another ha-admin is making the group of {config.path} just now; nothing was changed"
        ) from None
    finally:
        os.close(folder)


def create_domain(
    config: GroupConfig,
    pins: Mapping[str, Pin],
    so_pin: Pin,
    *,
    sealed: bool,
    hand_out: Callable[[tuple[bytes, bytes]], None] | None,
    take_back: Callable[[], None] = lambda: None,
) -> None:
    """Make the domain's keys on every member of a group that is still to be created.

    :param pins: user PIN of each member.
    :param so_pin: SO PIN of the first member.
    :param hand_out: gives shares of both secrets to people before anything is made; None: there are no shares, and the
        keys are never outside of a member.
    :param take_back: what was handed out, where the keys could not be made.
    :raises ConfigurationError: a member cannot take part, holds keys already, or its security officer does not agree;
        nothing was changed.
    """
    timeout = config.timeouts.generate
    with _alone(config), _opened(config, pins, timeout=timeout) as lives:
        _refuse_journal(config)
        held, left = _held(config, lives, timeout=timeout)
        if sealed:
            _expect_sealed(lives, held, timeout=timeout)
        if len(held) == len(lives) and left and hand_out is None:  # made, but for the marks
            _officer_agrees(config, lives, held, so_pin, timeout=timeout)
            _clear(lives, left, timeout=timeout)
            return
        if held:
            names = ", ".join(held)
            shared = (
                "" if hand_out is None else " (shares of them: `ha-admin domain shares`, once the group is created)"
            )
            raise ConfigurationError(f"keys of a domain are there already, on {names}; nothing was changed{shared}")
        _officer_agrees(config, lives, held, so_pin, timeout=timeout)
        _clear(lives, left, timeout=timeout)
        secret, made = None, False
        try:
            if hand_out is not None:
                secret = random_secrets(lives[config.members[0].name].connection, timeout=timeout)
                hand_out(secret)
            with one_step():
                if sealed:
                    _drop_pairs(lives, timeout=timeout)
                generate_domain(_sides(config, lives), sealed=sealed, timeout=timeout, secrets=secret)
                made = True
        except BaseException:
            if not made and not _came_to_be(config, lives, timeout=timeout):
                take_back()
            raise


def _expect_sealed(lives: Mapping[str, Life], held: Mapping[str, DomainKeys], *, timeout: float) -> None:
    """:raises ConfigurationError: the keys that are there can leave a member; nothing was changed."""
    for name, keys in held.items():
        if not is_sealed(lives[name].connection, keys, timeout=timeout):
            raise ConfigurationError(
                f'keys of a domain are there already, and they can leave member "{name}": create the group without '
                "--sealed, then `ha-admin domain rotate --sealed`; nothing was changed"
            )


def _came_to_be(config: GroupConfig, lives: Mapping[str, Life], *, timeout: float) -> bool:
    """Whether members have keys of a domain now, or may have."""
    try:
        return bool(_held(config, lives, timeout=timeout)[0])
    except (Ckr, DeadlinePassed, HAError, *CONNECTION_LOST):
        return True


@contextmanager
def _opened(config: GroupConfig, pins: Mapping[str, Pin], *, timeout: float) -> Iterator[dict[str, Life]]:
    """Every member with its user logged in, looked at for what speaks against it."""
    lives: dict[str, Life] = {}
    try:
        _open_all(config, pins, lives, timeout=timeout)
        _check(config, lives, timeout=timeout)
        yield lives
    finally:
        for life in lives.values():
            life.connection.close()


def _open_all(config: GroupConfig, pins: Mapping[str, Pin], lives: dict[str, Life], *, timeout: float) -> None:
    def start(member: MemberConfig) -> Life:
        try:
            return open_life(member, None, generation=1, timeout=timeout)
        except ModuleProblem as error:
            raise ConfigurationError(f"{config.path}: {error}; nothing was changed") from error
        except (Ckr, DeadlinePassed, HAError, *CONNECTION_LOST) as error:
            raise GroupUnavailable(f'member "{member.name}" cannot be used: {error}; nothing was changed') from error

    with ThreadPoolExecutor(max_workers=8) as pool:
        started = {member.name: pool.submit(start, member) for member in config.members}
    errors = [future.exception() for future in started.values() if future.exception() is not None]
    lives.update({name: future.result() for name, future in started.items() if future.exception() is None})
    for error in errors:
        assert error is not None
        raise error
    for member in config.members:  # one after the other: a wrong PIN must not be tried on a second member
        try:
            lives[member.name].connection.login(CKU_USER, pins[member.name].reveal(), timeout=timeout)
        except Ckr as error:
            if error.rv in PIN_ERRORS:
                raise ConfigurationError(
                    f'member "{member.name}" refused its user PIN ({error}); no other member was tried after it and '
                    "nothing was changed"
                ) from error
            raise GroupUnavailable(f'member "{member.name}": {error}; nothing was changed') from error
        lives[member.name].logged_in = True


def _check(config: GroupConfig, lives: Mapping[str, Life], *, timeout: float) -> None:
    serials: dict[str, str] = {}
    for member in config.members:
        life = lives[member.name]
        other = serials.setdefault(life.token.serial, member.name)
        if other != member.name:
            raise ConfigurationError(
                f'{config.path}: members "{other}" and "{member.name}" are one token (serial number '
                f"{life.token.serial}); give each its own module, env or token_serial; nothing was changed"
            )
        missing = [name for name in (*NEEDED, member.wrap_mechanism) if name not in life.mechanisms]
        if missing:
            names = ", ".join(f"0x{int(number):x}" for number in missing)
            raise ConfigurationError(
                f'member "{member.name}" lacks mechanisms that replication needs ({names}); nothing was changed'
            )


def _refuse_journal(config: GroupConfig) -> None:
    if isinstance(config.journal.url, SqliteUrl) and config.journal.url.path.exists():
        raise ConfigurationError(
            f"{config.path}: the journal {config.journal.url.path} exists already; it belongs to a group; name another "
            "file in [journal] url, or remove it if that group is gone for good; nothing was changed"
        )


def held_keys(member: DomainMember, *, gone: Collection[bytes] = (), timeout: float) -> DomainKeys | None:
    """The keys of a domain that the member belongs to already; None: of none.

    :param gone: names of keys that belong to no domain.
    """
    there = unfinished.whole_keys(member.connection, timeout=timeout)
    found = {label: [key for key in keys if key[1] not in gone] for label, keys in there.items()}
    counts = [len(keys) for keys in found.values()]
    if counts == [0, 0]:
        return None
    if counts != [1, 1]:
        raise DomainMismatch(
            f'member "{member.name}" holds {counts[0]} domain keys and {counts[1]} partition keys instead of one each '
            "(a group was not removed whole); destroy them with the member's own tools; nothing was changed"
        )
    (domain_key, domain_id), (partition_key, partition_id) = found[DOMAIN_LABEL][0], found[PARTITION_LABEL][0]
    return DomainKeys(
        domain=domain_key,
        partition=partition_key,
        domain_key_id=domain_id,
        partition_key_id=partition_id,
        wrap_mechanism=member.wrap_mechanism,
    )


def _sides(config: GroupConfig, lives: Mapping[str, Life]) -> list[DomainMember]:
    return [
        DomainMember(connection=lives[member.name].connection, name=member.name, wrap_mechanism=member.wrap_mechanism)
        for member in config.members
    ]


def _held(
    config: GroupConfig, lives: Mapping[str, Life], *, timeout: float
) -> tuple[dict[str, DomainKeys], dict[str, set[bytes]]]:
    """The members that hold the keys of a domain already; that it is one and the same is proved. And, for members with
    something that an attempt before left, the names of keys there that have to go.

    :raises DomainMismatch: it is not.
    """
    members = _sides(config, lives)
    found = {member.name: unfinished.whole_keys(member.connection, timeout=timeout) for member in members}
    names = {name: [{key[1] for key in keys} for keys in found[name].values()] for name in found}
    pairs = {(*first, *second) for first, second in names.values() if len(first) == len(second) == 1}
    everywhere = {ids for ids in pairs if all(mine == [{ids[0]}, {ids[1]}] for mine in names.values())}
    present, left = {}, {}
    for member in members:
        marked = unfinished.marked(member.connection, timeout=timeout)
        gone = {name for ids in marked.pairs - everywhere for name in ids}
        keys = held_keys(member, gone=gone, timeout=timeout)
        if keys is not None:
            present[member.name] = keys
        there = unfinished.keys_of_domains(member.connection, timeout=timeout)
        if marked.any or there != found[member.name]:
            left[member.name] = gone
    holders = [member for member in members if member.name in present]
    for other in holders[1:]:
        try:
            challenge(holders[0], present[holders[0].name], other, present[other.name], timeout=timeout)
        except DomainMismatch as error:
            raise DomainMismatch(f"{error}; nothing was changed") from error
    return present, left


def _clear(lives: Mapping[str, Life], left: Mapping[str, set[bytes]], *, timeout: float) -> None:
    """What an attempt before left goes."""
    for name, gone in left.items():
        unfinished.clear(lives[name].connection, gone, timeout=timeout)


def _drop_pairs(lives: Mapping[str, Life], *, timeout: float) -> None:
    """Transport keys that an earlier attempt left. What they unwrap could leave a member again: for a sealed domain
    each gets new ones."""
    for life in lives.values():
        drop(life.connection, transport.own(life.connection, timeout=timeout), timeout=timeout)


def _take_back(lives: Mapping[str, Life], made: Mapping[str, DomainKeys], *, timeout: float) -> None:
    """Nothing of a group that could not be made stays on members that held nothing before. Where one of them does not
    answer all keep what they have: the same command completes it, and could not if the keys were on one member only.
    """
    try:
        for name in made:
            lives[name].connection.probe(timeout=timeout)
        for name, keys in made.items():
            connection = lives[name].connection
            for handle in (*transport.own(connection, timeout=timeout), keys.domain, keys.partition):
                connection.destroy(handle, timeout=timeout)
    except (Ckr, DeadlinePassed, *CONNECTION_LOST) as error:
        log.warning("group.left-unfinished", reason=str(error))


def _domain(
    config: GroupConfig,
    lives: Mapping[str, Life],
    held: Mapping[str, DomainKeys],
    made: dict[str, DomainKeys],
    so_pin: Pin,
    *,
    sealed: bool,
    timeout: float,
) -> None:
    """The same two keys on every member: those that members hold already, or new ones, which go into ``made``."""
    members = _sides(config, lives)
    if not held:
        if sealed:
            _drop_pairs(lives, timeout=timeout)
        keys = generate_domain(members, sealed=sealed, timeout=timeout)
        made.update({member.name: one for member, one in zip(members, keys, strict=True)})
        return
    holders = [member for member in members if member.name in held]
    newcomers = [member for member in members if member.name not in held]
    if newcomers:
        first = next(member for member in config.members if member.name == holders[0].name)
        officer = officer_of(first, lives[first.name], so_pin, timeout=timeout)
        ids = (held[first.name].domain_key_id, held[first.name].partition_key_id)
        try:
            for member in newcomers:
                with unfinished.marked_while(member.connection, ids, timeout=timeout):
                    made[member.name] = join_domain(
                        holders[0], held[first.name], officer.connection, member, timeout=timeout
                    )
        finally:
            officer.connection.close()


def officer_of(
    member: MemberConfig, life: Life, so_pin: Pin, *, journal: Journal | None = None, timeout: float
) -> Life:
    """The SO of the member that speaks for the others: in a module instance of its own (the user is logged in).

    :param journal: None while there is no group yet.
    """
    officer = open_life(member, journal, generation=1, timeout=timeout, serial=life.token.serial)
    try:
        officer.connection.login(CKU_SO, so_pin.reveal(), timeout=timeout)
    except Ckr as error:
        officer.connection.kill()
        raise ConfigurationError(f'member "{member.name}" refused the SO PIN ({error}); nothing was changed') from error
    except BaseException:
        officer.connection.kill()
        raise
    return officer


def _objects_already(lives: Mapping[str, Life], *, timeout: float) -> dict[str, int]:
    """How many objects that are nobody's group's each member holds, where it holds some."""
    counts = {
        name: sum(not entry.own and not entry.ghost for entry in inventory(life.connection, timeout=timeout))
        for name, life in lives.items()
    }
    return {name: count for name, count in counts.items() if count}


def _officer_agrees(
    config: GroupConfig, lives: Mapping[str, Life], held: Mapping[str, DomainKeys], so_pin: Pin, *, timeout: float
) -> None:
    """A domain takes two people, also where no step needs what only the security officer may do: he logs in once.

    :raises ConfigurationError: he does not; nothing was changed.
    """
    speaker = next((member for member in config.members if member.name in held), config.members[0])
    officer_of(speaker, lives[speaker.name], so_pin, timeout=timeout).connection.close()


def _there_is_a_journal(config: GroupConfig, clock: Clock) -> bool:
    """Whether making it got as far as that, or may have: then the same command goes on from there."""
    try:
        open_journal(config.journal, clock=clock).close()
    except JournalUnavailable:
        return False
    except JournalMismatch:
        return True  # whosever it is
    return True


def _make_journal(
    config: GroupConfig, lives: Mapping[str, Life], keys: Mapping[str, DomainKeys], clock: Clock, *, timeout: float
) -> None:
    serial = f"{secrets.randbelow(90_000_000) + 10_000_000}"
    first = config.members[0]
    reference = reference_envelope(lives[first.name].connection, keys[first.name], timeout=timeout)
    members = [
        MemberRecord(
            name=member.name,
            serial=lives[member.name].token.serial,
            role=member.role,
            membership=Membership.ADMITTED,
            since=clock.wall(),
            default_extractable=default_extractable(lives[member.name], timeout=timeout),
            transport=transport.own_public(
                lives[member.name].connection,
                keys[member.name],
                lives[member.name].token.serial,
                timeout=timeout,
            ),
        )
        for member in config.members
    ]
    create_journal(
        config.journal,
        label=config.group.label,
        serial=serial,
        members=members,
        domain_key_id=keys[first.name].domain_key_id,
        partition_key_id=keys[first.name].partition_key_id,
        reference=reference,
        clock=clock,
    )


def _complete(
    config: GroupConfig,
    lives: Mapping[str, Life],
    keys: Mapping[str, DomainKeys],
    clock: Clock,
    *,
    timeout: float,
    new: bool,
) -> str:
    """The group of which there is a journal is shown on its members, and named in the file. May be done twice."""
    journal = open_journal(config.journal, clock=clock)
    try:
        group, listed = journal.view()
        by_name = {member.name: member for member in listed}
        for member in config.members:
            shown = manifest.compose(group, by_name, low=0, high=0)
            manifest.write(lives[member.name].connection, keys[member.name], shown, timeout=timeout)
            # of an attempt that was cut off inside a write: there was no journal yet to tell
            ghosts.sweep(lives[member.name].connection, journal, member.name, timeout=timeout)
        _show(config, group, by_name, lives, keys, timeout=timeout)
        if not journal.events(limit=1):
            journal.event(unfinished.CREATED, f"with members {', '.join(by_name)}")
    finally:
        journal.close()
    if new:
        write_new(_with_serial(config, group.serial), mode=0o600)
    else:
        set_group_serial(config.path, group.serial)
    return group.serial


def _with_serial(config: GroupConfig, serial: str) -> GroupConfig:
    return msgspec.structs.replace(config, group=msgspec.structs.replace(config.group, serial=serial))


def _show(
    config: GroupConfig,
    group: GroupRecord,
    members: Mapping[str, MemberRecord],
    lives: Mapping[str, Life],
    keys: Mapping[str, DomainKeys],
    *,
    timeout: float,
) -> None:
    """How the group is reached, on each member. One that has no room for it is a member like any other."""
    shown = configuration.compose(_with_serial(config, group.serial), group, members)
    for member in config.members:
        try:
            configuration.write(lives[member.name].connection, keys[member.name], shown, timeout=timeout)
        except Ckr as error:
            log.warning("member.configuration-not-kept", member=member.name, reason=str(error))


def default_extractable(life: Life, *, timeout: float) -> bool:
    """EXTRACTABLE of a key for which the template says nothing: the member's default, learnt with a session key."""
    template: Template = [
        (CKA.CLASS, pack_ulong(CKO.SECRET_KEY)),
        (CKA.TOKEN, pack_bool(False)),
        (CKA.PRIVATE, pack_bool(True)),
        (CKA.VALUE_LEN, pack_ulong(16)),
    ]
    sid = life.connection.open_session(timeout=timeout)
    try:
        handle = life.connection.generate((CKM.AES_KEY_GEN, None), template, sid=sid, timeout=timeout)
        values, _ = life.connection.get(handle, [CKA.EXTRACTABLE], sid=sid, timeout=timeout)
    finally:
        life.connection.close_session(sid, timeout=timeout)
    return unpack_bool(values.get(CKA.EXTRACTABLE, b"\0"))
