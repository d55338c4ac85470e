"""``ha-admin``: the operator's command (DESIGN.md 1.3)."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hagroup.admin import commands, move_commands, new_group, new_host_commands, rebuild_commands, show, sync_commands
from hagroup.admin.backup_commands import backup_app
from hagroup.admin.clear_commands import clear
from hagroup.admin.doctor_commands import doctor, recover
from hagroup.admin.domain_commands import domain_app
from hagroup.admin.journal_commands import journal_app
from hagroup.admin.member_commands import member_app
from hagroup.admin.options import (
    DEGRADED,
    FINE,
    UNREACHABLE,
    USAGE,
    FirstSoPinEnv,
    FirstSoPinFile,
    JournalFile,
    Json,
    PinEnv,
    PinFile,
    Yes,
    choose,
    chosen_config,
    confirm,
    fail,
    print_json,
    say,
    typed,
)
from hagroup.admin.pins import default_config
from hagroup.admin.verify_commands import verify
from hagroup.config import logging as logs
from hagroup.config.load import load
from hagroup.config.write import render
from hagroup.core.calls import Ckr, DeadlinePassed, MemberGone
from hagroup.engine.login import PIN_ERRORS
from hagroup.errors import ConfigurationError, GroupUnavailable, HAError
from hagroup.members import ModuleProblem


class Existing(StrEnum):
    """What becomes of objects that members hold before they are a group."""

    COPY = "copy"
    LEAVE = "leave"
    STOP = "stop"

    @classmethod
    def of_a_person(cls, found: Mapping[str, int], *, yes: bool) -> Existing:
        """As somebody at the terminal says; where nobody is asked they stay as they are."""
        if yes or not sys.stdin.isatty():
            return cls.LEAVE
        question = f"Objects are there already, {shown(found)}: copy them to all members, leave them, or stop?"
        while (answer := typer.prompt(question, default=cls.STOP.value)) not in list(cls):
            pass
        return cls(answer)


def shown(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} on {name}" for name, count in found.items())


app = typer.Typer(
    name="ha-admin",
    help="Looks after a hagroup: a group of HSMs that a program uses as one.\n\n"
    "Exit status: 0 fine and in sync; 1 degraded or out of sync; 2 usage or configuration; 3 nothing reachable.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
group_app = typer.Typer(help="The group as a whole.", no_args_is_help=True)
app.add_typer(group_app, name="group")
app.add_typer(member_app, name="member")
app.add_typer(domain_app, name="domain")
app.add_typer(journal_app, name="journal")
app.add_typer(backup_app, name="backup")
group_app.command("join")(new_host_commands.join)
journal_app.command("move")(move_commands.move)
journal_app.command("rebuild")(rebuild_commands.rebuild)
journal_app.command("adopt")(rebuild_commands.adopt)
app.command()(verify)
app.command()(clear)
app.command()(recover)
app.command()(doctor)


@app.callback()
def _options(
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", readable=False, metavar="FILE", help="hagroup.toml (default: $HAGROUP_CONFIG)"),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="log to standard error what is done")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no word about what went well")] = False,
) -> None:
    logs.configure("console", "DEBUG" if verbose else "CRITICAL")
    choose(config or (Path(path) if (path := default_config()) else None), quiet=quiet)


@group_app.command("create")
def group_create(
    label: Annotated[
        str | None, typer.Option("--label", help="of a group whose hagroup.toml is not there yet, as what follows")
    ] = None,
    member: Annotated[
        list[str] | None,
        typer.Option(
            "--member",
            metavar=new_group.MEMBER,
            help="a member; repeat it; label=LABEL in place of serial, pin-env=VARIABLE in place of pin-file",
        ),
    ] = None,
    journal: Annotated[
        str | None, typer.Option("--journal", metavar="URL", help="where the journal is to be (default: beside FILE)")
    ] = None,
    journal_ca: JournalFile = None,
    journal_cert: JournalFile = None,
    journal_key: JournalFile = None,
    min_replicas: Annotated[
        int | None, typer.Option("--min-replicas", help="members that hold a new key before the call returns")
    ] = None,
    so_pin_file: FirstSoPinFile = None,
    so_pin_env: FirstSoPinEnv = None,
    pin_file: PinFile = None,
    pin_env: PinEnv = None,
    sealed: Annotated[
        bool, typer.Option("--sealed", help="domain keys that can never leave a member (later joins need the shares)")
    ] = False,
    existing: Annotated[
        Existing | None,
        typer.Option(
            "--existing", help="objects that members hold already: copy | leave | stop (asked for; with --yes: leave)"
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Make the group that the configuration describes: cloning domain, journal, serial number.

    Where FILE is not there yet it is made: from --label and --member, or from answers at a terminal. It is written
    when the group is there; whatever else may stand in it is added by hand.

    Two people are needed, as for every join: the user (PIN) and the security officer (SO PIN) of the first member.

    Objects that members hold already become the group's and are brought to all members (copy, as by `sync --adopt`),
    stay where they are and are not the group's (leave), or nothing is done (stop).
    """
    chosen: list[Existing] = []

    def decide(found: Mapping[str, int]) -> None:
        chosen.append(existing or Existing.of_a_person(found, yes=yes))
        if chosen[0] is Existing.STOP:
            raise ConfigurationError(f"objects are there already, {shown(found)}; nothing was changed")

    path = Path(os.path.abspath(chosen_config()))
    files = {"ca": journal_ca, "cert": journal_cert, "key": journal_key}
    given = new_group.Given(
        label=label,
        members=tuple(member or ()),
        journal=journal,
        files={name: file.absolute() for name, file in files.items() if file is not None},
        min_replicas=min_replicas,
    )
    with contextlib.ExitStack() as until_done:
        new = not os.path.lexists(path)
        if new:
            until_done.enter_context(new_group.place_for(path))
            config = new_group.compose(path, given)
            if not yes and sys.stdin.isatty():
                typer.echo(f"\n{render(config)}")
        else:
            new_group.refuse_options(path, given)
            config = load(path)
        commands.create(
            config,
            new=new,
            pin=(pin_file, pin_env),
            so_pin=(so_pin_file, so_pin_env),
            sealed=sealed,
            confirm=None if yes else confirm,
            existing=decide,
        )
    if Existing.COPY in chosen:
        sync_commands.adopt(pin=(pin_file, pin_env), label=None, as_json=False)
    elif Existing.LEAVE in chosen:
        say("objects that were there already stay as they are; `ha-admin sync --adopt` can take them over")


