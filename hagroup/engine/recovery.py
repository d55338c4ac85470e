"""Finishing or undoing what processes left that died in the middle of a change (DESIGN.md 4.2, 4.3, G7)."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from hagroup.config.logging import get_logger
from hagroup.core.records import Intent, IntentKind, ObjectRecord, OwedKind
from hagroup.core.states import State
from hagroup.engine.member import Life, Member
from hagroup.engine.replicate import Outcome, Replicator, Result
from hagroup.engine.roster import Roster
from hagroup.engine.view import View
from hagroup.journal.api import Journal, NoLongerLive, StaleMembership

log = get_logger(__name__)


class Recovery:
    """Open intents of dead processes, and those of this one whose call could not find out what became of them."""

    def __init__(self, roster: Roster, view: View, journal: Journal, replicator: Replicator) -> None:
        self._roster = roster
        self._view = view
        self._journal = journal
        self._replicator = replicator
        self._in_flight = replicator.in_flight
        self._unresolved: set[str] = set()
        """Intents of this process (adopted ones too) that no call of it is working on."""
        self._interrupted: set[str] = set()
        """Marks. They stay: what was asked of the journal may come to be late."""
        self._one_at_a_time = threading.Lock()

    def unresolved(self, intent: str) -> None:
        self._unresolved.add(intent)

    def interrupted(self, mark: str) -> None:
        """A call of this process was, while it opened an intent with this mark, or was about to."""
        self._interrupted.add(mark)

    def _is_left(self, intent: Intent) -> bool:
        return intent.id in self._unresolved or any(intent.id.endswith(mark) for mark in self._interrupted)

    def recover_intents(self) -> bool:
        """Finish or undo what processes left that died in the middle. True: something was brought to an end."""
        if self._roster.journal_behind() is not None:
            return False
        recovered = False
        if not self._one_at_a_time.acquire(timeout=self._roster.config.timeouts.call):
            return False  # another thread is at it
        try:
            known = set(self._unresolved)  # before it is read: one that another thread adds now may not be among them
            intents = self._journal.intents()
            self._unresolved -= known - {intent.id for intent in intents}
            for intent in intents:
                told = self._is_left(intent)
                if intent.owner in {self._journal.owner, *self._journal.former_owners} and not told:
                    continue  # its thread is at work
                if intent.owner != self._journal.owner:
                    if self._journal.owner_alive(intent.owner):
                        continue
                    self._unresolved.add(intent.id)  # before: no answer may come
                    adopted = self._journal.adopt_intent(intent.id)
                    if adopted is None:
                        self._unresolved.discard(intent.id)
                        continue
                    intent = adopted
                try:
                    recovered |= self._recover(intent, told)
                except StaleMembership:
                    self._view.refresh(always=True)  # next time
        finally:
            self._one_at_a_time.release()
        return recovered

    def _recover(self, intent: Intent, told: bool) -> bool:
        recovered = self._recover_set(intent) if intent.kind is IntentKind.SET else self._recover_create(intent, told)
        if recovered:
            self._unresolved.discard(intent.id)
            log.info("intent.recovered", kind=intent.kind.value, intent=intent.id)
        return recovered

    def _recover_create(self, intent: Intent, told: bool) -> bool:
        if told:  # a call of this process has told the application that nothing was made
            self._journal.abandon_create(intent.id)
            return True
        serving = [member.name for member in self._roster.serving()]
        needed = max(1, min(self._roster.config.group.min_replicas, len(serving)))
        try:
            if not self._journal.go_live(intent.id, needed=needed, serving=serving):
                self._journal.abandon_create(intent.id)
        except NoLongerLive:
            pass
        return True

    def _recover_set(self, intent: Intent) -> bool:
        old = self._journal.object(intent.uids[0])
        if old is None or intent.new_attributes is None:
            return True
        after = intent.outcome(old)
        connected = [m for m in self._roster.members.values() if m.serving or m.state is State.RESYNCING]
        trusted = {member.name for member in connected if member.serving}
        rows = self._in_flight.take((member.name, old.uid) for member in connected)
        try:
            idle = [member for member in connected if (member.name, old.uid) in rows]
            answers = self._ask_for_set(idle, intent, old, after)
            accepted = [(member, life) for member, life, result in answers if result.outcome is Outcome.CONFIRMED]
            if accepted:
                if self._replicator.mirror is not None:
                    self._replicator.mirror.put([after])
                try:
                    self._journal.commit_set(intent.id)
                finally:
                    for member, life in accepted:
                        if member.name in trusted:
                            self._replicator.confirm_set(member, life, old, after)
                        else:
                            self._make_anew(member, old)
            elif answers and all(result.outcome is Outcome.REFUSED for _, _, result in answers):
                self._journal.rollback_set(intent.id)
            else:
                return False  # nobody could be asked, or nobody could tell: later
        except NoLongerLive:
            pass
        finally:
            self._in_flight.end(rows)
        return True

    def _make_anew(self, member: Member, record: ObjectRecord) -> None:
        """A member that is being resynced was asked too: else, where none is in service, the change would hinder the
        admission of each, and nobody could be asked for it. But what else is true of an object on a token that cannot
        be trusted is not known: its answer counts, and the object is made anew there."""
        row = (member.name, record.uid)
        self._journal.give_up([row], doubt=False, kind=OwedKind.SET)
        self._journal.owe([(*row, OwedKind.INSTALL)])

    def _ask_for_set(
        self, members: Sequence[Member], intent: Intent, old: ObjectRecord, after: ObjectRecord
    ) -> list[tuple[Member, Life, Result]]:
        answers = []
        _, owed = self._journal.placement(old.uid)
        for member in members:
            life, row = member.life, owed.get(member.name)
            if life is None or life.keys is None or row is None or row.kind is not OwedKind.SET:
                continue  # one that lacks the object is given it first
            self._replicator.own_up([row])
            claimed = self._journal.claim(
                [(member.name, old.uid)],
                worker=life.worker,
                membership_revision=self._view.group.membership_revision,
                locators=[old.locator, after.locator],
            )
            if claimed and claimed[0].kind is OwedKind.SET:
                answers.append((member, life, self._replicator.set(member, life, old, after, intent.change)))
            elif claimed:
                self._journal.give_up([(member.name, old.uid)], doubt=False, kind=claimed[0].kind)
        return answers
