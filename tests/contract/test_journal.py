"""What every journal backend has to do (DESIGN.md 4). A backend joins by its factory in ``BACKENDS``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hagroup.core.records import (
    Event,
    LoginState,
    Membership,
    ObjectState,
    Observation,
    OwedKind,
    Role,
    Rotation,
    Seal,
)
from hagroup.journal.api import Busy, Journal, LeaseLost, NoLongerLive, StaleMembership
from tests.support.etcd import EtcdBackend
from tests.support.journals import (
    ID,
    KEY_TYPE,
    LABEL,
    Backend,
    SqliteBackend,
    ask,
    claim,
    confirm,
    copy_of,
    destroyed,
    installed,
    make_live,
    member,
    new_object,
    new_uid,
    revision_of,
)

BACKENDS: dict[str, Callable[[Path, list], Backend]] = {"sqlite": SqliteBackend, "etcd": EtcdBackend}
INSTALL, SET, DESTROY = OwedKind.INSTALL, OwedKind.SET, OwedKind.DESTROY


@pytest.fixture(params=["sqlite", "etcd"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    made = BACKENDS[request.param](tmp_path, [member("a"), member("b"), member("c")])
    yield made
    made.close()


@pytest.fixture
def journal(backend: Backend) -> Journal:
    return backend.open()


@pytest.fixture
def other(backend: Backend, journal: Journal) -> Journal:
    """Another process's."""
    return backend.open()


def begin(journal: Journal, record, *names: str):
    return journal.begin_create([record], asking=ask(*names), membership_revision=revision_of(journal))


def begin_set(journal: Journal, record, new, *names: str):
    return journal.begin_set(
        record.uid,
        revision=record.revision,
        new_attributes=new,
        new_envelope=b"resealed",
        asking=ask(*names),
        membership_revision=revision_of(journal),
    )


def destroy(journal: Journal, uid: bytes, *names: str):
    return journal.destroy(uid, asking=ask(*names), membership_revision=revision_of(journal))


def row_of(journal: Journal, name: str, uid: bytes):
    return journal.placement(uid)[1].get(name)


def owed_by(journal: Journal, uid: bytes) -> set[str]:
    return set(journal.placement(uid)[1])


def caught_up(journal: Journal) -> Journal:
    """News of other hosts take a moment; who asks for counts has them."""
    journal.counts()
    return journal


# -- create --------------------------------------------------------------------------------------------------------


def test_create_is_owed_by_every_listed_member_whatever_its_membership(backend, journal):
    journal.update_member("b", membership=Membership.QUARANTINED, reason="PIN differs")
    journal.update_member("c", membership=Membership.OUT_OF_SYNC, reason="restored")
    record = new_object()
    intent = begin(journal, record, "a")
    assert owed_by(journal, record.uid) == {"a", "b", "c"}
    mine = row_of(journal, "a", record.uid)
    assert (mine.owner, mine.sent, mine.worker, mine.kind) == (journal.owner, True, "worker-a", INSTALL)
    free = row_of(journal, "b", record.uid)
    assert (free.owner, free.sent, free.locators) == (None, False, (record.locator,))
    assert [one.id for one in journal.intents()] == [intent.id]
    assert journal.object(record.uid).state is ObjectState.CREATING
    assert journal.search({LABEL: b"key"}) == []
    assert journal.counts() == {"live": 0, "creating": 1, "tombstones": 0, "intents": 1, "owed": 3}


def test_record_comes_back_as_it_was_put_in(journal):
    record = make_live(journal, "a")
    put = new_object(uid=record.uid)
    assert (record.attributes, record.answered_only, record.envelope, record.fingerprint) == (
        put.attributes,
        put.answered_only,
        put.envelope,
        put.fingerprint,
    )
    assert record.state is ObjectState.LIVE
    assert record.intent is None


def test_vendor_defined_class_keeps_its_number(journal):
    import msgspec

    odd = msgspec.structs.replace(new_object(), object_class=0xFFFF_FFFF_8000_0001, key_type=1 << 63)
    assert make_live(journal, "a", record=odd).object_class == 0xFFFF_FFFF_8000_0001
    assert row_of(journal, "b", odd.uid).locators == (odd.locator,)
    assert [r.uid for r in journal.search({KEY_TYPE: (1 << 63).to_bytes(8, "little"), LABEL: b"key"})] == []


def test_live_needs_enough_confirmations_on_serving_members(journal):
    record = new_object()
    intent = begin(journal, record, "a", "b")
    assert not journal.go_live(intent.id, needed=1, serving=["a", "b"])
    assert confirm(journal, installed("a", record)) == [True]
    assert not journal.go_live(intent.id, needed=1, serving=["b"])
    assert not journal.go_live(intent.id, needed=2, serving=["a", "b"])
    assert confirm(journal, installed("b", record)) == [True]
    assert journal.go_live(intent.id, needed=2, serving=["a", "b"])
    assert journal.go_live(intent.id, needed=2, serving=["a", "b"]), "live already"
    assert owed_by(journal, record.uid) == {"c"}
    assert journal.intents() == []
    assert [r.uid for r in journal.search({LABEL: b"key"})] == [record.uid]


def test_a_pair_lives_or_dies_as_one(journal):
    public, private = new_object(b"pair"), new_object(b"pair")
    intent = journal.begin_create([public, private], asking=ask("a"), membership_revision=revision_of(journal))
    confirm(journal, installed("a", public))
    assert not journal.go_live(intent.id, needed=1, serving=["a"])
    assert journal.abandon_create(intent.id)
    for record in (public, private):
        assert journal.object(record.uid) is None
        assert journal.tombstone(record.uid) is not None
    assert journal.counts()["creating"] == 0


def test_owner_and_recoverer_compete_for_one_outcome(backend, journal, other):
    first, second = new_object(), new_object()
    lived, died = begin(journal, first, "a"), begin(journal, second, "a")
    confirm(journal, installed("a", first), installed("a", second))
    assert journal.go_live(lived.id, needed=1, serving=["a"])
    assert not other.abandon_create(lived.id)
    assert journal.object(first.uid).state is ObjectState.LIVE
    assert other.abandon_create(died.id)
    assert other.abandon_create(died.id)
    with pytest.raises(NoLongerLive):
        journal.go_live(died.id, needed=1, serving=["a"])


def test_abandoned_create_is_owed_as_destroy_and_keeps_its_claims(journal):
    record = new_object()
    intent = begin(journal, record, "a")
    journal.abandon_create(intent.id)
    mine, free = row_of(journal, "a", record.uid), row_of(journal, "b", record.uid)
    assert (mine.kind, mine.owner, mine.sent) == (DESTROY, journal.owner, True)
    assert (free.kind, free.owner, free.sent) == (DESTROY, None, False)
    assert confirm(journal, installed("a", record)) == [False]


