"""How ``ha-admin`` prints for people: tables on a terminal, plain lines in pipes, no colour there.

rich is loaded when something is printed by it: with ``--json`` it would be a fifth of a command's time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from hagroup.admin.commands import ObjectLine, Synced
from hagroup.engine.status import MemberStatus, Status

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STYLES = {"in service": "green", "failed": "red", "quarantined": "bold red", "ok": "green", "down": "bold red"}


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


_WHOLE = frozenset(
    (
        *("member", "serial", "role", "state", "membership", "missing", "stale", "delete", "unmanaged", "uid"),
        *("number", "event", "complete", "time (UTC)", "date (UTC)"),
    )
)
"""Columns that stay in one piece, to be read and copied; the others give way on a narrow terminal."""


def _table(*columns: str, padding: tuple[int, int] = (0, 1)) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=padding, header_style="bold" if sys.stdout.isatty() else "")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in _WHOLE)
    return table


def clear() -> None:
    """An empty screen."""
    _console().clear()


def when(rfc3339: str) -> str:
    """A time in UTC as people read it."""
    return rfc3339.replace("T", " ").removesuffix("+00:00")


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Lines under headers."""
    found = _table(*columns)
    for line in lines:
        found.add_row(*line)
    _console().print(found)


def status(found: Status) -> None:
    console = _console()
    group = found.group
    sync = "in sync" if group.in_sync else "NOT in sync"
    console.print(
        f"group {group.label} ({group.serial}): {group.state}, {sync}", style=_STYLES.get(group.state, "yellow")
    )
    console.print(f"journal {found.journal.url}: {'ok' if found.journal.ok else 'not reachable'}")
    if found.journal.reason:
        console.print(found.journal.reason, style="red")
    console.print(f"{found.objects} objects, {found.tombstones} tombstones")
    if (watch := found.detection) is not None:
        console.print(
            f"a watchdog tells a failure within {watch.detection_bound:g} s "
            f"({watch.interval:g} s x {watch.threshold} + {watch.probe:g} s)"
        )
    console.print()
    more = _more_columns(found)
    lines = _table("member", "serial", "role", "state", "missing", "stale", "delete", "unmanaged", *more)
    for member in found.members:
        lines.add_row(
            member.name,
            member.serial,
            member.role,
            member.state,
            str(member.missing),
            str(member.stale),
            str(member.pending_deletes),
            "?" if member.unmanaged is None else str(member.unmanaged),
            *(_more(member, column) for column in more),
            style=_STYLES.get(member.state),
        )
    console.print(lines)
    if found.watchdog is not None:
        console.print("watchdog: watching" if found.watchdog else "watchdog: none is running")
    for member in found.members:
        if member.reason is not None:
            since = "" if member.state == "failed" else f" (since {when(member.since)} UTC)"
            console.print(
                f"{member.name}: {member.state}{since}: {member.reason}",
                style=_STYLES.get(member.state),
                soft_wrap=True,
            )
    if found.events:
        console.print()
    for event in found.events:
        of = f" {event.member}:" if event.member else ""
        console.print(f"{when(event.time)} {event.kind}:{of} {event.text}", soft_wrap=True)


def _more_columns(found: Status) -> list[str]:
    """Columns that say something here."""
    wanted = {
        "site": any(member.site for member in found.members),
        "unanswered": any(member.unanswered for member in found.members),
        "ms": any(member.latency_ms is not None for member in found.members),
    }
    return [column for column, shown in wanted.items() if shown]


def _more(member: MemberStatus, column: str) -> str:
    if column == "site":
        return member.site or ""
    if column == "unanswered":
        return str(member.unanswered)
    return "" if member.latency_ms is None else f"{member.latency_ms:.1f}"


def facts(found: Mapping[str, object]) -> None:
    console = _console()
    for name, value in found.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        console.print(f"{name.replace('_', ' '):14} {text}", soft_wrap=True)


def sync(done: Synced) -> None:
    console = _console()
    for line in done.members:
        console.print(f"{line.name}: {line.state}, {line.finished} changes brought up to date, {line.owed} still owed")
    console.print("in sync" if done.in_sync else "NOT in sync: see `ha-admin status`")


def objects(found: Sequence[ObjectLine]) -> None:
    console = _console()
    lines = _table("class", "type", "label", "id", "uid / what it is")
    for line in found:
        lines.add_row(line.object_class, line.key_type or "", line.label, line.id, line.note)
    console.print(lines)
