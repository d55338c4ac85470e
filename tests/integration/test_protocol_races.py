"""Histories of several clients over the same objects: whatever the order, the journal and the tokens agree in the end,
while all clients go on living (G2, G3, G4, G6, G7)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hagroup.core.attributes import CKA, CKM, pack_bool, pack_ulong
from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.core.records import OwedKind
from hagroup.core.states import State
from hagroup.engine import domain_keys
from hagroup.errors import GroupUnavailable, JournalUnavailable
from tests.support.clients import AES_ECB, Client, Gate, Running, everywhere, two_clients
from tests.support.groups import GroupFixture, make_group, wait_until


@pytest.fixture(scope="module")
def shared(fast_folder: Path) -> GroupFixture:
    return make_group(fast_folder / "races")


@pytest.fixture
def two(shared: GroupFixture) -> Iterator[tuple[Client, Client]]:
    with two_clients(shared) as both:
        yield both


def gone(error: BaseException | None) -> bool:
    return isinstance(error, Ckr) and error.rv in (CKR.OBJECT_HANDLE_INVALID, CKR.KEY_HANDLE_INVALID)


# -- set against destroy -------------------------------------------------------------------------------------


def test_destroyed_between_acceptance_and_commit(two: tuple[Client, Client], shared: GroupFixture) -> None:
    """A's members took the new value; before A commits, B destroys. A undoes, and says so: no row stays A's."""
    a, b = two
    uid = a.aes("old")
    a.sync()
    gate = Gate(a.journal, "commit_set", every=True)  # each member's thread would commit
    renaming = Running(lambda: a.rename(uid, "new"))
    gate.wait()
    b.session.destroy(uid)
    gate.open()
    with pytest.raises(Ckr) as caught:
        renaming.end()
    assert gone(caught.value)
    b.sync()
    everywhere(shared)


def test_destroyed_between_commit_and_confirmation(two: tuple[Client, Client], shared: GroupFixture) -> None:
    """The change is committed, B destroys, then A confirms: refused, undone, and the rows end while A lives."""
    a, b = two
    uid = a.aes("old")
    a.sync()
    gate = Gate(a.journal, "commit_set", after=True)
    renaming = Running(lambda: a.rename(uid, "new"))
    gate.wait()
    b.session.destroy(uid)
    gate.open()
    renaming.end()
    b.sync()
    everywhere(shared)


def test_destroyed_while_an_install_is_on_its_way(two: tuple[Client, Client], shared: GroupFixture) -> None:
    """Live on two members; the third call of A executes after B's destroy was acknowledged."""
    a, b = two
    gate = Gate(a.connection("hsm3"), "unwrap", when=lambda *_, sid=0, **__: sid == 0)
    uid = a.aes("late")
    gate.wait()
    b.session.destroy(uid)
    gate.open()
    a.sync()
    everywhere(shared)


# -- what a living process lost track of ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ["confirm", "go_live", "give_up"])
def test_the_journal_fails_once_in_a_create(two: tuple[Client, Client], shared: GroupFixture, method: str) -> None:
    """What A claimed ends although A lives on and never told the outcome."""
    a, _ = two
    fail_once(a, method)
    if method == "give_up":
        refuse_once(a.connection("hsm2"), "unwrap")
    try:
        a.aes("key")
    except JournalUnavailable:
        a.sync()
        everywhere(shared)
    else:
        a.sync()
        everywhere(shared, "key")


@pytest.mark.parametrize("method", ["commit_set", "confirm"])
def test_the_journal_fails_once_in_a_set(two: tuple[Client, Client], shared: GroupFixture, method: str) -> None:
    a, _ = two
    uid = a.aes("old")
    a.sync()
    fail_once(a, method)
    try:
        a.rename(uid, "new")
    except Exception:
        pass
    a.sync()
    everywhere(shared, a.journal.object(uid).attributes[CKA.LABEL].decode())


def test_the_journal_fails_once_in_a_destroy(two: tuple[Client, Client], shared: GroupFixture) -> None:
    a, _ = two
    uid = a.aes("key")
    a.sync()
    fail_once(a, "confirm")
    a.session.destroy(uid)
    a.sync()
    everywhere(shared)


def test_an_adopted_intent_does_not_strand_its_rows(two: tuple[Client, Client], shared: GroupFixture) -> None:
    """B dies with an open creation. A adopts it, and with it B's claims: they must not stay with living A for ever."""
    a, b = two
    gate = Gate(b.journal, "go_live")
    making = Running(lambda: b.aes("orphan"))
    gate.wait()
    for name in a.group.members:
        b.connection(name).kill()
    b.journal._registration.release()  # to the journal, B is dead from here on
    a.engine.supervisor.wake()
    wait_until(lambda: not a.journal.intents(), "recovery")
    gate.open()
    making.wait()
    a.sync()


