"""A handle is looked for once, by one thread; what is forgotten meanwhile is not remembered."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from hagroup.core.calls import DeadlinePassed, MemberGone
from hagroup.engine.handles import Handles

UID = b"uid"
LONG = 60.0


class Search:
    """Looks for an object until it is told what it found."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self._found: Future[int] = Future()
        self.times = 0

    def __call__(self) -> int:
        self.times += 1
        self.begun.set()
        return self._found.result(LONG)

    def finds(self, handle: int) -> None:
        self._found.set_result(handle)

    def fails(self, error: BaseException) -> None:
        self._found.set_exception(error)


def never() -> int:
    raise AssertionError("looked for a second time")


def asked_meanwhile(
    handles: Handles, search: Search, asks: Callable[[], int], tell: Callable[[], None]
) -> list[object]:
    """What the searching thread and one that asks during the search get."""
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(handles.find, UID, search, timeout=LONG)
        assert search.begun.wait(LONG)
        second = pool.submit(handles.find, UID, asks, timeout=LONG)
        second_waits = threading.Event()
        while not second_waits.wait(0.01):  # until it waits, or is done already where it need not
            waiting = handles._searches[UID].done._cond._waiters  # type: ignore[attr-defined]
            if waiting or second.done():
                second_waits.set()
        tell()
        return [one.exception(LONG) or one.result(LONG) for one in (first, second)]


def test_all_who_ask_meanwhile_get_what_one_finds() -> None:
    handles, search = Handles(), Search()
    assert asked_meanwhile(handles, search, never, lambda: search.finds(7)) == [7, 7]
    assert handles.find(UID, never, timeout=LONG) == 7
    assert search.times == 1


def test_all_who_ask_meanwhile_get_its_error_and_the_next_one_looks_again() -> None:
    handles, search = Handles(), Search()
    gone = MemberGone("gone", sent=True)
    assert asked_meanwhile(handles, search, never, lambda: search.fails(gone)) == [gone, gone]
    assert handles.find(UID, lambda: 8, timeout=LONG) == 8


def test_after_an_interrupted_search_each_looks_for_itself() -> None:
    handles, search = Handles(), Search()
    interrupt = KeyboardInterrupt()
    assert asked_meanwhile(handles, search, lambda: 9, lambda: search.fails(interrupt)) == [interrupt, 9]


def test_nobody_waits_beyond_the_deadline() -> None:
    handles, search = Handles(), Search()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(handles.find, UID, search, timeout=LONG)
        assert search.begun.wait(LONG)
        with pytest.raises(DeadlinePassed):
            handles.find(UID, never, timeout=0.01)
        search.finds(7)
        assert first.result(LONG) == 7


@pytest.mark.parametrize("forget", [lambda handles: handles.pop(UID, None), lambda handles: handles.clear()])
def test_what_is_forgotten_meanwhile_is_not_remembered(forget: Callable[[Handles], object]) -> None:
    """It may have been made anew on the member: the handle that is just being found may be another key's soon."""
    handles, search = Handles(), Search()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(handles.find, UID, search, timeout=LONG)
        assert search.begun.wait(LONG)
        forget(handles)
        assert handles.find(UID, lambda: 8, timeout=LONG) == 8  # does not wait for the search of before
        search.finds(7)
        assert first.result(LONG) == 7
    assert handles[UID] == 8


def test_a_call_that_interrupts_the_search_of_its_own_thread_does_not_wait_for_it() -> None:
    """A signal handler or a finalizer that uses the same key."""
    handles = Handles()
    assert handles.find(UID, lambda: handles.find(UID, lambda: 7, timeout=LONG), timeout=LONG) == 7
    assert handles[UID] == 7
