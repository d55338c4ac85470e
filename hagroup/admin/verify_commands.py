"""``ha-admin verify``."""

from __future__ import annotations

import typer

from hagroup.admin import commands
from hagroup.admin.options import DEGRADED, UNREACHABLE, Json, PinEnv, PinFile, chosen_config, print_json, say
from hagroup.admin.show import table
from hagroup.config.load import load
from hagroup.engine import verify as verifying
from hagroup.engine.verify import Found, Verified


def verify(pin_file: PinFile = None, pin_env: PinEnv = None, as_json: Json = False) -> None:
    """Compare every object on every member: is it there, with the same attributes, and the same key?

    Nothing is changed. Exit status 1: something differs. Objects that are not the group's are listed, and are no
    difference.
    """
    config = load(chosen_config())
    with commands.opened_journal(config) as journal:
        found = verifying.verify(config, journal, commands.stamped_pins(config, (pin_file, pin_env)))
    if as_json:
        print_json(found)
    else:
        _show(found)
    if not found.members:
        raise typer.Exit(UNREACHABLE)
    if found.differences:
        raise typer.Exit(DEGRADED)


def _show(found: Verified) -> None:
    say(f"{found.objects} objects compared on {len(found.members)} members: {', '.join(found.members)}")
    say(f"{found.proved} replicas proved to be the same, {len(found.unproven)} UNPROVEN")
    if found.unproven:
        _lines(found.unproven)
    if found.differences:
        print(f"{len(found.differences)} differences:")
        _lines(found.differences)
    else:
        say("no differences")
    if found.unmanaged:
        print(f"{len(found.unmanaged)} objects that are not the group's (`ha-admin sync --adopt` can take them over):")
        table(("member", "label", "id"), [(one.member, one.label, one.id) for one in found.unmanaged])


def _lines(found: list[Found]) -> None:
    table(
        ("member", "what", "label", "uid", "why"),
        [(one.member, one.difference.value, one.label, one.uid or "", one.text) for one in found],
        under=("why",),
    )
