"""Multi-part operations as python-pkcs11's generators (DESIGN.md 1.1): the rules of a session around them.

What becomes of them when members fail is in tests/faults/test_streams.py.
"""

from __future__ import annotations

import gc
import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hagroup as pkcs11
from hagroup import KeyType, Mechanism
from tests.support.groups import PIN, GroupFixture, make_group, wait_until

IV = b"0123456789abcdef"
MIB = 1 << 20
CHUNKS = [bytes([number]) * 1000 for number in range(6)]
DATA = b"".join(CHUNKS)
RSA = Mechanism.SHA256_RSA_PKCS


@pytest.fixture(scope="module")
def group(fast_folder: Path) -> GroupFixture:
    return make_group(fast_folder / "streams")


@pytest.fixture(scope="module")
def session(group: GroupFixture) -> Iterator[Any]:
    library = pkcs11.lib(str(group.toml))
    with library.get_token(token_label="payments").open(rw=True, user_pin=PIN) as session:
        library.group.supervisor.settle()
        yield session
    library.unload()


@pytest.fixture(scope="module")
def keys(session: Any) -> dict[str, Any]:
    public, private = session.generate_keypair(KeyType.RSA, 2048, store=True, label="stream")
    return {
        "public": public,
        "private": private,
        "stored": session.generate_key(KeyType.AES, 256, store=True, label="stream"),
        "loose": session.generate_key(KeyType.AES, 256),
    }


def outstanding(session: Any) -> int:
    return sum(member.outstanding for member in session.token.slot._library.group.roster.members.values())


@pytest.mark.parametrize("name", ["stored", "loose"])
def test_same_result_as_in_one_shot(session: Any, keys: dict[str, Any], name: str) -> None:
    key = keys[name]
    encrypted = key.encrypt(DATA, mechanism_param=IV)
    assert b"".join(key.encrypt(iter(CHUNKS), mechanism_param=IV)) == encrypted
    assert b"".join(key.decrypt([encrypted[:100], encrypted[100:]], mechanism_param=IV)) == DATA
    assert outstanding(session) == 0


def test_sign_verify_digest(session: Any, keys: dict[str, Any]) -> None:
    signature = keys["private"].sign(iter(CHUNKS), mechanism=RSA)
    assert signature == keys["private"].sign(DATA, mechanism=RSA)
    assert keys["public"].verify(iter(CHUNKS), signature, mechanism=RSA)
    assert not keys["public"].verify(iter(CHUNKS[1:]), signature, mechanism=RSA)
    assert session.digest(iter(CHUNKS), mechanism=Mechanism.SHA256) == hashlib.sha256(DATA).digest()
    mixed = session.digest((b"before", keys["loose"], b"after"), mechanism=Mechanism.SHA256)
    assert mixed == session.digest((b"bef", b"ore", keys["loose"], b"after"), mechanism=Mechanism.SHA256)
    assert outstanding(session) == 0


def test_killed_between_chunks(group: GroupFixture, session: Any, keys: dict[str, Any]) -> None:
    """The worker of the member that the operation is pinned to, whichever that is."""
    library = session.token.slot._library

    def chunks() -> Iterator[bytes]:
        for number, chunk in enumerate(CHUNKS):
            if number == 3:
                (pinned,) = [member.name for member in library.group.roster.members.values() if member.outstanding]
                group.workers()[pinned].send_signal(signal.SIGKILL)
            yield chunk

    expected = keys["stored"].encrypt(DATA, mechanism_param=IV)
    assert b"".join(keys["stored"].encrypt(chunks(), mechanism_param=IV)) == expected
    assert keys["private"].sign(chunks(), mechanism=RSA) == keys["private"].sign(DATA, mechanism=RSA)
    assert outstanding(session) == 0
    wait_until(lambda: len(library.group.roster.serving()) == 3, "all members back")


