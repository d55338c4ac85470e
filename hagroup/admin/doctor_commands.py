"""``ha-admin doctor`` and ``recover``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hagroup.admin import commands, rebuild_commands, show
from hagroup.admin.new_file import new_file
from hagroup.admin.options import DEGRADED, UNREACHABLE, Json, PinEnv, PinFile, Yes, chosen_config, print_json, say
from hagroup.engine import bundle as bundling
from hagroup.engine import doctor as examining
from hagroup.journal.clock import SystemClock

Bundle = Annotated[
    Path | None, typer.Option("--bundle", metavar="FILE", help="write an archive (tar.gz) for a support person")
]


def doctor(as_json: Json = False, bundle: Bundle = None) -> None:
    """Check what a support person would ask for, and print remedies. Needs no PIN, changes nothing, tries no login.

    --bundle writes checks, status, events and hagroup.toml into one file: no PIN, no key, no object's name is in it.
    """
    if bundle is not None:
        new_file(bundle, bundling.make(chosen_config(), SystemClock()))
        say(f"{bundle}: written, without secrets; look at it before you send it")
        return
    found = list(examining.examine(chosen_config(), SystemClock()))
    if as_json:
        print_json(found)
    else:
        for one in found:
            show.paragraph(f"{one.state:7} {one.subject}: {one.found}", indent=8)
            if one.remedy:
                show.paragraph(f"{'':7} remedy: {one.remedy}", indent=8)
    wrong = [one for one in found if one.state != examining.OK]
    if not as_json:
        say("all is well" if not wrong else f"{len(wrong)} of {len(found)} checks need a look")
    if any(one.state == examining.BAD for one in found):
        raise typer.Exit(DEGRADED)


def recover(pin_file: PinFile = None, pin_env: PinEnv = None, yes: Yes = False, as_json: Json = False) -> None:
    """Try to reach every member now, and bring those that answer up to date; says why where one does not.

    Applications do this by themselves; this is for who does not want to wait. Where the journal turns out to be older
    than the group (restored, copied), it is reconciled with the members first, after a question. Interrupted, the same
    command completes it.
    """
    behind = rebuild_commands.unfinished(chosen_config()) or commands.journal_behind(
        chosen_config(), pin=(pin_file, pin_env)
    )
    if behind is not None:
        rebuild_commands.reconcile(behind, pin=(pin_file, pin_env), yes=yes)
    done = commands.recover(chosen_config(), pin=(pin_file, pin_env))
    if as_json:
        print_json(done)
    else:
        lines = [(one.name, one.state, str(one.finished), str(one.owed), one.reason or "") for one in done.members]
        show.table(("member", "state", "brought up to date", "still owed", "why"), lines, under=("why",))
    if not done.reachable:
        raise typer.Exit(UNREACHABLE)
    if not done.in_sync:
        raise typer.Exit(DEGRADED)
