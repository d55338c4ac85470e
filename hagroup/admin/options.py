"""What all commands share: the configuration that was named, options for PINs, exit status, questions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import typer

from hagroup.admin import pins
from hagroup.config.pins import Pin
from hagroup.engine.group import GroupEngine

FINE, DEGRADED, USAGE, UNREACHABLE = 0, 1, 2, 3

PinFile = Annotated[
    Path | None,
    typer.Option("--pin-file", readable=False, help="file with the user PIN, for members without a `pin` source"),
]
PinEnv = Annotated[str | None, typer.Option("--pin-env", help="environment variable with the user PIN")]
SoPinFile = Annotated[
    Path | None, typer.Option("--so-pin-file", readable=False, help="file with the SO PIN of an existing member")
]
SoPinEnv = Annotated[str | None, typer.Option("--so-pin-env", help="variable with the SO PIN of an existing member")]
FirstSoPinFile = Annotated[
    Path | None, typer.Option("--so-pin-file", readable=False, help="file with the members' SO PIN")
]
FirstSoPinEnv = Annotated[str | None, typer.Option("--so-pin-env", help="variable with the members' SO PIN")]
JournalFile = Annotated[Path | None, typer.Option(metavar="FILE", help="as in [journal], for a journal on etcd")]
Json = Annotated[bool, typer.Option("--json", help="print a document for programs")]
Yes = Annotated[bool, typer.Option("--yes", help="do not ask")]

PinOptions = tuple[Path | None, str | None]

_chosen: dict[str, Any] = {}


def choose(config: Path | None, *, quiet: bool) -> None:
    """What the options before the command say."""
    if config is not None:
        _chosen["config"] = config
    _chosen["quiet"] = quiet


def chosen_config() -> Path:
    if "config" not in _chosen:
        fail("no configuration: give --config FILE or set HAGROUP_CONFIG", USAGE)
    found: Path = _chosen["config"]
    return found


def fail(text: str, status: int) -> NoReturn:
    print(f"ha-admin: {text}", file=sys.stderr)
    raise typer.Exit(status)


def say(text: str) -> None:
    """What is done; nothing with ``--quiet``."""
    if not _chosen.get("quiet"):
        print(text, flush=True)


def confirm(question: str) -> bool:
    return sys.stdin.isatty() and typer.confirm(question)


def typed(question: str, expected: str) -> bool:
    """Whether a person at a terminal typed just that."""
    return sys.stdin.isatty() and typer.prompt(question, default="", show_default=False) == expected


def print_json(document: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())


def group_pin(group: GroupEngine, options: PinOptions) -> Pin | None:
    """The PIN for members without a source of their own; None: each has one."""
    if all(member.config.pin is not None for member in group.roster.members.values()):
        return None
    return pins.read("user PIN", file=options[0], variable=options[1])
