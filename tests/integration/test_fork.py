"""A forked child uses the library, and so does its parent, both as if nothing had happened (DESIGN.md 1.1, 3)."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hagroup as pkcs11
from hagroup import Attribute, KeyType, Mechanism
from hagroup.engine import group as group_engine
from tests.support import plain
from tests.support.faulty import engine
from tests.support.groups import PIN, GroupFixture, make_group, wait_until

PKCS1 = Mechanism.SHA256_RSA_PKCS


@pytest.fixture(scope="module")
def forked_group(fast_folder: Path) -> GroupFixture:
    group = make_group(fast_folder / "forked", members=2)
    inline = group.folder / "inline.toml"
    inline.write_text(group.toml.read_text().replace('"process"', '"none"'))
    inline.chmod(0o600)
    return group


@pytest.fixture(scope="module", params=["process", "none"])
def session(forked_group: GroupFixture, request: pytest.FixtureRequest) -> Iterator[Any]:
    path = forked_group.toml if request.param == "process" else forked_group.folder / "inline.toml"
    lib = pkcs11.lib(str(path))
    with lib.get_token(token_label="payments").open(rw=True, user_pin=PIN) as session:
        yield session
        for item in list(session.get_objects({Attribute.TOKEN: True})):
            item.destroy()
    lib.unload()


def in_child(work: Callable[[], None], timeout: float = 90.0) -> None:
    """Run ``work`` in a forked child; its traceback is the test's failure."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(status)  # nothing of pytest's runs twice
    os.close(writer)
    try:
        deadline = time.monotonic() + timeout

        def ended() -> tuple[int] | None:
            found, status = os.waitpid(pid, os.WNOHANG)
            return (os.waitstatus_to_exitcode(status),) if found else None

        try:
            (status,) = wait_until(ended, "the end of the child", timeout)
        except AssertionError:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            raise
        assert status == 0, os.read(reader, 100_000).decode()
        assert time.monotonic() < deadline + 1
    finally:
        os.close(reader)


def pair(session: Any, label: str) -> tuple[Any, Any]:
    public, private = session.generate_keypair(KeyType.RSA, 2048, store=True, label=label)
    return public, private


def test_child_signs_and_generates_and_the_parent_goes_on(forked_group: GroupFixture, session: Any) -> None:
    """The parent is in the middle of a stream whose parts the member's process sees in shared memory."""
    _, private = pair(session, "parent")
    expected = private.sign(b"data", mechanism=PKCS1)
    secret = session.generate_key(KeyType.AES, 256, store=True, label="streamed")
    parts = [os.urandom(300_000) for _ in range(3)]
    sealed = secret.encrypt(b"".join(parts), mechanism_param=bytes(16))
    stream = secret.encrypt(iter(parts), mechanism_param=bytes(16))
    streamed = [next(stream)]

    def child() -> None:
        for _ in range(3):
            assert private.sign(b"data", mechanism=PKCS1) == expected
        assert b"".join(secret.encrypt(iter(parts), mechanism_param=bytes(16))) == sealed
        assert secret.decrypt(sealed, mechanism_param=bytes(16)) == b"".join(parts)
        key = session.generate_key(KeyType.AES, 256, store=True, label="of the child")
        assert key.decrypt(key.encrypt(b"x", mechanism_param=bytes(16)), mechanism_param=bytes(16)) == b"x"
        session.generate_key(KeyType.AES, 256, label="session object of the child").encrypt(
            b"x", mechanism_param=bytes(16)
        )

    in_child(child)
    assert private.sign(b"data", mechanism=PKCS1) == expected
    assert b"".join([*streamed, *stream]) == sealed
    assert session.get_key(label="of the child").encrypt(b"x", mechanism_param=bytes(16))
    assert not list(session.get_objects({Attribute.LABEL: "session object of the child"}))
    for member in forked_group.members.values():
        assert plain.labels(member).count("of the child") == 1


def test_several_children_and_their_children(session: Any) -> None:
    _, private = pair(session, "grandparent")
    expected = private.sign(b"data", mechanism=PKCS1)

    def work() -> None:
        assert private.sign(b"data", mechanism=PKCS1) == expected

    def child() -> None:
        work()
        in_child(work)
        work()

    for _ in range(2):
        in_child(child)
    work()


