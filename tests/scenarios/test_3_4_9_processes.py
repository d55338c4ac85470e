"""T 3.4.9: several processes on one group at once, and what one of them sees of the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import hagroup as pkcs11
from hagroup import Attribute, KeyType
from hagroup.config.load import load
from hagroup.core.records import OwedRow
from hagroup.journal import open_journal
from tests.support import plain
from tests.support.faulty import set_timeouts
from tests.support.groups import PIN, GroupFixture, make_group, run_client

IV = bytes(16)

WORK = """
import json
from concurrent.futures import ThreadPoolExecutor

name = sys.argv[1]
public, private = session.get_key(label="common", object_class=ObjectClass.PUBLIC_KEY), session.get_key(
    label="common", object_class=ObjectClass.PRIVATE_KEY)

def work(number):
    made = session.generate_key(KeyType.AES, 256, store=True, label=f"{name} {number}")
    gone = session.generate_key(KeyType.AES, 256, store=True, label=f"{name} {number} gone")
    for _ in range(5):
        data = f"{name} {number} {_}".encode()
        signature = private.sign(data, mechanism=Mechanism.SHA256_RSA_PKCS)
        assert public.verify(data, signature, mechanism=Mechanism.SHA256_RSA_PKCS)
    made[Attribute.LABEL] = f"{name} {number} kept"
    gone.destroy()
    return f"{name} {number} kept"

with ThreadPoolExecutor(4) as pool:
    print(json.dumps(list(pool.map(work, range(4)))))
"""


@pytest.fixture(scope="module")
def shared_group(fast_folder: Path) -> GroupFixture:
    group = make_group(fast_folder / "processes", "--min-replicas", "3")
    # a change waits that long for a member that is just being connected anew
    set_timeouts(group.toml, call=30.0, generate=60.0, probe=4.0)
    return group


def client(group: GroupFixture, name: str) -> Iterator[Any]:
    """A client with workers of its own: to a member's token it is another process."""
    toml = group.folder / f"{name}.toml"
    toml.write_text(group.toml.read_text())
    toml.chmod(0o600)
    lib = pkcs11.lib(str(toml))
    with lib.get_token(token_label="payments").open(rw=True, user_pin=PIN) as session:
        yield session
    lib.unload()


@pytest.fixture(scope="module")
def one(shared_group: GroupFixture) -> Iterator[Any]:
    yield from client(shared_group, "one")


@pytest.fixture(scope="module")
def two(shared_group: GroupFixture) -> Iterator[Any]:
    yield from client(shared_group, "two")


def recorded(group: GroupFixture) -> list[OwedRow]:
    """What the journal says that members owe."""
    journal = open_journal(load(group.toml).journal)
    try:
        return list(journal.owed())
    finally:
        journal.close()


def labels(group: GroupFixture) -> list[list[str]]:
    return [plain.labels(member) for member in group.members.values()]


def test_several_processes_at_once(shared_group: GroupFixture) -> None:
    run_client(shared_group, 'session.generate_keypair(KeyType.RSA, 2048, store=True, label="common")\n')
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda name: run_client(shared_group, WORK, name), ("red", "green", "blue")))
    kept = [label for answer in answers for label in json.loads(answer)]
    assert len(kept) == 12
    wanted = sorted(["common", "common", *kept])
    differ = {name for name, found in zip(shared_group.members, labels(shared_group), strict=True) if found != wanted}
    # a member that took longer to be connected anew than a change waits may owe the end of one
    assert differ <= {row.member for row in recorded(shared_group)}
    assert shared_group.admin("sync").returncode == 0
    assert labels(shared_group) == [wanted] * 3
    run_client(shared_group, "for item in list(session.get_objects({Attribute.TOKEN: True})): item.destroy()\n")
    assert labels(shared_group) == [[]] * 3


# SoftHSM takes another process's change for its own if it writes before it looks: the second client's modules do not
# see the first one's objects, until they are initialised anew.


def test_used_by_one_that_wrote_in_between(shared_group: GroupFixture, one: Any, two: Any) -> None:
    key = one.generate_key(KeyType.AES, 256, store=True, label="of one")
    two.generate_key(KeyType.AES, 256, store=True, label="of two")
    expected = key.encrypt(b"data", mechanism_param=IV)
    assert two.get_key(label="of one").encrypt(b"data", mechanism_param=IV) == expected
    assert labels(shared_group) == [["of one", "of two"]] * 3
    for item in list(two.get_objects({Attribute.TOKEN: True})):
        item.destroy()
    assert labels(shared_group) == [[]] * 3


def test_changed_by_one_that_wrote_in_between(shared_group: GroupFixture, one: Any, two: Any) -> None:
    key = one.generate_key(KeyType.AES, 256, store=True, label="of one")
    own = two.generate_key(KeyType.AES, 256, store=True, label="of two")
    try:
        two.get_key(label="of one")[Attribute.LABEL] = "renamed"
    except pkcs11.PKCS11Error as error:
        raise AssertionError("the change was refused") from error
    assert key[Attribute.LABEL] == "renamed"
    assert key.encrypt(b"data", mechanism_param=IV)
    assert labels(shared_group) == [["of two", "renamed"]] * 3
    own.destroy()
    key.destroy()
    assert labels(shared_group) == [[]] * 3


def test_destroyed_by_one_that_wrote_in_between(shared_group: GroupFixture, one: Any, two: Any) -> None:
    key = one.generate_key(KeyType.AES, 256, store=True, label="of one")
    own = two.generate_key(KeyType.AES, 256, store=True, label="of two")
    two.get_key(label="of one").destroy()
    assert labels(shared_group) == [["of two"]] * 3, "gone when the call returns"
    with pytest.raises(pkcs11.PKCS11Error):
        key.encrypt(b"data", mechanism_param=IV)
    own.destroy()
    assert labels(shared_group) == [[]] * 3
