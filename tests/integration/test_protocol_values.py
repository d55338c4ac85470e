"""One value under several UIDs, tokens that come back from the past, and a journal that does (G1 to G3, G6)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hagroup.core.attributes import CKA, pack_bool
from hagroup.core.calls import Ckr
from hagroup.core.records import Membership, OwedKind
from hagroup.engine import manifest
from hagroup.errors import JournalMismatch
from tests.support import plain
from tests.support.clients import Client, Gate, Running, clients, everywhere
from tests.support.groups import GroupFixture, make_group, wait_until

CERTIFICATE = b"0\x82 a certificate"


@pytest.fixture(scope="module")
def shared(fast_folder: Path) -> GroupFixture:
    return make_group(fast_folder / "values")


@pytest.fixture
def two(shared: GroupFixture) -> Iterator[tuple[Client, Client]]:
    with clients(shared) as (a, b):
        yield a, b
        a.sync()
        for record in list(a.journal.objects()):
            a.session.destroy(record.uid)
        a.sync()
        everywhere(shared)


def take_away(group: GroupFixture, name: str, *present: Client) -> None:
    group.take_away(name)
    for client in present:
        client.connection(name).kill()
        wait_until(lambda client=client: client.engine.roster.members[name].life is None, f"{name} failed")


def bring_back(group: GroupFixture, name: str, *present: Client) -> None:
    group.bring_back(name)
    for client in present:
        client.wait_serving()
        client.sync()


# -- a tombstone condemns a UID, not a value -------------------------------------------------------------------


def test_destroyed_and_imported_again_while_a_member_is_away(two: tuple[Client, Client], shared: GroupFixture) -> None:
    a, b = two
    first = a.certificate("cert", CERTIFICATE)
    a.sync()
    take_away(shared, "hsm3", a, b)
    a.session.destroy(first)
    second = a.certificate("cert", CERTIFICATE)
    assert second != first
    bring_back(shared, "hsm3", a, b)
    everywhere(shared, "cert")


def test_looking_again_for_a_destroyed_object_spares_its_successor(
    two: tuple[Client, Client], shared: GroupFixture
) -> None:
    """A destroy in doubt is searched for again and again; meanwhile the same certificate was imported anew."""
    a, _ = two
    first = a.certificate("cert", CERTIFICATE)
    a.session.destroy(first)
    second = a.certificate("cert", CERTIFICATE)
    a.sync()
    a.journal.owe([(name, first, OwedKind.DESTROY) for name in shared.members])
    a.sync()
    everywhere(shared, "cert")
    copies, owed = a.journal.placement(second)
    assert set(copies) == set(shared.members)
    assert not owed


def test_an_old_copy_beside_its_successor_goes(two: tuple[Client, Client], shared: GroupFixture) -> None:
    """A late call made the destroyed one again, beside its successor: one of the two is left, and the journal knows."""
    a, _ = two
    first = a.certificate("cert", CERTIFICATE)
    record = a.journal.object(first)
    a.session.destroy(first)
    a.certificate("cert", CERTIFICATE)
    a.sync()
    template = [(n, v) for n, v in record.attributes.items() if n in (CKA.CLASS, CKA.CERTIFICATE_TYPE, CKA.ID)]
    template += [(CKA.LABEL, b"cert"), (CKA.VALUE, CERTIFICATE), (CKA.SUBJECT, b"0\x00")]
    template += [(CKA.TOKEN, pack_bool(True)), (CKA.PRIVATE, pack_bool(False))]
    a.connection("hsm2").create(template, timeout=5)
    a.journal.owe([("hsm2", first, OwedKind.DESTROY)])
    a.sync()
    everywhere(shared, "cert")


def test_a_renamed_object_and_a_new_one_in_its_old_place(two: tuple[Client, Client], shared: GroupFixture) -> None:
    """hsm3 missed both: it has one object under the old label, and must end with two, none taken for the other."""
    a, b = two
    first = a.certificate("x", CERTIFICATE)
    a.sync()
    take_away(shared, "hsm3", a, b)
    a.rename(first, "y")
    a.certificate("x", CERTIFICATE)
    bring_back(shared, "hsm3", a, b)
    everywhere(shared, "x", "y")


def test_two_clients_import_one_certificate_at_once(two: tuple[Client, Client], shared: GroupFixture) -> None:
    """Each looked for a twin before the other wrote: the journal tells them apart."""
    a, b = two
    gate = Gate(a.journal, "begin_create")
    importing = Running(lambda: a.certificate("cert", CERTIFICATE))
    gate.wait()
    kept = b.certificate("cert", CERTIFICATE)
    gate.open()
    other = importing.end()
    a.sync()
    everywhere(shared, "cert", "cert")
    a.session.destroy(other)
    a.sync()
    everywhere(shared, "cert")
    copies, owed = a.journal.placement(kept)
    assert set(copies) == set(shared.members)
    assert not owed


def test_a_change_makes_two_objects_look_the_same(two: tuple[Client, Client], shared: GroupFixture) -> None:
    """One value under two labels; then both get one label. Each stays usable, and one can be destroyed alone."""
    a, b = two
    first, second = a.certificate("x", CERTIFICATE), a.certificate("y", CERTIFICATE)
    a.sync()
    a.rename(second, "x")
    a.sync()
    everywhere(shared, "x", "x")
    for uid in (first, second):
        values, _ = b.session.get(uid, [CKA.VALUE])
        assert values[CKA.VALUE] == CERTIFICATE
    a.session.destroy(first)
    a.sync()
    everywhere(shared, "x")
    values, _ = b.session.get(second, [CKA.VALUE])
    assert values[CKA.VALUE] == CERTIFICATE


# -- a token from the past -----------------------------------------------------------------------------------------


def test_a_member_that_joins_again_with_its_old_objects(two: tuple[Client, Client], shared: GroupFixture) -> None:
    a, b = two
    for label in ("one", "two"):
        a.aes(label)
    a.sync()
    listed = next(one for one in a.journal.members() if one.name == "hsm3")
    a.journal.remove_member("hsm3")
    for client in (a, b):
        client.engine.follow()
    a.journal.add_member(msgspec.structs.replace(listed, membership=Membership.JOINING))
    for client in (a, b):
        client.engine.follow()
        client.wait_serving()
    a.sync()
    everywhere(shared, "one", "two")


def test_a_token_restored_from_before_an_attribute_change(shared: GroupFixture) -> None:
    """It shows less than it once did: it is brought up to date before it serves (G3)."""
    with clients(shared, 1) as (a,):
        uid = a.aes("key")
        a.sync()
    tokens, backup = shared.token_folder("hsm3"), shared.folder / "backup"
    shutil.copytree(tokens, backup)
    with clients(shared, 1) as (a,):
        a.session.set(uid, [(CKA.SIGN, pack_bool(False))])
        a.sync()
    shutil.rmtree(tokens)
    backup.rename(tokens)
    assert signing(shared, "hsm3") is True
    with clients(shared, 1) as (a,):
        a.sync()
        assert signing(shared, "hsm3") is False
        assert any(event.kind == "alarm" for event in a.journal.events())
        a.session.destroy(uid)


def signing(group: GroupFixture, name: str) -> Any:
    (item,) = plain.objects(group.members[name], int(CKA.SIGN))
    return item["attributes"][str(int(CKA.SIGN))]


# -- manifests -------------------------------------------------------------------------------------------------------


def test_a_manifest_replaced_while_it_is_read(two: tuple[Client, Client]) -> None:
    """ "No manifest" would put the member out of sync: it is not said because a newer one came meanwhile."""
    a, b = two
    uid = a.aes("key")
    a.sync()
    connection, life = a.connection("hsm1"), a.engine.roster.members["hsm1"].life
    assert life is not None
    assert life.keys is not None
    original = connection.get
    calls: list[int] = []

    def get(handle: int, types: list[int], **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) <= 2:
            b.rename(uid, f"key {len(calls)}")
        return original(handle, types, **keywords)

    connection.get = get
    try:
        assert manifest.read(connection, life.keys, timeout=5) is not None
    finally:
        del connection.get


def test_a_journal_that_is_behind_decides_nothing(fast_folder: Path) -> None:
    """A token has seen more than the journal announced: no change, repair or admission by any client that sees it."""
    group = make_group(fast_folder / "behind")
    with clients(group, 1) as (a,):
        uid = a.aes("key")
        a.sync()
        life, member = a.engine.roster.members["hsm2"].life, a.engine.roster.members["hsm2"]
        assert life is not None
        manifest.raise_high(a.engine.view, member, life, a.journal.barrier() + 1000, timeout=5)
    client = Client(group)
    try:
        client.wait_serving("hsm1", "hsm3")
        wait_until(lambda: client.engine.roster.journal_behind() is not None, "the journal is found behind")
        for change in (
            lambda: client.aes("other"),
            lambda: client.rename(uid, "other"),
            lambda: client.session.destroy(uid),
        ):
            with pytest.raises(JournalMismatch, match="older than the group"):
                change()
        client.use(uid)
        client.journal.owe([("hsm1", uid, OwedKind.INSTALL)])
        client.engine.supervisor.sync_now()
        assert [row.member for row in client.journal.owed()] == ["hsm1"]
        assert not client.journal.intents()
        assert client.engine.roster.members["hsm2"].life is None
    finally:
        client.close()


def test_the_manifest_of_a_later_epoch_is_the_higher_one() -> None:
    made = [
        manifest.Manifest(group="1", label="g", epoch=epoch, members={}, low=0, high=high)
        for epoch, high in (("00000001-ff", 900), ("00000002-00", 3), ("00000010-00", 1))
    ]
    assert sorted(made, key=lambda one: one.order) == made
    marks = [one.mark for one in made]
    assert sorted(marks) == marks


def test_gone_is_gone(two: tuple[Client, Client]) -> None:
    a, b = two
    uid = a.aes("key")
    a.session.destroy(uid)
    with pytest.raises(Ckr):
        b.use(uid)
