"""What was read is old by the time it is used: a token read as a whole, a member worked off, while others go on
(G1, G2; DESIGN.md 4.6)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hagroup.core.records import Lease, Membership, OwedKind
from hagroup.core.states import State
from hagroup.engine import recent, resync, verify, whole_token
from tests.support.clients import Client, Gate, Running, everywhere, two_clients
from tests.support.groups import GroupFixture, make_group, wait_until


@pytest.fixture(scope="module")
def shared(fast_folder: Path) -> GroupFixture:
    return make_group(fast_folder / "long_reads")


@pytest.fixture
def two(shared: GroupFixture) -> Iterator[tuple[Client, Client]]:
    with two_clients(shared) as both:
        yield both


def looks_away(two: tuple[Client, Client], reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a token was read as a whole, and before that is used: one key is destroyed, one renamed, two are made."""
    a, b = two
    doomed, renamed = a.aes("doomed"), a.aes("renamed")
    a.sync()
    read = reader.inventory

    def reads_and_looks_away(*arguments: Any, **options: Any) -> Any:
        found = read(*arguments, **options)
        for client in two:
            client.aes("made")
        b.session.destroy(doomed)
        b.rename(renamed, "new")
        b.sync()
        return found

    monkeypatch.setattr(reader, "inventory", reads_and_looks_away)


