"""Carrying out, on one member, what it owes for one object; and confirming it (DESIGN.md 4.1).

Every change of a token goes through here, from an application's call and from a resync alike: the row is claimed and
marked sent before the member is asked, only a reply *and* a confirming transaction clear it, and a change whose
confirmation is refused is undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from hagroup.config.logging import get_logger
from hagroup.core.attributes import CKA, pack_ulong
from hagroup.core.calls import Ckr, DeadlinePassed, Handle
from hagroup.core.classify import Verdict, classify
from hagroup.core.records import Fingerprint, Lease, Locator, ObjectRecord, OwedKind
from hagroup.engine import manifest, replica
from hagroup.engine.member import Life, Member
from hagroup.engine.proof import Proof, prove
from hagroup.engine.roster import CONNECTION_LOST, Roster
from hagroup.engine.view import View
from hagroup.errors import HAError, JournalUnavailable
from hagroup.journal.api import Confirmation, Journal, LeaseLost, StaleMembership

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

    def __init__(self, roster: Roster, view: View, journal: Journal) -> None:
        self._roster = roster
        self._view = view
        self._journal = journal
        self._mirrored = roster.config.journal.mirror is not None

    @property
    def _timeout(self) -> float:
        return self._roster.config.timeouts.generate

    def _revision(self) -> int:
        return self._view.group.membership_revision

    # -- install -------------------------------------------------------------------------------------------
    def install(
        self,
        member: Member,
        life: Life,
        records: Sequence[ObjectRecord],
        *,
        anew: Sequence[Locator] = (),
        lease: Lease | None = None,
    ) -> Result:
        """Make token objects there (rows claimed and sent), prove them, confirm.

        :param anew: it may be there already, whole or in half, under these locators too: look, and replace it.
        """
        assert life.keys is not None
        done: list[ObjectRecord] = []
        failed: Exception | None = None
        unknown = False
        for record in records:
            try:
                old = self._there_already(life, record, anew) if anew else []
                replica.install(
                    life.connection, life.keys, record, timeout=self._timeout, with_record=not self._mirrored
                )
                if anew:  # the new one first: at every instant there is one
                    life.handles.pop(record.uid, None)
                    replica.discard(life.connection, record, old, timeout=self._timeout)
                done.append(record)
            except (Ckr, DeadlinePassed, HAError, *CONNECTION_LOST) as error:
                failed, unknown = error, self._is_unknown(member, life, error)
                break
        rest = [(member.name, record.uid) for record in records[len(done) :]]
        if failed is not None:
            self._journal.give_up(rest, doubt=unknown, reason=None if unknown else str(failed))
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

    def _there_already(self, life: Life, record: ObjectRecord, locators: Sequence[Locator]) -> list[Handle]:
        """What is on the token of this object: under any locator that it had, else (somebody may have changed label
        and id behind the group's back) wherever no other live object is."""

        def claimed(locator: Locator) -> bool:
            there = self._journal.search(
                {
                    CKA.CLASS: pack_ulong(locator.object_class),
                    CKA.LABEL: locator.label,
                }
            )
            return any(other.uid != record.uid and other.locator == locator for other in there)

        return replica.locate(
            life.connection,
            [record.locator, *locators],
            record.fingerprint,
            record.attributes,
            timeout=self._timeout,
            claimed=claimed,
        )

    def _confirm(self, confirmations: Sequence[Confirmation], lease: Lease | None) -> list[bool]:
        """Confirm; a moved membership is looked at again (the reply itself stays true), a lost lease is a refusal."""
        if not confirmations:
            return []
        while True:
            try:
                return self._journal.confirm(confirmations, membership_revision=self._revision(), lease=lease)
            except StaleMembership:
                self._view.refresh()
            except LeaseLost:
                return [False] * len(confirmations)

    def _is_unknown(self, member: Member, life: Life, error: Exception) -> bool:
        """Deal with the member; True when it cannot be told whether the change was made."""
        if isinstance(error, Ckr):
            verdict = classify(error.rv, member.config.errors)
            if verdict in _KNOWN_REFUSALS:
                return False
            if verdict is Verdict.QUARANTINE:
                self._roster.quarantine(member, str(error))
            elif verdict is not Verdict.STALE_HANDLE:
                if verdict is not Verdict.AMBIGUOUS:
                    self._roster.lost(member, life, str(error))
                return True
            return True
        if isinstance(error, DeadlinePassed):
            self._roster.timed_out(member, life)
            return True
        if isinstance(error, CONNECTION_LOST):
            self._roster.lost(member, life, str(error))
            return getattr(error, "sent", True)
        log.error("replica.refused", member=member.name, error=str(error))
        return False

    def undo(self, member: Member, life: Life, record: ObjectRecord) -> None:
        """A confirmation was refused: the object must not be there. What is owed in the journal stays owed."""
        try:
            replica.remove(
                life.connection,
                record.uid,
                [record.locator],
                record.fingerprint,
                record.attributes,
                timeout=self._timeout,
            )
            self._journal.undone(member.name, record.uid)
        except (Ckr, DeadlinePassed, *CONNECTION_LOST) as error:
            self._is_unknown(member, life, error)

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
                self._journal.give_up([(member.name, old.uid)], doubt=False)
                self._journal.owe([(member.name, old.uid, OwedKind.INSTALL)], reason=None)
                return Result(member.name, Outcome.UNKNOWN)
            replica.apply_set(
                life.connection,
                life.keys,
                handles[0],
                old,
                new,
                timeout=self._timeout,
                with_record=not self._mirrored,
            )
        except (Ckr, DeadlinePassed, HAError, *CONNECTION_LOST) as error:
            unknown = self._is_unknown(member, life, error)
            self._journal.give_up([(member.name, old.uid)], doubt=unknown, reason=None if unknown else str(error))
            return Result(member.name, Outcome.UNKNOWN if unknown else Outcome.REFUSED, error)
        return Result(member.name, Outcome.CONFIRMED)

    def confirm_set(self, member: str, record: ObjectRecord, *, lease: Lease | None = None) -> bool:
        """After the change was accepted by some member and committed."""
        confirmation = Confirmation(
            member=member, uid=record.uid, kind=OwedKind.SET, revision=record.revision, locator=record.locator
        )
        return self._confirm([confirmation], lease)[0]

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
        lease: Lease | None = None,
    ) -> Result:
        """Remove the object wherever it may be on this member (row claimed and sent), and confirm."""
        try:
            manifest.raise_high(self._view, member, life, change, timeout=self._timeout)
            life.handles.pop(uid, None)
            replica.remove(life.connection, uid, list(locators), fingerprint, attributes, timeout=self._timeout)
        except (Ckr, DeadlinePassed, HAError, *CONNECTION_LOST) as error:
            unknown = self._is_unknown(member, life, error)
            self._journal.give_up([(member.name, uid)], doubt=unknown, reason=None if unknown else str(error))
            return Result(member.name, Outcome.UNKNOWN if unknown else Outcome.REFUSED, error)
        self._confirm([Confirmation(member=member.name, uid=uid, kind=OwedKind.DESTROY)], lease)
        try:
            self._journal.manifest_confirmed(member.name, high=life.manifest_high)
        except JournalUnavailable as error:
            log.warning("journal.unavailable", error=str(error))
        return Result(member.name, Outcome.CONFIRMED)

    # -- proof ---------------------------------------------------------------------------------------------
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
