"""Bringing members up to date, and finishing what dead processes left (DESIGN.md 4.1, 4.6).

A member's backlog is what the journal says it owes; it costs what changed, not what is stored. A member whose token
cannot be trusted to be where its rows say (joining, restored, emptied) is taken through a full inventory first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hagroup.config.logging import get_logger
from hagroup.core.calls import Ckr, DeadlinePassed
from hagroup.core.clock import Clock
from hagroup.core.records import (
    GroupRecord,
    Lease,
    Locator,
    Membership,
    ObjectRecord,
    ObjectState,
    OwedKind,
    OwedRow,
)
from hagroup.core.states import Event, State
from hagroup.engine import cleared, ghosts, manifest, recent, renewal, whole_token
from hagroup.engine.held_lease import held
from hagroup.engine.member import Life, Member
from hagroup.engine.opening import CONNECTION_LOST
from hagroup.engine.recovery import Recovery
from hagroup.engine.replicate import Outcome, Replicator, Result
from hagroup.engine.roster import Roster
from hagroup.engine.view import View
from hagroup.errors import JournalMismatch
from hagroup.journal.api import Journal, LeaseLost, StaleMembership

log = get_logger(__name__)

LEASE = 30.0
"""Seconds; renewed between rows, and while one is worked on."""
BATCH = 16
_RETRY_FIRST, _RETRY_MOST = 1.0, 60.0
_ANOTHERS = 1.0
"""Seconds until rows that others work on are looked at again: an owner's death moves no view number."""
_ROUNDS = 10
_LOOK = 10.0
"""Seconds between looks for workers of others that were cut off; and until ghosts that somebody may be writing are
looked at again."""


