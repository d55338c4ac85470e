"""Sessions, login and generations on a module that misbehaves as told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from hagroup.core.calls import Ckr, DeadlinePassed, StaleGeneration
from hagroup.core.ckr import CKR
from hagroup.members.cryptoki import CKF_PROTECTED_AUTHENTICATION_PATH
from hagroup.members.life import Life
from hagroup.members.operation import output
from hagroup.members.sessions import Session


class Token:
    """As much of a module as sessions and login need; numbers of sessions begin again after :meth:`restart`."""

    slot_id = 7
    flags = 0

    def __init__(self) -> None:
        self.cryptoki: Any = self
        self.open: set[int] = set()
        self.closed: list[int] = []
        self.next = 0
        self.user: int | None = None
        self.pins: list[bytes | None] = []
        self.finalized = False

    def restart(self) -> None:
        self.open.clear()
        self.next, self.user = 0, None

    def _must_be_open(self, handle: int, name: str) -> None:
        if handle not in self.open:
            raise Ckr(CKR.SESSION_HANDLE_INVALID, name)

    def C_OpenSession(self, slot: int, flags: int, _: None, __: None, pointer: Any) -> int:  # noqa: N802
        self.next += 1
        self.open.add(self.next)
        pointer._obj.value = self.next
        return 0

    def C_CloseSession(self, handle: int) -> int:  # noqa: N802
        self._must_be_open(handle, "C_CloseSession")
        self.open.discard(handle)
        self.closed.append(handle)
        if not self.open:
            self.user = None
        return 0

    def C_Login(self, handle: int, user: int, pin: bytes | None, length: int) -> int:  # noqa: N802
        self._must_be_open(handle, "C_Login")
        if self.user is not None:
            raise Ckr(CKR.USER_ALREADY_LOGGED_IN, "C_Login")
        self.pins.append(pin)
        self.user = user
        return 0

    def C_Logout(self, handle: int) -> int:  # noqa: N802
        self._must_be_open(handle, "C_Logout")
        if self.user is None:
            raise Ckr(CKR.USER_NOT_LOGGED_IN, "C_Logout")
        self.user = None
        return 0

    def token_info(self) -> Any:
        return self

    def finalize(self) -> None:
        self.finalized = True


class Calls:
    """Actions to run on a session."""

    def __init__(self, token: Token) -> None:
        self.token = token
        self.used: list[int] = []

    def touch(self, session: Session) -> int:
        self.used.append(session.handle)
        self.token._must_be_open(session.handle, "C_Touch")
        return session.handle

    def fail(self, session: Session, rv: int, operation: str | None = None) -> None:
        self.used.append(session.handle)
        session.operation = operation
        raise Ckr(rv, "C_Fail")


@pytest.fixture
def token() -> Token:
    return Token()


@pytest.fixture
def calls(token: Token) -> Calls:
    return Calls(token)


@pytest.fixture
def life(token: Token) -> Life:
    made = Life(token, 1)  # type: ignore[arg-type]
    made.login(1, b"1234", 1.0)
    return made


def rv_of(call: Callable[[], object]) -> int:
    with pytest.raises(Ckr) as caught:
        call()
    return caught.value.rv


class Inside:
    """A call that stays inside the module until it is let go."""

    def __init__(self, life: Life, sid: int = 0) -> None:
        self._entered, self.go = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=life.run, args=(life.generation, sid, self._stay))
        self.thread.start()
        assert self._entered.wait(10)

    def _stay(self, _: Session) -> None:
        self._entered.set()
        assert self.go.wait(10)

    def leave(self) -> None:
        self.go.set()
        self.thread.join(10)


def test_a_session_is_reused(life: Life, calls: Calls) -> None:
    assert len({life.run(1, 0, calls.touch) for _ in range(5)}) == 1


def test_calls_at_the_same_time_have_different_sessions(life: Life, calls: Calls) -> None:
    first = life.run(1, 0, calls.touch)
    inside = Inside(life)
    assert life.run(1, 0, calls.touch) != first
    inside.leave()


def test_operation_active_of_an_earlier_call_never_surfaces(life: Life, calls: Calls, token: Token) -> None:
    dirty = life.run(1, 0, calls.touch)

    def begin(session: Session) -> int:
        if session.handle == dirty:
            raise Ckr(CKR.OPERATION_ACTIVE, "C_SignInit")
        return calls.touch(session)

    assert life.run(1, 0, begin) != dirty
    assert token.closed == [dirty]


def test_a_session_is_closed_when_its_operation_may_be_active(life: Life, calls: Calls, token: Token) -> None:
    used = life.run(1, 0, calls.touch)
    assert rv_of(lambda: life.run(1, 0, calls.fail, CKR.KEY_FUNCTION_NOT_PERMITTED)) == CKR.KEY_FUNCTION_NOT_PERMITTED
    assert token.closed == []
    assert rv_of(lambda: life.run(1, 0, calls.fail, CKR.DATA_LEN_RANGE, "sign")) == CKR.DATA_LEN_RANGE
    assert token.closed == [used]

    def fault(_: Session) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        life.run(1, 0, fault)
    assert len(token.closed) == 2


def test_a_failed_creation_takes_its_ghost_with_it(life: Life, calls: Calls, token: Token) -> None:
    for on_token in (True, False):
        rv_of(lambda on_token=on_token: life.run_creating(1, 0, on_token, calls.fail, CKR.GENERAL_ERROR))  # type: ignore[misc]
    assert token.closed == calls.used
    keeper = life.run_creating(1, 0, False, calls.touch)
    rv_of(lambda: life.run_creating(1, 0, False, calls.fail, CKR.GENERAL_ERROR))
    assert keeper in token.open, "the objects of others went with it"


def test_a_keeper_is_no_working_session(life: Life, calls: Calls) -> None:
    keeper = life.run_creating(1, 0, False, calls.touch)
    rv_of(lambda: life.run(1, 0, calls.fail, CKR.DATA_LEN_RANGE, "sign"))
    assert keeper not in [life.run(1, 0, calls.touch), life.run_creating(1, 0, True, calls.touch)]
    assert life.run_creating(1, 0, False, calls.touch) == keeper


# -- losses


def test_a_lost_session_ends_the_generation(life: Life, calls: Calls, token: Token) -> None:
    inside = Inside(life)  # so that there are two working sessions
    life.run(1, 0, calls.touch)
    inside.leave()
    sid = life.open_named(1, True)
    token.restart()
    assert rv_of(lambda: life.run(1, 0, calls.touch)) == CKR.SESSION_HANDLE_INVALID
    assert life.generation == 2
    with pytest.raises(StaleGeneration):
        life.run(1, 0, calls.touch)
    with pytest.raises(StaleGeneration):
        life.run(1, sid, calls.touch)
    assert rv_of(lambda: life.run(2, 0, calls.touch)) == CKR.SESSION_CLOSED
    life.login(1, b"1234", 1.0)
    assert life.generation == 2
    used = len(calls.used)
    life.run(2, 0, calls.touch)
    assert len(calls.used) == used + 1, "another dead session came first"
    assert rv_of(lambda: life.run(2, sid, calls.touch)) == CKR.SESSION_HANDLE_INVALID
    assert token.closed == [], "a dead session's number may be a living one's"
    assert len(set(token.open)) == len(token.open)


def test_login_after_a_loss_waits_for_those_inside(life: Life, calls: Calls, token: Token) -> None:
    inside = Inside(life)
    token.restart()
    rv_of(lambda: life.run(1, 0, lambda s: calls.fail(s, CKR.DEVICE_REMOVED)))
    with pytest.raises(DeadlinePassed):
        life.login(1, b"1234", 0.01)
    assert token.user is None
    inside.leave()
    life.login(1, b"1234", 1.0)
    assert life.run(2, 0, calls.touch)


def test_only_one_session_was_lost(life: Life, calls: Calls, token: Token) -> None:
    rv_of(lambda: life.run(1, 0, calls.fail, CKR.SESSION_CLOSED))
    assert token.user == 1
    assert rv_of(lambda: life.login(0, b"so pin", 1.0)) == CKR.USER_ALREADY_LOGGED_IN
    life.login(1, b"1234", 1.0)
    assert life.run(2, 0, calls.touch)


def test_losses_of_one_generation_count_once(life: Life, token: Token) -> None:
    held = [Inside(life), Inside(life)]
    for call in held:
        call.leave()
    barrier = threading.Barrier(2)

    def lose(_: Session) -> None:
        barrier.wait(10)
        raise Ckr(CKR.SESSION_HANDLE_INVALID, "C_Sign")

    def run() -> None:
        with pytest.raises(Ckr):
            life.run(1, 0, lose)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert life.generation == 2


# -- logout


def test_logout_refuses_then_waits_then_closes(life: Life, calls: Calls, token: Token) -> None:
    sid = life.open_named(1, True)
    life.run_creating(1, 0, False, calls.touch)
    inside = Inside(life, sid)
    done = threading.Thread(target=life.logout, args=(10.0,))
    done.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            life.run(1, 0, calls.touch)
        except StaleGeneration:
            break
    assert token.user == 1, "logged out under a call"
    assert life.generation == 1
    inside.leave()
    done.join(10)
    assert (token.user, life.generation, token.open) == (None, 2, set())
    assert life.run(2, 0, calls.touch)


def test_logout_gives_up_without_a_change(life: Life, calls: Calls, token: Token) -> None:
    inside = Inside(life)
    with pytest.raises(DeadlinePassed):
        life.logout(0.01)
    assert (token.user, life.generation) == (1, 1)
    life.run(1, 0, calls.touch)
    inside.leave()


def test_logout_is_the_way_out_of_every_state(token: Token, calls: Calls) -> None:
    life = Life(token, 1)  # type: ignore[arg-type]
    life.logout(1.0)
    assert life.generation == 2
    life.login(1, b"1234", 1.0)
    token.restart()
    life.logout(1.0)
    assert life.generation == 3
    assert life.run(3, 0, calls.touch)


# -- streams


def test_a_streams_session_goes_back_only_when_the_stream_ended_well(life: Life, calls: Calls, token: Token) -> None:
    used: list[int] = []
    stream = life.open_stream(1, "digest", lambda s: used.append(s.handle))
    assert life.run(1, 0, calls.touch) != used[0]
    assert life.run_stream(1, stream, calls.touch, last=False) == used[0]
    life.run_stream(1, stream, calls.touch, last=True)
    assert life.run(1, 0, calls.touch) == used[0]
    stream = life.open_stream(1, "digest", lambda s: used.append(s.handle))
    rv_of(lambda: life.run_stream(1, stream, calls.fail, CKR.DATA_INVALID, last=False))
    assert token.closed == [used[1]]
    assert rv_of(lambda: life.run_stream(1, stream, calls.touch, last=True)) == CKR.SESSION_HANDLE_INVALID
    stream = life.open_stream(1, "digest", lambda s: used.append(s.handle))
    life.close_named(stream)
    assert token.closed == [used[1], used[2]]


def test_a_stream_that_does_not_begin_has_no_session(life: Life, calls: Calls, token: Token) -> None:
    assert rv_of(lambda: life.open_stream(1, "sign", lambda s: calls.fail(s, CKR.PIN_INCORRECT, "sign"))) == 0xA0
    assert token.closed == calls.used


# -- the rest


def test_protected_authentication_path(life: Life, token: Token) -> None:
    life.logout(1.0)
    life.login(1, b"", 1.0)
    token.flags = CKF_PROTECTED_AUTHENTICATION_PATH
    life.logout(1.0)
    life.login(1, b"", 1.0)
    assert token.pins == [b"1234", b"", None]


def test_finish(life: Life, token: Token, calls: Calls) -> None:
    inside = Inside(life)
    life.finish(0.01)
    assert not token.finalized, "C_Finalize under a call"
    inside.leave()
    life.finish(1.0)
    assert token.finalized
    with pytest.raises(StaleGeneration):
        life.run(1, 0, calls.touch)


@pytest.mark.parametrize("tells_length", [True, False])
def test_an_output_longer_than_the_buffer(tells_length: bool) -> None:
    result = bytes(range(256)) * 400
    sizes: list[int] = []

    def function(pointer: Any, length: Any) -> int:
        import ctypes

        size = length._obj.value
        sizes.append(size)
        if size < len(result):
            length._obj.value = len(result) if tells_length else 2**64 - 1
            raise Ckr(CKR.BUFFER_TOO_SMALL, "C_Sign")
        ctypes.memmove(pointer, result, len(result))
        length._obj.value = len(result)
        return 0

    assert output(Session(1), function) == result
    assert len(sizes) == 2 if tells_length else len(sizes) < 6
