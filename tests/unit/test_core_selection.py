"""Which member gets the next call (DESIGN.md 3, "Load")."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hagroup.core.selection import choose


@dataclass(eq=False)
class Candidate:
    outstanding: int = 0
    standby: bool = False
    rank: tuple[int, int] = (0, 0)
    last_used: int = 0


candidates = st.lists(
    st.builds(
        Candidate,
        outstanding=st.integers(0, 3),
        standby=st.booleans(),
        rank=st.tuples(st.integers(0, 1), st.integers(0, 2)),
        last_used=st.integers(0, 5),
    ),
    max_size=6,
)


def test_nobody() -> None:
    assert choose([], None) is None
    assert choose([], Candidate()) is None


def test_order() -> None:
    free, busy = Candidate(outstanding=0, rank=(1, 5)), Candidate(outstanding=1, rank=(0, 0))
    assert choose([busy, free], None) is free, "fewest outstanding calls first"
    near, far = Candidate(rank=(0, 3), last_used=9), Candidate(rank=(1, 0))
    assert choose([far, near], None) is near, "then the site"
    first, second = Candidate(rank=(0, 1), last_used=9), Candidate(rank=(0, 2))
    assert choose([second, first], None) is first, "then priority"
    recent, long_ago = Candidate(last_used=7), Candidate(last_used=3)
    assert choose([recent, long_ago], None) is long_ago, "then least recent"


def test_a_slow_member_is_left_alone_until_the_wait_for_others_is_longer() -> None:
    slow, quick = Candidate(last_used=1), Candidate(last_used=9)
    factor = {id(slow): 10.0, id(quick): 1.0}

    def load(one: Candidate) -> float:
        return (one.outstanding + 1) * factor[id(one)]

    assert choose([slow, quick], slow, load) is quick, "although it stands idle, and the thread was there"
    quick.outstanding = 8
    assert choose([slow, quick], None, load) is quick
    quick.outstanding = 10
    assert choose([slow, quick], None, load) is slow


def test_a_thread_stays_while_that_is_as_good() -> None:
    here, other = Candidate(last_used=9), Candidate(last_used=1)
    assert choose([other, here], here) is here
    here.outstanding = 1
    assert choose([other, here], here) is other
    assert choose([other], here) is other, "it is no candidate any more"
    here.outstanding, here.rank = 0, (0, 1)
    assert choose([other, here], here) is other, "a nearer one came back"


@given(candidates, st.data())
def test_what_is_chosen(members: list[Candidate], data: st.DataObject) -> None:
    last = data.draw(st.sampled_from([None, *members]))
    chosen = choose(members, last)
    if not members:
        assert chosen is None
        return
    assert chosen is not None
    assert any(chosen is member for member in members)
    if any(not member.standby for member in members):
        assert not chosen.standby, "standby serves only where no active one can"
    eligible = [member for member in members if member.standby == chosen.standby]
    assert chosen.outstanding == min(member.outstanding for member in eligible)
    as_free = [member for member in eligible if member.outstanding == chosen.outstanding]
    assert chosen.rank == min(member.rank for member in as_free)


@given(st.integers(1, 5), st.integers(1, 40))
def test_calls_are_spread_evenly(count: int, calls: int) -> None:
    members = [Candidate() for _ in range(count)]
    for number in range(1, calls + 1):
        chosen = choose(members, None)
        assert chosen is not None
        chosen.outstanding += 1
        chosen.last_used = number
    loads = [member.outstanding for member in members]
    assert max(loads) - min(loads) <= 1


AT_ONCE = 4


class Device:
    """A member of the network model: so many calls at once, the others in the order in which they came."""

    standby = False
    rank = (0, 0)

    def __init__(self) -> None:
        self.outstanding = 0
        self.last_used = 0
        self.free_at = [0.0] * AT_ONCE

    def ends(self, now: float) -> float:
        """When a call that comes now is done; each takes one second."""
        done = max(now, self.free_at[0]) + 1.0
        heapq.heapreplace(self.free_at, done)
        return done


def calls_per_second(threads: int, members: int) -> float:
    """Of threads that call again and again, once all of them are under way."""
    devices = [Device() for _ in range(members)]
    last: dict[int, Device] = {}
    ends: list[tuple[float, int]] = [(thread / threads, thread) for thread in range(threads)]
    begin, end = 20.0, 60.0
    done = uses = 0
    while True:
        now, thread = heapq.heappop(ends)
        if now >= end:
            return done / (end - begin)
        if thread in last:
            last[thread].outstanding -= 1
            done += now >= begin
        device = choose(devices, last.get(thread))
        assert device is not None
        uses += 1
        device.outstanding, device.last_used, last[thread] = device.outstanding + 1, uses, device
        heapq.heappush(ends, (device.ends(now), thread))


@pytest.mark.parametrize("members", range(1, 9))
def test_nothing_of_what_the_members_can_do_is_lost(members: int) -> None:
    for threads in sorted({members, members + 1, 2 * members, 4 * members, 4 * members + 1, 32, 64, 100}):
        allowed = min(threads, members * AT_ONCE)
        assert calls_per_second(threads, members) >= 0.99 * allowed, (threads, members)
