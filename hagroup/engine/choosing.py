"""On which member a call runs, and how many run on each: the shell of ``core.selection`` and ``core.pace``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from hagroup.config.model import Timeouts
from hagroup.core.clock import Clock
from hagroup.core.pace import Paces
from hagroup.core.selection import choose
from hagroup.engine.member import Member, Usable


class Choosing:
    """Of the members of one process; the lock is the roster's."""

    def __init__(self, lock: threading.RLock, clock: Clock, timeouts: Timeouts) -> None:
        self._lock, self._clock, self._timeouts = lock, clock, timeouts
        self._members: Mapping[str, Member] = {}
        self._level = False
        """No member is preferred to another by role, site or priority."""
        self._uses = 0
        self.here = threading.local()
        """``last``: where the calling thread was."""
        self.paces = Paces()

    def among(self, members: Mapping[str, Member]) -> None:
        """These are the members from now on."""
        self._members = members
        self._level = len({(one.standby, one.rank) for one in members.values()}) < 2

    def renew_after_fork(self, lock: threading.RLock) -> None:
        self._lock = lock
        self.here = threading.local()

    def stay(self, objects: Sequence[Usable]) -> Member | None:
        """The member where the calling thread was, if nothing can be better: none is preferred to others, and none has
        fewer outstanding calls.

        What :func:`choose` would say, without asking who of the others has the objects: the path of nearly every call.
        """
        last: Member | None = getattr(self.here, "last", None)
        if last is None or last.rests or not self._level or not last.serving:
            return None
        for item in objects:
            if not item.on(last):
                return None
        with self._lock:  # that of `changed`, taken without its Python code
            load = last.outstanding
            if load:  # an idle one need not be compared
                for member in self._members.values():
                    if member.outstanding < load and member.serving:
                        return None
            last.outstanding += 1
            self._uses += 1
            last.last_used = self._uses
        return last

    def pick(self, candidates: list[Member], *, making: bool = False) -> Member | None:
        """Choose, and count the call as outstanding there; give it back with :meth:`done`.

        :param making: for the many calls of making an object: a slow member gets them only where the wait for the
            others would be longer.
        """
        last: Member | None = getattr(self.here, "last", None)
        with self._lock:
            rested = self._rested(candidates)
            member = choose(rested, last, self._time_for_making()) if making else choose(rested, last)
            if member is not None:
                if member.rests:  # this call is its trial; until it answered, the others go elsewhere
                    member.rest_until = self._clock.boot() + self._timeouts.call + self._timeouts.probe
                member.outstanding += 1
                self._uses += 1
                member.last_used = self._uses
        self.here.last = member
        return member

    def _time_for_making(self) -> Callable[[Member], float]:
        now = self._clock.boot()
        return lambda member: (member.outstanding + 1) * self.paces.slower(member.name, now)

    def took(self, member: Member, seconds: float) -> None:
        """This member took new objects, that all were asked to take, in so many seconds."""
        with self._lock:
            self.paces.told(member.name, seconds, self._clock.boot())

    def _rested(self, candidates: list[Member]) -> list[Member]:
        """Without those that answered a probe but not a call, for a growing while: each call there may be a stall."""
        if not any(member.rests for member in candidates):
            return candidates
        now = self._clock.boot()
        return [member for member in candidates if member.rest_until <= now] or candidates

    def done(self, member: Member) -> None:
        with self._lock:
            member.outstanding -= 1