def test_a_second_one_in_the_same_thread(session: Any, keys: dict[str, Any]) -> None:
    running = keys["stored"].encrypt(iter(CHUNKS), mechanism_param=IV)
    next(running)
    with pytest.raises(pkcs11.exceptions.OperationActive):
        next(keys["stored"].encrypt(iter(CHUNKS), mechanism_param=IV))
    with pytest.raises(pkcs11.exceptions.OperationActive):
        session.digest(iter(CHUNKS), mechanism=Mechanism.SHA256)
    assert keys["private"].sign(b"one shot", mechanism=RSA), "one-shot operations are not held up"
    list(running)
    assert session.digest(iter(CHUNKS), mechanism=Mechanism.SHA256) == hashlib.sha256(DATA).digest()


def test_another_thread_waits(session: Any, keys: dict[str, Any]) -> None:
    running = keys["stored"].encrypt(iter(CHUNKS), mechanism_param=IV)
    next(running)
    began, result = threading.Event(), []

    def digest() -> None:
        began.set()
        result.append(session.digest(iter(CHUNKS), mechanism=Mechanism.SHA256))

    thread = threading.Thread(target=digest)
    thread.start()
    began.wait()
    thread.join(0.2)
    assert thread.is_alive()
    assert not result
    list(running)
    thread.join(20)
    assert result == [hashlib.sha256(DATA).digest()]


def test_a_dropped_generator_frees_the_session(session: Any, keys: dict[str, Any]) -> None:
    running = keys["stored"].encrypt(iter(CHUNKS), mechanism_param=IV)
    next(running)
    assert outstanding(session) == 1
    del running
    gc.collect()
    assert outstanding(session) == 0
    list(keys["stored"].encrypt(iter(CHUNKS), mechanism_param=IV))
    untouched = keys["stored"].encrypt(iter(CHUNKS), mechanism_param=IV)
    del untouched
    assert outstanding(session) == 0


def test_an_error_in_the_input_frees_the_session(session: Any, keys: dict[str, Any]) -> None:
    def broken() -> Iterator[bytes]:
        yield b"x" * 100
        raise RuntimeError("the program's own")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="the program's own"):
            keys["private"].sign(broken(), mechanism=RSA)
    assert outstanding(session) == 0
    with pytest.raises(pkcs11.PKCS11Error):
        list(keys["stored"].decrypt([b"x" * 7], mechanism_param=IV))
    assert outstanding(session) == 0
    list(keys["stored"].encrypt(iter(CHUNKS), mechanism_param=IV))


def test_no_sessions_are_lost_on_the_members(session: Any, keys: dict[str, Any]) -> None:
    """Many streams, dropped, failed and finished, and every one of them can still begin."""
    for _ in range(150):
        running = keys["stored"].encrypt(iter(CHUNKS), mechanism_param=IV)
        next(running)
        running.close()
    assert outstanding(session) == 0
    assert b"".join(keys["stored"].encrypt(iter(CHUNKS), mechanism_param=IV))


def resident(processes: list[int]) -> float:
    """MiB."""
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in processes]
    return sum(pages) * os.sysconf("SC_PAGESIZE") / (1 << 20)


def test_memory_is_flat(group: GroupFixture, keys: dict[str, Any]) -> None:
    """What is kept for a replay is bounded; past that nothing grows, here or in the members' processes."""
    processes = [os.getpid(), *(worker.pid for worker in group.workers().values())]
    used: list[float] = []

    def parts() -> Iterator[bytes]:
        for number in range(96):
            yield bytes([number]) * MIB
            used.append(resident(processes))

    length = sum(len(out) for out in keys["stored"].encrypt(parts(), mechanism=Mechanism.AES_CBC, mechanism_param=IV))
    assert length == 96 * MIB
    begin, replay = used[0], max(used[:24])
    assert replay < begin + 2 * 16 + 12, "input and output up to replay_limit, and buffers"
    assert max(used[24:]) <= replay + 2
    assert max(used[48:]) <= max(used[24:48]) + 2