def test_a_lost_lease_frees_what_was_claimed_under_it(two: tuple[Client, Client], shared: GroupFixture) -> None:
    a, b = two
    uids = [a.aes(f"key {number}") for number in range(3)]
    a.sync()
    gate = Gate(a.connection("hsm1"), "unwrap", when=lambda *_, sid=0, **__: sid == 0)
    b.engine.supervisor.resync.bring_up_to_date = lambda *_, **__: True  # type: ignore[method-assign]
    a.journal.owe([("hsm1", uid, OwedKind.INSTALL) for uid in uids])
    a.engine.supervisor.wake()
    gate.wait()
    with b.journal._write() as transaction:
        transaction.sql.execute("UPDATE leases SET token = token + 1")
    gate.open()
    a.sync()
    everywhere(shared, "key 0", "key 1", "key 2")


def fail_once(client: Client, method: str) -> None:
    original = getattr(client.journal, method)

    def fails(*arguments: Any, **keywords: Any) -> Any:
        delattr(client.journal, method)
        raise JournalUnavailable("not now")

    assert original
    setattr(client.journal, method, fails)


def refuse_once(connection: Any, method: str) -> None:
    original = getattr(connection, method)

    def refuses(*arguments: Any, sid: int = 0, **keywords: Any) -> Any:
        if sid:
            return original(*arguments, sid=sid, **keywords)
        delattr(connection, method)
        raise Ckr(CKR.DEVICE_MEMORY, "C_UnwrapKey")

    setattr(connection, method, refuses)


# -- availability during a change ----------------------------------------------------------------------------


def test_a_key_can_be_used_while_its_label_changes(two: tuple[Client, Client]) -> None:
    """During a change every member owes it for a moment; whoever uses the key waits that moment and sees no error."""
    a, b = two
    uid = a.aes("0")
    errors: list[BaseException] = []
    over = threading.Event()

    def use(client: Client) -> None:
        while not over.is_set():
            try:
                client.use(uid)
            except BaseException as error:
                errors.append(error)
                return

    users = [threading.Thread(target=use, args=(client,)) for client in (a, b, b)]
    for user in users:
        user.start()
    for number in range(1, 30):
        a.rename(uid, str(number))
    over.set()
    for user in users:
        user.join()
    assert not errors, errors[0]


def test_a_slow_member_does_not_keep_the_others_from_serving(two: tuple[Client, Client], shared: GroupFixture) -> None:
    """hsm3 takes long to set the label: the key serves on hsm1 and hsm2 meanwhile, with the new value."""
    a, b = two
    uid = a.aes("old")
    a.sync()
    gate = Gate(a.connection("hsm3"), "set")
    renaming = Running(lambda: a.rename(uid, "new"))
    gate.wait()
    wait_until(lambda: a.journal.object(uid).revision == 2, "commit")
    for client in (a, b):
        client.use(uid)
    gate.open()
    renaming.end()
    a.sync()
    everywhere(shared, "new")


def test_a_call_that_read_the_object_before_a_change_finds_it_after(two: tuple[Client, Client]) -> None:
    """B looked the key up, A renames it, then B asks a member for it by the old label."""
    a, b = two
    uid = a.aes("old")
    a.sync()
    item = b.session.key(uid)
    a.rename(uid, "new")
    for member in b.engine.roster.members.values():
        assert member.life is not None
        member.life.handles.clear()
    data = b.engine.caller.run(
        [item], lambda life, handles: life.connection.random(4, timeout=1) if handles else b"", logged_in=True
    )
    assert len(data) == 4
    a.sync()


def test_no_change_is_opened_where_nobody_can_take_it(two: tuple[Client, Client]) -> None:
    """The key is owed on every member that is usable: a change would lock the object for nobody."""
    a, b = two
    uid = a.aes("key")
    a.sync()
    for client in (a, b):
        client.engine.supervisor.resync.bring_up_to_date = lambda *_, **__: True  # type: ignore[method-assign]
    a.journal.owe([(name, uid, OwedKind.INSTALL) for name in a.group.members])
    with pytest.raises(GroupUnavailable):
        a.rename(uid, "new")
    assert not a.journal.intents()
    for client in (a, b):
        del client.engine.supervisor.resync.bring_up_to_date


# -- the view ------------------------------------------------------------------------------------------------


def test_a_view_number_that_was_not_moved_stops_nobody(two: tuple[Client, Client], shared: GroupFixture) -> None:
    """A process died between its commit and moving the view number: the membership revision moved, unnoticed."""
    a, b = two
    uid = a.aes("key")
    a.sync()
    put, b.journal._view.put = b.journal._view.put, lambda number: None
    b.journal.update_member("hsm3", draining=False)
    b.journal._view.put = put
    making = Running(lambda: a.aes("other"))
    making.end()
    b.journal._view.put = lambda number: None
    b.journal.update_member("hsm3", draining=False)
    b.journal._view.put = put
    Running(lambda: a.session.destroy(uid)).end()
    a.sync()
    everywhere(shared, "other")


