"""What the event log says of a journal that was moved on purpose: its members' tokens show the epoch before, once."""

from __future__ import annotations

from collections.abc import Iterable

from hagroup.core.records import Event, MemberRecord

JOURNAL_MOVED = "journal moved"
MEMBER_FOLLOWED = "member followed the journal"
_BEFORE, _AFTER, _CONFIRMED = "epoch_before", "epoch", "confirmed:"


def moved(before: str, after: str) -> dict[str, str]:
    """As data of either event."""
    return {_BEFORE: before, _AFTER: after}


def confirmed(members: Iterable[MemberRecord]) -> dict[str, str]:
    """What each token had shown when the journal was moved, as further data of that event."""
    return {_CONFIRMED + member.name: str(member.confirmed) for member in members}


def is_expected(events: Iterable[Event], member: str, *, shown: tuple[str, int], epoch: str) -> bool:
    """Whether a token that shows this epoch and change is as the move left it: the journal of ``epoch`` was moved from
    that very epoch, its token had shown no later change then, and it was not looked through for that before. (Seen a
    second time, it was put back to before the move.)"""
    data = moved(shown[0], epoch).items()
    about = [event for event in events if data <= event.data.items()]
    return any(
        event.kind == JOURNAL_MOVED and int(event.data.get(_CONFIRMED + member, "0")) <= shown[1] for event in about
    ) and not any(event.kind == MEMBER_FOLLOWED and event.member == member for event in about)
