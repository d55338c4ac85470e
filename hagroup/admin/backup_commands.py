"""``ha-admin backup …``."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from hagroup.admin.member_commands import opened
from hagroup.admin.new_file import new_file
from hagroup.admin.options import DEGRADED, USAGE, Json, PinEnv, PinFile, Yes, confirm, fail, print_json, say
from hagroup.admin.show import table
from hagroup.engine import backup, membership
from hagroup.errors import ConfigurationError

backup_app = typer.Typer(help="The group's objects in one sealed file, and back.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(metavar="FILE", help="the backup")]
Labels = Annotated[list[str] | None, typer.Option("--label", metavar="TEXT", help="only objects with this label")]


@backup_app.command("create")
def backup_create(file: File, label: Labels = None, pin_file: PinFile = None, pin_env: PinEnv = None) -> None:
    """Write all objects, or those with the labels given, with everything that was destroyed, into a new file.

    Keys are in it wrapped under the domain key, all of it sealed under the partition key: it opens only inside a
    member that has both secrets.
    """
    if os.path.lexists(file):
        fail(f"{file} exists already and is not overwritten", USAGE)
    with opened((pin_file, pin_env)) as group:
        header, data = backup.create(group, label or [])
    new_file(file, data)
    say(f"{file}: {header.objects} objects, {header.tombstones} tombstones of group {header.label} ({header.group})")


@backup_app.command("restore")
def backup_restore(
    file: File,
    label: Labels = None,
    resurrect: Annotated[
        list[str] | None, typer.Option("--resurrect", metavar="UID", help="bring this destroyed object back")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be done")] = False,
    pin_file: PinFile = None,
    pin_env: PinEnv = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Bring back the objects of a backup that the group does not have. What it has is left as it is.

    What was destroyed stays destroyed, unless it is named with --resurrect. Interrupted, the same command completes it.
    """
    data = file.read_bytes()
    header, _, _ = backup.read_header(data)
    wanted = [_uid(text) for text in resurrect or []]
    if not yes and not dry_run:
        when = datetime.fromtimestamp(header.created, UTC).isoformat(timespec="seconds")
        if not confirm(f"Restore {header.objects} objects of group {header.label} ({header.group}) as of {when}?"):
            raise ConfigurationError("not confirmed (give --yes in scripts); nothing was changed")
    found: list[backup.Restored] = []
    with opened((pin_file, pin_env)) as group:
        with membership.alone(group.journal):
            backup.restore(group, data, labels=label or [], resurrect=wanted, dry_run=dry_run, told=found.append)
        if not dry_run:
            group.supervisor.sync_now()
    if as_json:
        print_json(found)
    else:
        table(
            ("uid", "label", "outcome", "what"),
            [(one.uid, one.label, one.outcome, one.text) for one in found],
            under=("what",),
        )
        counts = {outcome: sum(one.outcome == outcome for one in found) for outcome in {one.outcome for one in found}}
        say(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    if any(one.outcome == "refused" for one in found):
        raise typer.Exit(DEGRADED)


def _uid(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        fail(f"--resurrect {text}: this is no UID; `backup restore --dry-run` lists them", USAGE)
