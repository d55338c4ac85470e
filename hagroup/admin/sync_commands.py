"""``ha-admin sync --dry-run`` and ``sync --adopt``."""

from __future__ import annotations

from pathlib import Path

import typer

from hagroup.admin import commands
from hagroup.admin.columns import without_empty
from hagroup.admin.member_commands import opened
from hagroup.admin.options import DEGRADED, chosen_config, print_json, say
from hagroup.admin.show import table
from hagroup.config.load import load
from hagroup.engine import adopt as adopting
from hagroup.engine import membership, plan


def dry_run(*, as_json: bool) -> int:
    """Print the plan. Returns how many steps it has."""
    with commands.opened_journal(load(chosen_config())) as journal:
        steps = plan.plan(journal)
    if as_json:
        print_json(steps)
    elif steps:
        columns = ("member", "action", "label", "uid", "reason")
        lines = [(one.member, one.action, one.label, one.uid or "", one.reason) for one in steps]
        table(*without_empty(columns, lines), under=("reason",))
    else:
        say("nothing is to be done")
    return len(steps)


def adopt(*, pin: tuple[Path | None, str | None], label: str | None, as_json: bool) -> None:
    with opened(pin) as group:
        membership.sponsor(group)
        with membership.alone(group.journal):
            done = adopting.adopt(group, only=label)
        group.supervisor.sync_now()
    refused = [one for one in done if one.refused is not None]
    if as_json:
        print_json(done)
    elif done:
        table(
            ("member", "label", "id", "what became of it"),
            [(one.member, one.label, one.id, one.refused or f"the group's, UID {one.uid}") for one in done],
            under=("what became of it",),
        )
        say(f"{len(done) - len(refused)} objects adopted, {len(refused)} refused")
    else:
        say("no object on a member is other than the group's")
    if refused:
        raise typer.Exit(DEGRADED)
