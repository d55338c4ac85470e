"""The members of this process: connecting, failing, probing. Every change of a member's state is here."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import msgspec

from hagroup.config.load import load
from hagroup.config.logging import get_logger
from hagroup.config.model import GroupConfig, MemberConfig
from hagroup.config.pins import Pin
from hagroup.core.attributes import CKA
from hagroup.core.calls import Ckr, DeadlinePassed
from hagroup.core.ckr import CKR
from hagroup.core.clock import Clock
from hagroup.core.records import MemberRecord, Membership, Observation, Role
from hagroup.core.selection import rank
from hagroup.core.states import Event, State
from hagroup.engine import head_start, manifest
from hagroup.engine.choosing import Choosing
from hagroup.engine.key_search import KeySearch
from hagroup.engine.lanes import Lanes
from hagroup.engine.login import APPLICATION, PIN_ERRORS, LoginHeld, PinStore, last_logins, log_in
from hagroup.engine.member import Life, Member
from hagroup.engine.opening import CONNECTION_LOST, open_life
from hagroup.engine.view import View
from hagroup.errors import ConfigurationError, DomainMismatch, HAError, JournalUnavailable, MemberQuarantined
from hagroup.journal.api import Journal
from hagroup.members import ModuleProblem

log = get_logger(__name__)

T = TypeVar("T")

CLOSE_GRACE = 5.0
"""Seconds that the end of a process waits for what it does in the background."""
GENERATIONS = 1_000_000
"""Room that each life has for the generations within it (a logout moves it)."""
_BACKOFF = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SHORT_LIFE = 5.0
"""A connection that ends sooner counts as a failed attempt: a member that fails whenever it is used would otherwise be
started again and again without a pause."""
_SOON = 0.5
"""A connection attempt that is this near is worth waiting for."""
_GLANCE = 0.05
"""Seconds between looks at whether the calls in a worker that is to be killed have ended."""
_LONGEST_REST = 30.0
_MISSED_LATELY = 60.0
_MOST_MISSED = 1000
PIN_CHANGED = "pin changed"
"""Kind of the event that tells other processes that the PIN they hold is an old one."""


def thread_pool() -> Executor:
    """The threads that work for the members of one process."""
    return ThreadPoolExecutor(max_workers=64, thread_name_prefix="hagroup")


class Roster:
    """All members, the pool of threads that works for them, and the one lock under which their state changes."""

    def __init__(
        self,
        config: GroupConfig,
        journal: Journal,
        view: View,
        clock: Clock,
        workers: Callable[[], Executor] = thread_pool,
        *,
        one_first: bool = False,
    ) -> None:
        """:param one_first: connect one member before the others, for a quick first call (see ``head_start``)."""
        self._workers = workers
        self.config = config
        self.journal = journal
        self.view = view
        self.clock = clock
        self.pins = PinStore(keep=config.group.recovery_mode == "enhanced")
        self._events_seen = max((event.number for event in journal.events(limit=1)), default=0)
        self.site = config.group.site
        self.members: dict[str, Member] = {}
        self.tasks = self._workers()
        self._running: set[Future[Any]] = set()
        self.lanes = Lanes(self.run)
        self._lock = threading.RLock()
        self.choosing = Choosing(self._lock, clock, config.timeouts)
        self.changed = threading.Condition(self._lock)
        """Notified at every change of a member's state."""
        self.on_lost: Callable[[Member], None] = lambda member: None
        self.wake: Callable[[], None] = lambda: None
        self.pause_before: Callable[[int], float] = lambda failures: _BACKOFF[min(failures, len(_BACKOFF) - 1)]
        """Seconds before a connection attempt after so many failed ones; the watchdog has its own."""
        self._generation = 0
        self.followed = -1
        """The members are as the view was when it had moved so often."""
        self._closed = False
        self.head_start = head_start.HeadStart()
        self.keys = KeySearch(self)
        view.dropped = self._forget_handles
        self.follow_journal()
        if one_first:
            self._let_one_go_first()

    def _let_one_go_first(self) -> None:
        members = list(self.members.values())
        logins, seen = last_logins(self.journal), self.journal.observations()
        one = head_start.first(members, logins, seen, os.getpid())
        if one is not None:
            others = [member for member in members if member is not one]
            self.head_start.give(one, others, self.clock.boot())

    def all_had_a_turn(self) -> None:
        """What concerns all members waits, for a moment, until those that were not connected first had their turn."""
        if self.head_start.waiting:
            with self.changed:
                self.head_start.hurry()
            self.wake()
            self.wait_for_change(head_start.FIRST_TURN, lambda: not self.head_start.waiting)
            self.head_start.waiting.clear()  # that was the moment

    def _forget_handles(self, uids: Collection[bytes] | None) -> None:
        """What moved in the journal may have been made anew on a member: its handle there may be another key's."""
        for member in self.members.values():
            life = member.life
            if life is None:
                continue
            if uids is None:
                life.handles.clear()
                continue
            for uid in uids:
                life.handles.pop(uid, None)

    # -- membership as the journal has it ------------------------------------------------------------------
    def follow_journal(self) -> None:
        """Take over roles, admissions, draining and quarantine from the journal's member records."""
        if self.followed == self.view.moved:
            return
        with self.changed:
            moved = self.view.moved
            if moved == self.followed:  # another thread did it meanwhile
                return
            configured = self._configured()
            members: dict[str, Member] = {}
            for name, record in self.view.members.items():
                if name not in configured:
                    continue
                member = self.members.get(name)
                if member is None:
                    config = configured[name]
                    near_first = rank(self.site, config.site, config.priority)
                    member = Member(config, rank=near_first, standby=False)
                members[name] = member
                self._apply(member, record)
            gone = [member for name, member in self.members.items() if name not in members]
            self.members = members  # anew: other threads go through the old one without a lock
            self.choosing.among(members)
            self.followed = moved  # not before: no other thread goes on with what was
            for member in gone:
                self._end(member)
            self.keys.heed_rotation()
            self.changed.notify_all()

    def _configured(self) -> dict[str, MemberConfig]:
        """The configuration's members; read from the file again where the journal lists one that it did not have when
        this process started: so an application sees a new member without a restart."""
        listed = self.view.members
        known = tuple(member for member in self.config.members if member.name in listed)
        if len(known) < len(listed):
            try:
                now = load(self.config.path).members
            except ConfigurationError as error:
                log.error("configuration.not-read", reason=str(error))
                now = ()
            names = {member.name for member in known}
            known += tuple(member for member in now if member.name in listed and member.name not in names)
            for name in sorted(set(listed) - {member.name for member in known}):
                log.error("member.not-configured", member=name, file=str(self.config.path))
        self.config = msgspec.structs.replace(self.config, members=known)
        return {member.name: member for member in known}

    def _apply(self, member: Member, record: MemberRecord) -> None:
        member.standby = record.role is Role.STANDBY
        member.admitted = (
            record.membership is Membership.ADMITTED and record.role is not Role.BACKUP and not record.draining
        )
        if record.membership is Membership.QUARANTINED:
            member.reason = record.reason
            if member.happened(Event.QUARANTINE):
                self._end(member)
        elif member.state is State.QUARANTINED:
            member.happened(Event.RELEASE)
            member.next_attempt = 0.0
            self.wake()
        elif record.membership is not Membership.ADMITTED:
            member.happened(Event.NOT_ADMITTED)
        elif member.state is State.RESYNCING:
            member.happened(Event.ADMITTED)

    def journal_behind(self) -> str | None:
        """Why this journal must decide nothing any more: some member has seen more than it knows (DESIGN.md 4.6)."""
        return next((one.journal_behind for one in self.members.values() if one.journal_behind is not None), None)

    # -- choosing ------------------------------------------------------------------------------------------
    def serving(self) -> list[Member]:
        return [member for member in self.members.values() if member.serving]

    def wait_for_change(self, timeout: float, unless: Callable[[], bool]) -> bool:
        """Wait until a member's state changes so that ``unless`` holds. False: it did not in ``timeout`` seconds."""
        with self.changed:
            return self.changed.wait_for(unless, timeout)

    def may_come(self, only: Member | None = None) -> bool:
        """Some member (this one) is being connected, probed or resynced now: worth waiting for, within a call's
        bound."""
        soon = self.clock.boot() + _SOON
        return any(
            (member.busy and not member.serving)
            or member.learning
            or member.about_to_be_resynced
            or member.state is State.SUSPECT
            or (member.state in (State.JOINING, State.FAILED) and member.next_attempt <= soon)
            for member in ([only] if only is not None else self.members.values())
        )

    # -- losing --------------------------------------------------------------------------------------------
    def lost(self, member: Member, life: Life, why: str) -> None:
        """The connection ended, or the member reported that it is broken: not used again in this life."""
        with self.changed:
            if member.life is not life:
                return
            member.life = None
            member.reason = why
            member.happened(Event.LOST)
            now = self.clock.boot()
            member.failures = member.failures + 1 if now - member.entered < _SHORT_LIFE else 0
            member.next_attempt = now + self.pause_before(member.failures)
            self.head_start.failed(member)
            self.changed.notify_all()
        log.warning("member.failed", member=member.name, reason=why)
        self.submit(self._kill_when_idle, member, life)
        self.submit(self._publish, member, False, why)
        self.on_lost(member)
        self.wake()

    def look_again(self, member: Member, life: Life, uid: bytes) -> bool:
        """An object was not found. True: its connection was ended, to be asked again in the next one. False: it was
        looked for in a new one already, and is not there.

        A module may be behind what other processes did to the token: SoftHSM reads the token's folder again only when a
        counter in it moved, and takes another's move for its own if it writes itself before it looks.

        :raises JournalUnavailable: its connection was not ended: no other could be made now (see ``log_in``).
        """
        earlier = member.missed.get(uid)
        if earlier is not None and earlier != life.started and life.started - earlier < _MISSED_LATELY:
            return False
        self.journal.logins()
        with self.changed:
            if len(member.missed) > _MOST_MISSED:
                member.missed.clear()
            member.missed[uid] = life.started
            if member.life is not life:
                return True
            member.life = None
            member.looked_at_again = True
            member.reason = "connected anew, to look for an object again"
            member.happened(Event.LOST)
            member.next_attempt = 0.0
            self.changed.notify_all()
        log.info("member.looked-at-again", member=member.name)
        self.submit(life.connection.close)
        self.wake()
        return True

    def bury_the_dead(self) -> None:
        """A worker that died while nobody called it is noticed all the same."""
        for member in list(self.members.values()):
            life = member.life
            if life is not None and not life.connection.alive:
                self.lost(member, life, "its worker ended")

    def timed_out(self, member: Member, life: Life, *, stalled: bool = True) -> None:
        """A deadline passed: suspect, until a probe on a session of its own has answered or not.

        :param stalled: False: no call of ours did, others doubt it; a probe that is answered is all there is to it."""
        with self.changed:
            if member.life is not life or not member.happened(Event.TIMEOUT):
                return
            self.changed.notify_all()
        self.submit(self.probe, member, life, stalled)

    def probe(self, member: Member, life: Life, stalled: bool = True) -> bool:
        """One heartbeat. Serial number changed: another token behind the same address."""
        try:
            token = life.connection.probe(timeout=self.config.timeouts.probe)
        except (Ckr, DeadlinePassed, *CONNECTION_LOST) as error:
            self.lost(member, life, f"probe: {error}")
            return False
        if token.serial != life.token.serial:
            self.quarantine(member, f"shows serial number {token.serial}, not {life.token.serial}: another token")
            return False
        with self.changed:
            member.last_success = self.clock.boot()
            if member.happened(Event.PROBE_OK) and stalled:
                member.rests += 1
                pause = self.config.timeouts.call * 2.0**member.rests
                member.rest_until = self.clock.boot() + min(pause, _LONGEST_REST)
            self.changed.notify_all()
        return True

    def is_still_whole(self, member: Member, life: Life) -> bool:
        """Something was not found: is the token there at all? One that is just going away first answers searches with
        nothing, and only then with errors; it cannot read of the domain's keys any more either."""
        if member.life is not life or life.keys is None or not self.probe(member, life, stalled=False):
            return False
        try:
            life.connection.get(life.keys.partition, [CKA.CLASS], timeout=self.config.timeouts.probe)
        except (Ckr, DeadlinePassed, *CONNECTION_LOST) as error:
            self.lost(member, life, f"it does not have the domain's keys now: {error}")
            return False
        return member.life is life

    def quarantine(self, member: Member, why: str) -> None:
        """Out of use in the whole group until a person acts (``ha-admin member resume``)."""
        with self.changed:
            member.reason = why
            member.happened(Event.QUARANTINE)
            self._end(member)
            self.changed.notify_all()
        log.error("member.quarantined", member=member.name, reason=why)
        try:
            self.journal.update_member(member.name, membership=Membership.QUARANTINED, reason=why)
            self.journal.event("member quarantined", why, member=member.name)
        except JournalUnavailable as error:
            log.error("journal.unavailable", error=str(error))

    def _end(self, member: Member) -> None:
        life, member.life = member.life, None
        if life is not None:
            self.submit(self._kill_when_idle, member, life)

    def _kill_when_idle(self, member: Member, life: Life) -> None:
        """Kill a worker once no other call is inside its own deadline: a 50 s key generation is not a hang. Nor is it
        waited for when it has ended: a member that comes and goes would leave a worker behind each time.

        No call begins there any more: one that writes to the token would be cut off. What was cut off all the same is
        looked for after that, not only after the member was lost: its next life may have been swept by then.
        """
        connection = life.connection
        if connection.alive:
            connection.take_no_more()
            until = max(connection.outstanding(), default=0.0)
            while time.monotonic() < until and connection.outstanding():
                time.sleep(_GLANCE)
        connection.kill()
        self.on_lost(member)

    def _publish(self, member: Member, ok: bool, kind: str) -> None:
        observation = Observation(
            member=member.name,
            observer=self.journal.owner,
            site=self.site,
            ok=ok,
            kind=kind,
            boot_time=self.clock.boot(),
        )
        try:
            self.journal.observe([observation])
        except JournalUnavailable as error:
            log.warning("journal.unavailable", error=str(error))

    # -- connecting ----------------------------------------------------------------------------------------
    def due(self) -> list[Member]:
        """Members that the supervisor should connect now."""
        now = self.clock.boot()
        with self.changed:
            return [
                member
                for member in self.members.values()
                if member.state in (State.JOINING, State.FAILED) and not member.busy and member.next_attempt <= now
            ]

    def next_due(self) -> float | None:
        """Boot time of the next connection attempt; None: none is waiting."""
        with self.changed:
            times = [m.next_attempt for m in self.members.values() if m.state in (State.JOINING, State.FAILED)]
        return min(times, default=None)

    def connect(self, member: Member) -> bool:
        """Start, check and log in to one member; leaves it in service, resyncing, failed or quarantined."""
        with self.changed:
            if member.busy or not member.happened(Event.CONNECT):
                return False
            member.busy = True
            self._generation += 1
            generation = self._generation * GENERATIONS
        life: Life | None = None
        try:
            record = self.view.members[member.name]
            started, began = self.clock.boot(), self.view.group.change
            life = open_life(
                member.config,
                self.journal,
                generation=generation,
                timeout=self.config.timeouts.call,
                serial=record.serial,
            )
            life.started, life.began = started, began
            self._check(member, life)
        except (MemberQuarantined, DomainMismatch, manifest.OtherGroup) as error:
            self._drop(life)
            self.quarantine(member, str(error))
        except (Ckr, DeadlinePassed, ModuleProblem, HAError, *CONNECTION_LOST) as error:
            self._drop(life)
            self._not_connected(member, str(error))
        except BaseException as error:
            self._drop(life)
            self._not_connected(member, f"{type(error).__name__}: {error}")
            raise
        finally:
            with self.changed:
                member.busy = False
                self.head_start.waiting.discard(member.name)
                if member.life is None:
                    self.head_start.failed(member)
                elif member.life.keys is not None:  # else it waits for the application's PIN
                    self.head_start.served(member, self.clock.boot())
                self.changed.notify_all()
            self.wake()
        return member.life is not None

    def _check(self, member: Member, life: Life) -> None:
        record = self.view.members[member.name]
        if record.serial and life.token.serial != record.serial:
            raise MemberQuarantined(
                f'member "{member.name}" shows serial number {life.token.serial}, not {record.serial}: another token'
            )
        for other in self.members.values():
            if other is not member and other.life is not None and other.life.token.serial == life.token.serial:
                raise MemberQuarantined(f'members "{member.name}" and "{other.name}" show one serial number')
        self.heed_pin_changes()
        known = self.pins.for_member(member.config)
        if known is not None:
            self.log_in(member, life, *known, automatic=True)
        self._enter(member, life)
        if known is None and (known := self.pins.for_member(member.config)) is not None:
            self.log_in(member, life, *known, automatic=True)  # an application logged in just then

    def _enter(self, member: Member, life: Life) -> None:
        with self.changed:
            member.life = life
            member.looked_at_again = False
            member.reason = None
            member.entered = member.last_success = self.clock.boot()
            member.rests = 0
            admitted = self.view.members[member.name].membership is Membership.ADMITTED
            member.happened(Event.CHECKED if admitted else Event.NOT_ADMITTED)
            self.changed.notify_all()
        log.info("member.connected", member=member.name, state=member.state.value)
        self.submit(self._publish, member, True, "connected")

    def _not_connected(self, member: Member, why: str) -> None:
        with self.changed:
            member.life = None
            member.looked_at_again = False
            member.happened(Event.LOST)
            member.reason = why
            member.failures += 1
            member.next_attempt = self.clock.boot() + self.pause_before(member.failures)
            self.changed.notify_all()
        log.warning("member.unreachable", member=member.name, reason=why, attempt=member.failures)

    def _drop(self, life: Life | None) -> None:
        if life is not None:
            life.connection.kill()

    def log_in(self, member: Member, life: Life, pin: Pin, source: str, stamp: str, *, automatic: bool = False) -> None:
        """Log in to one member and check its domain keys and manifest.

        :param automatic: not in a call in which the application gave the PIN.
        :raises MemberQuarantined: its PIN was refused, and another one's was not.
        :raises LoginHeld: it must not be tried now.
        """
        timeout = self.config.timeouts.call
        try:
            log_in(self.journal, member, life, pin, source, stamp, automatic=automatic, timeout=timeout)
        except Ckr as error:
            if error.rv not in PIN_ERRORS:
                raise
            if automatic and source == APPLICATION and self.pins.accepted_before(member.name, pin):
                self.pins.forget()  # changed behind our back: no other member is tried with it
                raise LoginHeld(
                    f'member "{member.name}": the PIN that this program logged in with is refused now ({error})'
                ) from error
            what = "PIN differs" if error.rv == CKR.PIN_INCORRECT else "PIN refused"
            raise MemberQuarantined(f'member "{member.name}": {what} ({source}): {error}') from error
        self.pins.accepted(member.name, pin, application=source == APPLICATION)
        self.keys.find(member, life)

    def heed_pin_changes(self) -> None:
        """Another process changed the PIN on all members: what is held here is not right any more."""
        try:
            events = self.journal.events(limit=1000, since=self._events_seen)
        except JournalUnavailable:
            return
        if events:
            self._events_seen = events[-1].number
        if any(event.kind == PIN_CHANGED and event.data.get("owner") != self.journal.owner for event in events):
            self.pins.forget()

    def log_in_first(self, member: Member, life: Life, pin: Pin) -> None:
        """Log in with a PIN that the application gave in this call: a refusal is the application's error.

        :raises Ckr: ``PIN_*`` and whatever else the member answered.
        """
        timeout = self.config.timeouts.call
        log_in(self.journal, member, life, pin, APPLICATION, "", automatic=False, timeout=timeout)
        self.pins.accepted(member.name, pin, application=True)
        self.keys.find(member, life)

    # -- background ----------------------------------------------------------------------------------------
    def renew_after_fork(self) -> None:
        """In the child: no thread, no connection and no lock of the parent's is ours."""
        self._lock = threading.RLock()
        self.changed = threading.Condition(self._lock)
        self.tasks = self._workers()
        self._running = set()
        self.lanes.renew_after_fork()
        self.head_start.renew_after_fork()
        self.choosing.renew_after_fork(self._lock)
        self.pins.renew_after_fork()
        for member in self.members.values():
            member.renew_after_fork()

    def submit(self, function: Callable[..., object], *args: object) -> Future[object]:
        """Run in the background; what it raises is logged, never lost. Nothing is begun once the group was closed."""
        if self._closed:
            done: Future[object] = Future()
            done.set_result(None)
            return done

        def guarded() -> object:
            try:
                return function(*args)
            except JournalUnavailable as error:
                log.warning("journal.unavailable", error=str(error))
            except Exception:
                log.exception("background task failed", task=getattr(function, "__name__", str(function)))
            return None

        return self.run(guarded)

    def run(self, function: Callable[..., T], *args: object) -> Future[T]:
        """Run in the background; the caller looks at the outcome."""
        future = self.tasks.submit(function, *args)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    def close(self) -> None:
        """End the connections: in an orderly way where what runs comes to its end in time; else workers are left to
        finish the call that they are at, and to leave by themselves."""
        self._closed = True
        self.tasks.shutdown(wait=False)
        _, unfinished = wait(set(self._running), timeout=CLOSE_GRACE)
        for member in list(self.members.values()):
            life, member.life = member.life, None
            if life is None:
                continue
            if not unfinished:
                life.connection.close()
            elif max(life.connection.outstanding(), default=math.inf) < time.monotonic():
                life.connection.kill()  # it hangs
            else:
                life.connection.let_go()
        wait(unfinished, timeout=CLOSE_GRACE)