@group_app.command("show")
def group_show(as_json: Json = False) -> None:
    """Show what the group is: its settings, journal and members. Asks no member; `status` tells how they are."""
    found = commands.group_facts(chosen_config())
    if as_json:
        print_json(found)
    else:
        show.facts(found)


@group_app.command("delete")
def group_delete(pin_file: PinFile = None, pin_env: PinEnv = None, yes: Yes = False) -> None:
    """Delete an empty group: its keys and manifests on every member, its journal, its serial number in hagroup.toml.

    Objects are destroyed by `ha-admin clear` before. Where a member cannot be reached nothing more is done after the
    others: the same command completes it. The journal's file is kept under another name; it opens nothing any more.
    """
    deleted = commands.delete_group(chosen_config(), pin=(pin_file, pin_env), confirm=None if yes else typed)
    say(deleted)


@app.command()
def status(
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="refresh until Ctrl-C ends it")] = False,
    interval: Annotated[float, typer.Option("--interval", min=0.2, help="seconds between refreshes")] = 2.0,
) -> None:
    """Show at one look what is wrong and what to do. Needs no PIN."""
    while True:
        found = commands.status(chosen_config())
        if as_json:
            print_json(found)
        else:
            if watch and sys.stdout.isatty():
                show.clear()
            show.status(found)
        if not watch:
            break
        sys.stdout.flush()
        time.sleep(interval)
    if found.group.state == "down":
        raise typer.Exit(UNREACHABLE)
    if found.group.state != "ok" or not found.group.in_sync:
        raise typer.Exit(DEGRADED)


