"""The journal against members that execute calls late, twice, or after everybody gave them up (DESIGN.md 4.1).

The model is the world: what each token really holds, and every call that may still reach it. Processes act as the
engine does (ask only after the row says so, confirm replies, undo what is refused), die and hang at any point. After
every step the journal must never make anybody use, or fail to destroy, what is not as it says.

The same over etcd (a model of it, and a real node), where besides nobody may learn what became of a transaction: its
answer is lost, or it is carried out when everybody gave it up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
from etcd3gw.client import Etcd3Client
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hagroup.config.model import Endpoint, EtcdUrl, JournalSection
from hagroup.core.records import IntentKind, MemberRecord, ObjectRecord, ObjectState, OwedKind, OwedRow
from hagroup.errors import JournalOutcomeUnknown, JournalUnavailable
from hagroup.journal import EtcdJournal
from hagroup.journal.api import Busy, Confirmation, Journal, NoLongerLive
from tests.support.etcd import EtcdBackend, one_node
from tests.support.etcd_model import ModelEtcd
from tests.support.etcd_network import Fate, Network
from tests.support.journals import LABEL, Backend, SqliteBackend, ask, member, new_object, revision_of

MEMBERS = ("a", "b")
INSTALL, SET, DESTROY = OwedKind.INSTALL, OwedKind.SET, OwedKind.DESTROY
SHM = Path("/dev/shm")
RARELY = (False, False, False, True)


@dataclass(eq=False)
class Call:
    """One request to a member. Until it was executed it may be, whoever still waits for it."""

    owner: Journal
    member: str
    record: ObjectRecord
    kind: OwedKind
    attempt: int
    owed: OwedKind
    """As which it was asked: what is owed as ``set`` may be made anew."""
    clean_first: bool = False
    undo: bool = False
    intent: str | None = None
    executed: bool = False
    effect: bool = True
    waiting: bool = True


@dataclass
class Reader:
    """A process that caches what it read, by the view number and ``changes`` alone."""

    journal: Journal
    seen: int = -1
    since: int = 0
    epoch: str = ""
    cache: dict[bytes, object] = field(default_factory=dict)


class JournalMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None)
        self.backend = self.new_backend(Path(self._folder.name), [member(name) for name in MEMBERS])
        self.processes = [self.backend.open(), self.backend.open()]
        self.reader = Reader(self.backend.open())
        self.tokens: dict[str, list[tuple[bytes, int]]] = {name: [] for name in MEMBERS}
        self.calls: list[Call] = []
        self.records: dict[bytes, ObjectRecord] = {}
        self.promised: set[bytes] = set()
        """Acknowledged as destroyed."""
        self.refused: set[bytes] = set()
        """Never made, and the application was told so."""
        self.unanswered: set[tuple[str, str, bytes]] = set()
        """Owner, member and UID where the journal could not be told that the member gave no answer."""

    def new_backend(self, folder: Path, members: list[MemberRecord]) -> Backend:
        return SqliteBackend(folder, members)

    def reader_hears_nothing(self) -> None:
        """For a while; where that can be."""

    def teardown(self) -> None:
        self.backend.close()
        self._folder.cleanup()

    @property
    def any(self) -> Journal:
        return self.processes[0]

    def _call(self, owner: Journal, row: OwedRow, record: ObjectRecord, **more: object) -> Call:
        mine = [one for one in row.attempts if one.owner == owner.owner][-1]
        call = Call(owner, row.member, record, row.kind, mine.number, row.kind, clean_first=row.asked_before, **more)  # type: ignore[arg-type]
        self.calls.append(call)
        return call

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """The journal may give no answer. Then what was to come after is not done; see ``_own_up``."""
        with contextlib.suppress(JournalUnavailable):
            yield

    def _own_up(self, journal: Journal, row: OwedRow) -> None:
        """As the engine's ``own_up``: nobody in this process waits for these any more."""
        for attempt in row.attempts:
            if attempt.owner != journal.owner or attempt.doubt_since is not None:
                continue
            doubt = (journal.owner, row.member, row.uid) in self.unanswered
            journal.give_up([(row.member, row.uid)], doubt=doubt, kind=attempt.kind)
            if attempt.kind is SET and not doubt:
                journal.owe([(row.member, row.uid, INSTALL)])
        self.unanswered.discard((journal.owner, row.member, row.uid))

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
            self._tell(call)
        record = journal.object(uid)
        assert record is not None
        assert record.intent is not None
        assert journal.go_live(record.intent, needed=len(MEMBERS), serving=MEMBERS)

    # -- what applications ask for ---------------------------------------------------------------------------------

    @precondition(lambda self: len(list(self.any.objects())) < 2)
    @rule(who=st.integers(0, 1), asking=st.sets(st.sampled_from(MEMBERS)))
    def create_slowly(self, who: int, asking: set[str]) -> None:
        record = new_object()
        with self._asking():
            try:
                self.create(who, asking, record)
            except JournalOutcomeUnknown:
                raise
            except JournalUnavailable:
                if not [c for c in self.calls if c.record is record]:
                    self.refused.add(record.uid)
                raise

    def create(self, who: int, asking: set[str], record: ObjectRecord | None = None) -> bytes:
        journal, record = self.processes[who], record or new_object()
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
        with self._asking():
            if not forward:
                assert journal.abandon_create(intent.id)
            elif journal.go_live(intent.id, needed=1, serving=MEMBERS):
                copies, owed = journal.placement(intent.uids[0])
                assert any(name not in owed or owed[name].settled for name in copies)

    @precondition(lambda self: list(self.any.objects()))
    @rule(
        who=st.integers(0, 1),
        data=st.data(),
        asking=st.sets(st.sampled_from(MEMBERS)),
        unheard=st.booleans(),
        really=st.sampled_from(RARELY),
    )
    def destroy(self, who: int, data: st.DataObject, asking: set[str], unheard: bool, really: bool) -> None:
        journal = self.processes[who]
        records = list(journal.objects())
        if not really:
            return
        record = data.draw(st.sampled_from(records))
        if unheard:
            self.reader_hears_nothing()
        with self._asking():
            _, rows = journal.destroy(record.uid, asking=ask(*asking), membership_revision=revision_of(journal))
            self.promised.add(record.uid)
            for row in rows:
                if row.member in asking:
                    self._call(journal, row, record)
            told = self.reader.journal.changes(self.reader.since, self.reader.epoch)
            assert told.everything or record.uid in told.uids, "acknowledged before all had seen it"

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
        with self._asking(), contextlib.suppress(Busy):
            intent = journal.begin_set(
                record.uid,
                revision=record.revision,
                new_attributes={LABEL: after.attributes[LABEL]},
                new_envelope=None,
                asking=ask(*asking),
                membership_revision=revision_of(journal),
            )
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
            chosen = data.draw(st.sampled_from(opened))
            with self._asking():
                journal.rollback_set(chosen.id)

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
        with self._asking():
            self._tell(call)

    def _tell(self, call: Call) -> None:
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
        kind = DESTROY if call.undo else call.owed
        with self._asking():
            call.owner.give_up([(call.member, call.record.uid)], doubt=False, reason="refused", kind=kind)

    @precondition(lambda self: self._waiting())
    @rule(data=st.data())
    def time_out(self, data: st.DataObject) -> None:
        """Given up; what was not executed yet may be, at any time."""
        call = data.draw(st.sampled_from(self._waiting()))
        call.waiting = False
        kind = DESTROY if call.undo else call.owed
        row = (call.member, call.record.uid)
        self.unanswered.add((call.owner.owner, *row))
        with self._asking():
            call.owner.give_up([row], doubt=True, kind=kind)
            self.unanswered.discard((call.owner.owner, *row))

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
        with self._asking():
            self._claim(self.processes[who], data)

    def _claim(self, journal: Journal, data: st.DataObject) -> tuple[OwedRow, Call] | None:
        at_work = {(c.member, c.record.uid) for c in self.calls if c.waiting and c.owner is journal}
        rows = [row for row in journal.owed() if (row.member, row.uid) not in at_work]  # as the engine's InFlight.take
        if not rows:
            return None
        chosen = data.draw(st.sampled_from(rows))
        self._own_up(journal, chosen)
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
        with self._asking():
            self._late_window_passed(self.processes[who], data)

    def _late_window_passed(self, journal: Journal, data: st.DataObject) -> None:
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
        for uid in self.refused:
            assert self.any.object(uid) is None and self.any.tombstone(uid) is None, "the application was told no"

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
        journal.owed()  # on etcd others hear of it a moment later: not before this returns
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


