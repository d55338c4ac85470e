"""``ha-admin domain …``: the two secrets without which nothing is replicated (DESIGN.md 5)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from hagroup.admin import commands, pins, share_words
from hagroup.admin.member_commands import opened
from hagroup.admin.options import (
    DEGRADED,
    USAGE,
    FirstSoPinEnv,
    FirstSoPinFile,
    Json,
    PinEnv,
    PinFile,
    SoPinEnv,
    SoPinFile,
    Yes,
    chosen_config,
    confirm,
    fail,
    print_json,
    say,
)
from hagroup.admin.progress import Progress
from hagroup.admin.show import table
from hagroup.config.load import load
from hagroup.engine import domain_joining, domain_rotation, domain_show, membership, shares
from hagroup.engine import setup as group_setup
from hagroup.engine.challenge import DomainMember
from hagroup.engine.group import GroupEngine
from hagroup.engine.one_step import one_step
from hagroup.engine.setup import officer_of
from hagroup.errors import ConfigurationError

domain_app = typer.Typer(
    help="The cloning domain: two keys, held by different people, that every member has.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="the member's name in hagroup.toml")]
Sealed = Annotated[bool, typer.Option("--sealed", help="keys that can never leave a member: later joins need shares")]
Shares = Annotated[
    str | None, typer.Option("--shares", metavar="M-of-N", help="also give shares of each key to N people, M suffice")
]
SharesFolder = Annotated[
    Path | None, typer.Option("--shares-folder", help="one file for each share, in place of the screen")
]
ShareFiles = Annotated[
    list[Path] | None, typer.Option("--share-file", metavar="FILE", help="a share, in place of typing; repeat it")
]


@domain_app.command("show")
def domain_show_command(pin_file: PinFile = None, pin_env: PinEnv = None, as_json: Json = False) -> None:
    """Show which keys the group has, and for each member whether it has them and how it guards them."""
    with opened((pin_file, pin_env)) as group:
        found = domain_show.gather(group)
    if as_json:
        print_json(found)
    else:
        say(f"domain key {found.domain_key}, partition key {found.partition_key}")
        say(
            {None: "never changed", True: "changed, complete"}.get(
                found.rotated, "being changed: `ha-admin domain rotate`"
            )
        )
        lines = [(one.name, one.keys, one.leave, one.returns, one.text) for one in found.members]
        table(("member", "keys", "can be handed on", "new keys when away", "remark"), lines, under=("remark",))
    if any(one.keys != "both" for one in found.members):
        raise typer.Exit(DEGRADED)


@domain_app.command("create")
def domain_create(
    sealed: Sealed = False,
    how: Shares = None,
    shares_folder: SharesFolder = None,
    pin_file: PinFile = None,
    pin_env: PinEnv = None,
    so_pin_file: FirstSoPinFile = None,
    so_pin_env: FirstSoPinEnv = None,
    yes: Yes = False,
) -> None:
    """Make both keys on all members of hagroup.toml, before `group create`, which does this by itself otherwise.

    Two people are needed: the user (PIN) and the security officer (SO PIN) of the first member.
    With --shares the keys exist in this host while they are split; each share is shown alone, to its holder.
    """
    path = chosen_config()
    config = load(path)
    if config.group.serial is not None:
        fail(f"{path}: this group was created already and has its keys; `domain rotate` changes them", USAGE)
    scheme = _scheme(how, shares_folder)
    user_pins = commands.user_pins(config, (pin_file, pin_env))
    so_pin = pins.read("SO PIN", file=so_pin_file, variable=so_pin_env)
    names = ", ".join(member.name for member in config.members)
    _agreed(yes, f"Make the keys of a new domain on {names}?")

    handed: list[Path] = []

    def hand_out(secrets: tuple[bytes, bytes]) -> None:
        if scheme is not None:
            share_words.hand_out(config.group.label, secrets, scheme, shares_folder, handed)

    given = hand_out if scheme is not None else None
    group_setup.create_domain(
        config,
        user_pins,
        so_pin,
        sealed=sealed,
        hand_out=given,
        take_back=lambda: share_words.take_back(handed),
    )
    say(f"domain made on {names}; now `ha-admin group create`")


@domain_app.command("join")
def domain_join(
    name: Name,
    from_shares: Annotated[bool, typer.Option("--shares", help="from the shares, in place of another member")] = False,
    share_files: ShareFiles = None,
    pin_file: PinFile = None,
    pin_env: PinEnv = None,
    so_pin_file: SoPinFile = None,
    so_pin_env: SoPinEnv = None,
) -> None:
    """Give both keys to a member of hagroup.toml that lacks them: from the shares, or from a member that has them.

    From a member takes its security officer too.

    For a token that was reset, or was away while the keys were changed; and, in a sealed domain, before `member add`.
    """
    config = load(chosen_config())
    mine = next((member for member in config.members if member.name == name), None)
    if mine is None:
        fail(f"{chosen_config()} has no [[member]] {name!r}", USAGE)
    with opened((pin_file, pin_env)) as group:
        pin = commands.stamped_pins(msgspec.structs.replace(config, members=(mine,)), (pin_file, pin_env))[name]
        with domain_joining.reached(group, mine, pin) as life, membership.alone(group.journal):
            keys = domain_joining.held(group, mine, life)
            if keys is not None:
                completed = domain_joining.complete(group, mine, life, keys)
                say(f"member {name} has both keys already" + ("; it comes back by itself" if completed else ""))
                return
            secrets, so_pin = None, None
            if from_shares or share_files:
                secrets = share_words.collect(share_files or [])
            else:
                speaker = membership.sponsor(group)[0].name
                so_pin = pins.read(f"SO PIN of member {speaker}", file=so_pin_file, variable=so_pin_env)
            with one_step():
                domain_joining.give(group, mine, life, so_pin=so_pin, secrets=secrets)
        listed = name in group.view.members
    say(
        f"member {name} has both keys; "
        + ("it comes back by itself" if listed else f"now `ha-admin member add {name}`")
    )


@domain_app.command("shares")
def domain_shares(
    how: Shares = None,
    check: Annotated[bool, typer.Option("--check", help="prove that shares are those of the present keys")] = False,
    shares_folder: SharesFolder = None,
    share_files: ShareFiles = None,
    pin_file: PinFile = None,
    pin_env: PinEnv = None,
    so_pin_file: SoPinFile = None,
    so_pin_env: SoPinEnv = None,
    yes: Yes = False,
) -> None:
    """Make shares of the present keys (--shares M-of-N), with a member's user and security officer; or --check some.

    Each share is shown alone, to its holder. A sealed domain does not give its keys out: it had to be made with shares.
    """
    if check == (how is not None):
        fail("give --shares M-of-N, or --check", USAGE)
    scheme = None if check else _scheme(how, shares_folder)
    with opened((pin_file, pin_env)) as group, contextlib.ExitStack() as until_done:
        if scheme is not None:  # else another one changes the keys, and these shares are of the ones before
            until_done.enter_context(membership.alone(group.journal))
            group.follow()
        speaker, life, keys = membership.sponsor(group)
        side = DomainMember(connection=life.connection, name=speaker.name, wrap_mechanism=speaker.config.wrap_mechanism)
        timeout = group.config.timeouts.generate
        if scheme is None:
            now = group.view.group
            ids = (now.domain_key_id, now.partition_key_id)
            shares.prove(side, share_words.collect(share_files or []), now.reference, ids, timeout=timeout)
            say("these shares give both keys of this group")
            return
        so_pin = pins.read(f"SO PIN of member {speaker.name}", file=so_pin_file, variable=so_pin_env)
        _agreed(yes, f"Bring both keys of group {group.label} into this host, to split them?")
        officer = officer_of(speaker.config, life, so_pin, journal=group.journal, timeout=timeout)
        try:
            secrets = shares.read_secrets(side, keys, officer.connection, timeout=timeout)
        finally:
            officer.connection.close()
        group.journal.event("domain shares made", f"{scheme.needed} of {scheme.of}")
        handed: list[Path] = []
        try:
            share_words.hand_out(group.label, secrets, scheme, shares_folder, handed)
        except BaseException:
            share_words.take_back(handed)  # too few to be of use: the same command makes new ones
            raise
    say(f"{scheme.of} shares of each key are made; any {scheme.needed} suffice")


@domain_app.command("rotate")
def domain_rotate(
    sealed: Sealed = False,
    how: Shares = None,
    shares_folder: SharesFolder = None,
    pin_file: PinFile = None,
    pin_env: PinEnv = None,
    so_pin_file: SoPinFile = None,
    so_pin_env: SoPinEnv = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Change both keys while programs run, and seal everything anew. Interrupted, the same command completes it.

    A member's user and security officer are needed to begin. Members that are away take the new keys when they return.
    Backups and shares made before open nothing any more: make new ones.
    """
    scheme = None if how is None else shares.scheme(how)
    with opened((pin_file, pin_env)) as group, membership.alone(group.journal), contextlib.ExitStack() as until_done:
        group.follow()
        so_pin, secrets = None, None
        if not domain_rotation.unfinished(group):  # else the shares of its keys were given out before it began
            if scheme is not None:
                share_words.expect_a_place(shares_folder)
            speaker, life, _ = membership.sponsor(group)
            so_pin = pins.read(f"SO PIN of member {speaker.name}", file=so_pin_file, variable=so_pin_env)
            _agreed(yes, f"Change both keys of group {group.label}? (backups and shares made before open no more)")
            if scheme is not None:
                handed = until_done.enter_context(_of_keys_to_be(group))
                secrets = shares.random_secrets(life.connection, timeout=group.config.timeouts.generate)
                share_words.hand_out(group.label, secrets, scheme, shares_folder, handed)
        with Progress() as told:
            done = domain_rotation.rotate(group, so_pin, sealed=sealed, secrets=secrets, told=told)
    _tell(done, group, as_json=as_json)


