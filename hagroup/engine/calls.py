"""One operation on the group: choose a member, call it, and go on elsewhere when that member fails (G4, G5).

Everything that the loop needs to decide is in ``core`` (which member, what a return value means); what an operation
does on a member is a function of a life and handles. Only what may be repeated comes here: operations, and the making
of keys as session objects in a scratch session, which leaves nothing behind wherever it is cut off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from hagroup.core.calls import Ckr, DeadlinePassed, Handle, StaleGeneration
from hagroup.core.ckr import CKR
from hagroup.core.classify import Verdict, classify
from hagroup.engine.member import Life, Member, Missing, Usable
from hagroup.engine.opening import CONNECTION_LOST
from hagroup.engine.roster import Roster
from hagroup.errors import CallTimeout, GroupUnavailable, JournalUnavailable

T = TypeVar("T")
Operation = Callable[[Life, list[Handle]], T]

_OVERLOAD_PAUSE = 0.02
_CHANGE_PAUSE = 0.005
_MOST_DEATHS = 2
"""A call in which two members died or hung is not sent to a third: it may be the call that kills them."""


class Caller:
    """Runs repeatable operations with failover."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._patience = roster.config.timeouts.call

    def run(
        self,
        objects: Sequence[Usable],
        operation: Operation[T],
        *,
        logged_in: bool,
        mechanism: int | None = None,
        need_keys: bool = False,
        only: Member | None = None,
        making: bool = False,
    ) -> T:
        """Run ``operation`` on one member after the other until one gives an answer that counts.

        :param objects: what it uses; a candidate must be able to use all of them.
        :param logged_in: the virtual session is logged in (decides what USER_NOT_LOGGED_IN means).
        :param need_keys: only members whose domain keys are known.
        :param making: it is the making of an object, for which slow members are left alone.
        :raises Ckr: the application's error.
        :raises GroupUnavailable: no member can serve this now.
        :raises CallTimeout: two members died or hung in it.
        """
        attempt: _Attempt | None = None  # most calls succeed where their thread was before, and need none
        member = None if need_keys or making or only is not None else self._roster.choosing.stay(objects)
        while True:
            if member is None:
                attempt = attempt or self._begin(objects, need_keys=need_keys, only=only, making=making)
                member = attempt.next_member()
            life = member.life
            if life is None:  # it failed between being chosen and now
                self._roster.choosing.done(member)
                member = None
                continue
            again: Ckr | None = None
            try:
                try:
                    result = operation(life, [item.handle(member, life) for item in objects])
                    member.rests = 0
                    member.answers += 1
                    return result
                except Ckr as error:
                    again = error
                except DeadlinePassed as error:
                    attempt = attempt or self._begin(objects, need_keys=need_keys, only=only, making=making)
                    self._roster.timed_out(member, life)
                    attempt.died(member, error)
                except CONNECTION_LOST as error:
                    attempt = attempt or self._begin(objects, need_keys=need_keys, only=only, making=making)
                    self._roster.lost(member, life, str(error))
                    attempt.lost(member, error)
                except Missing as error:
                    attempt = attempt or self._begin(objects, need_keys=need_keys, only=only, making=making)
                    if error.uid is not None and self._look_again(member, life, error.uid):
                        attempt.come_back(member)
                    else:
                        for item in objects:
                            item.missing(member)
                        attempt.not_there(member)
            finally:
                self._roster.choosing.done(member)
            if again is not None:
                attempt = attempt or self._begin(objects, need_keys=need_keys, only=only, making=making)
                authenticate = any(item.always_authenticate for item in objects)
                verdict = classify(
                    again.rv, member.config.errors, logged_in=logged_in, always_authenticate=authenticate
                )
                attempt.answered(member, life, again, verdict, mechanism)
            member = None

    def _look_again(self, member: Member, life: Life, uid: bytes) -> bool:
        try:
            return self._roster.look_again(member, life, uid)
        except JournalUnavailable:
            return False  # others may have destroyed it: no reason to lose the member for all other objects

    def _begin(self, objects: Sequence[Usable], *, need_keys: bool, only: Member | None, making: bool) -> _Attempt:
        return _Attempt(self._roster, objects, need_keys=need_keys, only=only, making=making, patience=self._patience)