@app.command()
def sync(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan, with the reason for each step")] = False,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="take over objects on the members that are not the group's")
    ] = False,
    label: Annotated[str | None, typer.Option("--label", help="with --adopt: only objects with this label")] = None,
    pin_file: PinFile = None,
    pin_env: PinEnv = None,
    as_json: Json = False,
) -> None:
    """Bring every reachable member up to date now, and finish what processes that died left open.

    --dry-run needs no PIN and asks no member. --adopt takes over what can be wrapped or is public, and refuses what the
    group destroyed.
    """
    if dry_run:
        if adopt:
            fail("--adopt and --dry-run do not go together; `ha-admin verify` lists what could be adopted", USAGE)
        steps = sync_commands.dry_run(as_json=as_json)
        raise typer.Exit(DEGRADED if steps else FINE)
    if adopt:
        sync_commands.adopt(pin=(pin_file, pin_env), label=label, as_json=as_json)
        return
    if label is not None:
        fail("--label goes with --adopt: all of what the group owes is brought up to date", USAGE)
    done = commands.sync(chosen_config(), pin=(pin_file, pin_env))
    if as_json:
        print_json(done)
    else:
        show.sync(done)
    if not done.reachable:
        raise typer.Exit(UNREACHABLE)
    if not done.in_sync:
        raise typer.Exit(DEGRADED)


@app.command()
def objects(
    member: Annotated[
        str | None, typer.Option("--member", metavar="NAME", help="what is on this member's token")
    ] = None,
    pin_file: PinFile = None,
    pin_env: PinEnv = None,
    as_json: Json = False,
) -> None:
    """List the group's objects, or with --member what one member's own token holds."""
    if member is None:
        found = commands.group_objects(chosen_config())
    else:
        found = commands.member_objects(chosen_config(), member, pin=(pin_file, pin_env))
    if as_json:
        print_json(found)
    else:
        show.objects(found)


STOPPED = 130
"""By Ctrl-C, as shells have it."""
_UsageError: Any = typer.BadParameter.__mro__[1]
"""By way of typer: its newer versions bring a click of their own, and need no other."""


def main() -> None:
    """Entry point: an error of ours or of a library is one sentence on standard error, never a traceback."""
    try:
        status = app(standalone_mode=False)
    except HAError as error:
        print(f"ha-admin: {error}", file=sys.stderr)
        status = UNREACHABLE if isinstance(error, GroupUnavailable) else USAGE
    except Ckr as error:
        refused = error.rv in PIN_ERRORS
        remedy = " (one attempt, on one member): correct the PIN and run the command again"
        print(
            f"ha-admin: {'the PIN was refused: ' if refused else ''}{error}{remedy if refused else ''}", file=sys.stderr
        )
        status = USAGE if refused else UNREACHABLE
    except (ModuleProblem, MemberGone, DeadlinePassed) as error:
        print(f"ha-admin: {error}", file=sys.stderr)
        status = UNREACHABLE
    except (typer.Abort, KeyboardInterrupt):
        status = STOPPED
    except _UsageError as error:
        error.show()
        status = USAGE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = FINE
    except OSError as error:
        print(f"ha-admin: {f'{error.filename}: {error.strerror}' if error.filename else error}", file=sys.stderr)
        status = USAGE
    if status == STOPPED:  # newer typers turn Ctrl-C into that status by themselves
        print("ha-admin: stopped; run the same command again to complete it", file=sys.stderr)
    sys.exit(status or FINE)


if __name__ == "__main__":
    main()
