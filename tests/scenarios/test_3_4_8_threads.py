"""T 3.4.8: many threads on one group sign, make keys, change and destroy them; every result is right."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import hagroup as pkcs11
from hagroup import Attribute, KeyType, Mechanism
from tests.support import plain
from tests.support.groups import PIN, GroupFixture, make_group, wait_until

PKCS1 = Mechanism.SHA256_RSA_PKCS
IV = bytes(16)


@pytest.fixture(scope="module")
def busy_group(fast_folder: Path) -> GroupFixture:
    return make_group(fast_folder / "threads", "--min-replicas", "3")


@pytest.fixture(scope="module", params=["process", "none"])
def session(busy_group: GroupFixture, request: pytest.FixtureRequest) -> Iterator[Any]:
    toml = busy_group.folder / f"{request.param}.toml"
    toml.write_text(busy_group.toml.read_text().replace('"process"', f'"{request.param}"'))
    toml.chmod(0o600)
    lib = pkcs11.lib(str(toml))
    with lib.get_token(token_label="payments").open(rw=True, user_pin=PIN) as session:
        yield session
        for item in list(session.get_objects({Attribute.TOKEN: True})):
            item.destroy()
    lib.unload()


@pytest.mark.parametrize("threads", [1, 20, 100])
def test_sign(session: Any, threads: int) -> None:
    """One key, one session, any number of threads."""
    public, private = session.generate_keypair(KeyType.RSA, 2048, store=True, label=f"{threads} threads")

    def work(number: int) -> bool:
        data = b"data of thread %d" % number
        return all(public.verify(data, private.sign(data, mechanism=PKCS1), mechanism=PKCS1) for _ in range(3))

    with ThreadPoolExecutor(threads) as pool:
        assert all(pool.map(work, range(threads)))


def wait_settled(session: Any) -> None:
    journal = session.engine._group.journal
    wait_until(lambda: not journal.owed() and not journal.intents(), "the end of what members owe")


def test_make_change_and_destroy(busy_group: GroupFixture, session: Any) -> None:
    """Each thread with objects of its own, all of them on the same tokens."""

    def work(number: int) -> str:
        key = session.generate_key(KeyType.AES, 256, store=True, label=f"key {number}")
        other = session.generate_key(KeyType.AES, 128, store=True, label=f"other {number}")
        encrypted = key.encrypt(b"data", mechanism_param=IV)
        key[Attribute.LABEL] = f"kept {number}"
        other.destroy()
        (found,) = session.get_objects({Attribute.LABEL: f"kept {number}"})
        assert found.decrypt(encrypted, mechanism_param=IV) == b"data"
        return f"kept {number}"

    wait_settled(session)
    before = plain.labels(busy_group.members["hsm1"])
    with ThreadPoolExecutor(12) as pool:
        kept = list(pool.map(work, range(24)))
    wait_settled(session)  # a new object is live as soon as ``min_replicas`` have it
    for member in busy_group.members.values():
        assert plain.labels(member) == sorted(before + kept)


def test_threads_with_sessions_of_their_own(session: Any) -> None:
    key = session.generate_key(KeyType.AES, 256, store=True, label="shared")
    expected = key.encrypt(b"data", mechanism_param=IV)

    def work(_: int) -> bool:
        with session.token.open(rw=True) as own:
            mine = own.generate_key(KeyType.AES, 256)
            assert mine.decrypt(mine.encrypt(b"x", mechanism_param=IV), mechanism_param=IV) == b"x"
            result: bool = own.get_key(label="shared").encrypt(b"data", mechanism_param=IV) == expected
            return result

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(work, range(24)))


def test_one_object_changed_by_all(busy_group: GroupFixture, session: Any) -> None:
    """The last change is the same one on every member, once nothing is owed (who is behind does not serve)."""
    key = session.generate_key(KeyType.AES, 256, store=True, label="contested")

    def work(number: int) -> None:
        key[Attribute.LABEL] = f"contested {number}"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    label = key[Attribute.LABEL]
    wait_settled(session)
    for member in busy_group.members.values():
        assert [found for found in plain.labels(member) if found.startswith("contested")] == [label]
