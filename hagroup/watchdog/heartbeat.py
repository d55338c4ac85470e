"""One heartbeat: every member is asked in parallel, each within the probe timeout, and what came is put together."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

import msgspec

from hagroup.core.attributes import CKA
from hagroup.core.calls import Ckr, DeadlinePassed
from hagroup.core.records import LoginState, Membership
from hagroup.core.states import State
from hagroup.core.watch import ALARMS, Noted, Seen, Sight, Told
from hagroup.engine.group import GroupEngine
from hagroup.engine.member import Life, Member
from hagroup.engine.membership import BEING_REMOVED
from hagroup.engine.opening import CONNECTION_LOST
from hagroup.engine.status import owed_by_member
from hagroup.journal.api import Journal
from hagroup.watchdog.signing import Signing

_GRACE = 0.5
"""Seconds beyond the probe timeout after which a heartbeat is not waited for: a module in this process can hang."""


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """What one member answered."""

    ok: bool
    level: str = "none"
    """How far it got: ``none``, ``token`` (token information and a random number), ``keys`` (logged in) or
    ``signature`` (with a key of its own)."""
    reason: str | None = None
    error: str | None = None
    """Class of what went wrong, for counting."""
    seconds: float = 0.0
    free_memory: int | None = None
    total_memory: int | None = None

    @property
    def room(self) -> float | None:
        """Share of the token's memory that is free; None: it does not tell."""
        if self.free_memory is None or self.total_memory is None:
            return None
        return self.free_memory / self.total_memory