class Resync:
    """The background work on members, of one process."""

    def __init__(self, roster: Roster, view: View, journal: Journal, replicator: Replicator, clock: Clock) -> None:
        self._roster = roster
        self._view = view
        self._journal = journal
        self._replicator = replicator
        self._clock = clock
        self._later: dict[tuple[str, bytes], tuple[float, float]] = {}
        """Rows that did not go through: (boot time of the next try, the pause before it)."""
        self._nothing_due: dict[str, tuple[int, float]] = {}
        """At which view number nothing was due for a member, and until when (boot time) that holds by itself."""
        self._haunted: dict[str, float] = {}
        """Members on which calls may have been cut off inside a write: from when on (boot time) to look for that."""
        self._looked: dict[str, float] = {}
        """When (boot time) it was looked whether workers of others were."""
        self._in_flight = replicator.in_flight
        roster.on_lost = self._cut_off
        self._recovery = Recovery(roster, view, journal, replicator)

    @property
    def _timeout(self) -> float:
        return self._roster.config.timeouts.generate

    # -- what is due ---------------------------------------------------------------------------------------
    def due(self, member: Member) -> list[OwedRow]:
        """Rows that this process could work on now: free, lost track of, or of a dead owner; not those put off."""
        now, number = self._clock.boot(), self._journal.view_number()
        doubted = self._replicator.doubted()
        owed = self._journal.owed(member.name)
        there = {(row.member, row.uid) for row in owed}
        self._replicator.forget([key for key in doubted if key[0] == member.name and key not in there])
        for key in list(self._later):
            if key[0] == member.name and key not in there:
                self._later.pop(key, None)
        rows = []
        again = math.inf
        for row in owed:
            key = (row.member, row.uid)
            later = self._later.get(key, (0.0, 0.0))[0]
            if key in self._in_flight or (
                row.owner not in (None, self._journal.owner) and self._journal.owner_alive(row.owner)
            ):
                again = min(again, now + _ANOTHERS)
            elif later > now:
                again = min(again, later)
            else:
                rows.append(row)
        self._nothing_due[member.name] = (number, now if rows else again)
        return rows

    def has_work(self, member: Member) -> bool:
        life = member.life
        unproved = life is not None and (not life.proved_since_low or renewal.due(self._view, life))
        if unproved or self._is_haunted(member):
            return True
        number, until = self._nothing_due.get(member.name, (-1, 0.0))
        if number == self._journal.view_number() and self._clock.boot() < until:
            return False  # nothing moved since: reading all that is put off again would tell the same
        return bool(self.due(member))

    def _cut_off(self, member: Member) -> None:
        """Calls there may have been cut off."""
        self._haunted[member.name] = 0.0

    def _is_haunted(self, member: Member) -> bool:
        now = self._clock.boot()
        if now - self._looked.get(member.name, -_LOOK) >= _LOOK:
            self._looked[member.name] = now
            if self._journal.cut_off(member.name):
                self._haunted.setdefault(member.name, 0.0)
        return self._haunted.get(member.name, math.inf) <= now

    def _put_off(self, row: OwedRow) -> None:
        _, pause = self._later.get((row.member, row.uid), (0.0, 0.0))
        pause = min(_RETRY_MOST, pause * 2 or _RETRY_FIRST)
        self._later[(row.member, row.uid)] = (self._clock.boot() + pause, pause)

    # -- a member's backlog --------------------------------------------------------------------------------
    def bring_up_to_date(self, member: Member, *, patient: bool = False) -> bool:
        """Work off what a member owes, under the member's lease; admit it where the journal does not yet.

        True: nothing that could be done now is left. False: another process does it, or the member failed.
        """
        life = member.life
        if life is None or not self._roster.keys.usable(member) or self._roster.journal_behind() is not None:
            return False
        lease = self._journal.acquire_lease(_lease(member), ttl=LEASE)
        if lease is None:
            return False
        try:
            if patient:
                self._later = {key: value for key, value in self._later.items() if key[0] != member.name}
            return self._under_lease(member, life, lease)
        except (Ckr, DeadlinePassed, *CONNECTION_LOST) as error:
            self._roster.lost(member, life, str(error))
            return False
        except (LeaseLost, StaleMembership, JournalMismatch) as error:
            log.warning("resync.ended", member=member.name, reason=str(error))
            return False
        finally:
            self._journal.release_lease(lease)

    def is_at_it(self, member: Member) -> bool:
        """Whether some process brings it up to date now."""
        return self._journal.lease_held(_lease(member))

    def _under_lease(self, member: Member, life: Life, lease: Lease) -> bool:
        record = self._view.members[member.name]
        looked_at = record.membership, record.since, self._view.group.epoch
        if record.membership is not Membership.ADMITTED or not life.proved_since_low or renewal.due(self._view, life):
            with held(self._journal, lease, ttl=LEASE):
                if not self._look(member, life, record.membership):
                    return False
        life.proved_since_low = True
        for _ in range(_ROUNDS):
            barrier = self._journal.barrier()
            lease = self._backlog(member, life, lease)
            self._view.refresh()
            group = self._view.group
            record = self._view.members[member.name]
            if record.membership in (Membership.JOINING, Membership.OUT_OF_SYNC):
                if looked_at != (record.membership, record.since, group.epoch):
                    return False  # it was put out of sync meanwhile (the group was cleared): first the inventory
                if self._admit(member, life, barrier, lease, group):
                    return True
            elif not self.due(member):
                self._raise_low(member, life, barrier)
                return True
        return False

    def _look(self, member: Member, life: Life, membership: Membership) -> bool:
        """What differs on its token from what its rows say is owed by now. False: that cannot be told."""
        if renewal.due(self._view, life):
            renewal.renew(self._journal, self._view, member, life, timeout=self._timeout)
        if membership in (Membership.JOINING, Membership.OUT_OF_SYNC):
            self._cut_off(member)
            cleared.sweep(self._journal, self._view, member, life, timeout=self._timeout)
            return self._compare_whole(member, life)
        return life.proved_since_low or self._prove_since_low(member, life)

    def _admit(self, member: Member, life: Life, barrier: int, lease: Lease, group: GroupRecord) -> bool:
        """:param group: as it was when it was seen that nothing more has to be looked at on the token."""
        record = self._view.members[member.name]
        assert life.keys is not None
        # What is owed from before the barrier is known only after admit: ``low`` follows, lazily.
        high = max(life.manifest_high, record.announced)
        shown = manifest.compose(group, self._view.members, low=record.low, high=high)
        manifest.write(life.connection, life.keys, shown, timeout=self._timeout)
        life.manifest_high, life.manifest_epoch = shown.high, shown.epoch
        revision = group.membership_revision
        try:
            keeps_out = self._journal.admit(
                member.name, barrier=barrier, low=barrier, lease=lease, membership_revision=revision
            )
        except StaleMembership:  # another member was admitted, or this one is to be looked at once more
            self._view.refresh(always=True)
            return False
        if keeps_out:
            log.info("member.not-admitted", member=member.name, owed=len(keeps_out))
            return False
        self._journal.manifest_confirmed(member.name, high=life.manifest_high, low=barrier)
        self._journal.event("member admitted", "brought up to date", member=member.name)
        self._view.refresh()
        with self._roster.changed:
            member.happened(Event.ADMITTED)
            self._roster.changed.notify_all()
        self._roster.follow_journal()
        log.info("member.admitted", member=member.name)
        return True

    def _raise_low(self, member: Member, life: Life, barrier: int) -> None:
        """Everything up to the barrier is finished there: recorded lazily, on the token in steps."""
        if self._journal.owed(member.name):
            return
        if barrier > self._view.members[member.name].low:
            self._journal.manifest_confirmed(member.name, high=life.manifest_high, low=barrier)
        if barrier - life.manifest_low >= recent.STEP:
            recent.raise_low(self._view, member, life, barrier, timeout=self._timeout)

    def _backlog(self, member: Member, life: Life, lease: Lease) -> Lease:
        order = {OwedKind.DESTROY: 0, OwedKind.INSTALL: 1, OwedKind.SET: 2}
        rows = sorted(self.due(member), key=lambda row: (order[row.kind], row.change))
        self._replicator.own_up(rows)
        if self._is_haunted(member):
            with held(self._journal, lease, ttl=LEASE):
                self._sweep(member, life)
        for start in range(0, len(rows), BATCH):
            batch = self._in_flight.take((row.member, row.uid) for row in rows[start : start + BATCH])
            try:
                with held(self._journal, lease, ttl=LEASE):
                    lease = self._batch(member, life, batch, lease)
            except StaleMembership:
                self._view.refresh(always=True)
                return lease
            finally:
                self._in_flight.end(batch)
            if member.life is not life:
                return lease
        return lease

    def _batch(self, member: Member, life: Life, batch: list[tuple[str, bytes]], lease: Lease) -> Lease:
        claimed = self._journal.claim(
            batch, worker=life.worker, membership_revision=self._view.group.membership_revision, lease=lease
        )
        waiting = list(claimed)
        try:
            if any(self._over(member, row) for row in claimed):  # it left what it may have left: nothing more comes
                self._cut_off(member)
            self._sweep(member, life, [row.uid for row in claimed])
            while waiting and member.life is life:
                if lease.expires - self._clock.boot() < LEASE / 2:
                    lease = self._journal.renew_lease(lease, ttl=LEASE)
                row = waiting.pop(0)
                if not self._carry_out(member, life, row, lease):
                    self._put_off(row)
                    lease = self._journal.renew_lease(lease, ttl=LEASE)  # was it the lease? Then no further
        finally:
            for row in waiting:  # claimed, and never asked
                self._journal.give_up([(row.member, row.uid)], doubt=False, kind=row.kind)
        return lease

    def _sweep(self, member: Member, life: Life, mine: Sequence[bytes] = ()) -> None:
        """:param mine: claimed by this thread, which has asked for nothing yet."""
        if not self._is_haunted(member):
            return
        cut_off = self._journal.cut_off(member.name)
        self._haunted.pop(member.name, None)  # before it is looked for: what is cut off meanwhile is not covered
        swept = False
        try:
            swept = ghosts.sweep(life.connection, self._journal, member.name, mine=mine, timeout=self._timeout)
        finally:
            if swept:
                self._journal.forget_cut_off(cut_off)
            else:
                self._haunted.setdefault(member.name, self._clock.boot() + _LOOK)

    def _carry_out(self, member: Member, life: Life, row: OwedRow, lease: Lease) -> bool:
        """One claimed row. True when it is finished (or nothing was to be done)."""
        over = self._over(member, row)  # before the member is searched: one that executes until then is found
        if row.kind is OwedKind.DESTROY:
            result = self._destroy(member, life, row, lease)
        else:
            record = self._journal.object(row.uid)
            if record is None or self._belongs_to_intent(row, record):
                self._journal.give_up([(row.member, row.uid)], doubt=False, kind=row.kind)
                return record is None
            anew = row.locators if self._may_be_there(row) else ()
            if any(a.asked >= life.started and a.worker != life.worker for a in row.unanswered) and (
                self._roster.look_again(member, life, row.uid)  # what another worker made may be hidden from this one
            ):
                self._journal.give_up([(row.member, row.uid)], doubt=False, kind=row.kind)
                return False
            if row.kind is OwedKind.SET:
                manifest.raise_high(self._view, member, life, row.change, timeout=self._timeout)
            doubted = bool(row.unanswered)
            result = self._replicator.install(
                member, life, [record], anew=anew, doubted=doubted, kind=row.kind, lease=lease
            )
        if result.outcome is not Outcome.CONFIRMED:
            return False
        if over:
            self._journal.resolve_attempts(member.name, row.uid, over)
        if len(over) < len(row.unanswered):
            self._put_off(row)
        else:
            self._later.pop((row.member, row.uid), None)
        return True

    def _belongs_to_intent(self, row: OwedRow, record: ObjectRecord) -> bool:
        """Left to whoever carries out (or recovers) an open intent: the creation by a living process, and what members
        were asked for by an attribute change, which nobody can bring to its end before that change is decided."""
        if record.state is ObjectState.CREATING:
            return self._being_made(record)
        return row.kind is OwedKind.SET and row.revision > record.revision

    def _being_made(self, record: ObjectRecord) -> bool:
        intent = next((one for one in self._journal.intents() if one.id == record.intent), None)
        return intent is not None and self._journal.owner_alive(intent.owner)

    @staticmethod
    def _may_be_there(row: OwedRow) -> bool:
        """It was asked for before, or was there once: look before making it."""
        return row.asked_before or row.kind is OwedKind.SET

    def _destroy(self, member: Member, life: Life, row: OwedRow, lease: Lease) -> Result:
        tombstone = self._journal.tombstone(row.uid)
        if tombstone is None:
            self._journal.give_up([(row.member, row.uid)], doubt=False, kind=row.kind)
            return Result(member.name, Outcome.CONFIRMED)
        locators: tuple[Locator, ...] = (*row.locators, *tombstone.locators)
        record = self._view.members[member.name]
        put_aside = row.change <= record.low  # when the member was admitted: that may be the token of before yet
        if self._replicator.mirror is not None:  # its destroyer may have died before that
            self._replicator.mirror.drop(row.uid)
        return self._replicator.destroy(
            member,
            life,
            row.uid,
            locators,
            tombstone.fingerprint,
            {},
            tombstone.change,
            may_be_hidden=row.asked_before,
            anywhere=put_aside or record.membership is not Membership.ADMITTED,
            lease=lease,
        )

    def _over(self, member: Member, row: OwedRow) -> list[int]:
        """Older unanswered attempts that can no longer execute: the worker is proved dead and the module is local, the
        member's late window has passed (DESIGN.md 4.1), or they were this process's and came back."""
        over = []
        for attempt in row.unanswered:
            dead = member.config.local and attempt.worker is not None and self._journal.worker_dead(attempt.worker)
            given_up = attempt.doubt_since is not None
            late = given_up and self._clock.boot() - attempt.since > member.config.late_window
            if dead or late or self._replicator.came_back(row, attempt):
                over.append(attempt.number)
        return over

    def _compare_whole(self, member: Member, life: Life) -> bool:
        with_record = self._replicator.mirror is None
        return whole_token.owe_what_differs(
            self._roster, self._journal, member, life, with_record=with_record, timeout=self._timeout
        )

    def _prove_since_low(self, member: Member, life: Life) -> bool:
        """False: the token went away meanwhile."""
        uids = recent.moved_since_low(self._journal, self._view, life)
        if uids is None:
            return self._compare_whole(member, life)
        with_record = self._replicator.mirror is None
        rows = recent.missing_of(self._journal, member, life, uids, with_record=with_record, timeout=self._timeout)
        if rows and not self._roster.is_still_whole(member, life):
            return False
        hidden = [
            recent.may_be_hidden(self._roster, self._journal, member, life, uid)
            for _, uid, kind in rows
            if kind is OwedKind.INSTALL
        ]
        if any(hidden):
            return False
        if rows and self.we_are_current(member):
            recent.report(self._journal, member.name, rows)
            self._journal.owe(rows, reason=None)
        return True

    def we_are_current(self, member: Member) -> bool:
        """Whether the manifests of that member and of one other show that this journal is not the stale one (4.4)."""
        others = [m for m in self._roster.members.values() if m is not member and m.life is not None]
        for one in [member, *others[:1]]:
            life = one.life
            if life is None or life.keys is None:
                continue
            try:
                manifest.check(self._journal, self._view, one, life, timeout=self._timeout)
            except JournalMismatch as error:
                log.error("journal.behind", reason=str(error))
                return False
            except (Ckr, DeadlinePassed, *CONNECTION_LOST) as error:
                self._roster.lost(one, life, str(error))
        return True

    # -- intents of the dead -------------------------------------------------------------------------------
    def unresolved(self, intent: str) -> None:
        self._recovery.unresolved(intent)

    def interrupted(self, mark: str) -> None:
        self._recovery.interrupted(mark)

    def recover_intents(self) -> bool:
        """True: some were brought to an end, and members may owe something by that."""
        return self._recovery.recover_intents()

    # -- for commands --------------------------------------------------------------------------------------
    def states(self) -> dict[str, State]:
        return {name: member.state for name, member in self._roster.members.items()}


def _lease(member: Member) -> str:
    return f"resync/{member.name}"
