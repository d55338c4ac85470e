"""One short history for each rule of the protocol that would be easy to break (``tests/mutations``), over simulated
members: what happens in between is exactly what the test says."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hagroup.core.attributes import CKA, CKM, CKO, pack_ulong
from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.core.records import OBJECT_MISSING, Membership
from hagroup.core.states import State
from hagroup.engine import manifest
from hagroup.engine.domain_keys import seal_data
from hagroup.engine.resync import LEASE
from hagroup.errors import GroupUnavailable, JournalMismatch, JournalOutcomeUnknown
from tests.support.simulated import CKM_AES_CMAC, Fate, SimMember, SimObject, signature
from tests.support.simulation import LATE_WINDOW, Client, Killed, Simulation, key_template

SIGN = (CKM_AES_CMAC, None)


@pytest.fixture
def world() -> Iterator[Simulation]:
    """Three members elsewhere (a call may still execute after everybody gave it up)."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        simulation = Simulation(Path(folder), 1)
        simulation.log = []
        with simulation.running():
            yield simulation
            assert not simulation.unexpected


def make(client: Client, label: bytes = b"key") -> bytes:
    template = [*key_template(label), (CKA.VALUE_LEN, pack_ulong(32))]
    return client.ready().generate((CKM.AES_KEY_GEN, None), template, assign_id=True)


def held(member: SimMember) -> list[SimObject]:
    """What the token holds beside the group's own objects."""
    return [item for item in member.right_token.objects.values() if not item.label.startswith(b"hagroup")]


def dies_at(client: Client, method: str) -> None:
    """Killed when it is about to call this of the journal."""

    def die(*_: Any, **__: Any) -> None:
        client.dead = True
        raise Killed

    setattr(client.journal, method, die)


