"""The watchdog of one group: who is the active one, its heartbeats, and what it tells.

The active one holds the lease ``watchdog/<serial>``. It alone runs an engine, whose supervisor connects, resyncs and
readmits members and finishes what crashed processes left. The others only try for the lease. Whoever was stopped and
wakes up finds its lease run out before it tells or repairs anything: telling compares the lease's time, and every
resync runs under a lease of the member (DESIGN.md 4.6).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from hagroup.bootstrap import start_group
from hagroup.config.load import load
from hagroup.config.logging import get_logger
from hagroup.config.model import GroupConfig
from hagroup.core.clock import Clock
from hagroup.core.records import WATCHDOG, Lease, Observation
from hagroup.core.watch import (
    LOG_ONLY,
    Sight,
    Told,
    WatchEvent,
    decide,
    detection_bound,
    lease_time,
    pause_before,
    unreachable_from_the_start,
)
from hagroup.engine import consistency
from hagroup.engine.group import GroupEngine
from hagroup.engine.status import Status, gather
from hagroup.errors import ConfigurationError, HAError, JournalUnavailable
from hagroup.journal import open_journal
from hagroup.journal.api import Journal, LeaseLost
from hagroup.journal.clock import SystemClock
from hagroup.watchdog.heartbeat import Beat, Heart, look, look_offline
from hagroup.watchdog.memory import recall, remember
from hagroup.watchdog.telling import Teller
from hagroup.watchdog.verify import Verified, Verifier

log = get_logger(__name__)

_EVENT_LOG_CHECK = 300.0
"""Seconds between checks of the whole event log; the first is made on becoming the active one."""
_DELIVERY = 0.1
"""Seconds between looks at what hook and webhook took."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What page and metrics show: one group after one heartbeat."""

    label: str
    serial: str
    active: bool
    """False: another watchdog is the active one; the rest is from when this one last was, or missing."""
    bound: float
    """Seconds within which a failure is told."""
    journal: bool = True
    status: Status | None = None
    beats: dict[str, Beat] = {}
    states: dict[str, str] = {}
    outstanding: dict[str, int] = {}
    since: dict[str, float] = {}
    """Boot time at which each member's state was first seen."""
    boot: float = 0.0
    time: float = 0.0
    events: tuple[WatchEvent, ...] = ()
    """The latest ones, newest last."""
    intents: int = 0
    verified: Verified = Verified()


def _teller(config: GroupConfig) -> Teller:
    sources = [member.pin.env for member in config.members if member.pin is not None]
    return Teller(config.watchdog, hidden=frozenset(name for name in sources if name is not None))


