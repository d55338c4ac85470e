"""``ha-admin journal …``: what happened, and what is still to be done."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated

import msgspec
import typer

from hagroup.admin import commands
from hagroup.admin.columns import without_empty
from hagroup.admin.options import (
    DEGRADED,
    USAGE,
    Json,
    PinEnv,
    PinFile,
    PinOptions,
    chosen_config,
    fail,
    print_json,
    say,
)
from hagroup.admin.show import table, when
from hagroup.config.load import load
from hagroup.config.model import GroupConfig
from hagroup.config.pins import Pin
from hagroup.core.records import Event
from hagroup.engine import about, consistency, outstanding, seal_check
from hagroup.errors import ConfigurationError
from hagroup.journal import Journal

journal_app = typer.Typer(help="The journal: what happened, and what is still to be done.", no_args_is_help=True)

_EVERYTHING = 2**31
_NAMED = 3
"""Objects that a line shows; --json has all."""
_PAUSE = 0.5
"""Seconds between looks of ``journal tail --follow``."""

Member = Annotated[str | None, typer.Option("--member", metavar="NAME", help="only events of this member")]
Object = Annotated[str | None, typer.Option("--object", metavar="LABEL|UID", help="only events about this object")]
Kind = Annotated[str | None, typer.Option("--event", metavar="TEXT", help="only kinds of event with this text")]
Since = Annotated[str | None, typer.Option("--since", metavar="TIME", help="not before, e.g. 2026-01-31 or ...T12:00")]
Until = Annotated[str | None, typer.Option("--until", metavar="TIME", help="not after")]


class ShownEvent(msgspec.Struct, frozen=True):
    """One event in ``--json``; fields are added, never renamed."""

    number: int
    time: str
    event: str
    member: str | None
    text: str
    data: dict[str, str]


class _Filter(msgspec.Struct, frozen=True):
    member: str | None
    objects: frozenset[str] | None
    kind: str | None
    since: float
    until: float

    def passes(self, event: Event) -> bool:
        return (
            (self.member is None or event.member == self.member)
            and (self.objects is None or not self.objects.isdisjoint(about.objects_in(event)))
            and (self.kind is None or self.kind in event.kind)
            and self.since <= event.time <= self.until
        )


def _moment(text: str | None, default: float) -> float:
    if text is None:
        return default
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        fail(f"{text!r} is not a time such as 2026-01-31 or 2026-01-31T12:00", USAGE)
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _shown(event: Event) -> ShownEvent:
    when = datetime.fromtimestamp(event.time, UTC).isoformat(timespec="seconds")
    return ShownEvent(event.number, when, event.kind, event.member, event.text, event.data)


def _line(event: Event) -> tuple[str, str, str, str, str]:
    shown = _shown(event)
    return str(shown.number), when(shown.time), shown.event, shown.member or "", shown.text + _named(event)


def _named(event: Event) -> str:
    """The objects in it, as far as a line goes."""
    found = about.objects_in(event)
    some = [f"{label!r} {uid}" for uid, label in list(found.items())[:_NAMED]]
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f" ({', '.join(some)}{more})" if some else ""


_COLUMNS = ("number", "time (UTC)", "event", "member", "what")


@journal_app.command("list")
def journal_list(
    member: Member = None,
    about_object: Object = None,
    event: Kind = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="the newest so many")] = _EVERYTHING,
    as_json: Json = False,
) -> None:
    """List events, oldest first. Times without a zone are UTC.

    An event names the objects that it is about (lost or back on a member, adopted, restored), at most 100. What
    programs do with their objects is no event.
    """
    times = _moment(since, 0.0), _moment(until, float("inf"))
    with commands.opened_journal(load(chosen_config())) as journal:
        events = journal.events(limit=_EVERYTHING)
        _expect_member(journal, events, member)
        chosen = _Filter(member, _meant(journal, events, about_object), event, *times)
    found = [one for one in events if chosen.passes(one)][-limit:]
    if as_json:
        print_json([_shown(one) for one in found])
    else:
        table(_COLUMNS, [_line(one) for one in found], under=("what",))


@journal_app.command("tail")
def journal_tail(
    member: Member = None,
    about_object: Object = None,
    event: Kind = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="how many to begin with")] = 10,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on with what comes; Ctrl-C ends it")] = False,
) -> None:
    """Show the newest events, one line each."""
    with commands.opened_journal(load(chosen_config())) as journal:
        found = journal.events(limit=_EVERYTHING)
        _expect_member(journal, found, member)
        chosen = _Filter(member, _meant(journal, found, about_object), event, 0.0, float("inf"))
        last = found[-1].number if found else 0
        passing = [one for one in found if chosen.passes(one)]
        _print(passing[len(passing) - min(lines, len(passing)) :])
        while follow:
            time.sleep(_PAUSE)
            found = journal.events(limit=_EVERYTHING, since=last)
            _print([one for one in found if chosen.passes(one)])
            last = found[-1].number if found else last


def _expect_member(journal: Journal, events: list[Event], name: str | None) -> None:
    """One that was removed is known by its events."""
    known = {member.name for member in journal.members()} | {event.member for event in events if event.member}
    if name is not None and name not in known:
        fail(f"the group has and had no member {name!r}; those it knows are: {', '.join(sorted(known))}", USAGE)


def _meant(journal: Journal, events: list[Event], name: str | None) -> frozenset[str] | None:
    return None if name is None else about.uids_of(journal, events, name)


def _print(events: list[Event]) -> None:
    for event in events:
        print(" ".join(part for part in _line(event)[1:] if part), flush=True)


@journal_app.command("verify")
def journal_verify(pin_file: PinFile = None, pin_env: PinEnv = None, as_json: Json = False) -> None:
    """Check that the journal agrees with itself, and that nobody changed, removed or moved an event of its log.

    The log is checked up to its last seal, which every member opens that can be logged in to without a question: by its
    `pin` source, or by --pin-file or --pin-env. What came after the seal is protected by the file's permissions alone.
    """
    config = load(chosen_config())
    with commands.opened_journal(config) as journal:
        found = consistency.check(journal)
        seals = seal_check.check(config, journal, _pins(config, (pin_file, pin_env)))
    found = msgspec.structs.replace(found, problems=[*found.problems, *seals.problems])
    if as_json:
        print_json({**msgspec.structs.asdict(found), "asked": seals.asked, "not_asked": seals.not_asked})
    else:
        for problem in found.problems:
            print(problem)
        say(f"{found.objects} objects, {found.tombstones} tombstones, {found.owed} owed changes, {found.events} events")
        say("consistent" if not found.problems else f"{len(found.problems)} problems")
        _say_sealed(found, seals)
    if found.problems:
        raise typer.Exit(DEGRADED)


def _pins(config: GroupConfig, options: PinOptions) -> dict[str, tuple[Pin, str, str]]:
    """For the members that need no question."""
    asked = options == (None, None)
    members = tuple(member for member in config.members if member.pin is not None or not asked)
    return commands.stamped_pins(msgspec.structs.replace(config, members=members), options)


def _say_sealed(found: consistency.Checked, seals: seal_check.SealChecked) -> None:
    for name, why in seals.not_asked.items():
        say(f"member {name} was not asked: {why}")
    if not found.sealed:
        say("no event is sealed yet: that nobody changed or removed one can be told by the file's permissions alone")
        return
    by = (
        f"members {', '.join(seals.asked)} were asked"
        if seals.asked
        else "no member was asked whether the seal is ours"
    )
    say(f"events up to {found.sealed} of {found.events} are sealed; {by}")


@journal_app.command("todo")
def journal_todo(
    everything: Annotated[bool, typer.Option("--all", help="what is complete too")] = False, as_json: Json = False
) -> None:
    """Show what is still to be done on which client host and member. Exit status 1: something is.

    Hosts are those on which programs use the group now (as far as the journal knows), and those with something to do.
    """
    config = load(chosen_config())
    with commands.opened_journal(config) as journal:
        found = outstanding.actions(journal, {member.name for member in config.members})
        names = [member.name for member in journal.members()]
        hosts = outstanding.hosts(journal, found)
    shown = [one for one in found if everything or not one.complete]
    if as_json:
        print_json(shown)
    elif shown:
        hosts = hosts if any(one.hosts for one in shown) else []
        names += sorted({name for one in shown for name in one.members} - set(names))
        lines = [
            (
                "" if one.number is None else str(one.number),
                when(one.date),
                one.action,
                *(one.hosts.get(name, outstanding.NOT_NEEDED) for name in hosts),
                *(one.members.get(name, outstanding.NOT_NEEDED) for name in names),
                "yes" if one.complete else "no",
            )
            for one in shown
        ]
        columns = ("number", "date (UTC)", "action", *(f"host {name}" for name in hosts), *names, "complete")
        table(*without_empty(columns, lines), under=("action",))
    else:
        say("nothing is to be done")
    if any(not one.complete for one in shown):
        raise typer.Exit(DEGRADED)


@journal_app.command("note")
def journal_note(
    text: Annotated[str, typer.Argument(help="what was done or is to be done")],
    done: Annotated[
        list[str] | None, typer.Option("--done", metavar="NAME", help="done on this member or host")
    ] = None,
    to_do: Annotated[list[str] | None, typer.Option("--to-do", metavar="NAME", help="to be done there")] = None,
    not_needed: Annotated[
        list[str] | None, typer.Option("--not-needed", metavar="NAME", help="not needed there")
    ] = None,
    action: Annotated[
        int | None, typer.Option("--action", metavar="NUMBER", help="goes on with this action of `journal todo`")
    ] = None,
) -> None:
    """Record an action of your own, or that one goes on: it shows in `journal todo` until it is done everywhere."""
    named = [*(to_do or []), *(not_needed or []), *(done or [])]
    if not text.strip():
        fail("a note without a word says nothing; nothing was recorded", USAGE)
    if twice := next((name for name in named if named.count(name) > 1), None):
        fail(f"{twice} is named twice: done, to do and not needed exclude each other", USAGE)
    given = {
        **dict.fromkeys(to_do or [], outstanding.TO_DO),
        **dict.fromkeys(not_needed or [], outstanding.NOT_NEEDED),
        **dict.fromkeys(done or [], outstanding.DONE),
    }
    with commands.opened_journal(load(chosen_config())) as journal:
        hosts = {name: status for name, status in given.items() if name in _known(journal, given, action)}
        members = {name: status for name, status in given.items() if name not in hosts}
        data = outstanding.statuses(members, hosts)
        if action is not None:
            data[outstanding.ABOUT] = str(action)
        journal.event(outstanding.NOTE, text, data=data)
        if action is not None:
            over = {name for name, status in hosts.items() if status != outstanding.TO_DO}
            outstanding.end_passed_over(journal, action, over)
    say("noted")


def _known(journal: Journal, given: dict[str, str], action: int | None) -> set[str]:
    """Those of them that are hosts. (Where a member has a host's name, it is the member.)"""
    names = {member.name for member in journal.members()}
    found = outstanding.actions(journal)
    if action is not None:
        about = next((one for one in found if one.number == action), None)
        if about is None:
            raise ConfigurationError(f"there is no action {action}; `ha-admin journal todo --all` lists them")
        names |= set(about.members)
    hosts = set(outstanding.hosts(journal, found)) - names
    unknown = sorted(set(given) - names - hosts)
    if unknown:
        raise ConfigurationError(
            f"the group has no member {unknown[0]!r}; its members are: {', '.join(sorted(names))}; hosts that are "
            f"known: {', '.join(sorted(hosts))}"
        )
    return hosts