def test_a_uid_names_one_object_for_ever(journal):
    record = make_live(journal, "a")
    with pytest.raises(ValueError, match="for ever"):
        begin(journal, new_object(uid=record.uid), "a")
    destroy(journal, record.uid)
    with pytest.raises(ValueError, match="for ever"):
        begin(journal, new_object(uid=record.uid), "a")
    assert journal.intents() == [], "nothing was written"


def test_stale_membership_writes_nothing(journal):
    stale = revision_of(journal)
    journal.add_member(member("d"))
    record = new_object()
    with pytest.raises(StaleMembership):
        journal.begin_create([record], asking=ask("a"), membership_revision=stale)
    assert journal.object(record.uid) is None
    live = make_live(journal, "a")
    for call in (
        lambda: journal.destroy(live.uid, asking=[], membership_revision=stale),
        lambda: journal.confirm([installed("b", live)], membership_revision=stale),
        lambda: journal.claim([("b", live.uid)], worker=None, membership_revision=stale),
        lambda: journal.begin_set(
            live.uid, revision=1, new_attributes={}, new_envelope=None, asking=[], membership_revision=stale
        ),
    ):
        with pytest.raises(StaleMembership):
            call()
    assert journal.object(live.uid) == live


def test_asking_somebody_who_is_no_member_is_refused(journal):
    with pytest.raises(ValueError, match="not a member"):
        begin(journal, new_object(), "nobody")


# -- attempts: an HSM cannot be fenced -----------------------------------------------------------------------------


def test_confirmation_without_having_said_so_is_refused(journal):
    record = new_object()
    begin(journal, record)
    assert confirm(journal, installed("a", record)) == [False]
    assert copy_of(journal, "a", record.uid) is None
    journal.undone("a", record.uid)
    row = row_of(journal, "a", record.uid)
    assert (row.kind, row.sent, row.asked_before) == (INSTALL, False, True)


def test_row_stays_while_an_older_install_is_unanswered(backend, journal, other):
    record = make_live(journal, "a")
    claim(journal, "b", record.uid)
    journal.give_up([("b", record.uid)], doubt=True)
    doubtful = row_of(journal, "b", record.uid)
    assert (doubtful.owner, doubtful.sent, doubtful.doubt_since) == (None, True, backend.clock.now)
    [again] = other.claim([("b", record.uid)], worker="w2", membership_revision=revision_of(other))
    assert again.asked_before
    assert [attempt.worker for attempt in again.unanswered] == ["later"]
    assert again.worker == "w2"
    assert confirm(other, installed("b", record)) == [True]
    settled = row_of(journal, "b", record.uid)
    assert settled.settled
    assert (settled.owner, settled.sent) == (None, True)
    assert copy_of(journal, "b", record.uid) is not None, "the copy is known, but the row keeps it from being used"
    journal.clear_doubt("b", record.uid)
    assert row_of(journal, "b", record.uid) is None


def test_clearing_doubt_of_what_was_not_brought_to_its_end_leaves_it_owed(journal):
    record = make_live(journal, "a")
    claim(journal, "b", record.uid)
    journal.give_up([("b", record.uid)], doubt=True)
    journal.clear_doubt("b", record.uid)
    row = row_of(journal, "b", record.uid)
    assert (row.kind, row.sent, row.owner, row.asked_before) == (INSTALL, False, None, True)


def test_clearing_doubt_spares_attempts_that_somebody_waits_for(journal, other):
    record = make_live(journal, "a")
    claim(journal, "b", record.uid)
    other.clear_doubt("b", record.uid)
    assert len(row_of(journal, "b", record.uid).attempts) == 1
    assert confirm(journal, installed("b", record)) == [True]
    assert row_of(journal, "b", record.uid) is None


def test_attempt_whose_worker_is_proved_dead_is_resolved_by_number(journal, other):
    record = make_live(journal, "a")
    claim(journal, "b", record.uid)
    [first] = row_of(journal, "b", record.uid).attempts
    journal.give_up([("b", record.uid)], doubt=True)
    claim(other, "b", record.uid)
    other.resolve_attempts("b", record.uid, [first.number])
    assert confirm(other, installed("b", record)) == [True]
    assert row_of(journal, "b", record.uid) is None


def test_destroy_overtakes_an_install_in_flight(journal, other):
    """O1's install may execute after O2's destroy: O2's confirmation alone must not clear the row."""
    record = new_object()
    intent = begin(journal, record, "a", "b")
    confirm(journal, installed("a", record))
    journal.go_live(intent.id, needed=1, serving=["a"])
    _, rows = destroy(other, record.uid, "a", "b")
    taken = {row.member: row for row in rows}["b"]
    assert (taken.kind, taken.owner, len(taken.attempts)) == (DESTROY, other.owner, 2)
    assert confirm(other, destroyed("a", record.uid), destroyed("b", record.uid)) == [True, True]
    assert owed_by(journal, record.uid) == {"b", "c"}
    settled = row_of(journal, "b", record.uid)
    assert settled.settled
    assert (settled.kind, settled.owner, settled.sent) == (DESTROY, None, True)
    # O1's reply comes: refused; it destroys what it made, and says so.
    assert confirm(journal, installed("b", record)) == [False]
    assert not row_of(journal, "b", record.uid).settled
    assert confirm(journal, destroyed("b", record.uid)) == [True]
    assert row_of(journal, "b", record.uid) is None


def test_destroy_by_somebody_else_keeps_the_claim_of_one_who_waits(journal, other):
    record = new_object()
    intent = begin(journal, record, "a", "b")
    confirm(journal, installed("a", record))
    journal.go_live(intent.id, needed=1, serving=["a"])
    destroy(other, record.uid, "a")
    row = row_of(journal, "b", record.uid)
    assert (row.kind, row.owner, row.sent) == (DESTROY, journal.owner, True)
    assert not claim(other, "b", record.uid)
    journal.close()
    assert claim(other, "b", record.uid), "its owner is dead"
    assert confirm(other, destroyed("b", record.uid)) == [True]
    assert row_of(other, "b", record.uid).settled, "the dead owner's install may still execute"
    other.clear_doubt("b", record.uid)
    assert row_of(other, "b", record.uid) is None


