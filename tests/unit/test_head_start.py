"""Which member comes before the others when a program starts, and when these follow."""

from __future__ import annotations

from pathlib import Path

from hagroup.config.model import MemberConfig, PinSource
from hagroup.core.records import Observation
from hagroup.engine.head_start import MOMENT, SECONDS, HeadStart, first
from hagroup.engine.member import Member


def member(name: str, *, pin: PinSource | None = None, rank: tuple[int, int] = (0, 0)) -> Member:
    config = MemberConfig(name=name, module=Path("/none.so"), pin=pin)
    made = Member(config, rank=rank, standby=False)
    made.admitted = True
    return made


def seen(name: str, *, ok: bool) -> Observation:
    return Observation(member=name, observer="other", site=None, ok=ok, kind="call", boot_time=1.0)


SOURCE = PinSource(file=Path("/pin"))


def test_each_as_likely_among_the_near_ones_that_nobody_saw_fail() -> None:
    members = [member("hsm1", pin=SOURCE), member("hsm2", pin=SOURCE), member("hsm3", pin=SOURCE, rank=(1, 0))]
    assert {first(members, {}, [], number) for number in range(6)} == {members[0], members[1]}
    assert {first(members, {}, [seen("hsm1", ok=False)], number) for number in range(6)} == {members[1]}
    members[0].standby, members[1].admitted = True, False
    assert {first(members, {}, [seen("hsm3", ok=True)], number) for number in range(6)} == {members[2]}
    assert first(members[:1], {}, [], 0) is None, "no choice"


def test_the_one_that_an_applications_pin_is_checked_on() -> None:
    members = [member("hsm1"), member("hsm2"), member("hsm3")]
    assert first(members, {"hsm2": 5.0, "hsm3": 4.0}, [], 0) is members[1]


def test_the_others_follow_when_it_serves_and_at_once_when_it_fails() -> None:
    one, *others = [member("hsm1"), member("hsm2"), member("hsm3")]
    for ended, expected in ((False, 10.0 + SECONDS), (True, 10.1 + MOMENT)):
        waits = HeadStart()
        waits.give(one, others, 10.0)
        if ended:
            waits.served(others[0], 10.0)  # it is not that one's head start
            waits.served(one, 10.1)
        assert [other.next_attempt for other in others] == [expected, expected]
    waits.hurry()
    assert [other.next_attempt for other in others] == [0.0, 0.0]
    waits = HeadStart()
    waits.give(one, others, 10.0)
    waits.waiting.discard("hsm2")
    others[0].next_attempt = 99.0  # it had its turn, and failed
    waits.failed(one)
    assert [other.next_attempt for other in others] == [99.0, 0.0]
