"""The queues of background work, one for each member."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from hagroup.engine.lanes import WIDTH, Lanes


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=WIDTH + 4) as pool:
        yield pool


def test_a_member_that_stands_still_leaves_threads_to_the_others(pool: ThreadPoolExecutor) -> None:
    lanes, standing = Lanes(pool.submit), threading.Event()
    try:
        slow = [lanes.run("slow", lambda: standing.wait(60.0)) for _ in range(3 * WIDTH)]
        quick = [lanes.run("quick", lambda number=number: number) for number in range(3 * WIDTH)]
        assert [future.result(60.0) for future in quick] == list(range(3 * WIDTH))
        assert not any(future.done() for future in slow)
    finally:
        standing.set()
    assert all(future.result(60.0) for future in slow), "all of them had their turn"
    assert lanes.run("slow", lambda: "again").result(60.0) == "again"


def test_an_error_is_its_own_tasks_and_ends_nothing(pool: ThreadPoolExecutor) -> None:
    def fails() -> None:
        raise ValueError

    lanes = Lanes(pool.submit)
    futures = [lanes.run("hsm1", fails) for _ in range(3 * WIDTH)]
    assert all(isinstance(future.exception(60.0), ValueError) for future in futures)
    assert lanes.run("hsm1", lambda: "again").result(60.0) == "again"