def test_late_reply_after_somebody_else_installed(journal, other):
    """O1 gave up; O2 installed and confirmed; O1 undoes its own: on the member that may have hit O2's."""
    record = make_live(journal, "a")
    claim(journal, "b", record.uid)
    journal.give_up([("b", record.uid)], doubt=True)
    claim(journal, "b", record.uid)  # a second attempt of O1
    first, _ = row_of(journal, "b", record.uid).attempts
    journal.resolve_attempts("b", record.uid, [first.number])
    # O2 takes the row over as if O1 were dead: by a claim after O1's was released elsewhere
    journal.give_up([("b", record.uid)], doubt=False, kind=SET)  # releases the claim, ends no attempt
    assert claim(other, "b", record.uid)
    assert confirm(journal, installed("b", record)) == [False], "the row is another owner's"
    assert confirm(other, installed("b", record)) == [True]
    assert row_of(journal, "b", record.uid).settled
    journal.undone("b", record.uid)
    row = row_of(journal, "b", record.uid)
    assert (row.kind, row.settled, row.sent) == (INSTALL, False, False)
    assert copy_of(journal, "b", record.uid) is None


def test_undoing_spoils_what_others_have_in_flight(journal, other):
    record = make_live(journal, "a")
    claim(journal, "b", record.uid)
    journal.give_up([("b", record.uid)], doubt=False, kind=SET)
    claim(other, "b", record.uid)
    assert confirm(journal, installed("b", record)) == [False]
    journal.undone("b", record.uid)
    assert confirm(other, installed("b", record)) == [False], "it was removed after it was made"
    other.undone("b", record.uid)
    row = row_of(journal, "b", record.uid)
    assert (row.kind, row.sent, row.owner) == (INSTALL, False, None)


def test_one_who_dies_while_undoing_leaves_an_install_owed(journal, other):
    record = make_live(journal, "a")
    claim(journal, "b", record.uid)
    journal.give_up([("b", record.uid)], doubt=False, kind=SET)
    claim(other, "b", record.uid)
    assert confirm(journal, installed("b", record)) == [False]
    journal.close()
    assert confirm(other, installed("b", record)) == [True]
    other.clear_doubt("b", record.uid)
    row = row_of(other, "b", record.uid)
    assert (row.kind, row.settled, row.sent) == (INSTALL, False, False), "half of the undo may have happened"
    assert copy_of(other, "b", record.uid) is None


def test_refusal_by_the_member_is_over_and_keeps_its_reason(journal):
    record = make_live(journal, "a")
    claim(journal, "b", record.uid)
    journal.give_up([("b", record.uid)], doubt=False, reason="DEVICE_MEMORY")
    row = row_of(journal, "b", record.uid)
    assert (row.sent, row.owner, row.reason) == (False, None, "DEVICE_MEMORY")
    assert claim(journal, "b", record.uid)
    assert confirm(journal, installed("b", record)) == [True]


def test_claims_of_the_living_stand(journal, other):
    record = make_live(journal, "a")
    assert claim(journal, "b", record.uid)
    assert not claim(other, "b", record.uid)
    assert claim(journal, "b", record.uid), "own"
    journal.give_up([("b", record.uid)], doubt=True)
    assert claim(other, "b", record.uid), "released"


def test_claim_adds_locators(journal):
    record = make_live(journal, "a")
    strange = new_object(b"strange").locator
    [row] = journal.claim(
        [("b", record.uid), ("a", record.uid)],
        worker=None,
        membership_revision=revision_of(journal),
        locators=[strange],
    )
    assert set(row.locators) == {record.locator, strange}


def test_destroy_confirmation_for_what_is_gone_is_true(journal):
    record = make_live(journal, "a")
    destroy(journal, record.uid, "a")
    assert confirm(journal, destroyed("a", record.uid)) == [True]
    assert confirm(journal, destroyed("a", record.uid)) == [True]
    assert owed_by(journal, record.uid) == {"b", "c"}


def test_destroy_confirmation_needs_a_claim(journal):
    record = make_live(journal, "a")
    destroy(journal, record.uid)
    assert confirm(journal, destroyed("a", record.uid)) == [False]
    assert row_of(journal, "a", record.uid) is not None


def test_install_confirmed_after_all_was_cleared_is_refused_and_repaired(journal):
    record = make_live(journal, "a")
    assert confirm(journal, installed("a", record)) == [False]
    row = row_of(journal, "a", record.uid)
    assert (row.kind, row.sent) == (INSTALL, True)
    journal.undone("a", record.uid)
    assert copy_of(journal, "a", record.uid) is None


def test_confirmation_for_a_member_that_was_removed_is_refused(journal):
    record = make_live(journal, "a")
    claim(journal, "b", record.uid)
    journal.remove_member("b")
    assert confirm(journal, installed("b", record)) == [False]
    assert owed_by(journal, record.uid) == {"c"}


def test_two_attempts_that_overlap_prove_nothing_together(journal):
    """A thread sets a label and is slow; another makes the object anew in its old revision; then the first replies."""
    record = make_live(journal, "a")
    intent = begin_set(journal, record, {LABEL: b"new"}, "a")
    claim(journal, "a", record.uid)
    assert confirm(journal, installed("a", record)) == [True]
    after = journal.commit_set(intent.id)
    assert confirm(journal, installed("a", after, SET)) == [False], "which of the two came last on the member?"
    journal.undone("a", record.uid)
    assert row_of(journal, "a", record.uid).kind is INSTALL
    assert copy_of(journal, "a", record.uid) is None


# -- set attributes ------------------------------------------------------------------------------------------------


def test_set_moves_record_and_members_together(journal):
    record = make_live(journal, "a", "b")
    intent = begin_set(journal, record, {LABEL: b"new"}, "a", "b")
    assert set(intent.asked) == {"a", "b"}
    assert journal.object(record.uid).attributes[LABEL] == b"key", "not yet"
    after = journal.commit_set(intent.id)
    assert (after.revision, after.attributes[LABEL], after.envelope) == (2, b"new", b"resealed")
    assert journal.commit_set(intent.id) == after, "idempotent"
    assert confirm(journal, installed("a", after, SET), installed("b", after, SET)) == [True, True]
    assert owed_by(journal, record.uid) == {"c"}
    row = row_of(journal, "c", record.uid)
    assert (row.kind, row.revision) == (INSTALL, 2)
    assert {record.locator, after.locator} <= set(row.locators)
    assert copy_of(journal, "a", record.uid).locator == after.locator
    assert journal.search({LABEL: b"key"}) == []
    assert [one.uid for one in journal.search({LABEL: b"new"})] == [record.uid]


def test_set_does_not_ask_a_member_that_owes_an_install(journal):
    record = make_live(journal, "a")
    intent = begin_set(journal, record, {LABEL: b"new"}, "a", "b")
    assert intent.asked == ("a",)
    assert not row_of(journal, "b", record.uid).sent


def test_one_change_at_a_time(journal, other):
    record = make_live(journal, "a")
    intent = begin_set(journal, record, {LABEL: b"one"}, "a")
    for who in (journal, other):
        with pytest.raises(Busy) as caught:
            begin_set(who, record, {LABEL: b"two"}, "a")
        assert caught.value.intent.id == intent.id
    journal.commit_set(intent.id)
    with pytest.raises(NoLongerLive):
        begin_set(other, record, {LABEL: b"two"}, "a")