@contextlib.contextmanager
def _of_keys_to_be(group: GroupEngine) -> Iterator[list[Path]]:
    """Files of shares, taken back where the keys did not come to be the group's: the same command makes new ones."""
    handed: list[Path] = []
    before = group.journal.group().domain_key_id
    try:
        yield handed
    except BaseException:
        if group.journal.group().domain_key_id == before:
            share_words.take_back(handed)
        raise


def _tell(done: domain_rotation.Rotated, group: GroupEngine, *, as_json: bool) -> None:
    if as_json:
        print_json(done)
    else:
        what = "the rotation that was begun earlier is complete" if done.resumed else "both keys are changed"
        say(f"{what}: {done.envelopes} envelopes sealed anew; old keys destroyed on {', '.join(done.done)}")
        for name in done.later:
            say(f"member {name} is away: it takes the new keys when it returns, before it serves")
        for name in done.by_hand:
            say(f"member {name} is away and needs `ha-admin domain join {name}` when it returns")
    if done.later or done.by_hand:
        raise typer.Exit(DEGRADED)


def _scheme(how: str | None, folder: Path | None) -> shares.Scheme | None:
    if how is None:
        return None
    found = shares.scheme(how)
    share_words.expect_a_place(folder)
    return found


def _agreed(yes: bool, question: str) -> None:
    if not yes and not confirm(question):
        raise ConfigurationError("not confirmed (give --yes in scripts); nothing was changed")
