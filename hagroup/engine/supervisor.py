"""What each process does in the background: connect members, bring them up to date, finish what the dead left.

A thread that only decides what is due; the work itself runs on the roster's pool. It never holds up a call of the
application: calls wait, if at all, for a member's state, not for this thread.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import wait
from functools import partial

from hagroup.config import logging
from hagroup.core.clock import Clock
from hagroup.core.records import WATCHDOG, Membership, Observation, OwedKind
from hagroup.core.states import State
from hagroup.engine import recent
from hagroup.engine.configuration import Keeper
from hagroup.engine.member import Life, Member
from hagroup.engine.opening import START_TIMEOUT
from hagroup.engine.replicate import Replicator
from hagroup.engine.resync import Resync
from hagroup.engine.roster import Roster
from hagroup.engine.sealing import Sealer
from hagroup.engine.view import View
from hagroup.errors import JournalUnavailable
from hagroup.journal.api import Journal

log = logging.get_logger(__name__)

TICK = 1.0
"""Seconds between looks when nothing happens."""
_GLANCE = 0.05
"""Seconds until it is looked again whether a member has done what it owes; then twice as long each time."""
_LOOK = 0.5
"""Seconds between looks whether another process does what a member owes."""
WITNESSES = 2
"""So many other processes must have seen a member fail before this one looks for itself."""


def doubted(
    observations: Iterable[Observation], own: str, alive: Callable[[str], bool], *, site: str | None = None
) -> dict[str, float]:
    """Members that enough other living processes saw fail, and since when they are enough (boot time).

    :param site: where this process is. What others see from elsewhere may be the way between: it does not count. The
        word of a watchdog of this site is enough alone.
    """
    seen: dict[str, list[float]] = {}
    since: dict[str, float] = {}
    for one in observations:
        if not one.ok and one.site == site and one.observer != own and alive(one.observer):
            seen.setdefault(one.member, []).append(one.boot_time)
            if one.kind == WATCHDOG:
                since[one.member] = max(one.boot_time, since.get(one.member, 0.0))
    for name, times in seen.items():
        if len(times) >= WITNESSES:
            since[name] = max(sorted(times)[-WITNESSES], since.get(name, 0.0))
    return since


class Supervisor:
    """One per process and group."""

    def __init__(
        self,
        roster: Roster,
        view: View,
        journal: Journal,
        replicator: Replicator,
        clock: Clock,
        at_exit: Callable[[], None],
    ) -> None:
        self._at_exit = at_exit
        self._roster = roster
        self._view = view
        self._journal = journal
        self._replicator = replicator
        self._clock = clock
        self.resync = Resync(roster, view, journal, replicator, clock)
        self.sealer = Sealer(roster, view, journal, clock)
        self.keeper = Keeper(roster, view, journal)
        self._event = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="hagroup-supervisor", daemon=True)
        self._observed = -1
        self._doubted: dict[str, float] = {}
        self._answers: dict[str, int] = {}

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._event.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)

    def wake(self) -> None:
        """Look now."""
        self._event.set()

    def _run(self) -> None:
        main = threading.main_thread()
        while not self._stopping:
            if not main.is_alive():  # the program is at its end: what hangs in the background must not hold it up
                self._at_exit()
                return
            try:
                self.tick()
            except JournalUnavailable as error:
                log.warning("journal.unavailable", error=str(error))
            except Exception:
                log.exception("supervisor failed; it goes on")
            pause = self._pause()
            if not self._event.wait(pause) and pause >= TICK:
                logging.prepare()  # a quiet second: no call waits for a member to come
            self._event.clear()

    def _pause(self) -> float:
        due = self._roster.next_due()
        if due is None:
            return TICK
        return min(TICK, max(0.01, due - self._clock.boot()))

    def tick(self) -> None:
        """One look: start what is due."""
        for member in list(self._roster.members.values()):
            life = member.life
            if life is not None and not life.connection.alive:  # it died while nobody called it
                self._roster.lost(member, life, "its worker ended")
        self._roster.bury_the_dead()
        for member in self._roster.due():
            self._roster.submit(self._roster.connect, member)
        self._view.refresh()
        self._roster.follow_journal()
        self._heed_observations()
        for member in list(self._roster.members.values()):
            if member.state in (State.RESYNCING, State.IN_SERVICE) and not member.busy and self._ready(member):
                self._resync(member)
        if self._any_keys() and self.resync.recover_intents():
            self.wake()  # members may owe something by it
        if self.sealer.due():
            self._roster.submit(self.sealer.seal)
            self._roster.submit(self.keeper.keep)

    def _heed_observations(self) -> None:
        """Others saw a member fail: look for ourselves. Never more than that: their own workers may be the broken part
        (DESIGN.md 4.5)."""
        number = self._journal.view_number()
        if number != self._observed:
            self._observed = number
            found, own = self._journal.observations(), self._journal.owner
            self._doubted = doubted(found, own, self._journal.owner_alive, site=self._roster.site)
        now = self._clock.boot()
        heartbeat = self._roster.config.watchdog.interval  # for so long an own success outweighs what others saw
        for member in list(self._roster.members.values()):
            answers, life = member.answers, member.life
            if answers != self._answers.get(member.name):
                self._answers[member.name] = answers
                member.last_success = now
            if life is None or member.state is not State.IN_SERVICE:
                continue
            if member.last_success < min(self._doubted.get(member.name, 0.0), now - heartbeat):
                log.info("member.doubted", member=member.name)
                self._roster.timed_out(member, life, stalled=False)

    def _any_keys(self) -> bool:
        return any(m.life is not None and m.life.keys is not None for m in self._roster.members.values())

    def _ready(self, member: Member) -> bool:
        life = member.life
        if life is None or life.keys is None:
            return False
        if member.state is State.RESYNCING:
            return True
        return self.resync.has_work(member)

    def _resync(self, member: Member) -> None:
        if self._take(member, 0.0):
            self._roster.submit(self._resync_task, member)

    def _resync_task(self, member: Member, *, patient: bool = False) -> None:
        life = member.life
        try:
            self.resync.bring_up_to_date(member, patient=patient)
        finally:
            with self._roster.changed:
                member.busy = False
                if life is not None:
                    life.resynced = True
                self._roster.changed.notify_all()

    # -- on demand -----------------------------------------------------------------------------------------
    def settle(self) -> None:
        """Return when every member is connected, failed or quarantined."""
        self.wake()
        bound = START_TIMEOUT + 2 * self._roster.config.timeouts.call
        self._roster.wait_for_change(bound, lambda: not self._roster.may_come())

    def sync_now(self) -> None:
        """Work off what every connected member owes; rows that were put off too."""
        self.resync.recover_intents()
        self.sealer.seal()
        for member in list(self._roster.members.values()):
            if member.state in (State.RESYNCING, State.IN_SERVICE):
                self._work_off(member)
        self.keeper.keep(insist=True)

    def _work_off(self, member: Member) -> None:
        """As long as that leaves less to do, whoever does it: the background or another process may be at it, and need
        longer on a large and slow token than one call may."""
        before = math.inf
        while True:
            if self._take(member, self._roster.config.timeouts.generate):
                self._resync_task(member, patient=True)
            left = len(self._journal.owed(member.name))
            if not left or (left >= before and not self._becomes_less(member, left)):
                return
            before = left

    def _becomes_less(self, member: Member, owed: int) -> bool:
        """Another process works it off, or may as soon as the member is connected anew."""
        end = self._clock.boot() + self._roster.config.timeouts.generate
        while self.resync.is_at_it(member) or self._roster.may_come(member):
            if len(self._journal.owed(member.name)) < owed:
                return True
            if self._clock.boot() >= end:
                return False
            self._roster.wait_for_change(_LOOK, lambda: False)
        return len(self._journal.owed(member.name)) < owed

    def _take(self, member: Member, timeout: float) -> bool:
        """Wait until no background task runs for the member, and be that task."""
        with self._roster.changed:
            if self._roster.changed.wait_for(lambda: not member.busy, timeout):
                member.busy = True
                return True
        return False

    def clean_now(self) -> None:
        """An object was given up: what members hold of it goes now."""
        self._clean(self._roster.members.values())

    def _clean(self, members: Iterable[Member], *, most: float | None = None) -> None:
        """:param most: seconds to wait for it; what takes longer goes on in the background."""
        end = self._clock.boot() + (self._roster.config.timeouts.call if most is None else most)
        for member in list(members):
            if member.serving and self._ready(member) and self._take(member, max(0.0, end - self._clock.boot())):
                wait([self._roster.submit(self._resync_task, member)], timeout=max(0.0, end - self._clock.boot()))

    def finish(self, uid: bytes, begun: float) -> None:
        """Not all members took a change of an object. Those that were connected anew since it began, to look at their
        tokens again, or just are, do what they owe before this returns, within a call's bound.

        :param begun: boot time.
        """
        members = self._roster.members.values()
        coming = [
            member for member in members if member.looked_at_again or (member.serving and member.entered >= begun)
        ]
        end, pause = self._clock.boot() + self._roster.config.timeouts.call, _GLANCE
        while coming := self._still_owing(uid, coming):
            left = end - self._clock.boot()
            if left <= 0:
                return
            self._roster.wait_for_change(left, partial(self._settled, coming))
            self._clean(coming, most=max(0.0, end - self._clock.boot()))
            if self._still_owing(uid, coming):  # another process is at that member, or it has not come yet
                self._roster.wait_for_change(min(pause, left), lambda: False)
                pause *= 2

    def _settled(self, members: Iterable[Member]) -> bool:
        return all(member.serving or not self._roster.may_come(member) for member in members)

    def _still_owing(self, uid: bytes, members: Iterable[Member]) -> list[Member]:
        """Those that could do now what they owe."""
        _, owed = self._journal.placement(uid)
        rows = [(member, owed[member.name]) for member in members if member.name in owed]
        return [
            member
            for member, row in rows
            if row.reason is None and row.doubt_since is None and (member.serving or self._roster.may_come(member))
        ]

    def recover_now(self) -> None:
        """An intent of a dead process stands in the way."""
        self.resync.recover_intents()

    def unresolved(self, intent: str) -> None:
        """A call of this process could not find out what became of its intent."""
        self.resync.unresolved(intent)
        self.wake()

    def interrupted(self, mark: str) -> None:
        """A call of this process does not know whether the journal recorded the intent with this mark."""
        self.resync.interrupted(mark)
        self.wake()

    def replace(self, uid: bytes, members: list[str]) -> None:
        """Members that refused a change that others took are owed a replacement (DESIGN.md 4.3)."""
        if members:
            self._journal.owe([(name, uid, OwedKind.INSTALL) for name in members], reason=None)
            self.wake()

    # -- reports from operations ---------------------------------------------------------------------------
    def report_missing(self, member: Member, uid: bytes) -> None:
        """An object that the journal has on ``member`` was not found there: repair it in the background."""
        self._roster.submit(self._look_for, member, uid)

    def report_doubtful(self, member: Member, uid: bytes) -> None:
        """Another member can use an object that this one cannot: prove it there."""
        self._roster.submit(self._prove, member, uid)

    def _look_for(self, member: Member, uid: bytes) -> None:
        life = member.life
        if life is not None and self._replicator.lacks(member, uid):
            self.repair(member, life, {uid: OwedKind.INSTALL})

    def repair(self, member: Member, life: Life, found: Mapping[bytes, OwedKind]) -> bool:
        """What is not on a member as it should be is owed there. False: that was no time to conclude anything.

        :param life: of before the search that found nothing.
        """
        if not (self._roster.is_still_whole(member, life) and self.resync.we_are_current(member)):
            return False
        rows = [(member.name, uid, kind) for uid, kind in found.items()]
        recent.report(self._journal, member.name, rows)
        self._journal.owe(rows, reason=None)
        self.wake()
        return True

    def _prove(self, member: Member, uid: bytes) -> None:
        life = member.life
        if life is None or self._view.members[member.name].membership is not Membership.ADMITTED:
            return
        if not self._replicator.proves(member, uid):
            self.repair(member, life, {uid: OwedKind.INSTALL})