def test_install_confirmed_in_an_older_revision_is_still_to_be_set(journal):
    record = make_live(journal, "a")
    claim(journal, "b", record.uid)
    intent = begin_set(journal, record, {LABEL: b"new"}, "a")
    assert confirm(journal, installed("b", record)) == [True]
    row = row_of(journal, "b", record.uid)
    assert (row.kind, row.revision, row.owner, row.sent) == (SET, 2, None, False)
    journal.commit_set(intent.id)
    assert copy_of(journal, "b", record.uid).revision == 1
    claim(journal, "c", record.uid)
    assert confirm(journal, installed("c", record)) == [True]
    assert (row_of(journal, "c", record.uid).kind, copy_of(journal, "c", record.uid).revision) == (SET, 1)


def test_new_revision_cannot_be_confirmed_before_it_is_committed(journal):
    import msgspec

    record = make_live(journal, "a")
    intent = begin_set(journal, record, {LABEL: b"new"}, "a")
    after = msgspec.structs.replace(record, revision=2)
    assert confirm(journal, installed("a", after, SET)) == [False]
    journal.rollback_set(intent.id)
    assert row_of(journal, "a", record.uid).kind is INSTALL


def test_rollback_leaves_no_trace_where_all_refused(journal):
    record = make_live(journal, "a", "b")
    intent = begin_set(journal, record, {LABEL: b"new"}, "a", "b")
    journal.give_up([("a", record.uid), ("b", record.uid)], doubt=False, reason="ATTRIBUTE_VALUE_INVALID")
    journal.rollback_set(intent.id)
    assert owed_by(journal, record.uid) == {"c"}
    assert journal.object(record.uid).revision == 1
    assert journal.object(record.uid).intent is None
    journal.rollback_set(intent.id)
    with pytest.raises(NoLongerLive):
        journal.commit_set(intent.id)


def test_rollback_owes_an_install_where_the_change_may_still_come(journal):
    record = make_live(journal, "a", "b")
    intent = begin_set(journal, record, {LABEL: b"new"}, "a", "b")
    journal.give_up([("a", record.uid)], doubt=False, reason="refused")
    journal.give_up([("b", record.uid)], doubt=True)
    journal.rollback_set(intent.id)
    assert owed_by(journal, record.uid) == {"b", "c"}
    row = row_of(journal, "b", record.uid)
    assert (row.kind, row.revision, row.sent) == (INSTALL, 1, True)
    assert any(locator.label == b"new" for locator in row.locators)


def test_rollback_keeps_what_a_member_owed_before(journal):
    record = make_live(journal, "a", "b")
    first = begin_set(journal, record, {LABEL: b"one"}, "a")
    journal.commit_set(first.id)
    confirm(journal, installed("a", journal.object(record.uid), SET))
    second = begin_set(journal, journal.object(record.uid), {LABEL: b"two"}, "a")
    journal.give_up([("a", record.uid)], doubt=False)
    journal.rollback_set(second.id)
    row = row_of(journal, "b", record.uid)
    assert (row.kind, row.revision) == (SET, 2)
    assert row_of(journal, "a", record.uid) is None


def test_second_set_while_an_older_one_is_unanswered_stays_in_doubt(journal):
    record = make_live(journal, "a", "b")
    first = begin_set(journal, record, {LABEL: b"one"}, "a", "b")
    second_revision = journal.commit_set(first.id)
    confirm(journal, installed("a", second_revision, SET))
    journal.give_up([("b", record.uid)], doubt=True)
    second = begin_set(journal, second_revision, {LABEL: b"two"}, "a", "b")
    third_revision = journal.commit_set(second.id)
    assert confirm(journal, *(installed(name, third_revision, SET) for name in "ab")) == [True, True]
    assert row_of(journal, "a", record.uid) is None
    assert row_of(journal, "b", record.uid).settled, "the older set may still put the old label back"


# -- destroy -------------------------------------------------------------------------------------------------------


def test_destroy_is_owed_wherever_it_may_be(journal):
    record = make_live(journal, "a", "b")
    (lacks,) = journal.owed("c")
    stone, rows = destroy(journal, record.uid, "a")
    assert {row.member: row.change for row in rows} == {"a": stone.change, "b": stone.change, "c": lacks.change}
    assert {row.kind for row in rows} == {DESTROY}
    assert {row.member for row in rows if row.owner == journal.owner and row.sent} == {"a"}
    assert journal.object(record.uid) is None
    assert journal.tombstone(record.uid) == stone
    assert stone.fingerprint == record.fingerprint
    with pytest.raises(NoLongerLive):
        destroy(journal, record.uid)
    assert journal.counts() == {"live": 0, "creating": 0, "tombstones": 1, "intents": 0, "owed": 3}


def test_destroy_takes_over_an_open_change_with_its_locators(journal, other):
    record = make_live(journal, "a", "b")
    intent = begin_set(journal, record, {LABEL: b"new"}, "a")
    stone, rows = destroy(other, record.uid, "b")
    assert {locator.label for locator in stone.locators} == {b"key", b"new"}
    assert all({b"key", b"new"} == {locator.label for locator in row.locators} for row in rows if row.member != "c")
    assert journal.intents() == []
    with pytest.raises(NoLongerLive):
        journal.commit_set(intent.id)
    journal.rollback_set(intent.id)
    assert confirm(journal, installed("a", record, SET)) == [False]


def test_destroy_of_one_of_a_pair_that_is_being_made_gives_up_both(journal):
    public, private = new_object(b"pair"), new_object(b"pair")
    journal.begin_create([public, private], asking=ask("a"), membership_revision=revision_of(journal))
    destroy(journal, private.uid, "a")
    assert journal.object(public.uid) is None
    assert journal.intents() == []


def test_tombstones_since(journal):
    uids = []
    for _ in range(3):
        record = make_live(journal, "a")
        destroy(journal, record.uid)
        uids.append(record.uid)
    assert [stone.uid for stone in journal.tombstones()] == uids
    second = journal.tombstone(uids[1])
    assert [stone.uid for stone in journal.tombstones(since=second.change)] == uids[2:]


def test_announced_moves_with_destroys_and_changes(journal):
    record = make_live(journal, "a")
    intent = begin_set(journal, record, {LABEL: b"new"}, "a")
    assert {m.announced for m in journal.members()} == {intent.change}
    stone, _ = destroy(journal, record.uid)
    assert {m.announced for m in journal.members()} == {stone.change}
    journal.manifest_confirmed("a", high=stone.change, low=3)
    journal.manifest_confirmed("a", high=1)
    first = journal.members()[0]
    assert (first.confirmed, first.low) == (stone.change, 3)


