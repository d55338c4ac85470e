"""Owed rows, for every backend: claimed, confirmed, given up. What becomes of a row is decided in ``rules``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from msgspec.structs import replace

from hagroup.core.records import Intent, Lease, Locator, OwedKind, OwedRow
from hagroup.journal import rules
from hagroup.journal.api import Confirmation
from hagroup.journal.transaction import Transaction, Writer, one_transaction


class Owing(Writer):
    """The part of a journal about what members still have to be brought to do."""

    @one_transaction
    def claim(
        self,
        rows: Sequence[tuple[str, bytes]],
        *,
        worker: str | None,
        membership_revision: int,
        lease: Lease | None = None,
        locators: Sequence[Locator] = (),
    ) -> list[OwedRow]:
        claimed = []
        with self._write() as t:
            t.expect_membership(membership_revision)
            t.expect_lease(lease)
            for member, uid in dict.fromkeys(rows):
                before = t.owed(member, uid)
                if before is None:
                    continue
                after = rules.claimed(before, t.asker(worker), t.alive)
                if after is None:
                    continue
                after = replace(after, locators=rules.merged(after.locators, locators))
                t.put_owed(before, after)
                claimed.append(after)
        return claimed

    @one_transaction
    def confirm(
        self, confirmations: Sequence[Confirmation], *, membership_revision: int, lease: Lease | None = None
    ) -> list[bool]:
        answers = []
        with self._write() as t:
            t.expect_membership(membership_revision)
            t.expect_lease(lease)
            listed = {member.name for member in t.members()}
            for said in confirmations:
                if said.member not in listed:
                    answers.append(False)
                    continue
                before = t.owed(said.member, said.uid)
                state = t.situation(said.uid)
                outcome = rules.confirmed(before, said, state, t.asker(None), t.change)
                answers.append(t.apply(said.member, said.uid, before, outcome))
        return answers

    @one_transaction
    def undone(self, member: str, uid: bytes) -> None:
        with self._write() as t:
            before = t.owed(member, uid)
            t.apply(member, uid, before, rules.undone(before, t.situation(uid), t.owner))

    @one_transaction
    def give_up(
        self,
        rows: Sequence[tuple[str, bytes]],
        *,
        doubt: bool,
        reason: str | None = None,
        kind: OwedKind | None = None,
    ) -> None:
        with self._write() as t:
            for member, uid in rows:
                before = t.owed(member, uid)
                if before is None:
                    continue
                state = t.situation(uid)
                outcome = rules.given_up(before, state, t.owner, doubt=doubt, reason=reason, kind=kind, now=t.now)
                t.apply(member, uid, before, outcome)

    @one_transaction
    def owe(self, rows: Sequence[tuple[str, bytes, OwedKind]], *, reason: str | None = None) -> None:
        with self._write() as t:
            listed = {member.name for member in t.members()}
            for member, uid, kind in rows:
                if member not in listed:
                    continue
                before = t.owed(member, uid)
                state, copy = t.situation(uid), t.copy(member, uid)
                after = rules.owed_again(before, member, uid, kind, state, copy, t.change)
                if after is not before and after is not None and reason is not None:
                    after = replace(after, reason=reason)
                t.apply(member, uid, before, rules.Outcome(row=after))

    def clear_doubt(self, member: str, uid: bytes) -> None:
        def over(row: OwedRow, t: Transaction) -> list[int]:
            marked = rules.with_dead_in_doubt(row, t.now, t.alive)
            return [one.number for one in marked.attempts if one.doubt_since is not None]

        self._resolve(member, uid, over)

    def resolve_attempts(self, member: str, uid: bytes, numbers: Collection[int]) -> None:
        self._resolve(member, uid, lambda row, t: numbers)

    @one_transaction
    def _resolve(self, member: str, uid: bytes, over: Callable[[OwedRow, Transaction], Collection[int]]) -> None:
        with self._write() as t:
            before = t.owed(member, uid)
            if before is None:
                return
            numbers = over(before, t)
            gone = [one for one in before.attempts if one.number in numbers]
            if gone:
                t.apply(member, uid, before, rules.resolved(before, gone, t.situation(uid)))

    @one_transaction
    def adopt_intent(self, intent: str) -> Intent | None:
        with self._write() as t:
            found = t.intent(intent)
            if found is None or found[1] is not None:
                return None
            opened = found[0]
            if opened.owner == self.owner or t.alive(opened.owner):
                return None
            t.adopt(opened)
            for uid in opened.uids:
                t.touch(uid)
                for row in t.owed_of(uid).values():
                    after = rules.with_dead_in_doubt(row, t.now, t.alive)
                    if row.owner == opened.owner:
                        after = replace(after, owner=self.owner)
                    t.put_owed(row, after)
            return replace(opened, owner=self.owner)