def test_a_replaced_object_leaves_no_handle_behind(two: tuple[Client, Client]) -> None:
    """B's handle of an object that A made anew may name another key by now."""
    a, b = two
    uid = a.aes("key")
    a.sync()
    for _ in range(6):
        b.use(uid)
    holders = [m for m in b.engine.roster.members.values() if m.life is not None and uid in m.life.handles]
    assert holders
    old = {member.name: member.life.handles[uid] for member in holders if member.life is not None}
    a.journal.owe([(name, uid, OwedKind.INSTALL) for name in old])
    a.sync()
    b.engine.follow()
    for member in holders:
        assert member.life is not None
        assert member.life.handles.get(uid) != old[member.name]
    b.use(uid)


# -- session objects ----------------------------------------------------------------------------------------------


def use_on(client: Client, uid: bytes, name: str) -> Any:
    member = client.engine.roster.members[name]

    def use(life: Any, handles: list[int]) -> Any:
        return life.connection.encrypt((AES_ECB, None), handles[0], bytes(16), timeout=5)

    return client.engine.caller.run([client.session.key(uid)], use, logged_in=True, only=member)


def test_a_session_object_is_made_on_one_member_while_another_hangs(two: tuple[Client, Client]) -> None:
    a, _ = two
    uid = a.aes("session", token=False)
    item: Any = a.session.key(uid)
    (home,) = [name for name, _, _ in item.places()]
    first, second = [name for name in a.group.members if name != home]
    gate = Gate(a.connection(first), "unwrap")
    hanging = Running(lambda: use_on(a, uid, first))
    gate.wait()
    assert Running(lambda: use_on(a, uid, second)).end() == use_on(a, uid, home)
    gate.open()
    hanging.end()


def test_a_changed_session_object_has_its_old_attributes_nowhere(two: tuple[Client, Client]) -> None:
    """A member that was suspect during the change still holds it as it was: it is made anew there."""
    a, _ = two
    uid = a.aes("session", token=False)
    for name in a.group.members:
        use_on(a, uid, name)
    suspect = a.engine.roster.members["hsm3"]
    suspect.state = State.SUSPECT
    a.session.set(uid, [(CKA.SIGN, pack_bool(False))])
    suspect.state = State.IN_SERVICE
    use_on(a, uid, "hsm3")
    item: Any = a.session.key(uid)
    assert {name for name, _, _ in item.places()} == set(a.group.members)
    for _, life, handle in item.places():
        values, _ = life.connection.get(handle, [int(CKA.SIGN)], timeout=5)
        assert values[CKA.SIGN] == pack_bool(False)


# -- members that come and go ----------------------------------------------------------------------------------


def test_a_token_that_goes_away_while_its_keys_are_looked_for_comes_back_by_itself(
    two: tuple[Client, Client], shared: GroupFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has nothing then, and no person could do anything about it."""
    a, _ = two
    find, seen = domain_keys._find_key, []

    def goes_away(connection: Any, label: bytes, *more: Any, **keywords: Any) -> list[int]:
        away = label == domain_keys.PARTITION_LABEL and not seen
        if away:
            shared.take_away("hsm2")
        found = find(connection, label, *more, **keywords)
        if away:
            seen.append(found)
            shared.bring_back("hsm2")
        return found

    life = a.engine.roster.members["hsm2"].life
    assert life is not None
    monkeypatch.setattr(domain_keys, "_find_key", goes_away)
    life.connection.kill()
    wait_until(lambda: seen, "its keys are looked for")
    assert seen == [[]]
    a.wait_serving()
    assert "member quarantined" not in {event.kind for event in a.journal.events()}


def test_a_worker_is_not_kept_for_calls_that_have_ended(two: tuple[Client, Client]) -> None:
    """One that is given up may work until the deadlines of its calls, and no longer than they do."""
    a, _ = two
    member = a.engine.roster.members["hsm2"]
    life = member.life
    assert life is not None
    connection, bits = life.connection, [(CKA.MODULUS_BITS, pack_ulong(3072))]
    session = connection.open_session(timeout=5.0)
    pair = (int(CKM.RSA_PKCS_KEY_PAIR_GEN), None)
    making = Running(lambda: connection.generate_pair(pair, bits, [], sid=session, timeout=600.0))
    wait_until(lambda: a.journal.being_changed("hsm2"), "a call is inside")
    a.engine.roster.lost(member, life, "as if it had failed")
    assert connection.alive
    making.end()
    wait_until(lambda: not connection.alive, "its worker is gone", 60.0)
    a.wait_serving()