# -- what is found on members --------------------------------------------------------------------------------------


def test_owe_what_was_found_missing_or_behind(journal):
    record = make_live(journal, "a", "b")
    journal.owe([("a", record.uid, INSTALL), ("b", record.uid, SET), ("c", record.uid, SET)])
    assert row_of(journal, "a", record.uid).kind is INSTALL
    assert row_of(journal, "a", record.uid).asked_before, "what is there has to be looked for"
    assert row_of(journal, "b", record.uid).kind is SET
    assert row_of(journal, "c", record.uid).kind is INSTALL
    assert set(journal.placement(record.uid)[0]) == {"a", "b"}, "copies stay"


def test_owe_never_decides_whether_an_object_is_to_be(journal):
    live, gone, unknown = make_live(journal, "a"), make_live(journal, "a"), new_uid()
    destroy(journal, gone.uid, "a")
    confirm(journal, destroyed("a", gone.uid))
    journal.owe([("a", live.uid, DESTROY), ("a", gone.uid, INSTALL), ("a", unknown, SET), ("x", live.uid, INSTALL)])
    assert [row_of(journal, "a", uid) for uid in (live.uid, gone.uid, unknown)] == [None] * 3
    journal.owe([("a", gone.uid, DESTROY), ("a", unknown, DESTROY)])
    assert row_of(journal, "a", gone.uid).kind is DESTROY
    assert claim(journal, "a", unknown)
    assert confirm(journal, destroyed("a", unknown)) == [True]


def test_owe_keeps_attempts(journal):
    record = make_live(journal, "a")
    claim(journal, "b", record.uid)
    journal.give_up([("b", record.uid)], doubt=True)
    journal.owe([("b", record.uid, INSTALL)], reason="half made")
    row = row_of(journal, "b", record.uid)
    assert (row.sent, row.reason) == (True, "half made")


# -- reading -------------------------------------------------------------------------------------------------------


def test_search_compares_all_attributes(journal):
    one = make_live(journal, "a", record=new_object(b"x", id_=b"1"))
    two = make_live(journal, "a", record=new_object(b"x", id_=b"2"))
    three = make_live(journal, "a", record=new_object(b"", id_=b""))

    def found(wanted):
        return [r.uid for r in journal.search(wanted)]

    assert found({}) == [one.uid, two.uid, three.uid]
    assert found({LABEL: b"x"}) == [one.uid, two.uid]
    assert found({LABEL: b"x", ID: b"2"}) == [two.uid]
    assert found({ID: b"1"}) == [one.uid]
    assert found({LABEL: b""}) == [three.uid]
    assert found({KEY_TYPE: (0x1F).to_bytes(8, "little"), ID: b""}) == [three.uid]
    assert found({KEY_TYPE: (0x1F).to_bytes(8, "little"), 0x170: b"\1"}) == []
    assert found({KEY_TYPE: b"\x1f"}) == [], "another length is another value"


def test_iterators_go_through_more_than_one_batch(journal):
    records = [new_object(b"n%d" % number) for number in range(260)]
    intents = [
        journal.begin_create(records[n : n + 10], asking=ask("a"), membership_revision=revision_of(journal))
        for n in range(0, 260, 10)
    ]
    confirm(journal, *(installed("a", record) for record in records))
    assert [r.uid for r in journal.objects()] == [r.uid for r in records]
    assert sorted(c.uid for c in journal.copies("a")) == sorted(r.uid for r in records)
    assert list(journal.copies("b")) == []
    for intent in intents:
        journal.abandon_create(intent.id)
    assert len(list(journal.tombstones())) == 260
    assert list(journal.objects()) == []


def test_what_nothing_separates_is_told_apart(journal):
    import msgspec

    first = make_live(journal, "a", record=new_object(b"x", id_=b"1"))
    twin = msgspec.structs.replace(new_object(b"x", id_=b"1"), fingerprint=first.fingerprint)
    begin(journal, twin)
    other = make_live(journal, "a", record=new_object(b"x", id_=b"1"))
    assert journal.object(twin.uid).member_id == twin.uid
    assert journal.object(first.uid).member_id is None
    assert journal.object(other.uid).member_id is None
    placed = journal.placement(twin.uid)[1]["a"].locators
    assert [locator.id for locator in placed] == [twin.uid]


def test_a_change_tells_apart_what_nothing_would_separate(journal):
    import msgspec

    first = make_live(journal, "a", record=new_object(b"x", id_=b"1"))
    other = msgspec.structs.replace(new_object(b"y", id_=b"1"), fingerprint=first.fingerprint)
    other = make_live(journal, "a", record=other)
    intent = begin_set(journal, other, {0x003: b"x"})
    assert intent.new_member_id == other.uid
    assert intent.outcome(other).locator.id == other.uid
    after = journal.commit_set(intent.id)
    assert (after.member_id, after.attributes[0x102]) == (other.uid, b"1")


def test_owed_by_change_number_and_doubt(journal):
    first, second = make_live(journal, "a"), make_live(journal, "a")
    assert [row.uid for row in journal.owed("b")] == [first.uid, second.uid]
    claim(journal, "b", second.uid)
    assert [row.uid for row in journal.owed("b", doubtful=True)] == [second.uid]
    assert [row.uid for row in journal.owed("b", doubtful=False)] == [first.uid]
    assert len(journal.owed()) == 4
    assert {row.member for row in journal.owed(doubtful=True)} == {"b"}


# -- who learns what ------------------------------------------------------------------------------------------------


def test_view_number_moves_for_everybody(journal, other):
    record = make_live(journal, "a")
    seen, group = caught_up(other).view_number(), other.group()
    destroy(journal, record.uid, "a")
    assert caught_up(other).view_number() != seen
    changes = other.changes(group.change, group.epoch)
    assert changes.uids == {record.uid}
    assert changes.members, "announced moved"
    assert not changes.everything
    seen = caught_up(other).view_number()
    confirm(journal, destroyed("a", record.uid))
    assert caught_up(other).view_number() != seen
    again = other.changes(changes.change, group.epoch)
    assert (again.uids, again.members) == ({record.uid}, False)
    assert other.changes(again.change, group.epoch).uids == frozenset()


def test_changes_of_another_epoch_are_everything(journal):
    assert journal.changes(0, "another").everything
    assert not journal.changes(journal.group().change, journal.group().epoch).everything


def test_listing_a_member_moves_more_than_is_listed(journal):
    make_live(journal, "a")
    since, epoch = journal.group().change, journal.group().epoch
    journal.add_member(member("d"))
    assert journal.changes(since, epoch).everything