def before(client: Client, method: str, action: Callable[[], object]) -> None:
    """Something else happens when the client is about to call this of the journal for the first time."""
    original = getattr(client.journal, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        setattr(client.journal, method, original)
        action()
        return original(*args, **kwargs)

    setattr(client.journal, method, call)


def wait(world: Simulation, client: Client, seconds: float) -> None:
    """Time passes, and the client's background works."""
    for _ in range(10):
        client.background()
        world.clock.now += seconds / 10
    client.background()


def asked(world: Simulation, since: int, what: str) -> list[str]:
    assert world.log is not None
    return [line for line in world.log[since:] if what in line]


def test_killed_before_the_envelope_is_durable_leaves_nothing(world: Simulation) -> None:
    a = world.client("A")
    dies_at(a, "begin_create")
    with pytest.raises(Killed):
        make(a)
    a.bury()
    assert [held(member) for member in world.members.values()] == [[], [], []]


def test_killed_before_the_tombstone_leaves_the_object_whole(world: Simulation) -> None:
    a = world.client("A")
    uid = make(a)
    dies_at(a, "destroy")
    with pytest.raises(Killed):
        a.ready().destroy(uid)
    a.bury()
    assert [len(held(member)) for member in world.members.values()] == [1, 1, 1]


def test_an_install_that_a_destroy_overtook_is_undone(world: Simulation) -> None:
    a, b = world.client("A"), world.client("B")
    before(a, "confirm", lambda: b.real.abandon_create(b.real.intents()[0].id))
    with pytest.raises(GroupUnavailable):
        make(a)
    wait(world, b, 100)
    assert [held(member) for member in world.members.values()] == [[], [], []]
    assert not list(b.real.owed())


@pytest.mark.parametrize("which", range(2), ids=["its record", "the object"])
def test_a_call_that_executes_late_leaves_nothing(world: Simulation, which: int) -> None:
    a = world.client("A")
    world.faults["hsm2"] = [(which, Fate.LATE, True)]
    uid = make(a)
    assert [len(held(member)) for member in world.members.values()] == [1, 0, 1]
    a.ready().destroy(uid)
    wait(world, a, LATE_WINDOW / 6)
    before = len(world.members["hsm2"].token.objects)
    world.members["hsm2"].run_late(0)
    assert len(world.members["hsm2"].token.objects) == before + 1
    wait(world, a, LATE_WINDOW * 2)
    assert [held(member) for member in world.members.values()] == [[], [], []]
    everything = [item.label for member in world.members.values() for item in member.token.objects.values()]
    assert not [label for label in everything if label.startswith(b"hagroup:object:")]
    assert not list(a.real.owed())


@pytest.mark.parametrize("what", ["attributes", "record"])
def test_a_token_that_was_put_back_to_the_middle_of_a_change_is_mended(world: Simulation, what: str) -> None:
    a = world.client("A")
    uid = make(a)
    a.ready().set(uid, [(int(CKA.LABEL), b"other")])
    a.ready().set(uid, [(int(CKA.DERIVE), b"\x01")])
    member = world.members["hsm2"]
    record = f"hagroup:object:{uid.hex()}:".encode()
    if what == "record":
        (item,) = [one for one in member.token.objects.values() if one.label.startswith(record)]
        item.attributes[CKA.LABEL] = record + b"2"
    else:
        held(member)[0].attributes[CKA.DERIVE] = b"\x00"
    member.power_cycle()
    wait(world, a, 100)
    assert [one.attributes[CKA.DERIVE] for one in held(member)] == [b"\x01"]
    labels = [one.label for one in member.token.objects.values() if one.label.startswith(record)]
    assert labels == [record + b"3"]


@pytest.mark.parametrize("change", ["set", "destroy"])
def test_a_change_waits_for_a_member_that_is_just_looked_at_again(world: Simulation, change: str) -> None:
    a = world.client("A")
    uid = make(a)
    session = a.ready()
    member = a.engine.roster.members["hsm2"]
    assert member.life is not None
    assert a.engine.roster.look_again(member, member.life, b"another")
    if change == "set":
        session.set(uid, [(int(CKA.LABEL), b"other")])
    else:
        session.destroy(uid)
    assert not list(a.real.owed())


def test_of_several_matches_none_is_used(world: Simulation) -> None:
    a = world.client("A")
    uid = make(a)
    a.bury()
    member = world.members["hsm1"]
    original = held(member)[0]
    number = member.next_number()
    member.token.objects[number] = SimObject(number, dict(original.attributes), original.secret, None)
    for name in ("hsm2", "hsm3"):
        world.members[name].down = True
    script = member.script

    def watched(connection: Any, name: str, changes: bool) -> Fate:
        if name == "C_Sign":
            assert len(held(member)) == 1
        return script(connection, name, changes)

    member.script = watched
    b = world.client("B")
    with contextlib.suppress(GroupUnavailable):  # where it is repaired first, the call may just not wait for that
        b.ready().sign(SIGN, uid, b"x")
    wait(world, b, 100)
    assert len(held(member)) == 1
    assert b.ready().sign(SIGN, uid, b"x")


def test_no_handle_outlives_its_connection(world: Simulation) -> None:
    a = world.client("A")
    uid = make(a)
    for name in ("hsm2", "hsm3"):
        world.members[name].down = True
        world.members[name].power_cycle()
    assert a.ready().sign(SIGN, uid, b"x")
    earlier = a.engine.roster.members["hsm1"].life
    assert earlier is not None and uid in earlier.handles
    world.members["hsm1"].power_cycle()
    wait(world, a, 10)
    life = a.engine.roster.members["hsm1"].life
    assert life is not None and life is not earlier and not life.handles
    key = SimObject(0, {}, held(world.members["hsm1"])[0].secret, None)
    assert a.ready().sign(SIGN, uid, b"x") == signature(key, CKM_AES_CMAC, b"x")


def test_an_unanswered_install_is_looked_for_before_it_is_made(world: Simulation) -> None:
    a = world.client("A")
    world.faults["hsm2"] = [(0, Fate.LOST_AFTER, True)]
    make(a)
    wait(world, a, LATE_WINDOW * 2)
    assert [len(held(member)) for member in world.members.values()] == [1, 1, 1]
    assert not list(a.real.owed())


def test_nobody_logs_in_automatically_while_the_count_is_low(world: Simulation) -> None:
    world.members["hsm2"].token.count_low = True
    earlier = world.members["hsm2"].token.logins
    a = world.client("A")
    wait(world, a, 100)
    assert world.members["hsm2"].token.logins == earlier
    assert make(a)


def test_a_resync_that_lost_its_lease_changes_nothing(world: Simulation) -> None:
    a, b = world.client("A"), world.client("B")
    world.members["hsm2"].down = True
    world.members["hsm2"].power_cycle()
    a.background()
    uid = make(a)
    world.members["hsm2"].down = False
    place = 0

    def takes_over() -> None:
        nonlocal place
        world.clock.now += LEASE + 1
        assert b.real.acquire_lease("resync/hsm2", ttl=10_000) is not None
        assert world.log is not None
        place = len(world.log)

    before(a, "claim", takes_over)
    wait(world, a, 100)
    assert place
    assert not asked(world, place, "A hsm2 C_UnwrapKey")
    assert not held(world.members["hsm2"])
    assert not world.journal.placement(uid)[1]["hsm2"].asked_before  # it did not even claim it


def test_a_journal_that_is_behind_changes_nothing(world: Simulation) -> None:
    a = world.client("A")
    make(a)
    life = a.engine.roster.members["hsm1"].life
    assert life is not None and life.keys is not None
    group, listed = a.real.view()
    shown = manifest.compose(group, {one.name: one for one in listed}, low=0, high=group.change + 1000)
    manifest.write(life.connection, life.keys, shown, timeout=1)
    a.bury()
    b = world.client("B")
    with pytest.raises(JournalMismatch):
        make(b)
    assert [len(held(member)) for member in world.members.values()] == [1, 1, 1]


def test_a_change_that_all_refuse_is_none(world: Simulation) -> None:
    a = world.client("A")
    uid = make(a)
    for name in world.members:
        world.faults[name] = [(0, Fate.UNSENT, True)]
    with pytest.raises(GroupUnavailable, match="nothing was changed"):
        a.ready().set(uid, [(int(CKA.LABEL), b"other")])
    wait(world, a, 100)
    assert a.ready().get(uid, [int(CKA.LABEL)])[0] == {CKA.LABEL: b"key"}
    assert [[item.label for item in held(member)] for member in world.members.values()] == [[b"key"]] * 3


def test_what_another_process_destroyed_is_refused(world: Simulation) -> None:
    a, b = world.client("A"), world.client("B")
    uid = make(a)
    assert b.ready().get(uid, [int(CKA.LABEL)])[0]
    a.ready().destroy(uid)
    with pytest.raises(Ckr) as caught:
        b.ready().get(uid, [int(CKA.LABEL)])
    assert caught.value.rv == CKR.OBJECT_HANDLE_INVALID


def test_a_joining_member_is_admitted_when_it_has_all(world: Simulation) -> None:
    """A member that the journal does not admit is not used before it has what was made meanwhile."""
    a = world.client("A")
    world.journal.update_member("hsm2", membership=Membership.OUT_OF_SYNC, reason="resumed")
    world.faults["hsm2"] = [(0, Fate.UNSENT, True)]
    uid = make(a)
    wait(world, a, 100)
    assert {one.name: one.membership for one in world.journal.members()}["hsm2"] is Membership.ADMITTED
    assert "hsm2" in world.journal.placement(uid)[0]


def test_a_token_that_is_restored_while_it_is_admitted_is_looked_at_again(world: Simulation) -> None:
    """Another process finds it restored between this one's last look and the admission, whose manifest hides that."""
    a = world.client("A")
    uid = make(a)
    world.journal.update_member("hsm2", membership=Membership.OUT_OF_SYNC, reason="resumed")
    token = world.members["hsm2"].right_token

    def restored() -> None:
        for number, item in list(token.objects.items()):
            if not item.label.startswith(b"hagroup ") and not item.label.startswith(manifest.LABEL):
                del token.objects[number]
        world.clock.now += 1
        world.journal.update_member("hsm2", membership=Membership.OUT_OF_SYNC, reason="its token was restored")

    before(a, "admit", restored)
    wait(world, a, 100)
    assert {one.name: one.membership for one in world.journal.members()}["hsm2"] is Membership.ADMITTED
    assert "hsm2" in world.journal.placement(uid)[0]
    assert len(held(world.members["hsm2"])) == 1


def test_a_manifest_of_an_earlier_hagroup_is_read_and_replaced(world: Simulation) -> None:
    """It has no CKA_OBJECT_ID, and knows of no revision and seal."""
    a = world.client("A")
    uid = make(a)
    life = a.engine.roster.members["hsm1"].life
    assert life is not None and life.keys is not None
    connection, keys, token = life.connection, life.keys, world.members["hsm1"].right_token
    newest = manifest.read(connection, keys, timeout=1)
    assert newest is not None
    for number, item in list(token.objects.items()):
        if item.label.startswith(manifest.LABEL):
            del token.objects[number]
    old = {name: getattr(newest, name) for name in ("group", "label", "epoch", "members", "low", "high")}
    template = [
        (CKA.CLASS, pack_ulong(CKO.DATA)),
        (CKA.TOKEN, b"\1"),
        (CKA.PRIVATE, b"\1"),
        (CKA.APPLICATION, b"hagroup"),
        (CKA.LABEL, manifest.LABEL + f"{newest.epoch}:{0:016x}:{0:016x}:{0:016x}".encode()),
        (CKA.VALUE, seal_data(connection, keys, b"manifest", msgspec.msgpack.encode(old), timeout=1)),
    ]
    connection.create([(int(number), value) for number, value in template], timeout=1)
    assert manifest.read(connection, keys, timeout=1) == msgspec.structs.replace(newest, sealed=0, head=b"", revision=0)
    a.ready().destroy(uid)
    assert len([item for item in token.objects.values() if item.label.startswith(manifest.LABEL)]) == 1
    found = manifest.read(connection, keys, timeout=1)
    assert found is not None and found.high > newest.high and found.revision > 0


def test_what_was_made_since_a_member_was_connected_is_not_taken_for_lost(
    world: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module of a client that just came may not show yet what another process made a moment ago."""
    a, b = world.client("A"), world.client("B")
    b.ready()
    member = b.engine.roster.members["hsm2"]
    life = member.life
    assert life is not None
    make(a)
    life.proved_since_low = False
    monkeypatch.setattr(life.connection, "find", lambda *_, **__: [])
    wait(world, b, 10)
    assert member.life is not None
    assert member.life is not life, "it looked again, in another life"
    assert [event.kind for event in b.real.events(limit=100) if event.kind == OBJECT_MISSING] == []
    assert [len(held(member)) for member in world.members.values()] == [1, 1, 1]


def test_a_forked_child_sees_what_changed_while_it_read_the_group(world: Simulation) -> None:
    """It counted as seen, and the child went on with the members of before until something else changed."""
    a, b = world.client("A"), world.client("B")
    a.ready()
    view = a.engine.view
    load = view._load_members

    def read() -> None:
        load()
        b.real.update_member("hsm2", draining=True)

    view._load_members = read  # type: ignore[method-assign]
    view.renew_after_fork()
    view._load_members = load  # type: ignore[method-assign]
    view.refresh()
    assert view.members["hsm2"].draining


@pytest.mark.parametrize("method", ["begin_create", "begin_set", "destroy"])
def test_an_interruption_while_the_journal_writes_it_down(world: Simulation, method: str) -> None:
    """Ctrl-C, or a signal's handler that raises: the program goes on, and so does what it had begun."""
    a, b = world.client("A"), world.client("B")
    uid = make(a)
    original = getattr(a.journal, method)

    def call(*args: Any, **kwargs: Any) -> None:
        setattr(a.journal, method, original)
        original(*args, **kwargs)
        raise KeyboardInterrupt

    setattr(a.journal, method, call)
    changes: dict[str, Callable[[], object]] = {
        "begin_create": lambda: make(a, b"other"),
        "begin_set": lambda: a.ready().set(uid, [(int(CKA.LABEL), b"new")]),
        "destroy": lambda: a.ready().destroy(uid),
    }
    with pytest.raises(KeyboardInterrupt):
        changes[method]()
    wait(world, a, 10.0)
    wait(world, b, 10.0)
    assert not world.journal.intents()
    assert not world.journal.owed()
    label = {"begin_create": b"key", "begin_set": b"new"}.get(method)
    for client in (a, b):
        assert len(client.ready().find({})) == (label is not None)
        if label is not None:
            assert client.ready().get(uid, [int(CKA.LABEL)])[0] == {int(CKA.LABEL): label}
    for member in world.members.values():
        assert [item.label for item in held(member)] == ([label] if label else [])


def test_a_login_whose_announcement_got_no_answer_is_not_under_way_for_ever(world: Simulation) -> None:
    """It was written down: nobody could log in to that member before this process ended."""
    a, b = world.client("A"), world.client("B")
    make(a)
    original = a.journal.begin_login

    def call(*args: Any, **kwargs: Any) -> None:
        a.journal.begin_login = original
        assert original(*args, **kwargs) is None
        raise JournalOutcomeUnknown("no answer")

    a.journal.begin_login = call
    for client in (a, b):
        life = client.engine.roster.members["hsm2"].life
        assert life is not None
        client.engine.roster.lost(client.engine.roster.members["hsm2"], life, "it went away")
    wait(world, a, 60.0)
    wait(world, b, 60.0)
    for client in (a, b):
        assert client.engine.roster.members["hsm2"].state is State.IN_SERVICE


def test_where_too_few_have_room_nothing_is_made(world: Simulation) -> None:
    """Members that are full serve: it is not that fewer than ``min_replicas`` are usable."""
    a = world.client("A")
    a.ready()
    world.members["hsm3"].token.full = True
    make(a, b"on two")
    world.members["hsm2"].token.full = True
    with pytest.raises(Ckr, match="DEVICE_MEMORY"):
        make(a, b"on one")
    assert [len(held(member)) for member in world.members.values()] == [1, 1, 0]
    assert len(a.ready().find({})) == 1
    for name in ("hsm2", "hsm3"):
        world.members[name].down = True
    wait(world, a, 10.0)
    make(a, b"degraded")
    assert [len(held(member)) for member in world.members.values()] == [2, 1, 0]


def test_what_a_mirror_had_is_put_beside_the_objects_in_an_inventory(world: Simulation) -> None:
    """A journal that moves to etcd leaves the mirror behind: it is one host's."""
    a = world.client("A")
    uid = make(a)
    a.bury()
    for member in world.members.values():  # as with [journal] mirror
        for number, item in list(member.token.objects.items()):
            if item.label.startswith(b"hagroup:object:"):
                del member.token.objects[number]
    for name in world.members:
        world.journal.update_member(name, membership=Membership.OUT_OF_SYNC, reason="the journal was moved")
    b = world.client("B")
    b.ready()
    wait(world, b, 10.0)
    assert b.ready().sign(SIGN, uid, b"data")
    for member in world.members.values():
        assert [item.label.startswith(b"hagroup:object:") for item in member.token.objects.values()].count(True) == 1
        assert len(held(member)) == 1