class _Attempt:
    """What one call has learnt so far."""

    def __init__(
        self,
        roster: Roster,
        objects: Sequence[Usable],
        *,
        need_keys: bool,
        only: Member | None,
        making: bool,
        patience: float,
    ) -> None:
        self._roster = roster
        self._objects = objects
        self._need_keys = need_keys
        self._only = only
        self._making = making
        self._patience = patience
        self._started: float | None = None
        self._tried: set[str] = set()
        self._refound: set[str] = set()
        self._deaths = 0
        self._come_back: set[str] = set()
        """Members whose worker died in this call: where nobody else is left, the next worker may be asked, once."""
        self._answer: Ckr | None = None
        self._missed: set[str] = set()
        self._only_missing = True
        """``_answer`` says no more than that nobody has the object."""
        self._ambiguous = False
        self._overloaded = False

    def next_member(self) -> Member:
        while True:
            candidates = [member for member in self._roster.members.values() if self._can(member)]
            member = self._roster.choosing.pick(candidates, making=self._making) if candidates else None
            if member is not None:
                return member
            self._none_left()

    def _can(self, member: Member) -> bool:
        if not member.serving or member.name in self._tried:
            return False
        if self._only is not None and member is not self._only:
            return False
        if self._need_keys and not self._roster.keys.usable(member):
            return False
        return all(item.on(member) for item in self._objects)

    def _none_left(self) -> None:
        """Nobody to ask: the answer that we have, or a bounded wait for a member that is about to come."""
        if self._started is None:
            self._started = time.monotonic()
        if (self._answer is None or self._only_missing) and self._moved(self._started + self._patience):
            return
        if self._answer is not None and not self._overloaded:
            raise self._answer
        left = self._started + self._patience - time.monotonic()
        if self._overloaded and left > 0:
            time.sleep(_OVERLOAD_PAUSE)
            self._tried.clear()
            self._overloaded = False
            return
        if self._answer is not None:
            raise self._answer

        self._tried -= self._come_back
        self._come_back.clear()

        def somebody() -> bool:
            return any(self._can(member) for member in self._roster.members.values()) or not self._roster.may_come()

        if left > 0:
            self._roster.wake()
            self._roster.wait_for_change(left, somebody)
            if any(self._can(member) for member in self._roster.members.values()):
                return
        raise GroupUnavailable(f"no member can serve this call now: {self._why()}")

    def _moved(self, deadline: float) -> bool:
        """An object was changed since this call read it, or is being changed: then no member may have it in its present
        state for a moment, and one of them soon has (G4). True: choose again."""
        while time.monotonic() < deadline:
            if any(item.renew() for item in self._objects):
                self._tried -= self._missed
                self._missed.clear()
                self._answer, self._only_missing = None, True
                return True
            if not any(item.changing for item in self._objects):
                break
            time.sleep(_CHANGE_PAUSE)
        return False

    def _why(self) -> str:
        parts = []
        for member in self._roster.members.values():
            state = member.state.value
            if member.serving and member.name in self._tried:
                state = "failed in this call"
            elif member.serving:
                state = "does not have the object in its present state"
            elif member.reason:
                state = f"{state} ({member.reason})"
            parts.append(f"{member.name} {state}")
        return ", ".join(parts) or "the group has no members"

    def died(self, member: Member, error: Exception) -> None:
        self._tried.add(member.name)
        self._deaths += 1
        if self._deaths >= _MOST_DEATHS:
            raise CallTimeout(f"two members died or did not answer in this call, a third is not asked: {error}")

    def lost(self, member: Member, error: Exception) -> None:
        """Its connection ended: in this call, or before it, which tells nothing of this call and counts as no death."""
        if getattr(error, "sent", not isinstance(error, StaleGeneration)):
            self._come_back.add(member.name)
            self._refound.add(member.name)
            self.died(member, error)
        else:
            self.come_back(member)

    def come_back(self, member: Member) -> None:
        """Its connection is made anew, and it may be asked again in this call, once."""
        if member.name in self._refound:
            self._tried.add(member.name)
        self._refound.add(member.name)

    def not_there(self, member: Member) -> None:
        self._tried.add(member.name)
        self._missed.add(member.name)
        if self._answer is None:
            self._answer = Ckr(CKR.OBJECT_HANDLE_INVALID, "C_FindObjects")

    def answered(self, member: Member, life: Life | None, error: Ckr, verdict: Verdict, mechanism: int | None) -> None:
        """Decide on what a member returned: raise the application's error, or go on elsewhere."""
        assert life is not None
        if verdict is Verdict.APPLICATION:
            raise error
        if verdict is Verdict.STALE_HANDLE and member.name not in self._refound:
            self._refound.add(member.name)
            for item in self._objects:
                item.forget(member, life)
            return
        self._tried.add(member.name)
        if verdict in (Verdict.MEMBER_FAILED, Verdict.SESSION_LOST, Verdict.LIBRARY_RESET):
            self._roster.lost(member, life, str(error))
            if verdict is not Verdict.MEMBER_FAILED:
                self._tried.discard(member.name)  # it may come back within this call, once
                if member.name in self._refound:
                    self._tried.add(member.name)
                self._refound.add(member.name)
        elif verdict is Verdict.QUARANTINE:
            self._roster.quarantine(member, str(error))
        elif verdict is Verdict.OVERLOAD:
            self._overloaded, self._only_missing = True, False
            self._answer = error
        elif verdict is Verdict.AMBIGUOUS:
            if self._ambiguous:
                raise error
            self._ambiguous, self._only_missing = True, False
            self._answer = error
        elif verdict is Verdict.CAPABILITY:
            self._answer, self._only_missing = error, False
            if mechanism is not None and mechanism in life.mechanisms:
                for item in self._objects:
                    item.suspect_replica(member)
        elif not self._objects and life.keys is not None:  # a handle that stays stale, and is none of an object
            self._roster.keys.check(member, life)
        else:
            for item in self._objects:
                item.missing(member)
            self.not_there(member)