def test_what_does_not_matter_to_others_moves_nothing(journal, other):
    seen = caught_up(other).view_number()
    journal.event("test", "text")
    journal.begin_login("a", "file:/pin", "1", clear=True)
    journal.acquire_lease("x", ttl=5)
    assert caught_up(other).view_number() == seen


def test_view_is_group_and_members(journal):
    group, members = journal.view()
    assert group == journal.group()
    assert members == journal.members()
    assert (group.label, group.serial, group.reference) == ("payments", "74007601", b"reference")
    journal.update_group(label="rotated")
    assert journal.group().label == "rotated"


# -- members --------------------------------------------------------------------------------------------------------


def test_a_new_member_owes_everything(journal):
    live, gone = make_live(journal, "a"), make_live(journal, "a")
    destroy(journal, gone.uid)
    creating = new_object()
    begin(journal, creating)
    before = revision_of(journal)
    assert journal.add_member(member("d")) == before + 1
    rows = journal.owed("d")
    assert {(row.uid, row.kind, row.sent) for row in rows} == {
        (live.uid, INSTALL, False),
        (creating.uid, INSTALL, False),
    }
    assert {row.uid: row.locators for row in rows}[live.uid] == (live.locator,)
    assert not rows[0].asked_before
    added = journal.members()[-1]
    assert (added.name, added.membership) == ("d", Membership.JOINING)
    with pytest.raises(ValueError, match="already"):
        journal.add_member(member("d"))


def test_removed_member_owes_nothing(journal):
    record = make_live(journal, "a", "b")
    journal.remove_member("b")
    assert [m.name for m in journal.members()] == ["a", "c"]
    assert set(journal.placement(record.uid)[0]) == {"a"}
    assert owed_by(journal, record.uid) == {"c"}
    assert journal.counts()["owed"] == 1
    with pytest.raises(ValueError, match="no member"):
        journal.remove_member("b")


def test_update_member(journal, backend):
    revision = revision_of(journal)
    assert journal.update_member("a", draining=True) == revision + 1
    assert journal.update_member("a", membership=Membership.QUARANTINED, reason="PIN") == revision + 2
    assert journal.update_member("a", role=Role.STANDBY, serial="other") == revision + 3
    first = journal.members()[0]
    assert (first.draining, first.membership, first.reason) == (True, Membership.QUARANTINED, "PIN")
    assert (first.role, first.serial, first.since) == (Role.STANDBY, "other", backend.clock.wall())
    journal.set_member_facts("a", default_extractable=True, low=7)
    first = journal.members()[0]
    assert (first.default_extractable, first.low) == (True, 7)
    assert revision_of(journal) == revision + 3


def admit(journal, name="b", *, barrier=None, low=0, lease=None):
    barrier = journal.barrier() if barrier is None else barrier
    return journal.admit(name, barrier=barrier, low=low, lease=lease, membership_revision=revision_of(journal))


def test_admission_waits_for_what_was_owed_before_the_barrier(journal):
    record = make_live(journal, "a")
    journal.update_member("b", membership=Membership.OUT_OF_SYNC, reason="restored")
    barrier = journal.barrier()
    lease = journal.acquire_lease("resync/b", ttl=30)
    hinders = admit(journal, barrier=barrier, low=barrier, lease=lease)
    assert [row.uid for row in hinders] == [record.uid]
    assert journal.members()[1].membership is Membership.OUT_OF_SYNC
    claim(journal, "b", record.uid)
    confirm(journal, installed("b", record))
    make_live(journal, "a")  # after the barrier: not of this admission
    assert admit(journal, barrier=barrier, low=barrier, lease=lease) == []
    second = journal.members()[1]
    assert (second.membership, second.low, second.reason) == (Membership.ADMITTED, barrier, None)


def test_doubt_and_permanent_reasons_do_not_keep_a_member_out(journal):
    one, two = make_live(journal, "a"), make_live(journal, "a")
    journal.update_member("b", membership=Membership.OUT_OF_SYNC, reason="restored")
    claim(journal, "b", one.uid)
    journal.give_up([("b", one.uid)], doubt=True)
    claim(journal, "b", two.uid)
    journal.give_up([("b", two.uid)], doubt=False, reason="MECHANISM_INVALID")
    assert admit(journal) == []


def test_a_quarantined_member_is_not_admitted(journal):
    journal.update_member("b", membership=Membership.QUARANTINED, reason="PIN")
    with pytest.raises(StaleMembership):
        admit(journal)


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda journal: journal.begin_clear(),
        lambda journal: journal.update_member("b", membership=Membership.OUT_OF_SYNC, reason="restored"),
    ],
    ids=["the group was cleared", "its token was restored"],
)
def test_a_member_is_not_admitted_by_what_was_known_before(journal, meanwhile):
    journal.update_member("b", membership=Membership.OUT_OF_SYNC, reason="resumed")
    revision, barrier = revision_of(journal), journal.barrier()
    meanwhile(journal)
    with pytest.raises(StaleMembership):
        journal.admit("b", barrier=barrier, low=barrier, lease=None, membership_revision=revision)
    assert journal.members()[1].membership is Membership.OUT_OF_SYNC
    assert admit(journal) == []


# -- leases, owners --------------------------------------------------------------------------------------------------


def test_lease_ends_by_itself_and_fences_late_writers(backend, journal, other):
    record = make_live(journal, "a")
    lease = journal.acquire_lease("resync/b", ttl=10)
    assert other.acquire_lease("resync/b", ttl=10) is None
    backend.clock.now += 9
    lease = journal.renew_lease(lease, ttl=10)
    backend.clock.now += 9
    assert other.acquire_lease("resync/b", ttl=10) is None
    backend.clock.now += 2
    with pytest.raises(LeaseLost):
        journal.renew_lease(lease, ttl=10)
    newer = other.acquire_lease("resync/b", ttl=10)
    assert newer.token > lease.token
    for call in (
        lambda: journal.claim([("b", record.uid)], worker=None, membership_revision=1, lease=lease),
        lambda: journal.confirm([installed("b", record)], membership_revision=1, lease=lease),
        lambda: admit(journal, lease=lease),
    ):
        with pytest.raises(LeaseLost):
            call()
    journal.release_lease(lease)
    assert journal.acquire_lease("resync/b", ttl=1) is None, "the late release changed nothing"
    other.release_lease(newer)
    assert journal.acquire_lease("resync/b", ttl=1).token > newer.token


def test_lease_of_the_dead_is_free(journal, other):
    other.acquire_lease("x", ttl=1000)
    assert journal.acquire_lease("x", ttl=1) is None
    other.close()
    assert journal.acquire_lease("x", ttl=1) is not None


