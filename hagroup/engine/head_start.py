"""One member before the others, when a program starts: its first call needs no more than one.

Modules that start at once, each in its own worker or all under one interpreter's lock, delay each other by their
processor time. So one is connected and proved first, and the others come as soon as it can serve, or is a little late.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hagroup.core.records import Observation
from hagroup.engine.member import Member

SECONDS = 0.25
"""So late, the others are not kept waiting any longer. Less than what a call counts as worth waiting for
(``Roster.may_come``)."""
MOMENT = 0.05
"""Seconds that the first call has to itself after that."""
FIRST_TURN = 1.0
"""Seconds that a change waits for the others' first attempt to connect."""


def first(
    members: Sequence[Member], logins: dict[str, float], observations: Collection[Observation], number: int
) -> Member | None:
    """Which one; None: there is no choice. Near and active members that nobody saw fail, each as likely as the others.

    :param logins: when each member was last logged in to by an application's PIN. Where members have no PIN source,
        the one that such a PIN is checked on has to be there first.
    :param number: chooses among equals.
    """
    able = [member for member in members if member.admitted and not member.standby]
    if len(members) < 2 or not able:
        return None
    seen_to_fail = {one.member for one in observations if not one.ok}
    able = [member for member in able if member.name not in seen_to_fail] or able
    asked = [member for member in able if member.config.pin is None]
    if asked:
        return max(asked, key=lambda member: logins.get(member.name, 0.0))
    near = [member for member in able if member.rank == min(one.rank for one in able)]
    return near[number % len(near)]


class HeadStart:
    """Who waits for whom. Used under the roster's lock."""

    def __init__(self) -> None:
        self._first: Member | None = None
        self._others: list[Member] = []
        self.waiting: set[str] = set()
        """Names of those whose first attempt did not end yet."""

    def give(self, member: Member, others: Sequence[Member], now: float) -> None:
        """:param now: boot time."""
        self._first, self._others = member, list(others)
        self.waiting = {one.name for one in others}
        for one in others:
            one.next_attempt = now + SECONDS

    def served(self, member: Member, now: float) -> None:
        """That one can serve."""
        if member is self._first:
            self._first = None
            self._let_come(now + MOMENT)

    def failed(self, member: Member) -> None:
        """That one does not come."""
        if member is self._first:
            self.hurry()

    def hurry(self) -> None:
        """Somebody waits for the others."""
        self._first = None
        self._let_come(0.0)
        self._others = []

    def _let_come(self, when: float) -> None:
        for one in self._others:
            if one.name in self.waiting and not one.failures:
                one.next_attempt = min(one.next_attempt, when)

    def renew_after_fork(self) -> None:
        """In the child: what the parent began is not ours."""
        self._first, self._others, self.waiting = None, [], set()