class GroupWatch:
    """Watches one group until :meth:`stop`. All methods but that and ``reload`` belong to one thread."""

    def __init__(
        self, path: Path, *, clock: Clock | None = None, published: Callable[[Report], None] = lambda report: None
    ) -> None:
        self.path = path
        self.config: GroupConfig = load(path)
        self.clock = clock or SystemClock()
        self.alive = time.monotonic()
        """When its loop last went round, for systemd's watchdog."""
        self.report = self._blank()
        self.ready = threading.Event()
        """It looked once: it is active, or stands by."""
        self._published = published
        self._wake = threading.Event()
        self._stopping = False
        self._reload = False
        self._journal: Journal | None = None
        self._lease: Lease | None = None
        self._engine: GroupEngine | None = None
        self._heart: Heart | None = None
        self._verifier: Verifier | None = None
        self._told = Told()
        self._unwritten = False
        """``_told`` is newer than what the journal has."""
        self._teller = _teller(self.config)
        self._events: list[WatchEvent] = []
        self._log_broken: str | None = None
        self._log_check_due = 0.0
        self._trouble: str | None = None
        self._was_active: bool | None = None
        self._blind_since_start = False

    def _blank(self) -> Report:
        section, probe = self.config.watchdog, self.config.timeouts.probe
        bound = detection_bound(section.interval, section.threshold, probe)
        return Report(label=self.config.group.label, serial=self.config.group.serial or "", active=False, bound=bound)

    @property
    def _ttl(self) -> float:
        section = self.config.watchdog
        return lease_time(section.interval, section.threshold, self.config.timeouts.probe)

    # -- the loop ------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Until :meth:`stop`."""
        while not self._stopping:
            due = time.monotonic() + self.config.watchdog.interval
            self.step()
            self._wait(due)
        self._end()

    def _wait(self, due: float) -> None:
        """Until the next heartbeat; meanwhile what hook and webhook took is written down."""
        while (left := due - time.monotonic()) > 0:
            waiting = self._engine is not None and bool(self._told.undelivered)
            if self._wake.wait(min(left, _DELIVERY) if waiting else left):
                self._wake.clear()
                return
            if waiting:
                self._confirm_deliveries()

    def step(self) -> None:
        """One round. What goes wrong is said once and tried again in the next one."""
        self.alive = time.monotonic()
        trouble = None
        try:
            if self._reload:
                self._load_again()
            self._round()
        except HAError as error:
            trouble = str(error)
            if trouble != self._trouble:
                log.error("watchdog.trouble", group=self.config.group.label, reason=trouble)
        except Exception:
            log.exception("watchdog round failed; it goes on", group=self.config.group.label)
        self._trouble = trouble
        self.ready.set()

    def stop(self) -> None:
        """End soon; from any thread."""
        self._stopping = True
        self._wake.set()

    def reload(self) -> None:
        """Read the configuration again; from any thread."""
        self._reload = True
        self._wake.set()

    def _load_again(self) -> None:
        self._reload = False
        try:
            config = load(self.path)
            teller = _teller(config)
        except ConfigurationError as error:
            log.error("configuration.not-reloaded", reason=str(error))
            return
        self._drop_engine()
        self._teller.stop(0.5)
        if config.journal != self.config.journal and self._journal is not None:
            self._journal.close()
            self._journal, self._lease = None, None
        self.config, self._teller = config, teller
        for event in self._told.undelivered:
            self._teller.tell(event)
        self.report = self._blank()
        log.info("configuration.reloaded", group=config.group.label, file=str(self.path))

    # -- being the active one ------------------------------------------------------------------------------
    def _round(self) -> None:
        blind = False
        try:
            active = self._hold_lease()
        except JournalUnavailable:
            if self._engine is None:
                self._without_journal()
                raise
            active = blind = True  # it was the active one, and people must hear of this
        if active != self._was_active:
            log.info("watchdog.active" if active else "watchdog.standing-by", group=self.config.group.label)
            self._was_active = active
        if not active:
            self._blind_since_start = False  # the active one tells
            self._drop_engine()
            self._publish(msgspec.structs.replace(self.report, active=False, status=None, journal=True))
            return
        if self._engine is None:
            self._take_up()
        self._watch(blind=blind)

    def _without_journal(self) -> None:
        """Where it never was there, nobody may be the active one who would tell."""
        if self._was_active is not None or self._blind_since_start:
            return
        self._blind_since_start = True
        group = self.config.group
        when = f"{self.clock.boot_id()}-{self.clock.boot() // 60:.0f}"
        event = unreachable_from_the_start(group.label, group.serial or "", when, self.clock.wall())
        self._teller.tell(event)
        self._events = [*self._events[-49:], event]
        self._publish(msgspec.structs.replace(self.report, journal=False, events=tuple(self._events)))

    def _hold_lease(self) -> bool:
        if self._journal is None:
            self._journal = open_journal(self.config.journal, clock=self.clock)
        journal = self._journal
        if self._lease is not None:
            try:
                self._lease = journal.renew_lease(self._lease, ttl=self._ttl)
                return True
            except LeaseLost as error:
                log.warning("watchdog.lease-lost", group=self.config.group.label, reason=str(error))
                self._lease = None
                self._drop_engine()  # somebody else may have told things since: go on from the journal, as any other
        self._lease = journal.acquire_lease(f"watchdog/{self.config.group.serial}", ttl=self._ttl)
        return self._lease is not None

    def _take_up(self) -> None:
        assert self._journal is not None
        engine = start_group(self.config, clock=self.clock)
        section = self.config.watchdog
        engine.roster.pause_before = lambda failures: pause_before(
            failures, retry=section.retry, retry_interval=section.retry_interval, jitter=random.random()
        )
        self._engine, self._heart = engine, Heart(engine)
        self._told = recall(self._journal)
        if self._blind_since_start:
            self._told = msgspec.structs.replace(self._told, journal_down=True)  # so that its end is told
            self._blind_since_start = False
        self._log_check_due = 0.0
        for event in self._told.undelivered:  # the one before may not have come to it
            self._teller.tell(event)
        engine.roster.wait_for_change(self._ttl / 2, lambda: not engine.roster.may_come())
        self._verifier = Verifier(engine, section.verify_rate)
        without = [member.name for member in self.config.members if member.pin is None]
        log.info(
            "watchdog.watching",
            group=engine.label,
            serial=engine.serial,
            members=len(engine.view.members),
            detection_bound=self.report.bound,
            cannot_resync=without,
        )

    def _drop_engine(self) -> None:
        engine, heart, verifier = self._engine, self._heart, self._verifier
        self._engine = self._heart = self._verifier = None
        if verifier is not None:
            verifier.stop()
        if heart is not None:
            heart.stop()
        if engine is not None:
            engine.close()

    # -- one heartbeat -------------------------------------------------------------------------------------
    def _watch(self, *, blind: bool) -> None:
        assert self._engine is not None
        assert self._heart is not None
        assert self._journal is not None
        engine = self._engine
        beats = self._heart.beat()
        try:
            if blind:
                raise JournalUnavailable("the lease could not be renewed")
            self._observe(beats)
            self._check_event_log()
            sight = look(engine, self._journal, beats, self._told, log_broken=self._log_broken)
        except JournalUnavailable:
            sight = look_offline(engine, beats, self._told)
        told, events = decide(self._told, sight, self.clock.wall())
        lease = self._lease
        if sight.journal and (lease is None or self.clock.boot() >= lease.expires):
            return  # it was stopped in between: another one may be active by now, and the next round finds out
        self._tell(told, events, sight)
        self._publish(self._describe(engine, sight, beats))

    def _check_event_log(self) -> None:
        assert self._journal is not None
        if self.clock.boot() >= self._log_check_due:
            self._log_broken = next(iter(consistency.event_log(self._journal)), None)
            self._log_check_due = self.clock.boot() + _EVENT_LOG_CHECK

    def _observe(self, beats: dict[str, Beat]) -> None:
        assert self._journal is not None
        now = self.clock.boot()
        self._journal.observe(
            [
                Observation(
                    member=name,
                    observer=self._journal.owner,
                    site=self.config.group.site,
                    ok=beat.ok,
                    kind=WATCHDOG,
                    boot_time=now,
                )
                for name, beat in beats.items()
            ]
        )

    def _tell(self, told: Told, events: list[WatchEvent], sight: Sight) -> None:
        lasting = [event for event in events if event.kind not in LOG_ONLY]
        waiting = self._teller.undelivered()
        undelivered = tuple(event for event in told.undelivered if event.id in waiting)
        first = self._told.noted is None
        self._told = msgspec.structs.replace(told, undelivered=(*undelivered, *lasting))
        # counts that move with every heartbeat are cheap to lose
        self._unwritten = self._unwritten or first or bool(lasting) or undelivered != told.undelivered
        if self._unwritten and sight.journal:
            self._write(lasting)
        for event in events:
            if event.kind in LOG_ONLY:
                self._teller.log(event)
            else:
                self._teller.tell(event)
                self._events = [*self._events[-49:], event]

    def _write(self, events: list[WatchEvent]) -> None:
        assert self._journal is not None
        assert self._lease is not None
        try:
            remember(self._journal, self._told, events, lease=self._lease)
            self._unwritten = False
        except JournalUnavailable as error:
            log.warning("journal.unavailable", error=str(error))

    def _confirm_deliveries(self) -> None:
        """Write down what was delivered: a successor tells the rest once more (with the same ids)."""
        waiting = self._teller.undelivered()
        left = tuple(event for event in self._told.undelivered if event.id in waiting)
        if left == self._told.undelivered or self._lease is None or self.clock.boot() >= self._lease.expires:
            return
        self._told = msgspec.structs.replace(self._told, undelivered=left)
        self._unwritten = True
        self._write([])

    # -- what page and metrics show ------------------------------------------------------------------------
    def _describe(self, engine: GroupEngine, sight: Sight, beats: dict[str, Beat]) -> Report:
        now = self.clock.boot()
        members = dict(engine.roster.members)
        states = {name: member.state.value for name, member in members.items()}
        before = self.report
        since = {
            name: before.since[name] if before.states.get(name) == state and name in before.since else now
            for name, state in states.items()
        }
        status, intents = before.status, before.intents
        if sight.journal and self._journal is not None:
            answers = {
                seen.name: None if seen.ok and not self._failed(seen.name) else seen.reason or "it does not answer"
                for seen in sight.members
            }
            try:
                status = gather(engine.config, self._journal, answers, clock=self.clock)
                intents = len(self._journal.intents())
            except JournalUnavailable as error:
                log.warning("journal.unavailable", error=str(error))
        return msgspec.structs.replace(
            before,
            active=True,
            journal=sight.journal,
            status=status,
            beats=beats,
            states=states,
            outstanding={name: member.outstanding for name, member in members.items()},
            since=since,
            boot=now,
            time=self.clock.wall(),
            events=tuple(self._events),
            intents=intents,
            verified=before.verified if self._verifier is None else self._verifier.so_far,
        )

    def _failed(self, name: str) -> bool:
        told = self._told.members.get(name)
        return told is not None and told.failed

    def _publish(self, report: Report) -> None:
        self.report = report
        self._published(report)

    # -- the end -------------------------------------------------------------------------------------------
    def _end(self) -> None:
        """The lease before the engine, so that another one takes over at once."""
        self._teller.stop(1.0)
        if self._journal is not None and self._lease is not None:
            try:
                self._confirm_deliveries()
                self._journal.release_lease(self._lease)
            except HAError as error:
                log.warning("watchdog.lease-not-released", reason=str(error))
        self._drop_engine()
        if self._journal is not None:
            self._journal.close()