def test_session_objects_and_logins_of_the_parent_in_the_child(session: Any) -> None:
    """The child has what a copy of the process has: its session objects and who is logged in."""
    key = session.generate_key(KeyType.AES, 256, label="before the fork")
    expected = key.encrypt(b"data", mechanism_param=bytes(16))

    def child() -> None:
        assert key.encrypt(b"data", mechanism_param=bytes(16)) == expected
        with pytest.raises(pkcs11.UserAlreadyLoggedIn):
            session.token.open(user_pin=PIN)
        with session.token.open(rw=True) as other:
            assert other.get_key(label="before the fork").encrypt(b"data", mechanism_param=bytes(16)) == expected

    in_child(child)
    assert key.encrypt(b"data", mechanism_param=bytes(16)) == expected


def test_fork_while_threads_sign(session: Any) -> None:
    """As in a server with a thread pool: no lock that another thread held at the fork stays held in the child."""
    _, private = pair(session, "threads")
    expected = private.sign(b"data", mechanism=PKCS1)
    stop = threading.Event()
    errors: list[BaseException] = []

    def sign() -> None:
        while not stop.is_set():
            try:
                assert private.sign(b"data", mechanism=PKCS1) == expected
            except BaseException as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=sign) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            in_child(lambda: sign_once(private, expected))
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not errors


def sign_once(private: Any, expected: bytes) -> None:
    assert private.sign(b"data", mechanism=PKCS1) == expected


def test_multiprocessing(session: Any) -> None:
    _, private = pair(session, "pool")
    expected = private.sign(b"data", mechanism=PKCS1)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=sign_once, args=(private, expected)) for _ in range(2)]
    for process in children:
        process.start()
    for process in children:
        process.join(30)
    assert [process.exitcode for process in children] == [0, 0]
    sign_once(private, expected)


def test_a_child_that_ends_takes_no_worker_of_the_parent_along(forked_group: GroupFixture, session: Any) -> None:
    _, private = pair(session, "own")
    group = engine(session)
    wait_until(lambda: not group.journal.owed(), "all members to have it")
    lives = {name: member.life for name, member in group.roster.members.items()}
    before = {name: worker.pid for name, worker in forked_group.workers().items()}
    in_child(lambda: sign_once(private, private.sign(b"data", mechanism=PKCS1)))
    in_child(lambda: session.close())
    after = {name: worker.pid for name, worker in forked_group.workers().items()}
    private.sign(b"data", mechanism=PKCS1)
    # (a member may be connected anew to be looked at again: that is no worker's end)
    kept = [name for name, member in group.roster.members.items() if member.life is lives[name]]
    assert kept
    assert [after.get(name) for name in kept] == [before.get(name) for name in kept]


def test_a_group_whose_journal_is_away_at_the_fork(fast_folder: Path, session: Any) -> None:
    """It says so in the child, serves there again when asked to, and stands in no other group's way."""
    _, private = pair(session, "beside")
    expected = private.sign(b"data", mechanism=PKCS1)
    group = make_group(Path(tempfile.mkdtemp(dir=fast_folder)) / "away", members=1)
    journal, away = group.folder / "journal.db", group.folder / "journal.db.away"
    lib = pkcs11.lib(str(group.toml))
    try:
        with lib.get_token().open(rw=True, user_pin=PIN) as other:
            other.generate_key(KeyType.AES, 256, store=True, label="of the other group")
            journal.rename(away)

            def child() -> None:
                sign_once(private, expected)
                with pytest.raises(pkcs11.JournalUnavailable, match=r"reinitialize\(\)"):
                    other.get_key(label="of the other group")
                away.rename(journal)
                lib.reinitialize()
                with lib.get_token().open(user_pin=PIN) as again:
                    assert again.get_key(label="of the other group").encrypt(b"x", mechanism_param=bytes(16))

            in_child(child)
            assert other.get_key(label="of the other group").encrypt(b"x", mechanism_param=bytes(16))
    finally:
        lib.unload()


def test_whatever_goes_wrong_with_one_group_stands_in_no_others_way(session: Any) -> None:
    """Ctrl-C reaches a child in the middle of taking up its groups."""

    class Broken:
        def renew_after_fork(self) -> None:
            raise KeyboardInterrupt

        def unusable_after_fork(self, why: BaseException) -> None:
            assert isinstance(why, KeyboardInterrupt)

    broken: list[Any] = [Broken() for _ in range(10)]  # which of them come before the others is left open
    for one in broken:
        group_engine._groups.add(one)
    try:
        in_child(lambda: session.generate_key(KeyType.AES, 256, store=True, label="all the same"))
    finally:
        for one in broken:
            group_engine._groups.discard(one)
