"""What is still to be done on which member, in the shape of T's table 5.1: date, action, per member done, to do or not
needed, complete? From what the journal owes, from its members' states, and from what people and commands wrote down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime

import msgspec

from hagroup.core.records import Event, LoginState, MemberRecord, Membership, OwedKind, OwedRow
from hagroup.journal.api import Journal

DONE, TO_DO, NOT_NEEDED = "done", "to do", "not needed"
NOTE = "note"
ABOUT = "action"
"""In the data of a later note: the number of the action that it goes on with."""
_MEMBER = "member:"

_EVERYTHING = 2**31
_OBJECTS = {
    OwedKind.INSTALL: "objects to be made there",
    OwedKind.SET: "attribute changes to be made there",
    OwedKind.DESTROY: "objects to be destroyed there",
}


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """One line; fields are added, never renamed."""

    number: int | None
    """Of the note or event, for ``journal note --action``; None: it ends by itself."""
    date: str
    action: str
    members: dict[str, str]
    """``done``, ``to do`` (with a number of objects where it has one) or ``not needed``."""
    complete: bool


def statuses(members: Mapping[str, str]) -> dict[str, str]:
    """As data of an event."""
    return {_MEMBER + name: status for name, status in members.items()}


def _statuses_in(event: Event) -> dict[str, str]:
    return {key.removeprefix(_MEMBER): value for key, value in event.data.items() if key.startswith(_MEMBER)}


def actions(journal: Journal) -> list[Action]:
    """All that was written down, oldest first, then what the group itself owes."""
    members = journal.members()
    return [*_written(journal), *_states(members), *_logins(journal), *_owed(members, journal.owed())]


def _date(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).isoformat(timespec="seconds")


def _written(journal: Journal) -> list[Action]:
    found: dict[int, Action] = {}
    for event in journal.events(limit=_EVERYTHING):
        about = event.data.get(ABOUT)
        if about is not None and int(about) in found:
            before = found[int(about)]
            members = {**before.members, **_statuses_in(event)}
            complete = TO_DO not in members.values()
            found[int(about)] = msgspec.structs.replace(before, members=members, complete=complete)
        elif event.kind == NOTE or _statuses_in(event):
            members = _statuses_in(event)
            found[event.number] = Action(
                number=event.number,
                date=_date(event.time),
                action=event.text if event.kind == NOTE else f"{event.kind}: {event.text}",
                members=members,
                complete=TO_DO not in members.values(),
            )
    return list(found.values())


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
