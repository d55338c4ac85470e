"""Carrying out, on one member, what it owes for one object; and confirming it (DESIGN.md 4.1).

Every change of a token goes through here, from an application's call and from a resync alike: the row is claimed and
marked sent before the member is asked, only a reply *and* a confirming transaction clear it, and a change whose
confirmation is refused is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from enum import StrEnum

import msgspec

from hagroup.config.logging import get_logger
from hagroup.core.calls import Ckr, DeadlinePassed, Handle
from hagroup.core.classify import Verdict, classify
from hagroup.core.records import Attempt, Fingerprint, Lease, Locator, ObjectRecord, OwedKind, OwedRow
from hagroup.engine import manifest, replica
from hagroup.engine.in_flight import InFlight
from hagroup.engine.member import Life, Member
from hagroup.engine.opening import CONNECTION_LOST
from hagroup.engine.proof import Proof, prove
from hagroup.engine.roster import Roster
from hagroup.engine.stored_records import drop_records, store_record
from hagroup.engine.twins import Occupied, destroyable, others_at
from hagroup.engine.view import View
from hagroup.errors import HAError, JournalUnavailable
from hagroup.journal.api import Confirmation, Journal, LeaseLost, StaleMembership
from hagroup.journal.mirror import Mirror

log = get_logger(__name__)


class Outcome(StrEnum):
    """How asking one member ended."""

    CONFIRMED = "confirmed"
    REFUSED = "refused"  # it answered no; nothing of it is there
    UNKNOWN = "unknown"  # no answer, or one that says nothing: in doubt
    OVERTAKEN = "overtaken"  # done, but the object was destroyed meanwhile: undone again


class Result(msgspec.Struct, frozen=True):
    """Outcome on one member, with the error of a refusal."""

    member: str
    outcome: Outcome
    error: Exception | None = None


_KNOWN_REFUSALS = (Verdict.APPLICATION, Verdict.CAPABILITY, Verdict.OVERLOAD)


class Replicator:
    """Asks members for changes. Stateless but for what it is made of."""

    def __init__(self, roster: Roster, view: View, journal: Journal, mirror: Mirror | None = None) -> None:
        self._roster = roster
        self._view = view
        self._journal = journal
        self.mirror = mirror
        self._mirrored = mirror is not None
        self.in_flight = InFlight()
        """Whoever claims rows says so here first, and ends it when :class:`Replicator` is done with them."""
        self._unanswered: set[tuple[str, bytes]] = set()
        """Rows for which the member gave no answer, until the journal knows it."""
        self._doubted: set[tuple[str, bytes]] = set()
        """Rows for which the member gave no answer, as long as there is such a row."""

    @property
    def _timeout(self) -> float:
        return self._roster.config.timeouts.generate

    def _revision(self) -> int:
        return self._view.group.membership_revision

    def own_up(self, rows: Sequence[OwedRow]) -> None:
        """Tell what became of attempts of this process that no thread of it waits for any more (see ``in_flight``):
        each came back, or is known to have got no answer."""
        for row in rows:
            key = (row.member, row.uid)
            for attempt in row.attempts:
                if attempt.owner != self._journal.owner or attempt.doubt_since is not None:
                    continue
                doubt = key in self._unanswered
                self._journal.give_up([key], doubt=doubt, kind=attempt.kind)
                if attempt.kind is OwedKind.SET and not doubt:  # it may have taken: to be made anew, whichever stays
                    self._journal.owe([(*key, OwedKind.INSTALL)])
            self._unanswered.discard(key)

    def came_back(self, row: OwedRow, attempt: Attempt) -> bool:
        """Whether it is over although its owner counts as dead: this process was that owner, before its registration
        ran out (it was cut off from the journal, or frozen), and the member answered. (No other thread is at the row:
        whoever asks has taken it.)"""
        return attempt.owner in self._journal.former_owners and (row.member, row.uid) not in self._doubted

    def doubted(self) -> frozenset[tuple[str, bytes]]:
        """Rows for which some member gave no answer."""
        return frozenset(self._doubted)

    def forget(self, rows: Collection[tuple[str, bytes]]) -> None:
        """These are no more."""
        self._doubted.difference_update(rows)

    # -- install -------------------------------------------------------------------------------------------
    def install(
        self,
        member: Member,
        life: Life,
        records: Sequence[ObjectRecord],
        *,
        anew: Sequence[Locator] = (),
        doubted: bool = False,
        kind: OwedKind = OwedKind.INSTALL,
        lease: Lease | None = None,
    ) -> Result:
        """Make token objects there (rows claimed and sent), prove them, confirm.

        :param anew: it may be there already, whole or in half, under these locators too: look, and replace it.
        :param doubted: an earlier attempt may have been executed, or be executed yet.
        :param kind: what the rows owe: a ``set`` may be brought to its end by making the object anew.
        """
        assert life.keys is not None
        done: list[ObjectRecord] = []
        failed: Exception | None = None
        unknown = beside = False
        for record in records:
            try:
                old = self._there_already(member, life, record, anew, doubted=doubted) if anew else []
                replica.install(
                    life.connection,
                    life.keys,
                    record,
                    timeout=self._timeout,
                    with_record=not self._mirrored,
                    refuses=lambda error: classify(error.rv, member.config.errors) in _KNOWN_REFUSALS,
                )
                if anew:  # the new one first: at every instant there is one
                    beside = bool(old)
                    life.handles.pop(record.uid, None)
                    replica.discard(life.connection, record, old, timeout=self._timeout)
                    beside = False
                done.append(record)
            except Occupied as error:
                failed = error
                break
            except (Ckr, DeadlinePassed, HAError, *CONNECTION_LOST) as error:
                # Where an older one may be beside it, under a label of before, it is looked for everywhere: whatever
                # the last call came to, by its locators only the new one would be found.
                failed, unknown = error, self._is_unknown(member, life, error) or beside
                break
        rest = [(member.name, record.uid) for record in records[len(done) :]]
        if failed is not None:
            told = None if unknown or isinstance(failed, Occupied) else str(failed)
            doubt = unknown and (beside or not self._answered(member, failed))
            self._give_up(rest, doubt=doubt, reason=told, kind=kind)
        confirmations = [
            Confirmation(
                member=member.name,
                uid=record.uid,
                kind=OwedKind.INSTALL,
                revision=record.revision,
                locator=record.locator,
            )
            for record in done
        ]
        overtaken = False
        for record, accepted in zip(done, self._confirm(confirmations, lease), strict=True):
            if not accepted:
                overtaken = True
                self.undo(member, life, record)
        if failed is not None:
            return Result(member.name, Outcome.UNKNOWN if unknown else Outcome.REFUSED, failed)
        return Result(member.name, Outcome.OVERTAKEN if overtaken else Outcome.CONFIRMED)

    def _there_already(
        self, member: Member, life: Life, record: ObjectRecord, locators: Sequence[Locator], *, doubted: bool
    ) -> list[Handle]:
        """What is on the token of this object and may go: under any locator that it had, else (somebody may have
        changed label and id behind the group's back) wherever no other live object is."""

        places = [record.locator, *locators]
        found = replica.locate(
            life.connection,
            places,
            record.fingerprint,
            record.attributes,
            timeout=self._timeout,
            claimed=self._claimed_by_others(record.uid),
            everywhere=doubted,
        )
        return self._destroyable(member, life, record.uid, places)(found)

    def _claimed_by_others(self, uid: bytes) -> Callable[[Locator], bool]:
        """Whether another object of the group is at a locator, or may be there any moment."""
        return lambda locator: bool(others_at(self._journal, uid, [locator]))

    def _destroyable(
        self, member: Member, life: Life, uid: bytes, locators: Sequence[Locator]
    ) -> Callable[[list[Handle]], list[Handle]]:
        """Which of the objects found as one may go, where other objects of the group have the same value there."""

        def is_one(handle: Handle, record: ObjectRecord) -> bool:
            return replica.is_this(life.connection, handle, record, timeout=self._timeout)

        def choose(found: list[Handle]) -> list[Handle]:
            if not found:
                return []
            others = others_at(self._journal, uid, locators)
            return destroyable(self._journal, member.name, found, others, is_one)

        return choose

    def _confirm(self, confirmations: Sequence[Confirmation], lease: Lease | None) -> list[bool]:
        """Confirm; a moved membership is looked at again (the reply itself stays true), a lost lease is a refusal."""
        if not confirmations:
            return []
        while True:
            try:
                return self._journal.confirm(confirmations, membership_revision=self._revision(), lease=lease)
            except StaleMembership:
                self._view.refresh(always=True)
            except LeaseLost:
                return [False] * len(confirmations)

    def _give_up(self, rows: Sequence[tuple[str, bytes]], *, doubt: bool, reason: str | None, kind: OwedKind) -> None:
        if doubt:
            self._unanswered.update(rows)
            self._doubted.update(rows)
        self._journal.give_up(rows, doubt=doubt, reason=reason, kind=kind)
        self._unanswered.difference_update(rows)

    def _answered(self, member: Member, error: Exception) -> bool:
        """Whether it is over, however it went: a module that works in this host has come back, and a handle that is no
        handle was no handle. (A module that works elsewhere may return an error for what its HSM executes later.)"""
        if not isinstance(error, Ckr):
            return False
        return member.config.local or classify(error.rv, member.config.errors) is Verdict.STALE_HANDLE

    def _is_unknown(self, member: Member, life: Life, error: Exception) -> bool:
        """Deal with the member; True when it cannot be told whether the change was made."""
        if isinstance(error, Ckr):
            verdict = classify(error.rv, member.config.errors)
            if verdict in _KNOWN_REFUSALS:
                return False
            if verdict is Verdict.QUARANTINE:
                self._roster.quarantine(member, str(error))
            elif verdict is Verdict.STALE_HANDLE:
                self._roster.keys.check(member, life)
            elif verdict is not Verdict.AMBIGUOUS:
                self._roster.lost(member, life, str(error))
            return True
        if isinstance(error, DeadlinePassed):
            self._roster.timed_out(member, life)
            return True
        if isinstance(error, CONNECTION_LOST):
            self._roster.lost(member, life, str(error))
            return getattr(error, "sent", True)
        log.error("replica.refused", member=member.name, error=str(error))
        return False

    def undo(self, member: Member, life: Life, record: ObjectRecord, *locators: Locator) -> None:
        """A confirmation was refused: what was done is taken back, and the object is not there. If it should be, the
        journal owes it anew.

        :param locators: further ones under which it may be.
        """
        places = [record.locator, *locators]
        life.handles.pop(record.uid, None)
        try:
            replica.remove(
                life.connection,
                record.uid,
                places,
                record.fingerprint,
                record.attributes,
                timeout=self._timeout,
                choose=self._destroyable(member, life, record.uid, places),
            )
        except (Ckr, DeadlinePassed, Occupied, *CONNECTION_LOST) as error:
            if not isinstance(error, Occupied):
                self._is_unknown(member, life, error)
            # The row stays: whoever comes next looks again.
            doubt = not isinstance(error, Occupied) and not self._answered(member, error)
            self._give_up([(member.name, record.uid)], doubt=doubt, reason=None, kind=OwedKind.DESTROY)
            return
        self._journal.undone(member.name, record.uid)

    # -- set attributes ------------------------------------------------------------------------------------
    def set(
        self,
        member: Member,
        life: Life,
        old: ObjectRecord,
        new: ObjectRecord,
        change: int,
        *,
        lease: Lease | None = None,
    ) -> Result:
        """Bring a token object from the old to the new record's attributes (row claimed and sent), and confirm."""
        assert life.keys is not None
        row = (member.name, old.uid)
        changed = False
        try:
            manifest.raise_high(self._view, member, life, change, timeout=self._timeout)
            handles = replica.locate(
                life.connection,
                [old.locator, new.locator],
                old.fingerprint,
                old.attributes,
                timeout=self._timeout,
            )
            if len(handles) != 1:
                if not handles:
                    self._roster.look_again(member, life, old.uid)
                self._journal.give_up([row], doubt=False, kind=OwedKind.SET)
                self._journal.owe([(*row, OwedKind.INSTALL)])
                return Result(member.name, Outcome.UNKNOWN)
            replica.apply_set(
                life.connection,
                life.keys,
                handles[0],
                old,
                new,
                timeout=self._timeout,
                with_record=False,
            )
            changed = True
            if not self._mirrored:
                store_record(life.connection, life.keys, new, timeout=self._timeout)
                drop_records(life.connection, new.uid, timeout=self._timeout, but=new.revision)
        except (Ckr, DeadlinePassed, HAError, *CONNECTION_LOST) as error:
            unknown = self._is_unknown(member, life, error)
            reason = None if unknown else str(error)
            doubt = unknown and not self._answered(member, error)
            self._give_up([row], doubt=doubt, reason=reason, kind=OwedKind.SET)
            if (changed or unknown) and not doubt:  # it may have new values, or lack their record: to be made anew
                self._journal.owe([(*row, OwedKind.INSTALL)])
            return Result(member.name, Outcome.UNKNOWN if unknown else Outcome.REFUSED, error)
        return Result(member.name, Outcome.CONFIRMED)

    def confirm_set(self, member: Member, life: Life, old: ObjectRecord, new: ObjectRecord) -> None:
        """After the change was accepted by some member, and committed or refused: a member that took it says so."""
        confirmation = Confirmation(
            member=member.name, uid=new.uid, kind=OwedKind.SET, revision=new.revision, locator=new.locator
        )
        if self._confirm([confirmation], None)[0]:
            self._manifest_shown(member, life)
        else:
            self.undo(member, life, new, old.locator)

    def _manifest_shown(self, member: Member, life: Life) -> None:
        try:
            self._journal.manifest_confirmed(member.name, high=life.manifest_high)
        except JournalUnavailable as error:
            log.warning("journal.unavailable", error=str(error))

    # -- destroy -------------------------------------------------------------------------------------------
    def destroy(
        self,
        member: Member,
        life: Life,
        uid: bytes,
        locators: Sequence[Locator],
        fingerprint: Fingerprint,
        attributes: dict[int, bytes],
        change: int,
        *,
        may_be_hidden: bool,
        anywhere: bool = False,
        lease: Lease | None = None,
    ) -> Result:
        """Remove the object wherever it may be on this member (row claimed and sent), and confirm.

        :param may_be_hidden: another worker may have put it there: if this one does not see it, it looks again.
        :param anywhere: if it is at none of the locators, look wherever no live object is: the token may be an old one.
        """
        try:
            manifest.raise_high(self._view, member, life, change, timeout=self._timeout)
            life.handles.pop(uid, None)
            found = replica.remove(
                life.connection,
                uid,
                list(locators),
                fingerprint,
                attributes,
                timeout=self._timeout,
                claimed=self._claimed_by_others(uid) if anywhere else None,
                choose=self._destroyable(member, life, uid, locators),
            )
        except Occupied as error:
            self._journal.give_up([(member.name, uid)], doubt=False, kind=OwedKind.DESTROY)
            return Result(member.name, Outcome.REFUSED, error)
        except (Ckr, DeadlinePassed, HAError, *CONNECTION_LOST) as error:
            unknown = self._is_unknown(member, life, error)
            reason = None if unknown else str(error)
            doubt = unknown and not self._answered(member, error)
            self._give_up([(member.name, uid)], doubt=doubt, reason=reason, kind=OwedKind.DESTROY)
            return Result(member.name, Outcome.UNKNOWN if unknown else Outcome.REFUSED, error)
        if not found and may_be_hidden and life.began < change and self._roster.look_again(member, life, uid):
            self._journal.give_up([(member.name, uid)], doubt=False, kind=OwedKind.DESTROY)
            return Result(member.name, Outcome.UNKNOWN)
        if not self._confirm([Confirmation(member=member.name, uid=uid, kind=OwedKind.DESTROY)], lease)[0]:
            # The lease was lost: it is gone from there, but somebody else has to say so.
            self._journal.give_up([(member.name, uid)], doubt=False, kind=OwedKind.DESTROY)
        self._manifest_shown(member, life)
        return Result(member.name, Outcome.CONFIRMED)

    # -- proof ---------------------------------------------------------------------------------------------
    def lacks(self, member: Member, uid: bytes) -> bool:
        """Whether the member should have the object, as of now, and does not have it (or has several)."""
        self._view.refresh()
        found = self._view.object(uid)
        life = member.life
        if found is None or life is None or member.name not in found.members:
            return False
        life.handles.pop(uid, None)
        try:
            handles = replica.locate(
                life.connection,
                [found.record.locator],
                found.record.fingerprint,
                found.record.attributes,
                timeout=self._timeout,
            )
        except (Ckr, DeadlinePassed, *CONNECTION_LOST) as error:
            self._is_unknown(member, life, error)
            return False
        if not handles and self._roster.look_again(member, life, uid):
            return False
        return len(handles) != 1

    def proves(self, member: Member, uid: bytes) -> bool:
        """Whether the member's object is the group's, whole (fingerprint and use). True where it cannot be told now."""
        found = self._view.object(uid)
        life = member.life
        if found is None or life is None or life.keys is None:
            return True
        try:
            handles = replica.locate(
                life.connection,
                [found.record.locator],
                found.record.fingerprint,
                found.record.attributes,
                timeout=self._timeout,
            )
            if len(handles) != 1:
                return False
            return prove(life.connection, handles[0], found.record, timeout=self._timeout) is not Proof.MISMATCH
        except (Ckr, DeadlinePassed, *CONNECTION_LOST) as error:
            self._is_unknown(member, life, error)
            return True
