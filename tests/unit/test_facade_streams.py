"""Multi-part operations of a session: one at a time, over when they are left, whoever leaves them."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from pkcs11 import (
    ArgumentsBad,
    DataInvalid,
    MechanismInvalid,
    OperationActive,
    OperationNotInitialized,
    SessionHandleInvalid,
    types,
)

from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.facade.streams import Operation, OperationLock

MECH = (1, None)


class Stream:
    def __init__(self, log: list[Any], pin: bytes | None) -> None:
        self.log = log
        self.fail: int | None = None
        log.append(("open", pin))

    def update(self, data: bytes) -> bytes:
        self.log.append(data)
        if data == b"bad":
            raise Ckr(CKR.DATA_INVALID, "C_EncryptUpdate")
        return data.upper()

    def update_key(self, uid: bytes) -> None:
        self.log.append(("key", uid))

    def final(self, signature: bytes = b"") -> bytes:
        self.log.append(("final", signature))
        return b"END"

    def cancel(self) -> None:
        self.log.append("cancel")


class FakeSession:
    """What an operation needs of a session."""

    def __init__(self) -> None:
        self.operation_lock = OperationLock()
        self.operation: Operation | None = None
        self.closed = False
        self.log: list[Any] = []
        self.engine = self

    def stream(self, kind: str, mech: Any, key: bytes | None, *, pin: bytes | None = None) -> Stream:
        if kind == "refused":
            raise Ckr(CKR.MECHANISM_INVALID, "C_SignInit")
        return Stream(self.log, pin)


@pytest.fixture
def session() -> FakeSession:
    return FakeSession()


def crypt(session: Any, chunks: Any = (b"a", b"", b"b")) -> Iterator[bytes]:
    with Operation(session, "encrypt", MECH, b"uid") as operation:
        yield from operation.crypt(chunks)


def is_free(session: FakeSession) -> bool:
    """Whether another operation of this thread may begin."""
    try:
        session.operation_lock.acquire()
    except OperationActive:
        return False
    session.operation_lock.release()
    return session.operation is None


def test_output_for_each_chunk_that_is_not_empty(session: FakeSession) -> None:
    assert list(crypt(session)) == [b"A", b"B", b"END"]
    assert session.log == [("open", None), b"a", b"b", ("final", b"")]
    assert is_free(session)


def test_free_before_the_last_output_is_taken(session: FakeSession) -> None:
    stream = crypt(session)
    assert [next(stream), next(stream), next(stream)] == [b"A", b"B", b"END"]
    assert is_free(session)


def test_second_one_in_the_same_thread(session: FakeSession) -> None:
    first = crypt(session)
    next(first)
    with pytest.raises(OperationActive):
        next(crypt(session))
    assert list(first) == [b"B", b"END"], "the first goes on"


def test_deleting_the_generator_cancels(session: FakeSession) -> None:
    stream = crypt(session)
    next(stream)
    del stream
    gc.collect()
    assert session.log[-1] == "cancel"
    assert is_free(session)


@pytest.mark.parametrize("how", ["close", "exhaust"])
def test_another_thread_may_end_it(session: FakeSession, how: str) -> None:
    stream = crypt(session)
    next(stream)
    other = threading.Thread(target=stream.close if how == "close" else lambda: list(stream))  # type: ignore[attr-defined]
    other.start()
    other.join(10)
    assert is_free(session)


def test_another_thread_waits(session: FakeSession) -> None:
    first = crypt(session)
    next(first)
    began = threading.Event()
    results: list[list[bytes]] = []

    def work() -> None:
        began.set()
        results.append(list(crypt(session, [b"x"])))

    other = threading.Thread(target=work)
    other.start()
    assert began.wait(10)
    assert results == []
    list(first)
    other.join(10)
    assert results == [[b"X", b"END"]]
    assert session.log.index(("final", b"")) < session.log.index(b"x"), "not before the first was over"


def test_an_error_of_the_input_releases(session: FakeSession) -> None:
    def broken() -> Iterator[bytes]:
        yield b"a"
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - the application's own
        list(crypt(session, broken()))
    assert session.log[-1] == "cancel"
    assert is_free(session)


def test_an_error_of_the_member_releases(session: FakeSession) -> None:
    with pytest.raises(DataInvalid):
        list(crypt(session, [b"bad"]))
    assert is_free(session)


def test_a_refused_beginning_releases(session: FakeSession) -> None:
    with pytest.raises(MechanismInvalid):
        Operation(session, "refused", MECH, b"uid").__enter__()  # type: ignore[arg-type]
    assert is_free(session)


def test_it_ends_with_its_session(session: FakeSession) -> None:
    stream = crypt(session)
    next(stream)
    session.closed = True
    with pytest.raises(SessionHandleInvalid):
        next(stream)
    assert session.log[-1] == "cancel"


@pytest.mark.parametrize("chunk", ["text", 5, [b"a"]])
def test_chunks_are_bytes(session: FakeSession, chunk: Any) -> None:
    with pytest.raises(TypeError):
        list(crypt(session, [chunk]))
    assert is_free(session)


def test_digest_takes_keys(session: FakeSession) -> None:
    class OurKey(types.Key):
        uid = b"k"

    with Operation(session, "digest", MECH, None) as operation:  # type: ignore[arg-type]
        operation.ingest([b"a", OurKey(), b""])
        assert operation.final() == b"END"
    assert session.log == [("open", None), b"a", ("key", b"k"), ("final", b"")]
    with (
        pytest.raises(ArgumentsBad),
        Operation(session, "digest", MECH, None) as operation,  # type: ignore[arg-type]
    ):
        operation.ingest([types.Key()])
    assert is_free(session)


def test_context_specific_login_begins_anew_before_the_first_data_only(session: FakeSession) -> None:
    with Operation(session, "sign", MECH, b"uid") as operation:  # type: ignore[arg-type]
        operation.reaffirm(b"1234")
        operation.update(b"a")
        with pytest.raises(Ckr):
            operation.reaffirm(b"1234")
        operation.final()
    assert session.log == [("open", None), "cancel", ("open", b"1234"), b"a", ("final", b"")]
    with pytest.raises(OperationNotInitialized):
        operation.update(b"late")


def test_a_forked_child_does_not_wait_for_a_thread_of_its_parent(session: FakeSession) -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        session.operation_lock.acquire()
        held.set()
        release.wait(30)
        session.operation_lock.release()

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(10)
    child = os.fork()
    if child == 0:
        os._exit(0 if list(crypt(session, [b"x"])) == [b"X", b"END"] else 1)
    _, status = os.waitpid(child, 0)
    release.set()
    holder.join(10)
    assert os.waitstatus_to_exitcode(status) == 0
