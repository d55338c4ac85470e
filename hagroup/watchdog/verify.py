"""Background verification: that each member's replica of each object is what the journal says, at a pace that never
competes with applications (``[watchdog] verify_rate``, objects per second).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import msgspec

from hagroup.config.logging import get_logger
from hagroup.core.calls import Ckr, DeadlinePassed
from hagroup.core.records import ObjectState
from hagroup.engine.group import GroupEngine
from hagroup.engine.member import Life, Member
from hagroup.engine.opening import CONNECTION_LOST
from hagroup.errors import HAError

log = get_logger(__name__)

REST = 3600.0
"""Seconds between the beginnings of two rounds through all objects, at least."""


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it so far."""

    proved: int = 0
    wrong: int = 0
    """Replicas that were not what they should be; each is repaired, and an alarm."""
    finished: float | None = None
    """Wall clock of the end of the last whole round."""


class Verifier:
    """A thread beside the heartbeats of the active watchdog."""

    def __init__(self, engine: GroupEngine, rate: float, *, rest: float = REST) -> None:
        self._engine = engine
        self._rate = rate
        self._rest = rest
        self._stop = threading.Event()
        self.so_far = Verified()
        self._thread = threading.Thread(target=self._run, name="watchdog-verify", daemon=True)
        if rate > 0:
            self._thread.start()

    def stop(self) -> None:
        """Soon; a proof under way ends with its connection."""
        self._stop.set()

    def _run(self) -> None:
        clock = self._engine.clock
        while not self._stop.wait(1.0 / self._rate):
            begun = clock.boot()
            try:
                whole = self._round()
            except HAError as error:
                log.warning("verify.interrupted", group=self._engine.label, reason=str(error))
                whole = False
            except Exception:
                if not self._stop.is_set():
                    log.exception("verify failed; it begins anew", group=self._engine.label)
                whole = False
            if whole:
                self.so_far = msgspec.structs.replace(self.so_far, finished=clock.wall())
                self._stop.wait(max(0.0, self._rest - (clock.boot() - begun)))
            else:
                self._stop.wait(min(60.0, self._rest))

    def _round(self) -> bool:
        """Every live object once; False: stopped, or a member was not there to be asked."""
        complete = True
        for uid in self._live():
            for name in sorted(self._engine.view.members):
                complete = self._check(name, uid) and complete
            if self._stop.wait(1.0 / self._rate):
                return False
        return complete

    def _live(self) -> Iterator[bytes]:
        for record in self._engine.journal.objects():
            if record.state is ObjectState.LIVE:
                yield record.uid

    def _check(self, name: str, uid: bytes) -> bool:
        """False: the member could not be asked."""
        engine = self._engine
        engine.follow()
        found = engine.view.object(uid)
        if found is None or name not in found.members:
            return True  # destroyed meanwhile, or owed: resync looks after it
        member: Member | None = engine.roster.members.get(name)
        if member is None or not member.serving or member.life is None or member.life.keys is None:
            return False
        life = member.life
        if engine.replicator.proves(member, uid):
            self.so_far = msgspec.structs.replace(self.so_far, proved=self.so_far.proved + 1)
            return True
        if not self._is_well(member, life):
            return False
        engine.follow()
        again = engine.view.object(uid)
        if again is None or name not in again.members or again.record.revision != found.record.revision:
            return True  # it was being changed just then
        if engine.replicator.proves(member, uid):
            return True
        log.error("verify.wrong", member=name, uid=uid.hex())
        self.so_far = msgspec.structs.replace(self.so_far, wrong=self.so_far.wrong + 1)
        engine.supervisor.report_doubtful(member, uid)  # proves it once more, and repairs
        return True

    def _is_well(self, member: Member, life: Life) -> bool:
        """A token that is just going away may first show nothing: it is believed if it answers a heartbeat later."""
        section, timeouts = self._engine.config.watchdog, self._engine.config.timeouts
        if self._stop.wait(section.interval):
            return False
        try:
            life.connection.probe(timeout=timeouts.probe)
        except (Ckr, DeadlinePassed, *CONNECTION_LOST):
            return False  # the next heartbeat says so
        return member.life is life and member.serving