class EtcdMachine(JournalMachine):
    """Over etcd's model, with all that may happen on the way to it."""

    def new_backend(self, folder: Path, members: list[MemberRecord]) -> Backend:
        self.network = Network(self.connect())
        self._patched = contextlib.ExitStack()
        self._patched.enter_context(self.network.between())
        self._patched.enter_context(patch("hagroup.journal.etcd_mirror.SILENCE", 0.1))
        return EtcdBackend(folder, members, self.section())

    def connect(self) -> Callable[..., Any]:
        return ModelEtcd().client

    def section(self) -> JournalSection:
        endpoints = tuple(Endpoint(host=f"h{n}", port=2379) for n in (1, 2, 3))
        return JournalSection(url=EtcdUrl(endpoints=endpoints, name="payments"))

    def teardown(self) -> None:
        super().teardown()
        self._patched.close()

    def reader_hears_nothing(self) -> None:
        assert isinstance(self.reader.journal, EtcdJournal)
        self.network.break_watches(self.reader.journal, silently=True)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        with super()._asking(), self.network.disturbed():
            yield

    @rule(fates=st.lists(st.sampled_from(Fate), min_size=1, max_size=2), cut=st.booleans())
    def something_will_happen(self, fates: Sequence[Fate], cut: bool) -> None:
        self.network.plan(fates, cut=cut)

    @rule()
    def what_was_late_arrives(self) -> None:
        self.network.arrive()

    @rule(who=st.integers(0, 1))
    def what_nobody_knew_is_settled(self, who: int) -> None:
        """As is done every few seconds."""
        journal = self.processes[who]
        assert isinstance(journal, EtcdJournal)
        journal._settle_later()

    @rule(who=st.integers(0, 2), silently=st.booleans(), compacted=st.booleans())
    def a_watch_breaks(self, who: int, silently: bool, compacted: bool) -> None:
        """And goes on later, where what came in between may not be kept any more."""
        journal = [*self.processes, self.reader.journal][who]
        assert isinstance(journal, EtcdJournal)
        self.network.break_watches(journal, silently=silently)
        if compacted:
            revision = journal._client.call("/kv/put", {"key": "AA==", "value": ""})["header"]["revision"]
            journal._client.call("/kv/compaction", {"revision": revision})


class RealEtcdMachine(EtcdMachine):
    """Over a real node."""

    def connect(self) -> Callable[..., Any]:
        return Etcd3Client

    def section(self) -> JournalSection:
        return one_node().section()


JournalMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
EtcdMachine.TestCase.settings = settings(JournalMachine.TestCase.settings, max_examples=50)
RealEtcdMachine.TestCase.settings = settings(JournalMachine.TestCase.settings, max_examples=3, stateful_step_count=25)
TestJournal = JournalMachine.TestCase
TestJournalOnEtcdModel = EtcdMachine.TestCase
TestJournalOnRealEtcd = RealEtcdMachine.TestCase
