"""``ha-admin group join``: a new host comes to a group that there is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from hagroup.admin import commands, pins, rebuild_commands
from hagroup.admin.member_commands import environment
from hagroup.admin.options import (
    DEGRADED,
    USAGE,
    Json,
    PinEnv,
    PinFile,
    Yes,
    chosen_config,
    fail,
    print_json,
    say,
    typed,
)
from hagroup.config import permissions, write
from hagroup.config.model import GroupConfig, MemberConfig, PinSource, SqliteUrl, is_softhsm
from hagroup.config.pins import Pin, read_pin_stamped
from hagroup.config.urls import BadUrl, parse_journal_url
from hagroup.engine import new_host, rebuild
from hagroup.engine.new_host import NOT_CHANGED, NewHost
from hagroup.errors import ConfigurationError
from hagroup.journal.clock import SystemClock

_JOURNAL = "journal.db"


def join(
    module: Annotated[Path, typer.Option("--module", metavar="FILE", help="one member's PKCS#11 module")],
    token_serial: Annotated[str | None, typer.Option("--token-serial", help="serial number of its token")] = None,
    token_label: Annotated[str | None, typer.Option("--token-label", help="label of its token, instead")] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="NAME=VALUE", help="environment of its module")
    ] = None,
    init_args: Annotated[str | None, typer.Option("--init-args", help="what its module needs at C_Initialize")] = None,
    journal: Annotated[
        str | None, typer.Option("--journal", metavar="URL", help="where the journal is to be (default: beside FILE)")
    ] = None,
    mirror: Annotated[Path | None, typer.Option("--mirror", metavar="FILE", help="where [journal] mirror is")] = None,
    pin_file: PinFile = None,
    pin_env: PinEnv = None,
    member_pin_file: Annotated[
        list[str] | None,
        typer.Option("--member-pin-file", metavar="NAME=FILE", help="a member's own PIN; becomes its `pin` source"),
    ] = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Bring this host to a group that there is, from one member's address and the PIN.

    The rest comes from the members: the configuration file is written. A journal for several hosts is used as it is;
    one of a single host is made anew from what the members hold, and the host that had it must not use it any more.
    Programs then log in with the PIN; members get `pin` sources by --member-pin-file, or by hand.
    """
    path = Path(os.path.abspath(chosen_config()))
    _refuse_place(path)
    if (token_serial is None) == (token_label is None):
        fail("give --token-serial or --token-label", USAGE)
    address = MemberConfig(
        name=token_serial or token_label or "",
        module=module.absolute(),
        token_serial=token_serial,
        token_label=token_label,
        env=environment(env or []),
        init_args=init_args,
        local=is_softhsm(module),
    )
    if not address.module.exists():
        raise ConfigurationError(f"--module {address.module} does not exist on this host{NOT_CHANGED}")
    own = _own_pins(member_pin_file or [])
    host = NewHost(path, address, pins.read("user PIN", file=pin_file, variable=pin_env), own)
    try:
        found = host.find()
        config = _placed(found, journal, mirror)
        new_host.check(config)
        done = _journal(host, found, config, yes=yes)
    finally:
        host.close()
    write.write_new(config, mode=0o600)
    _show(host, config, done, as_json=as_json)


def _refuse_place(path: Path) -> None:
    if os.path.lexists(path):
        raise ConfigurationError(f"{path} exists already: this host is in a group, or was; nothing was changed")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        permissions.check_folder_of(path)
    except (OSError, permissions.Unsafe) as error:
        raise ConfigurationError(f"no configuration can be written at {path}: {error}{NOT_CHANGED}") from None


def _own_pins(given: list[str]) -> dict[str, tuple[PinSource, Pin]]:
    found = {}
    for one in given:
        name, equals, file = one.partition("=")
        if not equals or not name or not file:
            fail(f"--member-pin-file {one}: write NAME=FILE", USAGE)
        source = PinSource(file=Path(file).absolute())
        found[name] = (source, read_pin_stamped(source)[0])
    return found


def _placed(found: GroupConfig, url: str | None, mirror: Path | None) -> GroupConfig:
    """The journal where this host has it."""
    place = found.journal.url
    if url is not None:
        try:
            place = parse_journal_url(url, found.folder)
        except BadUrl as error:
            raise ConfigurationError(f"--journal {url}: {error}{NOT_CHANGED}") from None
    elif isinstance(place, SqliteUrl):
        place = SqliteUrl(found.folder / _JOURNAL)
    if mirror is not None and not isinstance(place, SqliteUrl):
        raise ConfigurationError(f"--mirror is only for a sqlite: journal, not {place}{NOT_CHANGED}")
    second = mirror.absolute() if mirror is not None else found.journal.mirror
    return msgspec.structs.replace(found, journal=msgspec.structs.replace(found.journal, url=place, mirror=second))


def _journal(host: NewHost, found: GroupConfig, config: GroupConfig, *, yes: bool) -> rebuild.Rebuilt | None:
    """Make it, or see that the one that is there is the group's. What an interrupted attempt left is whole."""
    if not isinstance(config.journal.url, SqliteUrl):
        _attach(config)
        return None
    with rebuild_commands.alone(config):
        if config.journal.url.path.exists():
            _attach(config)
            return None
        label = config.group.label
        question = (
            f"The journal of group {label} is made anew here; the one that it had ({found.journal.url}, configuration "
            f"{host.origin}) must not be used any more. Type the group's label"
        )
        if not yes and not typed(question, label):
            raise ConfigurationError(f"not confirmed (give --yes in scripts){NOT_CHANGED}")
        return host.make_journal(config, clock=SystemClock())


def _attach(config: GroupConfig) -> None:
    """:raises HAError: the journal is another group's, or cannot be used here."""
    with commands.opened_journal(config) as journal:
        unknown = {member.name for member in journal.members()} - {member.name for member in config.members}
        if unknown:
            raise ConfigurationError(
                f"the journal {config.journal.url} has a member {min(unknown)!r} that the members' configuration "
                f"does not have: give the address of another member{NOT_CHANGED}"
            )


def _show(host: NewHost, config: GroupConfig, done: rebuild.Rebuilt | None, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "configuration": str(config.path),
                "origin": host.origin,
                "journal": str(config.journal.url),
                "rebuilt": done,
            }
        )
    else:
        say(f"{config.path} is written, as {host.origin} had it")
        if done is None:
            say(f"the journal {config.journal.url} is used as it is")
        else:
            rebuild_commands.show(done)
    if done is not None and (done.doubtful or done.not_replicable or done.away):
        raise typer.Exit(DEGRADED)
