"""``ha-admin member …``: members that come, rest and go while applications run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from hagroup import bootstrap
from hagroup.admin import commands, pins
from hagroup.admin.options import (
    DEGRADED,
    USAGE,
    Json,
    PinEnv,
    PinFile,
    SoPinEnv,
    SoPinFile,
    Yes,
    chosen_config,
    confirm,
    fail,
    group_pin,
    print_json,
    say,
)
from hagroup.admin.show import table
from hagroup.config import write
from hagroup.config.load import load
from hagroup.config.members import absolute_env_value
from hagroup.config.model import AES_KEY_WRAP_PAD, Isolation, MemberConfig, PinSource, is_softhsm
from hagroup.config.pins import Pin, pin_source_identity, read_pin_stamped
from hagroup.core.records import Role
from hagroup.engine import leaving, membership
from hagroup.engine.group import GroupEngine
from hagroup.engine.login import APPLICATION
from hagroup.engine.one_step import one_step
from hagroup.errors import ConfigurationError

member_app = typer.Typer(help="Members: show, add, take out of service and back, remove.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="the member's name in hagroup.toml")]
GroupPinFile = Annotated[
    Path | None,
    typer.Option("--group-pin-file", readable=False, help="file with the user PIN of members without a `pin` source"),
]
GroupPinEnv = Annotated[
    str | None, typer.Option("--group-pin-env", help="variable with the user PIN of members without a `pin` source")
]


@contextmanager
def opened(options: tuple[Path | None, str | None]) -> Iterator[GroupEngine]:
    """The group with every reachable member connected and logged in."""
    group = bootstrap.open_group(chosen_config(), one_first=False)
    try:
        given = group_pin(group, options)
        if given is not None:
            group.access.login(given.reveal())
        group.supervisor.settle()
        yield group
    finally:
        group.close()


class ListedMember(msgspec.Struct, frozen=True):
    """One line of ``member list``."""

    name: str
    serial: str
    role: str
    membership: str
    draining: bool
    site: str | None
    priority: int
    module: str
    pin: str
    """Where its PIN comes from."""
    reason: str | None


@member_app.command("list")
def member_list(as_json: Json = False) -> None:
    """List the members as the journal and hagroup.toml have them. Asks no member; `status` does."""
    path = chosen_config()
    config = load(path)
    with commands.opened_journal(config) as journal:
        records = journal.members()
    configured = {member.name: member for member in config.members}
    found = []
    for record in records:
        member = configured.get(record.name)
        found.append(
            ListedMember(
                name=record.name,
                serial=record.serial,
                role=record.role.value,
                membership=record.membership.value,
                draining=record.draining,
                site=member.site if member else None,
                priority=member.priority if member else 0,
                module=str(member.module) if member else "not in hagroup.toml of this host",
                pin=pin_source_identity(member.pin) if member and member.pin else APPLICATION,
                reason=record.reason,
            )
        )
    if as_json:
        print_json(found)
        return
    lines = [
        (
            one.name,
            one.serial,
            one.role,
            "draining" if one.draining and one.membership == "admitted" else one.membership,
            one.site or "",
            one.module,
            one.pin,
        )
        for one in found
    ]
    table(("member", "serial", "role", "membership", "site", "module", "PIN from"), lines, under=("module", "PIN from"))


def environment(settings: list[str]) -> dict[str, str]:
    """As hagroup.toml would have them: what looks like a relative path is relative to that file.

    :raises ConfigurationError: one of them is no NAME=VALUE.
    """
    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ConfigurationError(f"env {setting}: write NAME=VALUE; nothing was changed")
        found[name] = absolute_env_value(value, chosen_config().absolute().parent)
    return found


@member_app.command("add")
def member_add(
    name: Name,
    module: Annotated[Path, typer.Option("--module", metavar="FILE", help="the vendor's PKCS#11 module")],
    token_serial: Annotated[str | None, typer.Option("--token-serial", help="serial number of its token")] = None,
    token_label: Annotated[str | None, typer.Option("--token-label", help="label of its token, instead")] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="NAME=VALUE", help="environment of its module")
    ] = None,
    role: Annotated[Role, typer.Option("--role", help="active | standby | backup")] = Role.ACTIVE,
    site: Annotated[str | None, typer.Option("--site", help="data centre")] = None,
    priority: Annotated[int, typer.Option("--priority", help="lower first")] = 0,
    isolation: Annotated[str, typer.Option("--isolation", help="process | none")] = "process",
    wrap_mechanism: Annotated[
        str | None, typer.Option("--wrap-mechanism", help="the module's number for RFC 5649")
    ] = None,
    pin_file: Annotated[
        Path | None, typer.Option("--pin-file", readable=False, help="file with its user PIN; becomes its `pin` source")
    ] = None,
    pin_env: Annotated[
        str | None, typer.Option("--pin-env", help="variable with its user PIN; becomes its `pin` source")
    ] = None,
    group_pin_file: GroupPinFile = None,
    group_pin_env: GroupPinEnv = None,
    so_pin_file: SoPinFile = None,
    so_pin_env: SoPinEnv = None,
    yes: Yes = False,
) -> None:
    """Add a member while applications run; they use it without a restart.

    First everything that could speak against it is looked at and shown; nothing is changed before that. A token without
    the group's two secrets gets them from a member that has them, which takes that member's security officer (SO PIN).
    """
    if (token_serial is None) == (token_label is None):
        fail("give --token-serial or --token-label", USAGE)
    if pin_file is not None and pin_env is not None:
        fail("the member's PIN comes from a file or from a variable, not from both", USAGE)
    if isolation not in ("process", "none"):
        fail("--isolation is process or none", USAGE)
    kind: Isolation = "none" if isolation == "none" else "process"
    source = None
    if pin_file is not None or pin_env is not None:
        source = PinSource(file=pin_file.absolute() if pin_file else None, env=pin_env)
    config = MemberConfig(
        name=name,
        module=module.absolute(),
        token_serial=token_serial,
        token_label=token_label,
        role=role,
        site=site,
        priority=priority,
        isolation=kind,
        env=environment(env or []),
        pin=source,
        wrap_mechanism=AES_KEY_WRAP_PAD if wrap_mechanism is None else _number(wrap_mechanism),
        local=is_softhsm(module),
    )
    _refuse_other(config)
    with opened((group_pin_file, group_pin_env)) as group:
        known = group.view.members.get(name)
        if known is not None and known.membership.value == "admitted":
            fail(f'the group has a member "{name}" already; nothing was changed', USAGE)
        _add(group, config, (so_pin_file, so_pin_env), group_pins=(group_pin_file, group_pin_env), yes=yes)


def _number(text: str) -> int:
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if number < 0:
        fail(f"--wrap-mechanism {text}: write a number such as 0x210A; nothing was changed", USAGE)
    return number


def _refuse_other(config: MemberConfig) -> None:
    """A section of that name that says something else is not written over; nor one that could not be read again."""
    present = next((member for member in load(chosen_config()).members if member.name == config.name), None)
    if present is not None and present != config:
        raise ConfigurationError(
            f'{chosen_config()} has a [[member]] "{config.name}" with other settings; nothing was changed'
        )
    if present is None:
        try:
            write.check_new_member(chosen_config(), config)
        except ConfigurationError as error:
            raise ConfigurationError(f"{error}; nothing was changed") from None


def _add(
    group: GroupEngine,
    config: MemberConfig,
    so_options: tuple[Path | None, str | None],
    *,
    group_pins: tuple[Path | None, str | None],
    yes: bool,
) -> None:
    pin: Pin
    if config.pin is not None:
        pin = read_pin_stamped(config.pin)[0]
    else:
        pin = pins.read("user PIN", file=group_pins[0], variable=group_pins[1])
        if group.access.who is None:
            group.access.login(pin.reveal())
    life = membership.connect_newcomer(group.journal, config, pin, timeout=group.config.timeouts.generate)
    try:
        newcomer = membership.preflight(group, config, life)
        for finding in newcomer.findings:
            say(f"  {'!' if finding.differs else ' '} {finding.what}: {finding.text}")
        if not yes and not confirm(f"Add member {config.name} to group {group.label}?"):
            raise ConfigurationError("not confirmed (give --yes in scripts); nothing was changed")
        so_pin = None
        if newcomer.keys is None:
            speaker = membership.sponsor(group)[0].name
            so_pin = pins.read(f"SO PIN of member {speaker}", file=so_options[0], variable=so_options[1])
        with membership.alone(group.journal), one_step():
            membership.join(group, newcomer, so_pin)
    finally:
        life.connection.close()
    say(f"member {config.name} is listed; {group.journal.counts()['live']} objects are brought to it")
    membership.bring_in(group, config.name)
    say(f"member {config.name} is in service")


@member_app.command("standby")
def member_standby(name: Name) -> None:
    """It is kept in sync and serves only when no active member can."""
    _set_role(name, Role.STANDBY)


@member_app.command("backup")
def member_backup(name: Name) -> None:
    """It is kept in sync and never serves: a copy that no program reads. `activate` ends it."""
    _set_role(name, Role.BACKUP)


@member_app.command("activate")
def member_activate(name: Name) -> None:
    """Back from standby or backup: it serves like the others."""
    _set_role(name, Role.ACTIVE)


def _set_role(name: str, role: Role) -> None:
    with commands.opened_journal(load(chosen_config())) as journal:
        changed = membership.set_role(journal, chosen_config(), name, role)
    say(f"member {name} is {role.value}" if changed else f"member {name} was {role.value} already")


@member_app.command("drain")
def member_drain(name: Name, pin_file: PinFile = None, pin_env: PinEnv = None) -> None:
    """Take it out of service: calls in progress come to their end, no new ones begin; it is kept in sync."""
    with opened((pin_file, pin_env)) as group:
        membership.drain(group, name)
    say(f"member {name} is draining: no program begins a call there; `ha-admin member resume {name}` ends it")


@member_app.command("resume")
def member_resume(name: Name) -> None:
    """Use a member again that was quarantined or drained, after what was wrong with it was put right."""
    with commands.opened_journal(load(chosen_config())) as journal:
        say(membership.release(journal, name))


@member_app.command("remove")
def member_remove(
    name: Name,
    keep: Annotated[bool, typer.Option("--keep", help="leave the group's keys and objects on its token")] = False,
    lose: Annotated[bool, typer.Option("--lose", help="also where objects are on no other member")] = False,
    pin_file: PinFile = None,
    pin_env: PinEnv = None,
    yes: Yes = False,
) -> None:
    """Take a member out of the group for good, while applications run.

    The group's keys and objects on its token are destroyed, unless --keep; where it cannot be reached, `journal todo`
    keeps that as outstanding.
    """
    config = load(chosen_config())
    if all(member.name != name for member in config.members):
        with commands.opened_journal(config) as journal:
            if any(record.name == name for record in journal.members()):
                if not yes and not confirm(f"Remove member {name}, which hagroup.toml does not have?"):
                    raise ConfigurationError("not confirmed (give --yes in scripts); nothing was changed")
                with membership.alone(journal):
                    leaving.forget(journal, name, lose=lose)
                say(f"member {name} is removed; NOT destroyed on its token: see `ha-admin journal todo`")
                raise typer.Exit(DEGRADED)
    with opened((pin_file, pin_env)) as group:
        membership.listed(group, name)
        what = "its keys and objects stay on its token" if keep else "all of the group on its token is destroyed"
        if not yes and not confirm(f"Remove member {name} from group {group.label}? ({what})"):
            raise ConfigurationError("not confirmed (give --yes in scripts); nothing was changed")
        mine = next((member for member in config.members if member.name == name), None)
        pin = group.roster.pins.for_member(mine) if mine is not None else None
        with membership.alone(group.journal):
            left = leaving.remove(group, name, pin, keep=keep, lose=lose)
    say(f"member {name} is removed")
    if left.why_not is not None:
        say(f"NOT destroyed on its token: {left.why_not}; see `ha-admin journal todo`")
        raise typer.Exit(DEGRADED)
    if not keep:
        say(f"{left.destroyed} objects of the group destroyed on its token")
    if left.strangers:
        say(f"{left.strangers} objects that were not the group's are left on it")
