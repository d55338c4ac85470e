"""Bringing members up to date, and finishing what dead processes left (DESIGN.md 4.1, 4.6).

A member's backlog is what the journal says it owes; it costs what changed, not what is stored. A member whose token
cannot be trusted to be where its rows say (joining, restored, emptied) is taken through a full inventory first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from hagroup.config.logging import get_logger
from hagroup.core.calls import Ckr, DeadlinePassed
from hagroup.core.clock import Clock
from hagroup.core.records import (
    Intent,
    IntentKind,
    Lease,
    Locator,
    Membership,
    ObjectRecord,
    ObjectState,
    OwedKind,
    OwedRow,
)
from hagroup.core.states import Event, State
from hagroup.engine import manifest, replica
from hagroup.engine.member import Life, Member
from hagroup.engine.replicate import Outcome, Replicator, Result
from hagroup.engine.roster import CONNECTION_LOST, Roster
from hagroup.engine.view import View
from hagroup.errors import JournalMismatch
from hagroup.journal.api import Journal, LeaseLost, NoLongerLive, StaleMembership

log = get_logger(__name__)

LEASE = 30.0
"""Seconds; renewed after every batch."""
BATCH = 16
_RETRY_FIRST, _RETRY_MOST = 1.0, 60.0
_ROUNDS = 5


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
        self._unresolved: set[str] = set()
        """Intents of this very process whose outcome its call could not find out."""

    @property
    def _timeout(self) -> float:
        return self._roster.config.timeouts.generate

    # -- what is due ---------------------------------------------------------------------------------------
    def due(self, member: Member) -> list[OwedRow]:
        """Rows that this process could work on now: free, own, or of a dead owner; not those put off."""
        now = self._clock.boot()
        rows = []
        for row in self._journal.owed(member.name):
            if self._later.get((row.member, row.uid), (0.0, 0.0))[0] > now:
                continue
            if row.owner is not None and self._journal.owner_alive(row.owner):
                continue
            rows.append(row)
        return rows

    def has_work(self, member: Member) -> bool:
        return bool(self.due(member))

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
        if life is None or life.keys is None:
            return False
        lease = self._journal.acquire_lease(f"resync/{member.name}", ttl=LEASE)
        if lease is None:
            return False
        try:
            if patient:
                self._later = {key: value for key, value in self._later.items() if key[0] != member.name}
            return self._under_lease(member, life, lease)
        except (Ckr, DeadlinePassed, *CONNECTION_LOST) as error:
            self._roster.lost(member, life, str(error))
            return False
        except (LeaseLost, JournalMismatch) as error:
            log.warning("resync.ended", member=member.name, reason=str(error))
            return False
        finally:
            self._journal.release_lease(lease)

    def _under_lease(self, member: Member, life: Life, lease: Lease) -> bool:
        record = self._view.members[member.name]
        if record.membership in (Membership.JOINING, Membership.OUT_OF_SYNC):
            self.inventory(member, life)
        for _ in range(_ROUNDS):
            barrier = self._journal.barrier()
            lease = self._backlog(member, life, lease)
            self._view.refresh()
            record = self._view.members[member.name]
            if record.membership in (Membership.JOINING, Membership.OUT_OF_SYNC):
                if self._admit(member, life, barrier, lease):
                    return True
            elif not self.due(member):
                self._raise_low(member, life, barrier)
                return True
        return False

    def _admit(self, member: Member, life: Life, barrier: int, lease: Lease) -> bool:
        record = self._view.members[member.name]
        assert life.keys is not None
        shown = manifest.compose(
            self._view.group, self._view.members, low=barrier, high=max(life.manifest_high, record.announced)
        )
        manifest.write(life.connection, life.keys, shown, timeout=self._timeout)
        life.manifest_high = shown.high
        keeps_out = self._journal.admit(member.name, barrier=barrier, low=barrier, lease=lease)
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
        """Everything up to the barrier is finished there: recorded lazily, in the journal only."""
        if barrier > self._view.members[member.name].low and not self._journal.owed(member.name):
            self._journal.manifest_confirmed(member.name, high=life.manifest_high, low=barrier)

    def _backlog(self, member: Member, life: Life, lease: Lease) -> Lease:
        order = {OwedKind.DESTROY: 0, OwedKind.INSTALL: 1, OwedKind.SET: 2}
        rows = sorted(self.due(member), key=lambda row: (order[row.kind], row.change))
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            try:
                claimed = self._journal.claim(
                    [(row.member, row.uid) for row in batch],
                    worker=life.worker,
                    membership_revision=self._view.group.membership_revision,
                    lease=lease,
                )
            except StaleMembership:
                self._view.refresh()
                return lease
            for row in claimed:
                if not self._carry_out(member, life, row, lease):
                    self._put_off(row)
                if member.life is not life:
                    rest = [(r.member, r.uid) for r in claimed]
                    self._journal.give_up(rest, doubt=False)
                    return lease
            lease = self._journal.renew_lease(lease, ttl=LEASE)
        return lease

    def _carry_out(self, member: Member, life: Life, row: OwedRow, lease: Lease) -> bool:
        """One claimed row. True when it is finished (or nothing was to be done)."""
        if row.kind is OwedKind.DESTROY:
            result = self._destroy(member, life, row, lease)
        else:
            record = self._journal.object(row.uid)
            if record is None or (record.state is ObjectState.CREATING and self._being_made(record)):
                self._journal.give_up([(row.member, row.uid)], doubt=False)
                return record is None
            anew = row.locators if self._may_be_there(row) else ()
            result = self._replicator.install(member, life, [record], anew=anew, lease=lease)
        if result.outcome is not Outcome.CONFIRMED:
            return False
        self._settle_doubt(member, row)
        self._later.pop((row.member, row.uid), None)
        return True

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
            self._journal.give_up([(row.member, row.uid)], doubt=False)
            return Result(member.name, Outcome.CONFIRMED)
        locators: tuple[Locator, ...] = (*row.locators, *tombstone.locators)
        return self._replicator.destroy(
            member, life, row.uid, locators, tombstone.fingerprint, {}, tombstone.change, lease=lease
        )

    def _settle_doubt(self, member: Member, row: OwedRow) -> None:
        """Forget an older unanswered call once it can no longer execute: its worker is proved dead and the module is
        local, or the member's late window has passed (DESIGN.md 4.1)."""
        for attempt in row.unanswered:
            dead = member.config.local and attempt.worker is not None and self._journal.worker_dead(attempt.worker)
            late = self._clock.boot() - attempt.since > member.config.late_window
            if not (dead or late):
                self._put_off(row)
                return
        if row.unanswered:
            self._journal.clear_doubt(member.name, row.uid)

    # -- inventory -----------------------------------------------------------------------------------------
    def inventory(self, member: Member, life: Life) -> None:
        """Compare everything on a token with the journal, and owe what differs. Nothing on the token is changed."""
        assert life.keys is not None
        entries = replica.inventory(life.connection, timeout=self._timeout)
        by_locator: dict[Locator, list[int]] = {}
        for entry in entries:
            if not entry.own and not entry.ghost:
                by_locator.setdefault(entry.locator, []).append(entry.handle)
        owed = {row.uid for row in self._journal.owed(member.name)}
        rows: list[tuple[str, bytes, OwedKind]] = []
        for record in self._journal.objects():
            if record.uid in owed or record.state is not ObjectState.LIVE:
                continue
            if not self._has_it(life, record, by_locator.get(record.locator, [])):
                rows.append((member.name, record.uid, OwedKind.INSTALL))
        for tombstone in self._journal.tombstones():
            if tombstone.uid in owed:
                continue
            if any(locator in by_locator for locator in tombstone.locators):
                rows.append((member.name, tombstone.uid, OwedKind.DESTROY))
        for start in range(0, len(rows), 500):
            self._journal.owe(rows[start : start + 500], reason=None)
        log.info("member.inventory", member=member.name, objects=len(entries), owed=len(rows))

    def _has_it(self, life: Life, record: ObjectRecord, handles: Iterable[int]) -> bool:
        matching = [
            handle for handle in handles if replica.is_this(life.connection, handle, record, timeout=self._timeout)
        ]
        return len(matching) == 1

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
        self._unresolved.add(intent)

    def recover_intents(self) -> None:
        """Finish or undo what processes left that died in the middle."""
        for intent in self._journal.intents():
            mine = intent.owner == self._journal.owner and intent.id in self._unresolved
            if not mine:
                if self._journal.owner_alive(intent.owner):
                    continue
                adopted = self._journal.adopt_intent(intent.id)
                if adopted is None:
                    continue
                intent = adopted
            if intent.kind is IntentKind.CREATE:
                self._recover_create(intent)
            else:
                self._recover_set(intent)

    def _recover_create(self, intent: Intent) -> None:
        serving = [member.name for member in self._roster.serving()]
        needed = max(1, min(self._roster.config.group.min_replicas, len(serving)))
        try:
            if not self._journal.go_live(intent.id, needed=needed, serving=serving):
                self._journal.abandon_create(intent.id)
        except NoLongerLive:
            pass
        self._unresolved.discard(intent.id)
        log.info("intent.recovered", kind="create", intent=intent.id)

    def _recover_set(self, intent: Intent) -> None:
        old = self._journal.object(intent.uids[0])
        if old is None or intent.new_attributes is None:
            return
        after = msgspec.structs.replace(
            old,
            revision=old.revision + 1,
            attributes={**old.attributes, **intent.new_attributes},
            envelope=intent.new_envelope,
        )
        results = self._ask_for_set(intent, old, after)
        accepted = [result.member for result in results if result.outcome is Outcome.CONFIRMED]
        try:
            if accepted:
                self._journal.commit_set(intent.id)
                for name in accepted:
                    self._replicator.confirm_set(name, after)
            elif results and all(result.outcome is Outcome.REFUSED for result in results):
                self._journal.rollback_set(intent.id)
            else:
                return  # nobody could be asked: later
        except NoLongerLive:
            pass
        self._unresolved.discard(intent.id)
        log.info("intent.recovered", kind="set", intent=intent.id)

    def _ask_for_set(self, intent: Intent, old: ObjectRecord, after: ObjectRecord) -> Sequence[Result]:
        copies, _ = self._journal.placement(old.uid)
        results = []
        for member in self._roster.serving():
            life = member.life
            if life is None or life.keys is None or member.name not in copies:
                continue
            claimed = self._journal.claim(
                [(member.name, old.uid)],
                worker=life.worker,
                membership_revision=self._view.group.membership_revision,
                locators=[old.locator, after.locator],
            )
            if claimed:
                results.append(self._replicator.set(member, life, old, after, intent.change))
        return results

    # -- for commands --------------------------------------------------------------------------------------
    def states(self) -> dict[str, State]:
        return {name: member.state for name, member in self._roster.members.items()}