def test_own_older_lease_is_lost_by_a_newer_one(journal):
    older = journal.acquire_lease("x", ttl=10)
    newer = journal.acquire_lease("x", ttl=10)
    with pytest.raises(LeaseLost):
        journal.renew_lease(older, ttl=10)
    journal.renew_lease(newer, ttl=10)


def test_owner_is_alive_until_closed(journal, other):
    assert journal.owner_alive(other.owner)
    assert journal.owner_alive(journal.owner)
    assert journal.owner != other.owner
    other.close()
    assert not journal.owner_alive(other.owner)
    assert not journal.owner_alive("nobody")


def test_intent_of_the_dead_is_adopted_once(backend, journal, other):
    record = new_object()
    intent = begin(other, record, "a")
    assert journal.adopt_intent(intent.id) is None, "its owner lives"
    other.close()
    adopted = journal.adopt_intent(intent.id)
    assert adopted.owner == journal.owner
    row = row_of(journal, "a", record.uid)
    assert (row.owner, row.doubt_since) == (journal.owner, backend.clock.now)
    assert backend.open().adopt_intent(intent.id) is None
    assert claim(journal, "a", record.uid)
    assert confirm(journal, installed("a", record)) == [True]
    assert journal.go_live(intent.id, needed=1, serving=["a"])
    assert row_of(journal, "a", record.uid).settled, "the dead owner's install may still execute"


# -- observations, logins, events ---------------------------------------------------------------------------------


def observation(observer: str, ok: bool, at: float) -> Observation:
    return Observation(member="a", observer=observer, site=None, ok=ok, kind="probe", boot_time=at)


def test_clients_are_those_that_live(journal, other):
    mine, theirs = journal.owner, other.owner
    assert {client.owner for client in journal.clients()} >= {mine, theirs}
    assert all(client.here and client.host and client.process > 0 for client in journal.clients())
    other.close()
    owners = {client.owner for client in journal.clients()}
    assert mine in owners and theirs not in owners


def test_observations_keep_the_newest_of_each_observer(journal, other):
    journal.observe([observation("x", True, 5.0), observation("y", True, 6.0)])
    seen, change = caught_up(other).view_number(), other.group().change
    journal.observe([observation("x", True, 7.0)])
    assert caught_up(other).view_number() == seen
    journal.observe([observation("x", False, 6.5)])
    assert [o.boot_time for o in other.observations("a")] == [6.0, 7.0], "an older one changes nothing"
    journal.observe([observation("x", False, 8.0)])
    assert caught_up(other).view_number() != seen
    moved = other.changes(change, other.group().epoch)
    assert not moved.uids
    assert not moved.members
    assert {(o.observer, o.ok) for o in other.observations()} == {("x", False), ("y", True)}
    assert other.observations("b") == []


def test_logins_on_a_member_are_one_at_a_time(journal, other):
    assert journal.begin_login("a", "file:/pin", "1", clear=True) is None
    for who in (journal, other):
        waiting = who.begin_login("a", "application", "2", clear=True)
        assert (waiting.state, waiting.owner) == (LoginState.TRYING, journal.owner)
    assert other.begin_login("b", "file:/own pin", "1", clear=True) is None, "another member"
    other.end_login("a", LoginState.REFUSED)  # not its own
    journal.end_login("a", LoginState.ACCEPTED)
    assert other.begin_login("a", "application", "2", clear=True) is None


def test_a_refused_pin_is_not_tried_until_its_source_changes(journal, other):
    journal.begin_login("a", "file:/pin", "1", clear=True)
    journal.end_login("a", LoginState.REFUSED)
    refused = other.begin_login("a", "file:/pin", "1", clear=True)
    assert refused.state is LoginState.REFUSED
    # Neither another source's success nor an attempt that was not made makes it forgotten.
    assert other.begin_login("a", "application", "x", clear=True) is None
    other.end_login("a", LoginState.ACCEPTED)
    assert other.begin_login("a", "file:/pin", "2", clear=True) is None
    other.end_login("a", None)
    assert other.begin_login("a", "file:/pin", "1", clear=True).state is LoginState.REFUSED
    assert other.begin_login("a", "file:/pin", "2", clear=True) is None
    other.end_login("a", LoginState.ACCEPTED)
    assert {(r.source, r.state) for r in journal.logins()} == {
        ("file:/pin", LoginState.ACCEPTED),
        ("application", LoginState.ACCEPTED),
    }


def test_a_source_of_several_members_costs_one_attempt_on_one(journal, other):
    assert journal.begin_login("a", "file:/pin", "1", clear=True) is None
    waiting = other.begin_login("b", "file:/pin", "1", clear=True)
    assert (waiting.member, waiting.state) == ("a", LoginState.TRYING), "nobody knows yet whether it is right"
    assert other.begin_login("b", "file:/pin", "2", clear=True) is None, "another PIN"
    other.end_login("b", None)
    journal.end_login("a", LoginState.REFUSED)
    refused = other.begin_login("b", "file:/pin", "1", clear=True)
    assert (refused.member, refused.state) == ("a", LoginState.REFUSED)
    other.forget_login("a")
    assert other.begin_login("b", "file:/pin", "1", clear=True) is None
    other.end_login("b", LoginState.ACCEPTED)
    # Right on one: the others may find out each for itself, and one that refuses it is alone with that.
    assert journal.begin_login("a", "file:/pin", "1", clear=True) is None
    assert other.begin_login("c", "file:/pin", "1", clear=True) is None
    journal.end_login("a", LoginState.REFUSED)
    other.end_login("c", LoginState.ACCEPTED)
    assert journal.begin_login("a", "file:/pin", "1", clear=True).state is LoginState.REFUSED
    assert journal.begin_login("c", "file:/pin", "1", clear=True) is None


def test_a_source_that_a_dead_process_was_trying_elsewhere_is_tried(backend, journal):
    """Else a member that never comes back would keep the others out."""
    dead = backend.open()
    dead.begin_login("a", "file:/pin", "1", clear=True)
    dead.close()
    assert journal.begin_login("b", "file:/pin", "1", clear=True) is None


def test_trying_of_the_dead_counts_as_refused_unless_the_token_says_otherwise(backend, journal):
    for clear, expected in ((False, LoginState.REFUSED), (True, None)):
        dead = backend.open()
        dead.begin_login("a", "file:/pin", f"{clear}", clear=True)
        dead.close()
        record = journal.begin_login("a", "file:/pin", f"{clear}", clear=clear)
        assert (record and record.state) == expected
    journal.end_login("a", LoginState.REFUSED)
    journal.forget_login("a")
    assert journal.begin_login("a", "file:/pin", "True", clear=True) is None


