"""Bringing new objects onto the members: from ``creating`` to ``live`` (DESIGN.md 4.2, steps 3 to 5)."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from hagroup.config.logging import get_logger
from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.core.records import GroupRecord, Intent, ObjectRecord
from hagroup.engine.member import Life, Member
from hagroup.engine.replicate import Outcome, Result
from hagroup.errors import CallTimeout, GroupReadOnly, GroupUnavailable, HAError, JournalMismatch, JournalUnavailable
from hagroup.journal.api import Asking, Busy, NoLongerLive, StaleMembership
from hagroup.members.bounded import within

if TYPE_CHECKING:
    from hagroup.engine.group import GroupEngine

log = get_logger(__name__)

T = TypeVar("T")


def _has_no_room(error: Exception | None) -> bool:
    return isinstance(error, Ckr) and error.rv == CKR.DEVICE_MEMORY


class Replication:
    """The foreground of a create: asks all members in parallel, returns when enough have confirmed."""

    def __init__(self, group: GroupEngine) -> None:
        self._group = group
        self._roster = group.roster
        self._journal = group.journal
        self._settings = group.config.group
        self._timeout = group.config.timeouts.generate
        self._numbers = itertools.count(1)

    def targets(self) -> list[tuple[Member, Life]]:
        """Members that can be asked now, nearest first."""
        found = [(m, m.life) for m in self._roster.members.values() if m.serving and m.life is not None]
        return sorted(
            [(member, life) for member, life in found if self._roster.keys.usable(member)],
            key=lambda item: item[0].rank,
        )

    def refuse_if_degraded(self) -> None:
        """Wait, within a call's bound, for members that are just being connected, then look whether they suffice.

        :raises GroupReadOnly: fewer members than ``min_replicas`` and ``degraded = "refuse"``.
        """
        self._roster.all_had_a_turn()
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

    def refuse_if_behind(self) -> None:
        """:raises JournalMismatch: some member has seen changes that this journal does not know (DESIGN.md 4.6)."""
        why = self._roster.journal_behind()
        if why is not None:
            raise JournalMismatch(f"nothing was changed: {why}")

    def begin(
        self,
        uids: Sequence[bytes],
        start: Callable[[Sequence[Asking], int, str], T],
        usable: Callable[[Member], bool] = lambda member: True,
        prepare: Callable[[GroupRecord], None] = lambda group: None,
    ) -> tuple[T, list[tuple[Member, Life]]]:
        """Write a change down with the members that are usable now; a moved membership is looked at again.

        The rows of all these members count as in flight: ``self.ended`` for each when it was asked, or is not asked.

        :param start: gets the mark of the intent that it opens, if it does. What comes in between (Ctrl-C, a signal's
            handler that raises) comes when the journal has just written it down: nobody would know of the intent, and
            the object would be neither used nor changed by anybody as long as this process lives.
        :param prepare: called before each try with the group as of the membership revision that the try compares.
        """
        in_flight = self._group.replicator.in_flight
        mark = f".{self._journal.owner}.{next(self._numbers)}"
        self._group.follow()
        while True:
            self.refuse_if_degraded()
            self.refuse_if_behind()
            now = self._group.view.group
            prepare(now)
            targets = [(member, life) for member, life in self.targets() if usable(member)]
            if not targets:
                raise GroupUnavailable("no member that could take the change is usable now: nothing was changed")
            asking = [Asking(member=member.name, worker=life.worker) for member, life in targets]
            rows = [(member.name, uid) for member, _ in targets for uid in uids]
            in_flight.begin(rows)
            try:
                return start(asking, now.membership_revision, mark), targets
            except StaleMembership:
                in_flight.end(rows)
                self._group.view.refresh(always=True)
                self._roster.follow_journal()
            except (HAError, Busy, NoLongerLive):
                in_flight.end(rows)
                raise
            except BaseException:
                in_flight.end(rows)
                self._group.supervisor.interrupted(mark)
                raise

    def ended(self, member: Member, uids: Sequence[bytes]) -> None:
        """What ``begin`` began is over for this member."""
        self._group.replicator.in_flight.end((member.name, uid) for uid in uids)

    def wait_for(self, futures: Mapping[Future[Any], tuple[Member, Life]]) -> None:
        """Until each member has answered, was found lost, or had its time: what becomes of its call is dealt with where
        it runs."""
        pending = dict(futures)
        patience, end = self._group.config.timeouts.call, self._roster.clock.boot() + self._timeout
        while pending and (most := end - self._roster.clock.boot()) > 0:
            done, _ = wait(pending, timeout=min(patience, most), return_when=FIRST_COMPLETED)
            if not done:  # somebody is slow or hangs: a probe tells which
                for member, life in pending.values():
                    self._roster.submit(self._roster.probe, member, life)
                patience = self._group.config.timeouts.probe + 0.1
            pending = {
                future: (member, life)
                for future, (member, life) in pending.items()
                if future not in done and member.life is life
            }

    def replicate(self, records: Sequence[ObjectRecord]) -> None:
        """Put new token objects on the members. Returns when they are live.

        :raises GroupUnavailable: no member could take them; they are tombstoned, nothing remains.
        :raises Ckr: what the members answered, where all refused.
        """
        mirror = self._group.mirror
        if mirror is not None:
            mirror.put(records)
        uids = [record.uid for record in records]
        mirrored = list(records)

        def seal_anew(group: GroupRecord) -> None:
            nonlocal records
            records = [self._group.sealed_under(group, record) for record in records]

        try:
            intent, targets = self.begin(
                uids,
                lambda asking, revision, mark: self._journal.begin_create(
                    records, asking=asking, membership_revision=revision, mark=mark
                ),
                prepare=seal_anew,
            )
        except BaseException:
            if mirror is not None:  # nothing was begun: a rebuilt journal must not bring them to life
                with contextlib.suppress(JournalUnavailable):
                    for uid in uids:
                        mirror.drop(uid)
            raise
        try:
            try:
                # Two processes may have imported one certificate at once: the journal told them apart.
                apart = [self._told_apart(record) for record in records]
                if mirror is not None and apart != mirrored:
                    mirror.put(apart)
            except BaseException:
                for member, _ in targets:
                    self.ended(member, uids)  # nobody is asked
                raise
            records = apart
            futures = {
                self._roster.lanes.run(member.name, partial(self._install, member, life, records)): member
                for member, life in targets
            }
            self._gather(intent, futures)
        except BaseException:
            # Whatever came in between (the journal cannot be reached; Ctrl-C): it must not stay half-made.
            self._group.supervisor.unresolved(intent.id)
            raise

    def _told_apart(self, record: ObjectRecord) -> ObjectRecord:
        now = self._journal.object(record.uid)
        return record if now is None else msgspec.structs.replace(record, member_id=now.member_id)

    def _install(self, member: Member, life: Life, records: Sequence[ObjectRecord]) -> Result:
        begun = self._roster.clock.boot()
        try:
            with within(self._timeout):
                result = self._group.replicator.install(member, life, records)
            if result.outcome is Outcome.CONFIRMED:
                self._roster.choosing.took(member, self._roster.clock.boot() - begun)
            return result
        except Exception as error:
            log.warning("replica.failed", member=member.name, error=str(error))
            return Result(member.name, Outcome.UNKNOWN, error)
        finally:
            self.ended(member, [record.uid for record in records])

    def _gather(self, intent: Intent, futures: dict[Future[Result], Member]) -> None:
        confirmed: list[str] = []
        failures: list[Result] = []
        full = 0
        """Members in service without room for it: that they are there does not make one copy enough."""
        pending = dict(futures)
        patience, end = self._group.config.timeouts.call, self._roster.clock.boot() + self._timeout
        while True:
            usable = len(confirmed) + full + sum(1 for member in pending.values() if member.life is not None)
            needed = self._settings.min_replicas
            if self._settings.degraded == "allow":
                needed = min(needed, max(1, usable))
            if len(confirmed) >= needed and self._live(intent, needed, confirmed):
                return
            most = end - self._roster.clock.boot()
            if pending and most <= 0:
                text = f"too few members took the new object within {self._timeout:g} s; nothing of it is kept"
                failures += [Result(member.name, Outcome.UNKNOWN, CallTimeout(text)) for member in pending.values()]
                pending.clear()
            if not pending:
                self._abandon(intent, failures)
                return
            done, _ = wait(pending, timeout=min(patience, most), return_when=FIRST_COMPLETED)
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
                    full += member.life is not None and _has_no_room(result.error)

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
        why = "; ".join(map(str, errors)) or "another client, which took this one for dead, had given it up by then"
        raise GroupUnavailable(f"no member took the new object: nothing of it is kept: {why}")
