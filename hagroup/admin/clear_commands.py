"""``ha-admin clear``."""

from __future__ import annotations

import typer

from hagroup.admin.member_commands import opened
from hagroup.admin.options import DEGRADED, Json, PinEnv, PinFile, Yes, print_json, say, typed
from hagroup.engine import clearing, membership
from hagroup.errors import ConfigurationError


def clear(pin_file: PinFile = None, pin_env: PinEnv = None, yes: Yes = False, as_json: Json = False) -> None:
    """Destroy every object of the group, on all members: those that are away are emptied before they serve again.

    The group itself stays, with its members and its two secrets. Running programs do not refill it. Interrupted, the
    same command completes it.
    """
    with opened((pin_file, pin_env)) as group:
        membership.sponsor(group)
        count = group.journal.counts()["live"]
        question = f"This destroys all {count} objects of group {group.label}, for ever. Type its label to go on"
        if not yes and not typed(question, group.label):
            raise ConfigurationError("not confirmed (give --yes in scripts); nothing was changed")
        with membership.alone(group.journal):
            done = clearing.clear(group)
    if as_json:
        print_json(done)
    else:
        where = ", ".join(done.emptied) or "no member"
        say(f"group {group.label} is empty: {done.objects} objects destroyed, on {where}")
        for name, why in done.later.items():
            say(f"member {name} is emptied before it serves again ({why})")
    if done.later:
        raise typer.Exit(DEGRADED)