class Heart:
    """Asks the members of one engine."""

    def __init__(self, engine: GroupEngine) -> None:
        self._engine = engine
        self._pool = ThreadPoolExecutor(max_workers=32, thread_name_prefix="heartbeat")
        self._running: dict[str, Future[Beat]] = {}
        self._missed: dict[str, int] = {}
        self._signing = Signing()

    def beat(self) -> dict[str, Beat]:
        """One heartbeat of every member; returns within the probe timeout and a little."""
        timeout = self._engine.config.timeouts.probe
        for name in [name for name, future in self._running.items() if future.done()]:
            del self._running[name]
        members = dict(self._engine.roster.members)
        begun = {}
        for name, member in members.items():
            if name not in self._running:
                begun[name] = self._running[name] = self._pool.submit(self._ask, member, timeout)
        wait(begun.values(), timeout=timeout + _GRACE)
        beats = {name: self._answer(begun.get(name)) for name in members}
        for name, beat in beats.items():
            self._missed[name] = 0 if beat.ok else self._missed.get(name, 0) + 1
            self._fail(members[name], beat)
        return beats

    @staticmethod
    def _answer(future: Future[Beat] | None) -> Beat:
        if future is None or not future.done():
            return Beat(ok=False, reason="it does not answer", error="DeadlinePassed")
        return future.result()

    def _fail(self, member: Member, beat: Beat) -> None:
        """A member that missed too many heartbeats is failed for this process too, and its worker is killed."""
        life = member.life
        if life is not None and self._missed[member.name] >= self._engine.config.watchdog.threshold:
            self._engine.roster.lost(member, life, f"heartbeat: {beat.reason}")

    def _ask(self, member: Member, timeout: float) -> Beat:
        life = member.life
        if life is None:
            return Beat(ok=False, reason=member.reason or "it is not connected", error="NotConnected")
        begun = time.monotonic()
        try:
            token = life.connection.probe(timeout=timeout)
            if token.serial != life.token.serial:
                why = f"shows serial number {token.serial}, not {life.token.serial}: another token"
                self._engine.roster.quarantine(member, why)
                return Beat(ok=False, reason=why, error="OtherToken")
            level = self._logged_in(member.name, life, timeout)
        except DeadlinePassed as error:
            return Beat(ok=False, reason=str(error), error="DeadlinePassed", seconds=time.monotonic() - begun)
        except Ckr as error:
            self._engine.roster.lost(member, life, f"heartbeat: {error}")
            return Beat(ok=False, reason=str(error), error=f"0x{error.rv:x}")
        except CONNECTION_LOST as error:
            self._engine.roster.lost(member, life, f"heartbeat: {error}")
            return Beat(ok=False, reason=str(error), error=type(error).__name__)
        seconds = time.monotonic() - begun
        return Beat(
            ok=True,
            level=level,
            seconds=seconds,
            free_memory=token.free_private_memory,
            total_memory=token.total_private_memory,
        )

    def _logged_in(self, name: str, life: Life, timeout: float) -> str:
        """The domain's keys are private objects: who is not logged in (any more) cannot read of them."""
        if life.keys is None:
            return "token"
        life.connection.get(life.keys.partition, [CKA.CLASS], timeout=timeout)
        return "signature" if self._signing.sign(name, life, timeout=timeout) else "keys"

    def stop(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def look(
    engine: GroupEngine, journal: Journal, beats: Mapping[str, Beat], told: Told, *, log_broken: str | None = None
) -> Sight:
    """Put the heartbeats and the journal's knowledge together.

    :param log_broken: what the last check of the event log found.
    :raises JournalUnavailable: see :func:`look_offline`.
    """
    engine.follow()
    owed = owed_by_member(journal)
    refused = {
        login.member: f"{login.source} {login.stamp}" for login in journal.logins() if login.state is LoginState.REFUSED
    }
    newest = max((event.number for event in journal.events(limit=1)), default=0)
    noted = () if told.noted is None or newest <= told.noted else _noted(journal, told.noted)
    members = []
    for seen in _members(engine, beats):
        rows = owed.get(seen.name, [])
        members.append(
            msgspec.structs.replace(
                seen,
                owed=len(rows),
                oldest_owed=rows[0].change if rows else None,
                pin_refused=refused.get(seen.name),
            )
        )
    return _sight(engine, tuple(members), journal=True, noted=noted, newest=newest, log_broken=log_broken)


def look_offline(engine: GroupEngine, beats: Mapping[str, Beat], told: Told) -> Sight:
    """The same without the journal: what was known of the members from it stays."""
    kept = []
    for seen in _members(engine, beats):
        before = told.members.get(seen.name)
        refused = before.pin_refused if before else None
        kept.append(msgspec.structs.replace(seen, pin_refused=refused))
    return _sight(engine, tuple(kept), journal=False)


def _noted(journal: Journal, since: int) -> tuple[Noted, ...]:
    return tuple(
        Noted(number=event.number, kind=event.kind, member=event.member, text=event.text)
        for event in journal.events(limit=1000, since=since)
        if event.kind in ALARMS
    )


def _sight(
    engine: GroupEngine,
    members: tuple[Seen, ...],
    *,
    journal: bool,
    noted: tuple[Noted, ...] = (),
    newest: int = 0,
    log_broken: str | None = None,
) -> Sight:
    return Sight(
        group=engine.label,
        serial=engine.serial,
        min_replicas=engine.config.group.min_replicas,
        threshold=engine.config.watchdog.threshold,
        journal=journal,
        members=members,
        noted=noted,
        newest=newest,
        log_broken=log_broken,
    )


def _members(engine: GroupEngine, beats: Mapping[str, Beat]) -> list[Seen]:
    found = []
    for name, record in engine.view.members.items():
        if record.membership is Membership.QUARANTINED and record.reason == BEING_REMOVED:
            continue  # as somebody wants it; where that was cut off, `journal todo` has it
        member = engine.roster.members.get(name)
        if member is None:
            reason = "it is not in hagroup.toml of this host"
            found.append(Seen(name=name, serial=record.serial, ok=False, reason=reason, membership=record.membership))
            continue
        beat = beats.get(name, Beat(ok=False))
        quarantined = record.membership is Membership.QUARANTINED
        found.append(
            Seen(
                name=name,
                serial=record.serial,
                ok=beat.ok,
                reason=record.reason if quarantined else member.reason or beat.reason,
                membership=record.membership,
                role=record.role,
                draining=record.draining,
                usable=member.serving,
                attempts=member.failures,
                given_up=math.isinf(member.next_attempt),
                pin=member.config.pin is not None,
                starting=member.life is None and member.state in (State.JOINING, State.PROBING) and not member.failures,
                room=beat.room,
            )
        )
    return found