def test_changes_while_a_whole_token_is_compared(
    two: tuple[Client, Client], shared: GroupFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was read to hold is old by then: nothing that was made, renamed or destroyed meanwhile is made anew or
    destroyed once more, and no alarm is raised."""
    a, _ = two
    looks_away(two, whole_token.replica, monkeypatch)
    before = max(event.number for event in a.journal.events())
    member = a.engine.roster.members["hsm2"]
    assert member.life is not None
    assert whole_token.owe_what_differs(a.engine.roster, a.journal, member, member.life, with_record=True, timeout=10.0)
    assert not a.journal.owed()
    assert [event.kind for event in a.journal.events(since=before)] == []
    everywhere(shared, "made", "made", "new")


def test_an_object_that_is_being_made_while_a_whole_token_is_compared(
    two: tuple[Client, Client], shared: GroupFixture
) -> None:
    """It is on the token already, and confirmed a moment later: were it owed once more, its creation would fail."""
    a, _ = two
    member = a.engine.roster.members["hsm2"]
    assert member.life is not None
    gate = Gate(a.journal, "confirm", when=lambda said, **_: said[0].member == "hsm2")
    owes = Gate(a.journal, "owe")
    making = Running(lambda: a.aes("made"))
    gate.wait()
    assert whole_token.owe_what_differs(a.engine.roster, a.journal, member, member.life, with_record=True, timeout=10.0)
    gate.open()
    making.end()
    assert not owes.reached.is_set()
    a.sync()
    everywhere(shared, "made")


def test_an_object_changes_while_it_is_looked_for(
    two: tuple[Client, Client], shared: GroupFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where only what moved lately is compared."""
    a, b = two
    uid = a.aes("old")
    a.sync()
    look = recent.replica.locate

    def is_renamed_before(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        b.rename(uid, "new")
        b.sync()
        return look(*arguments, **options)

    monkeypatch.setattr(recent.replica, "locate", is_renamed_before)
    member = a.engine.roster.members["hsm2"]
    assert member.life is not None
    assert recent.missing_of(a.journal, member, member.life, [uid], with_record=True, timeout=10.0) == []
    everywhere(shared, "new")


def test_changes_while_a_member_is_verified(
    two: tuple[Client, Client], shared: GroupFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ha-admin verify` beside a busy application finds no difference that there never was."""
    a, _ = two
    looks_away(two, verify, monkeypatch)
    member = a.engine.roster.members["hsm2"]
    assert member.life is not None
    run = verify._Run(a.journal, "hsm2", member.life, timeout=10.0)
    run.compare()
    assert (run.differences, run.unproven, run.strangers, run.proved) == ([], [], [], 3)


def test_a_token_that_takes_longer_to_read_than_a_lease_lasts(
    two: tuple[Client, Client], shared: GroupFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member with many objects behind a slow line would never be admitted: each attempt would lose its lease."""
    a, b = two
    uid = a.aes("key")
    a.sync()
    b.engine.supervisor.stop()  # so that it is the other one that does it
    monkeypatch.setattr(resync, "LEASE", 3.0)
    read, renewed = whole_token.replica.inventory, Counter[str]()
    renew = a.journal.renew_lease

    def counted(lease: Lease, *, ttl: float) -> Lease:
        renewed[lease.name] += 1
        return renew(lease, ttl=ttl)

    def takes_long(connection: Any, **options: Any) -> Any:
        so_far = renewed["resync/hsm2"]
        wait_until(lambda: renewed["resync/hsm2"] >= so_far + 4, "more than a lease has passed", 20.0)
        return read(connection, **options)

    monkeypatch.setattr(a.journal, "renew_lease", counted)
    monkeypatch.setattr(whole_token.replica, "inventory", takes_long)
    a.journal.update_member("hsm2", membership=Membership.OUT_OF_SYNC, reason="it is looked at")
    wait_until(lambda: a.engine.roster.members["hsm2"].state is State.RESYNCING, "it is looked at")
    a.wait_serving()
    assert a.use(uid)


@pytest.mark.parametrize("worker", ["its own background", "another process"])
def test_sync_waits_for_whoever_is_at_it(
    two: tuple[Client, Client], shared: GroupFixture, monkeypatch: pytest.MonkeyPatch, worker: str
) -> None:
    """As long as that leaves less to do: on a large and slow token it takes longer than any call may."""
    a, b = two
    uids = [a.aes(f"key {number}") for number in range(3)]
    a.sync()
    at_it, idle = (a, b) if worker == "its own background" else (b, a)
    idle.engine.supervisor.stop()
    supervisor, working = a.engine.supervisor, at_it.engine.supervisor.resync
    looked, seen = Counter[str](), 0
    carry_out, take, is_at_it = working._carry_out, supervisor._take, supervisor.resync.is_at_it

    def works(*arguments: Any) -> bool:
        nonlocal seen
        wait_until(lambda: looked["for it"] > seen + 1, "sync has looked, and found somebody at it")
        seen = looked["for it"]
        return carry_out(*arguments)

    def looks(member: Any, timeout: float) -> bool:
        looked["for it"] += timeout > 0
        return take(member, min(timeout, 0.01))

    def finds(member: Any) -> bool:
        looked["for it"] += 1
        return is_at_it(member)

    monkeypatch.setattr(working, "_carry_out", works)
    monkeypatch.setattr(supervisor, "_take", looks)
    monkeypatch.setattr(supervisor.resync, "is_at_it", finds)
    a.journal.owe([("hsm2", uid, OwedKind.INSTALL) for uid in uids])
    at_it.engine.supervisor.wake()
    wait_until(lambda: a.journal.lease_held("resync/hsm2"), "somebody is at it")
    supervisor.sync_now()
    assert not a.journal.owed("hsm2")
    everywhere(shared, "key 0", "key 1", "key 2")


def test_sync_waits_for_a_member_that_is_lost_and_may_come_back(
    two: tuple[Client, Client], shared: GroupFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is connected anew a moment later, and brought up to date then."""
    a, b = two
    uid = a.aes("key")
    a.sync()
    b.engine.supervisor.stop()
    supervisor, roster, member = a.engine.supervisor, a.engine.roster, a.engine.roster.members["hsm2"]
    take, waits, due = supervisor._take, supervisor._becomes_less, roster.due

    def is_lost_before(asked: Any, timeout: float) -> bool:
        if asked is member:
            monkeypatch.setattr(supervisor, "_take", take)
            monkeypatch.setattr(roster, "due", list)  # nobody connects it before it was looked at
            roster.lost(member, member.life, "as if it had failed")
        return take(asked, timeout)

    def looks(asked: Any, owed: int) -> bool:
        monkeypatch.setattr(roster, "due", due)
        return waits(asked, owed)

    monkeypatch.setattr(supervisor, "_take", is_lost_before)
    monkeypatch.setattr(supervisor, "_becomes_less", looks)
    a.journal.owe([("hsm2", uid, OwedKind.INSTALL)])
    supervisor.sync_now()
    assert not a.journal.owed("hsm2")
    everywhere(shared, "key")
