"""Bringing new objects onto the members: from ``creating`` to ``live`` (DESIGN.md 4.2, steps 3 to 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING

from hagroup.config.logging import get_logger
from hagroup.core.calls import Ckr
from hagroup.core.records import Intent, ObjectRecord
from hagroup.engine.member import Life, Member
from hagroup.engine.replicate import Outcome, Result
from hagroup.errors import GroupReadOnly, GroupUnavailable, HAError
from hagroup.journal.api import Asking, NoLongerLive, StaleMembership

if TYPE_CHECKING:
    from hagroup.engine.group import GroupEngine

log = get_logger(__name__)


class Replication:
    """The foreground of a create: asks all members in parallel, returns when enough have confirmed."""

    def __init__(self, group: GroupEngine) -> None:
        self._group = group
        self._roster = group.roster
        self._journal = group.journal
        self._settings = group.config.group

    def targets(self) -> list[tuple[Member, Life]]:
        """Members that can be asked now, nearest first."""
        found = [(m, m.life) for m in self._roster.members.values() if m.serving and m.life is not None]
        return sorted(
            [(member, life) for member, life in found if life.keys is not None], key=lambda item: item[0].rank
        )

    def refuse_if_degraded(self) -> None:
        """Wait, within a call's bound, for members that are just being connected, then look whether they suffice.

        :raises GroupReadOnly: fewer members than ``min_replicas`` and ``degraded = "refuse"``.
        """
        wanted = self._settings.min_replicas
        if len(self.targets()) < wanted and self._roster.may_come():
            self._roster.wake()
            self._roster.wait_for_change(
                self._group.config.timeouts.call,
                lambda: len(self.targets()) >= wanted or not self._roster.may_come(),
            )
        usable = len(self.targets())
        if self._settings.degraded == "refuse" and usable < self._settings.min_replicas:
            raise GroupReadOnly(
                f"{usable} of the group's members are usable, {self._settings.min_replicas} are needed for a change "
                '([group] min_replicas, degraded = "refuse"); nothing was changed'
            )

    def begin(self, start: Callable[[Sequence[Asking], int], Intent]) -> tuple[Intent, list[tuple[Member, Life]]]:
        """Open an intent with the members that are usable now; a moved membership is looked at again."""
        while True:
            self._group.follow()
            self.refuse_if_degraded()
            targets = self.targets()
            if not targets:
                raise GroupUnavailable("no member is usable now: nothing was changed")
            asking = [Asking(member=member.name, worker=life.worker) for member, life in targets]
            try:
                return start(asking, self._group.view.group.membership_revision), targets
            except StaleMembership:
                continue

    def replicate(self, records: Sequence[ObjectRecord]) -> None:
        """Put new token objects on the members. Returns when they are live.

        :raises GroupUnavailable: no member could take them; they are tombstoned, nothing remains.
        :raises Ckr: what the members answered, where all refused.
        """
        mirror = self._group.mirror
        if mirror is not None:
            mirror.put(records)
        intent, targets = self.begin(
            lambda asking, revision: self._journal.begin_create(records, asking=asking, membership_revision=revision)
        )
        futures = {self._roster.run(self._install, member, life, records): member for member, life in targets}
        self._gather(intent, futures)

    def _install(self, member: Member, life: Life, records: Sequence[ObjectRecord]) -> Result:
        try:
            return self._group.replicator.install(member, life, records)
        except Exception as error:
            log.warning("replica.failed", member=member.name, error=str(error))
            return Result(member.name, Outcome.UNKNOWN, error)

    def _gather(self, intent: Intent, futures: dict[Future[Result], Member]) -> None:
        confirmed: list[str] = []
        failures: list[Result] = []
        pending = dict(futures)
        patience = self._group.config.timeouts.call
        while True:
            usable = len(confirmed) + sum(1 for member in pending.values() if member.life is not None)
            needed = self._settings.min_replicas
            if self._settings.degraded == "allow":
                needed = min(needed, max(1, usable))
            if len(confirmed) >= needed and self._live(intent, needed, confirmed):
                return
            if not pending:
                self._abandon(intent, failures)
                return
            done, _ = wait(pending, timeout=patience, return_when=FIRST_COMPLETED)
            if not done:  # somebody is slow or hangs: a probe tells which
                for member in pending.values():
                    if member.life is not None:
                        self._roster.submit(self._roster.probe, member, member.life)
                patience = self._group.config.timeouts.probe + 0.1
            for future in done:
                member = pending.pop(future)
                result = future.result()
                if result.outcome is Outcome.CONFIRMED:
                    confirmed.append(member.name)
                else:
                    failures.append(result)

    def _live(self, intent: Intent, needed: int, confirmed: list[str]) -> bool:
        try:
            return self._journal.go_live(intent.id, needed=needed, serving=confirmed)
        except NoLongerLive as error:
            raise GroupUnavailable(
                "the new object was given up by another process that found this one silent"
            ) from error

    def _abandon(self, intent: Intent, failures: list[Result]) -> None:
        """Nobody has it (or too few): ``creating -> deleted``, and what may be there is destroyed."""
        if not self._journal.abandon_create(intent.id):
            return  # somebody finished it: it is live
        self._group.supervisor.clean_now()
        errors = [result.error for result in failures if result.error is not None]
        for error in errors:
            if isinstance(error, (Ckr, HAError)):
                raise error
        raise GroupUnavailable("no member took the new object: nothing of it is kept: " + "; ".join(map(str, errors)))
