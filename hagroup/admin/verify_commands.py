"""``ha-admin verify``."""

from __future__ import annotations

from typing import Annotated

import typer

from hagroup.admin import commands
from hagroup.admin.columns import without_empty
from hagroup.admin.options import DEGRADED, UNREACHABLE, Json, PinEnv, PinFile, chosen_config, print_json, say
from hagroup.admin.show import table
from hagroup.config.load import load
from hagroup.engine import verify as verifying
from hagroup.engine.verify import Found, Verified


def verify(
    repair: Annotated[
        bool, typer.Option("--repair", help="what differs is made anew, or destroyed, as the journal has it")
    ] = False,
    pin_file: PinFile = None,
    pin_env: PinEnv = None,
    as_json: Json = False,
) -> None:
    """Compare every object on every member: is it there, with the same attributes, and the same key?

    Nothing is changed, unless --repair is given: then what differs is repaired, and all is compared once more. Exit
    status 1: something differs. Objects that are not the group's are listed, are no difference, and stay as they are.
    """
    config = load(chosen_config())
    with commands.opened_journal(config) as journal:
        given = commands.stamped_pins(config, (pin_file, pin_env))
        found = verifying.verify(config, journal, given)
        wrong = verifying.repairable(found)
        if repair and wrong:
            if not as_json:
                _show(found, repaired=True)
                say("")
            left = commands.repair(chosen_config(), wrong, pin=(pin_file, pin_env))
            for name, why in left.items():
                typer.echo(f"{name} was not repaired: {why}", err=True)
            found = verifying.verify(config, journal, given)
    if as_json:
        print_json(found)
    else:
        _show(found, repaired=repair)
    if not found.members:
        raise typer.Exit(UNREACHABLE)
    if found.differences:
        raise typer.Exit(DEGRADED)


def _show(found: Verified, *, repaired: bool) -> None:
    say(f"{found.objects} objects compared on {len(found.members)} members: {', '.join(found.members)}")
    say(f"{found.proved} replicas proved to be the same, {len(found.unproven)} UNPROVEN")
    if found.unproven:
        _lines(found.unproven)
    if found.differences:
        print("1 difference:" if len(found.differences) == 1 else f"{len(found.differences)} differences:")
        _lines(found.differences)
        if not repaired and verifying.repairable(found):
            say("`ha-admin verify --repair` makes these as the group has them; objects that are not the group's stay")
    else:
        say("no differences")
    if found.unmanaged:
        print(f"{len(found.unmanaged)} objects that are not the group's (`ha-admin sync --adopt` can take them over):")
        table(("member", "label", "id"), [(one.member, one.label, one.id) for one in found.unmanaged])


def _lines(found: list[Found]) -> None:
    lines = [(one.member, one.difference.value, one.label, one.uid or "", one.text) for one in found]
    table(*without_empty(("member", "what", "label", "uid", "why"), lines), under=("why",))
