"""What is still to be done on which client host and member, in the shape of T's table 5.1: date, action, per host and
member done, to do or not needed, complete? From what the journal owes, from its members' states, from clients that a
change did not wait for, from this host's configuration, and from what people and commands wrote down.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime

import msgspec

from hagroup.core.passed_over import clients_in, hosts_left
from hagroup.core.records import Event, LoginState, MemberRecord, Membership, OwedKind, OwedRow
from hagroup.journal.api import Journal

DONE, TO_DO, NOT_NEEDED = "done", "to do", "not needed"
NOTE = "note"
ABOUT = "action"
"""In the data of a later note: the number of the action that it goes on with."""
_MEMBER, _HOST = "member:", "host:"

_EVERYTHING = 2**31
_OBJECTS = {
    OwedKind.INSTALL: "objects to be made there",
    OwedKind.SET: "attribute changes to be made there",
    OwedKind.DESTROY: "objects to be destroyed there",
}


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """One line; fields are added, never renamed."""

    number: int | None
    """Of the note or event, for ``journal note --action``; None: it ends by itself, and only so."""
    date: str
    action: str
    members: dict[str, str]
    """``done``, ``to do`` (with a number of objects where it has one) or ``not needed``."""
    complete: bool
    hosts: dict[str, str] = {}
    """The same for hosts on which programs use the group."""


def statuses(members: Mapping[str, str], hosts: Mapping[str, str] | None = None) -> dict[str, str]:
    """As data of an event."""
    return {
        **{_MEMBER + name: status for name, status in members.items()},
        **{_HOST + name: status for name, status in (hosts or {}).items()},
    }


def _statuses_in(event: Event, kind: str) -> dict[str, str]:
    return {key.removeprefix(kind): value for key, value in event.data.items() if key.startswith(kind)}


def actions(journal: Journal, configured: Collection[str] | None = None) -> list[Action]:
    """All that was written down, oldest first, then what the group itself owes.

    :param configured: members in hagroup.toml of this host; None: that is not looked at.
    """
    members = journal.members()
    return [
        *_written(journal),
        *([] if configured is None else _not_configured(members, configured)),
        *_states(members),
        *_logins(journal),
        *_owed(members, journal.owed()),
    ]


def hosts(journal: Journal, found: Iterable[Action]) -> list[str]:
    """Where clients of the journal run, and those that these actions are about."""
    return sorted({client.host for client in journal.clients()} | {host for one in found for host in one.hosts})


def end_passed_over(journal: Journal, action: int, names: Collection[str]) -> None:
    """A person says of these hosts that their programs, which a change did not wait for, are over."""
    for event in journal.events(limit=_EVERYTHING, since=action - 1)[:1]:
        journal.forget_passed_over([client for client, host in clients_in(event.data).items() if host in names])


def _date(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).isoformat(timespec="seconds")


def _written(journal: Journal) -> list[Action]:
    found: dict[int, Action] = {}
    left = {one.owner for one in journal.passed_over()}
    for event in journal.events(limit=_EVERYTHING):
        about = event.data.get(ABOUT)
        members, hosts = _statuses_in(event, _MEMBER), _statuses_in(event, _HOST)
        hosts |= {host: TO_DO if still else DONE for host, still in hosts_left(event.data, left).items()}
        if about is not None and int(about) in found:
            before = found[int(about)]
            found[int(about)] = _with(before, {**before.members, **members}, {**before.hosts, **hosts})
        elif event.kind == NOTE or members or hosts:
            text = event.text if event.kind == NOTE else f"{event.kind}: {event.text}"
            action = Action(
                number=event.number, date=_date(event.time), action=text, members={}, complete=True, hosts={}
            )
            found[event.number] = _with(action, members, hosts)
    return list(found.values())


def _with(action: Action, members: dict[str, str], hosts: dict[str, str]) -> Action:
    complete = TO_DO not in (*members.values(), *hosts.values())
    return msgspec.structs.replace(action, members=members, hosts=hosts, complete=complete)


def _not_configured(members: list[MemberRecord], configured: Collection[str]) -> list[Action]:
    """Of this host: what others have in their files is theirs."""
    here = socket.gethostname()
    text = "add its [[member]] section to hagroup.toml of this host, or `ha-admin member remove` it"
    return [
        Action(number=None, date="", action=text, members={member.name: TO_DO}, complete=False, hosts={here: TO_DO})
        for member in members
        if member.name not in configured
    ]


def _states(members: list[MemberRecord]) -> list[Action]:
    found = []
    for member in members:
        if member.membership is not Membership.ADMITTED:
            text = {
                Membership.JOINING: "joining: to be brought up to date before it serves",
                Membership.OUT_OF_SYNC: f"to be brought up to date before it serves: {member.reason}",
                Membership.QUARANTINED: f"quarantined, a person acts, then `ha-admin member resume`: {member.reason}",
            }[member.membership]
        elif member.draining:
            text = f"out of service until `ha-admin member resume {member.name}`"
        else:
            continue
        found.append(_own(_date(member.since), text, {member.name: TO_DO}))
    return found


def _own(date: str, text: str, members: dict[str, str]) -> Action:
    return Action(number=None, date=date, action=text, members=members, complete=False)


def _logins(journal: Journal) -> list[Action]:
    return [
        _own("", f"correct the PIN that was refused ({login.source})", {login.member: TO_DO})
        for login in journal.logins()
        if login.state is LoginState.REFUSED
    ]


def _owed(members: list[MemberRecord], rows: list[OwedRow]) -> list[Action]:
    counts = Counter((row.kind, row.member) for row in rows)
    found = []
    for kind, text in _OBJECTS.items():
        owing = {member.name: counts[(kind, member.name)] for member in members}
        if any(owing.values()):
            shown = {name: f"{TO_DO} ({count})" if count else DONE for name, count in owing.items()}
            found.append(_own("", text, shown))
    return found