def test_events_are_numbered_and_kept(journal, other, backend):
    for number in range(5):
        journal.event("kind", f"text {number}", member="a", data={"n": str(number)})
    events = other.events(limit=3)
    assert [event.text for event in events] == ["text 2", "text 3", "text 4"]
    assert events[-1] == Event(
        number=events[0].number + 2,
        time=backend.clock.wall(),
        kind="kind",
        member="a",
        text="text 4",
        data={"n": "4"},
    )
    assert [event.text for event in other.events(since=events[1].number)] == ["text 4"]


# -- many at once ----------------------------------------------------------------------------------------------------


def test_threads_and_owners_at_once(journal, other):
    failures: list[BaseException] = []

    def work(which: Journal) -> None:
        try:
            for _ in range(8):
                record = make_live(which, "a", "b")
                destroy(which, record.uid, "a", "b")
                confirm(which, destroyed("a", record.uid), destroyed("b", record.uid))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(which,)) for which in (journal, other) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    counts = journal.counts()
    assert counts == {"live": 0, "creating": 0, "tombstones": 48, "intents": 0, "owed": 48}
    assert len(journal.owed()) == 48


# -- emptying, and other domain keys ---------------------------------------------------------------------------------


def test_clear(journal, other):
    live = [make_live(journal, "a", "b") for _ in range(3)]
    changing = make_live(journal, "a")
    begin_set(journal, changing, {LABEL: b"new"}, "a")
    creating = new_object()
    intent = begin(journal, creating)
    before = journal.group()
    seen = caught_up(other).view_number()
    epoch = journal.begin_clear()
    assert epoch > before.epoch
    assert journal.group().cleared == journal.group().epoch == epoch
    assert {one.membership for one in journal.members()} == {Membership.OUT_OF_SYNC}
    assert caught_up(other).view_number() != seen and other.changes(0, before.epoch).everything
    gone: list[bytes] = []
    while some := journal.clear_some(2):
        assert len(some) <= 2
        gone += some
    assert sorted(gone) == sorted(record.uid for record in [*live, changing, creating])
    assert journal.counts() | {"owed": 0} == {"live": 0, "creating": 0, "tombstones": 5, "intents": 0, "owed": 0}
    assert all(row.kind is DESTROY for row in journal.owed())
    assert {row.member for row in journal.owed() if row.uid == live[0].uid} >= {"a", "b"}
    with pytest.raises(NoLongerLive):
        journal.go_live(intent.id, needed=1, serving=["a"])
    with pytest.raises(ValueError, match="another object"):
        begin(journal, new_object(uid=live[0].uid))


def rotation_of(journal: Journal, **changed: object) -> Rotation:
    group = journal.group()
    fields = {
        "domain_key_id": group.domain_key_id,
        "partition_key_id": group.partition_key_id,
        "reference": group.reference,
        "sealed": False,
        "wrapped": {"serial-c": (b"one", b"two")},
        "former": ((group.domain_key_id, group.partition_key_id),),
    }
    return Rotation(**(fields | changed))


def begin_rotation(journal: Journal, rotation: Rotation) -> None:
    journal.begin_rotation(domain_key_id=b"new", partition_key_id=b"newer", reference=b"proof", rotation=rotation)


def test_rotation(journal, other):
    record = make_live(journal, "a")
    stale, seen = revision_of(journal), caught_up(other).view_number()
    rotation = rotation_of(journal)
    with pytest.raises(ValueError, match="not the present ones"):
        begin_rotation(journal, rotation_of(journal, domain_key_id=b"another"))
    begin_rotation(journal, rotation)
    group = other.group()
    assert (group.domain_key_id, group.partition_key_id, group.reference) == (b"new", b"newer", b"proof")
    assert group.rotation == rotation and not group.rotation.finished
    assert caught_up(other).view_number() != seen and other.changes(group.change - 1, group.epoch).members
    with pytest.raises(StaleMembership):  # it was sealed under the keys before
        journal.begin_create([new_object()], asking=[], membership_revision=stale)
    with pytest.raises(ValueError, match="not finished"):
        begin_rotation(journal, rotation_of(journal))
    journal.finish_rotation()
    journal.finish_rotation()
    assert other.group().rotation.finished and other.group().rotation.wrapped == rotation.wrapped
    assert journal.object(record.uid).envelope == record.envelope
    begin_rotation(journal, rotation_of(journal))


def test_rewrap_compares_what_was_sealed_anew(journal, other):
    record, gone = make_live(journal, "a"), make_live(journal, "a")
    journal.destroy(gone.uid, asking=[], membership_revision=revision_of(journal))
    seen, group = caught_up(other).view_number(), other.group()
    good = (record.uid, record.revision, b"envelope", b"anew")
    late = (record.uid, record.revision, b"envelope", b"too late")
    behind = (record.uid, record.revision + 1, b"anew", b"another revision")
    lost = (gone.uid, gone.revision, b"envelope", b"anew")
    assert journal.rewrap([good, late, behind, lost]) == [True, False, False, False]
    after = other.object(record.uid)
    assert (after.envelope, after.revision) == (b"anew", record.revision)
    assert caught_up(other).view_number() != seen
    assert other.changes(group.change, group.epoch).uids == {record.uid}
    assert journal.owed("a") == [row for row in journal.owed("a") if row.uid == gone.uid]


def test_transport_key_is_kept(journal):
    journal.set_member_facts("a", transport=b"sealed")
    assert {one.name: one.transport for one in journal.members()} == {"a": b"sealed", "b": b"", "c": b""}


def test_lease_held(backend, journal, other):
    assert not journal.lease_held("x")
    lease = other.acquire_lease("x", ttl=5.0)
    assert journal.lease_held("x") and other.lease_held("x")
    backend.clock.now += 6.0
    assert not journal.lease_held("x")
    other.acquire_lease("x", ttl=5.0)
    other.close()
    assert not journal.lease_held("x"), "its owner is dead"
    assert lease is not None


def test_the_seal_only_grows_and_under_the_lease(backend, journal, other):
    assert journal.group().seal is None
    lease = journal.acquire_lease("seal", ttl=10)
    first = Seal(number=3, head=b"three", mac=b"sealed")
    before = caught_up(other).group()
    journal.put_seal(first, lease=lease)
    assert other.group().seal == first
    moved = caught_up(other).changes(before.change, before.epoch)
    assert (moved.uids, moved.members) == (frozenset(), True)
    with pytest.raises(ValueError, match="sealed already"):
        journal.put_seal(Seal(number=2, head=b"two", mac=b"sealed"), lease=lease)
    journal.release_lease(lease)
    assert other.acquire_lease("seal", ttl=10) is not None
    with pytest.raises(LeaseLost):
        journal.put_seal(Seal(number=4, head=b"four", mac=b"sealed"), lease=lease)
    assert journal.group().seal == first
