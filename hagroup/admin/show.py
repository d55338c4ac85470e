"""How ``ha-admin`` prints for people: tables on a terminal, plain lines in pipes, no colour there.

rich is loaded when something is printed by it: with ``--json`` it would be a fifth of a command's time.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from hagroup.admin.columns import fold, lay_out
from hagroup.admin.commands import ObjectLine, Synced
from hagroup.engine.status import MemberStatus, Status

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"in service": "green", "failed": "red", "quarantined": "bold red", "ok": "green", "down": "bold red"}


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


_WHOLE = frozenset(
    (
        *("member", "serial", "role", "state", "membership", "missing", "stale", "delete", "unmanaged", "uid", "id"),
        *("number", "event", "complete", "time (UTC)", "date (UTC)"),
    )
)
"""Columns that stay in one piece, to be read and copied; the others give way on a narrow terminal."""


def clear() -> None:
    """An empty screen."""
    _console().clear()


def when(rfc3339: str) -> str:
    """A time in UTC as people read it."""
    return rfc3339.replace("T", " ").removesuffix("+00:00")


def table(
    columns: Sequence[str],
    lines: Iterable[Sequence[str]],
    *,
    under: Collection[str] = (),
    named: bool = False,
    styles: Sequence[str | None] = (),
) -> None:
    """Lines under headers.

    :param under: columns that go below their line where the terminal is too narrow for it.
    :param named: with their names.
    :param styles: of each line.
    """
    from rich.text import Text

    console = _console()
    for text, row in lay_out(columns, lines, console.width, whole=_WHOLE, under=under, named=named):
        style = "bold" if row is None else styles[row] if styles else None
        console.print(Text(text), style=style if sys.stdout.isatty() else None, soft_wrap=True)


def paragraph(text: str, *, indent: int = 0, style: str | None = None) -> None:
    """Folded between words on a terminal, its further lines indented; one line in pipes."""
    from rich.text import Text

    console = _console()
    first, *others = fold(text, console.width) if sys.stdout.isatty() else [text]
    if others:
        first, *others = textwrap.wrap(text, console.width, subsequent_indent=" " * indent, break_on_hyphens=False)
    for line in (first, *others):
        console.print(Text(line), style=style, soft_wrap=True)


def status(found: Status) -> None:
    console = _console()
    group = found.group
    sync = ", in sync" if group.in_sync else "" if group.state == "out of sync" else ", NOT in sync"
    console.print(
        f"group {group.label} ({group.serial}): {group.state}{sync}", style=_STYLES.get(group.state, "yellow")
    )
    paragraph(f"journal {found.journal.url}: {'ok' if found.journal.ok else 'not reachable'}", indent=4)
    if found.journal.reason:
        paragraph(found.journal.reason, style="red")
    console.print(f"{found.objects} objects, {found.tombstones} tombstones")
    if (watch := found.detection) is not None:
        console.print(
            f"a watchdog tells a failure within {watch.detection_bound:g} s "
            f"({watch.interval:g} s x {watch.threshold} + {watch.probe:g} s)"
        )
    console.print()
    _members(found)
    if found.watchdog is not None:
        console.print("watchdog: watching" if found.watchdog else "watchdog: none is running")
    for member in found.members:
        if member.reason is not None:
            since = "" if not member.since else f" (since {when(member.since)} UTC)"
            text = f"{member.name}: {member.state}{since}: {member.reason}"
            paragraph(text, indent=4, style=_STYLES.get(member.state))
    for client in found.passed_over:
        paragraph(
            f"host {client.host}: process {client.process} did not acknowledge {client.what} ({when(client.since)} "
            "UTC): it is cut off or frozen, and may go on with what it knew before; `ha-admin journal todo` has it "
            "until it is over",
            indent=4,
            style="yellow",
        )
    _what_to_do(found)
    if found.events:
        console.print()
    for event in found.events:
        of = f" {event.member}:" if event.member else ""
        paragraph(f"{when(event.time)} {event.kind}:{of} {event.text}", indent=4)


def _what_to_do(found: Status) -> None:
    if any(member.state == "failed" for member in found.members):
        paragraph(
            "a failed member comes back by itself once it answers; `ha-admin doctor` looks for the cause", indent=4
        )
    if not found.group.in_sync:
        paragraph("`ha-admin sync --dry-run` shows what is to be done, `ha-admin sync` does it now", indent=4)


def _members(found: Status) -> None:
    more = _more_columns(found)
    lines = [
        (
            member.name,
            member.serial,
            member.role,
            member.state,
            str(member.missing),
            str(member.stale),
            str(member.pending_deletes),
            "?" if member.unmanaged is None else str(member.unmanaged),
            *(_more(member, column) for column in more),
        )
        for member in found.members
    ]
    columns = ("member", "serial", "role", "state", "missing", "stale", "delete", "unmanaged", *more)
    table(columns, lines, under=more, named=True, styles=[_STYLES.get(member.state) for member in found.members])


def _more_columns(found: Status) -> list[str]:
    """Columns that say something here."""
    wanted = {
        "since (UTC)": any(member.since for member in found.members),
        "site": any(member.site for member in found.members),
        "unanswered": any(member.unanswered for member in found.members),
        "latency": any(member.latency_ms is not None for member in found.members),
    }
    return [column for column, shown in wanted.items() if shown]


def _more(member: MemberStatus, column: str) -> str:
    if column == "since (UTC)":
        return when(member.since)
    if column == "site":
        return member.site or ""
    if column == "unanswered":
        return str(member.unanswered)
    return "" if member.latency_ms is None else f"{member.latency_ms:.1f} ms"


def facts(found: Mapping[str, object]) -> None:
    for name, value in found.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        paragraph(f"{name.replace('_', ' '):14} {text}", indent=15)


def sync(done: Synced) -> None:
    console = _console()
    for line in done.members:
        console.print(f"{line.name}: {line.state}, {line.finished} changes brought up to date, {line.owed} still owed")
        if line.reason is not None:
            paragraph(f"{line.name}: {line.reason}")
    console.print("in sync" if done.in_sync else "NOT in sync: see `ha-admin status`")


def objects(found: Sequence[ObjectLine]) -> None:
    table(
        ("class", "type", "label", "id", "uid / what it is"),
        [(line.object_class, line.key_type or "", line.label, line.id, line.note) for line in found],
        under=("uid / what it is",),
    )
