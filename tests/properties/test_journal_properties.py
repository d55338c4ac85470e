"""The journal against members that execute calls late, twice, or after everybody gave them up (DESIGN.md 4.1).

The model is the world: what each token really holds, and every call that may still reach it. Processes act as the
engine does (ask only after the row says so, confirm replies, undo what is refused), die and hang at any point. After
every step the journal must never make anybody use, or fail to destroy, what is not as it says.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hagroup.core.records import IntentKind, ObjectRecord, ObjectState, OwedKind, OwedRow
from hagroup.journal.api import Busy, Confirmation, NoLongerLive
from hagroup.journal.sqlite import SqliteJournal
from tests.support.journals import LABEL, SqliteBackend, ask, member, new_object, revision_of

MEMBERS = ("a", "b")
INSTALL, SET, DESTROY = OwedKind.INSTALL, OwedKind.SET, OwedKind.DESTROY
SHM = Path("/dev/shm")
RARELY = (False, False, False, True)


@dataclass(eq=False)
class Call:
    """One request to a member. Until it was executed it may be, whoever still waits for it."""

    owner: SqliteJournal
    member: str
    record: ObjectRecord
    kind: OwedKind
    attempt: int
    clean_first: bool = False
    undo: bool = False
    intent: str | None = None
    executed: bool = False
    effect: bool = True
    waiting: bool = True


@dataclass
class Reader:
    """A process that caches what it read, by the view number and ``changes`` alone."""

    journal: SqliteJournal
    seen: int = -1
    since: int = 0
    epoch: str = ""
    cache: dict[bytes, object] = field(default_factory=dict)


class JournalMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None)
        self.backend = SqliteBackend(Path(self._folder.name), [member(name) for name in MEMBERS])
        self.processes = [self.backend.open(), self.backend.open()]
        self.reader = Reader(self.backend.open())
        self.tokens: dict[str, list[tuple[bytes, int]]] = {name: [] for name in MEMBERS}
        self.calls: list[Call] = []
        self.records: dict[bytes, ObjectRecord] = {}
        self.promised: set[bytes] = set()
        """Acknowledged as destroyed."""

    def teardown(self) -> None:
        self.backend.close()
        self._folder.cleanup()

    @property
    def any(self) -> SqliteJournal:
        return self.processes[0]

    def _call(self, owner: SqliteJournal, row: OwedRow, record: ObjectRecord, **more: object) -> Call:
        mine = [one for one in row.attempts if one.owner == owner.owner][-1]
        call = Call(owner, row.member, record, row.kind, mine.number, clean_first=row.asked_before, **more)  # type: ignore[arg-type]
        self.calls.append(call)
        return call

    def _waiting(self, *, executed: bool | None = None) -> list[Call]:
        return [c for c in self.calls if c.waiting and executed in (None, c.executed)]

    @initialize()
    def one_object_everywhere(self) -> None:
        self.create_at_once(0)

    @precondition(lambda self: not list(self.any.objects()))  # few objects, so that histories meet
    @rule(who=st.integers(0, 1))
    def create_at_once(self, who: int) -> None:
        journal = self.processes[who]
        before = len(self.calls)
        uid = self.create(who, set(MEMBERS))
        for call in self.calls[before:]:
            self._execute(call)
            self.calls.remove(call)
            self._answered(call)
        record = journal.object(uid)
        assert record is not None
        assert record.intent is not None
        assert journal.go_live(record.intent, needed=len(MEMBERS), serving=MEMBERS)

    # -- what applications ask for ---------------------------------------------------------------------------------

    @precondition(lambda self: len(list(self.any.objects())) < 2)
    @rule(who=st.integers(0, 1), asking=st.sets(st.sampled_from(MEMBERS)))
    def create_slowly(self, who: int, asking: set[str]) -> None:
        self.create(who, asking)

    def create(self, who: int, asking: set[str]) -> bytes:
        journal, record = self.processes[who], new_object()
        self.records[record.uid] = record
        intent = journal.begin_create([record], asking=ask(*asking), membership_revision=revision_of(journal))
        _, owed = journal.placement(record.uid)
        for name in sorted(asking):
            self._call(journal, owed[name], record, intent=intent.id)
        return record.uid

    @precondition(lambda self: self.any.intents())
    @rule(who=st.integers(0, 1), data=st.data(), forward=st.booleans())
    def finish_create(self, who: int, data: st.DataObject, forward: bool) -> None:
        """Owner or recoverer: both may, at any time."""
        journal = self.processes[who]
        opened = [i for i in journal.intents() if i.kind is IntentKind.CREATE]
        if not opened:
            return
        intent = data.draw(st.sampled_from(opened))
        if not forward:
            assert journal.abandon_create(intent.id)
        elif journal.go_live(intent.id, needed=1, serving=MEMBERS):
            copies, owed = journal.placement(intent.uids[0])
            assert any(name not in owed or owed[name].settled for name in copies)

    @precondition(lambda self: list(self.any.objects()))
    @rule(
        who=st.integers(0, 1), data=st.data(), asking=st.sets(st.sampled_from(MEMBERS)), really=st.sampled_from(RARELY)
    )
    def destroy(self, who: int, data: st.DataObject, asking: set[str], really: bool) -> None:
        journal = self.processes[who]
        records = list(journal.objects())
        if not really:
            return
        record = data.draw(st.sampled_from(records))
        _, rows = journal.destroy(record.uid, asking=ask(*asking), membership_revision=revision_of(journal))
        self.promised.add(record.uid)
        for row in rows:
            if row.member in asking:
                self._call(journal, row, record)

    @rule(who=st.integers(0, 1), data=st.data(), asking=st.sets(st.sampled_from(MEMBERS), min_size=1))
    def set_attributes(self, who: int, data: st.DataObject, asking: set[str]) -> None:
        journal = self.processes[who]
        records = [record for record in journal.objects() if record.state is ObjectState.LIVE]
        if not records:
            return
        record = data.draw(st.sampled_from(records))
        after = msgspec.structs.replace(
            record,
            revision=record.revision + 1,
            attributes={**record.attributes, LABEL: b"%d" % (record.revision + 1)},
        )
        try:
            intent = journal.begin_set(
                record.uid,
                revision=record.revision,
                new_attributes={LABEL: after.attributes[LABEL]},
                new_envelope=None,
                asking=ask(*asking),
                membership_revision=revision_of(journal),
            )
        except Busy:
            return
        _, owed = journal.placement(record.uid)
        for name in intent.asked:
            self._call(journal, owed[name], after, intent=intent.id)

    @precondition(lambda self: self.any.intents())
    @rule(who=st.integers(0, 1), data=st.data())
    def roll_back(self, who: int, data: st.DataObject) -> None:
        """Only while no member is known to have accepted; unknown ones become owed as install."""
        journal = self.processes[who]
        opened = [i for i in journal.intents() if i.kind is IntentKind.SET]
        if opened:
            journal.rollback_set(data.draw(st.sampled_from(opened)).id)

    # -- what members and the network do -----------------------------------------------------------------------------

    @precondition(lambda self: any(not call.executed for call in self.calls))
    @rule(data=st.data())
    def execute(self, data: st.DataObject) -> None:
        self._execute(data.draw(st.sampled_from([call for call in self.calls if not call.executed])))

    def _execute(self, call: Call) -> None:
        token, uid = self.tokens[call.member], call.record.uid
        call.executed = True
        there = [one for one in token if one[0] == uid]
        if call.kind is INSTALL and not call.undo:
            if call.clean_first:
                token[:] = [one for one in token if one[0] != uid]
            token.append((uid, call.record.revision))
        elif call.kind is SET and not call.undo:
            call.effect = len(there) == 1
            if call.effect:
                token[token.index(there[0])] = (uid, call.record.revision)
        else:
            token[:] = [one for one in token if one[0] != uid]

    @precondition(lambda self: self._waiting(executed=False))
    @rule(data=st.data())
    def execute_and_reply(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self._waiting(executed=False)))
        self._execute(call)
        self.calls.remove(call)
        self._answered(call)

    @precondition(lambda self: self._waiting(executed=True))
    @rule(data=st.data())
    def reply(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self._waiting(executed=True)))
        self.calls.remove(call)
        self._answered(call)

    def _answered(self, call: Call) -> None:
        journal, uid = call.owner, call.record.uid
        if call.undo:
            journal.undone(call.member, uid)
            return
        if not call.effect:
            journal.give_up([(call.member, uid)], doubt=False, kind=call.kind)
            journal.owe([(call.member, uid, INSTALL)])
            return
        if call.kind is SET and call.intent is not None:
            try:
                journal.commit_set(call.intent)
            except NoLongerLive:
                pass  # the confirmation will be refused
        said = Confirmation(
            member=call.member,
            uid=uid,
            kind=call.kind,
            revision=call.record.revision,
            locator=None if call.kind is DESTROY else call.record.locator,
        )
        [accepted] = journal.confirm([said], membership_revision=revision_of(journal))
        if not accepted and call.kind is not DESTROY:
            self.calls.append(dataclasses.replace(call, undo=True, executed=False, effect=True, intent=None))

    @precondition(lambda self: self._waiting(executed=False))
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        """The member says no, and did nothing."""
        call = data.draw(st.sampled_from(self._waiting(executed=False)))
        self.calls.remove(call)
        kind = DESTROY if call.undo else call.kind
        call.owner.give_up([(call.member, call.record.uid)], doubt=False, reason="refused", kind=kind)

    @precondition(lambda self: self._waiting())
    @rule(data=st.data())
    def time_out(self, data: st.DataObject) -> None:
        """Given up; what was not executed yet may be, at any time."""
        call = data.draw(st.sampled_from(self._waiting()))
        call.waiting = False
        kind = DESTROY if call.undo else call.kind
        call.owner.give_up([(call.member, call.record.uid)], doubt=True, kind=kind)

    @rule(who=st.integers(0, 1), really=st.sampled_from(RARELY))
    def die(self, who: int, really: bool) -> None:
        if not really:
            return
        dead = self.processes[who]
        dead.close()
        for call in self.calls:
            if call.owner is dead:
                call.waiting = False
        self.processes[who] = self.backend.open()

    # -- what repairs ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.any.owed())
    @rule(who=st.integers(0, 1), data=st.data())
    def claim(self, who: int, data: st.DataObject) -> None:
        """A resync takes a row and asks the member."""
        self._claim(self.processes[who], data)

    def _claim(self, journal: SqliteJournal, data: st.DataObject) -> tuple[OwedRow, Call] | None:
        at_work = {(c.member, c.record.uid) for c in self.calls if c.waiting and c.owner is journal}
        rows = [row for row in journal.owed() if (row.member, row.uid) not in at_work]  # as the engine's InFlight.take
        if not rows:
            return None
        chosen = data.draw(st.sampled_from(rows))
        claimed = journal.claim([(chosen.member, chosen.uid)], worker="w", membership_revision=revision_of(journal))
        if not claimed:
            return None
        [row] = claimed
        record = journal.object(row.uid) or self.records[row.uid]
        call = self._call(journal, row, record)
        if row.kind is SET:  # a resync makes it anew in the record's revision
            call.kind, call.clean_first = INSTALL, True
        return row, call

    @precondition(lambda self: self.any.owed())
    @rule(who=st.integers(0, 1), data=st.data())
    def late_window_passed(self, who: int, data: st.DataObject) -> None:
        """What was unanswered can no longer execute; then the row is worked off, and the doubt cleared."""
        journal = self.processes[who]
        claimed = self._claim(journal, data)
        if claimed is None:
            return
        row, call = claimed
        old = {attempt.number for attempt in row.unanswered if attempt.doubt_since is not None}
        self.calls = [
            c
            for c in self.calls
            if c.waiting or (c.member, c.record.uid) != (row.member, row.uid) or c.attempt not in old
        ]
        token = self.tokens[row.member]
        token[:] = [one for one in token if one[0] != row.uid]
        if call.kind is not DESTROY:
            token.append((row.uid, call.record.revision))
        call.executed = True
        self.calls.remove(call)
        self._answered(call)
        journal.resolve_attempts(row.member, row.uid, old)

    # -- what must hold --------------------------------------------------------------------------------------------

    @invariant()
    def nobody_uses_what_is_not_there(self) -> None:
        for record in self.any.objects():
            copies, owed = self.any.placement(record.uid)
            for name, copy in copies.items():
                if record.state is not ObjectState.LIVE or name in owed or copy.revision != record.revision:
                    continue
                there = [one for one in self.tokens[name] if one[0] == record.uid]
                assert there == [(record.uid, record.revision)], (name, there, record.revision)
                late = [c for c in self.calls if (c.member, c.record.uid) == (name, record.uid) and not c.executed]
                assert late == [], "a call that may still execute is forgotten"

    @invariant()
    def nothing_destroyed_stays_or_comes_back_unnoticed(self) -> None:
        for name in MEMBERS:
            holds = {uid for uid, _ in self.tokens[name]}
            coming = {c.record.uid for c in self.calls if c.member == name and c.kind is not DESTROY and not c.undo}
            for uid in holds | coming:
                if self.any.object(uid) is None:
                    row = self.any.placement(uid)[1].get(name)
                    assert row is not None, "what the tombstone condemns is, or may come, there"
                    assert row.kind is DESTROY
                    assert row.attempts or uid in holds or uid not in coming

    @invariant()
    def every_member_has_or_owes_every_object(self) -> None:
        for record in self.any.objects():
            copies, owed = self.any.placement(record.uid)
            for name in MEMBERS:
                assert name in owed or copies[name].revision == record.revision

    @invariant()
    def destroyed_stays_destroyed(self) -> None:
        for uid in self.promised:
            assert self.any.object(uid) is None
            assert self.any.tombstone(uid) is not None

    @invariant()
    def counters_count(self) -> None:
        records = list(self.any.objects())
        assert self.any.counts() == {
            "live": sum(record.state is ObjectState.LIVE for record in records),
            "creating": sum(record.state is ObjectState.CREATING for record in records),
            "tombstones": len(list(self.any.tombstones())),
            "intents": len(self.any.intents()),
            "owed": len(self.any.owed()),
        }

    @invariant()
    def readers_learn_of_everything(self) -> None:
        reader, journal = self.reader, self.reader.journal
        number = journal.view_number()
        if number != reader.seen:
            changes = journal.changes(reader.since, reader.epoch)
            if changes.everything:
                reader.cache.clear()
            for uid in changes.uids:
                reader.cache.pop(uid, None)
            reader.seen, reader.since, reader.epoch = number, changes.change, journal.group().epoch
        for uid in self.records:
            now = journal.object_with_placement(uid)
            assert reader.cache.setdefault(uid, now) == now


JournalMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestJournal = JournalMachine.TestCase
