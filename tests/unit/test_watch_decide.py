"""What the watchdog tells: each change once, none missed (core/watch.py)."""

from __future__ import annotations

import math
import random
import re
from collections import Counter

import msgspec
import pytest

from hagroup.core.records import Membership, Role
from hagroup.core.watch import (
    Kind,
    MemberTold,
    Noted,
    Seen,
    Sight,
    Told,
    WatchEvent,
    decide,
    detection_bound,
    lease_time,
    luna,
    pause_before,
)

NAMES = ("hsm1", "hsm2", "hsm3")


def seen(name: str, ok: bool = True, **fields: object) -> Seen:
    return msgspec.convert(
        {"name": name, "serial": f"serial-{name}", "ok": ok, "usable": ok, **fields}, type=Seen, strict=False
    )


def sight(*members: Seen, journal: bool = True, noted: tuple[Noted, ...] = (), newest: int = 0) -> Sight:
    return Sight(
        group="payments",
        serial="4711",
        min_replicas=2,
        threshold=2,
        journal=journal,
        members=members or tuple(seen(name) for name in NAMES),
        noted=noted,
        newest=newest,
    )


def run(*sights: Sight, told: Told | None = None) -> tuple[Told, list[WatchEvent]]:
    told = told or Told(noted=0)
    events: list[WatchEvent] = []
    for one in sights:
        told, new = decide(told, one, 0.0)
        events += new
    return told, events


def kinds(events: list[WatchEvent]) -> list[str]:
    return [event.kind.value for event in events]


DOWN = sight(seen("hsm1"), seen("hsm2", False), seen("hsm3"))
UP = sight()


def test_a_quiet_group_tells_nothing() -> None:
    assert run(*[UP] * 100)[1] == []


def test_one_missed_heartbeat_is_not_a_failure() -> None:
    assert run(DOWN, UP, DOWN, UP)[1] == []


def test_failed_and_recovered_each_once() -> None:
    _, events = run(*[DOWN] * 10, *[UP] * 10)
    assert kinds(events) == ["member failed", "group degraded", "member recovered", "group whole"]
    assert len({event.id for event in events}) == len(events)


def test_below_min_replicas_and_all_lost() -> None:
    two = sight(seen("hsm1"), seen("hsm2", False), seen("hsm3", False))
    none = sight(*(seen(name, False) for name in NAMES))
    _, events = run(two, two, none, none, two, UP)
    assert Counter(kinds(events)) == {
        "member failed": 3,
        "group degraded": 1,
        "below min_replicas": 1,
        "all members lost": 1,
        "group serves again": 1,
        "min_replicas reached": 1,
        "member recovered": 3,
        "group whole": 1,
    }


def test_answering_is_not_enough_to_be_back() -> None:
    resyncing = sight(seen("hsm1"), seen("hsm2", True, usable=False), seen("hsm3"))
    _, events = run(DOWN, DOWN, resyncing, resyncing)
    assert "member recovered" not in kinds(events)


def test_a_change_under_way_is_not_out_of_sync() -> None:
    def owing(change: int) -> Sight:
        return sight(seen("hsm1"), seen("hsm2", owed=1, oldest_owed=change), seen("hsm3"))

    assert run(owing(5), owing(6), owing(7), UP)[1] == []
    assert kinds(run(owing(5), owing(5), owing(5), UP, UP)[1]) == ["out of sync", "resync done"]


def test_quarantine_and_pin() -> None:
    held = seen("hsm2", False, membership=Membership.QUARANTINED, pin_refused="file:/pin 1", reason="PIN differs")
    bad = sight(seen("hsm1"), held, seen("hsm3"))
    _, events = run(bad, bad, bad, UP)
    assert kinds(events) == ["PIN refused", "member quarantined", "group degraded", "member released", "group whole"]


def test_without_a_pin_it_says_so_once() -> None:
    blind = sight(seen("hsm1", pin=False))
    assert kinds(run(blind, blind)[1]).count("cannot resync") == 1


def test_alarms_of_the_journal_once() -> None:
    alarm = Noted(number=7, kind="alarm", member="hsm1", text="its token was restored")
    told, events = run(sight(newest=7, noted=(alarm,)), sight(newest=7, noted=(alarm,)))
    assert kinds(events) == ["alarm"]
    assert told.noted == 7
    assert run(sight(newest=7, noted=(alarm,)), told=Told())[1] == []  # the first start looks forward only


def test_journal_away_and_back() -> None:
    away = sight(journal=False)
    assert kinds(run(away, away, UP, UP)[1]) == ["journal unreachable", "journal back"]


def test_attempts_are_numbered_and_then_given_up() -> None:
    def trying(attempts: int, given_up: bool = False) -> Sight:
        return sight(seen("hsm1"), seen("hsm2", False, attempts=attempts, given_up=given_up), seen("hsm3"))

    _, events = run(trying(1), trying(2), trying(4), trying(4, True), trying(4, True), UP)
    assert [e.attempt for e in events if e.kind is Kind.RECOVERY_FAILED] == [1, 2, 3, 4]
    assert kinds(events).count("member given up") == 1
    assert [e.attempt for e in events if e.kind is Kind.MEMBER_RECOVERED] == [5]


@pytest.mark.parametrize("role", [Role.BACKUP])
def test_a_backup_does_not_degrade_the_group(role: Role) -> None:
    away = sight(seen("hsm1"), seen("hsm2"), seen("hsm3", False, role=role))
    back = sight(seen("hsm1"), seen("hsm2"), seen("hsm3", True, usable=False, role=role))
    assert kinds(run(away, away, back)[1]) == ["member failed", "member recovered"]


def test_24_hours_of_random_failures_with_takeovers() -> None:
    """Each event exactly once, none missed; the watchdog dies now and then, and another goes on from the journal."""
    chance = random.Random(5)
    interval = 5
    broken_until = dict.fromkeys(NAMES, -1)
    told, missed = Told(noted=0), dict.fromkeys(NAMES, 0)
    down: set[str] = set()
    expected: Counter[tuple[str, str | None]] = Counter()
    got: Counter[tuple[str, str | None]] = Counter()
    ids: list[str] = []
    levels = (False, False, False)
    for now in range(0, 24 * 3600, interval):
        for name in NAMES:
            if now > broken_until[name] and chance.random() < 0.004:
                broken_until[name] = now + int(chance.expovariate(1 / 60))
        answers = {name: now > broken_until[name] for name in NAMES}
        # what should be told, worked out in another way
        for name, ok in answers.items():
            missed[name] = 0 if ok else missed[name] + 1
            if missed[name] == 2 and name not in down:
                down.add(name)
                expected["member failed", name] += 1
            if ok and name in down:
                down.remove(name)
                expected["member recovered", name] += 1
        after = (len(down) > 0, len(NAMES) - len(down) < 2, len(down) == len(NAMES))
        names = (
            ("group degraded", "group whole"),
            ("below min_replicas", "min_replicas reached"),
            ("all members lost", "group serves again"),
        )
        for was, is_, (begins, ends) in zip(levels, after, names, strict=True):
            if was != is_:
                expected[begins if is_ else ends, None] += 1
        levels = after
        told, events = decide(told, sight(*(seen(name, ok) for name, ok in answers.items())), float(now))
        got.update((event.kind.value, event.member) for event in events)
        ids += [event.id for event in events]
        if chance.random() < 0.01:  # another process: it knows what the journal holds, in JSON
            told = msgspec.json.decode(msgspec.json.encode(told), type=Told)
    assert got == expected
    assert sum(got.values()) > 500
    assert len(set(ids)) == len(ids)


def test_a_retold_event_has_the_same_id() -> None:
    before, _ = run(DOWN)
    _, first = decide(before, DOWN, 1.0)
    _, again = decide(before, DOWN, 2.0)  # crashed before it was written down
    assert [event.id for event in first] == [event.id for event in again]


def test_pauses() -> None:
    pauses = [pause_before(n, retry=-1, retry_interval=10.0, jitter=0.0) for n in range(1, 12)]
    assert pauses[:4] == [0.0, 0.2, 0.4, 0.8]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 10.0
    assert pause_before(10**6, retry=-1, retry_interval=10.0, jitter=1.0) == 7.5
    assert pause_before(3, retry=3, retry_interval=10.0, jitter=0.0) < math.inf
    assert pause_before(4, retry=3, retry_interval=10.0, jitter=0.0) == math.inf
    assert pause_before(1, retry=0, retry_interval=10.0, jitter=0.0) == math.inf


def test_bounds() -> None:
    assert detection_bound(5.0, 2, 1.0) == 11.0
    assert lease_time(5.0, 2, 1.0) == 11.0
    assert lease_time(0.5, 1, 0.1) == 3.0


PATTERNS = (
    r"HA group: (\d+) has dropped member: (\S+)",
    r"HA group: (\d+) recovery attempt #(\d+) failed for member: (\S+)",
    r"HA group: (\d+) recovery attempt #(\d+) succeeded for member: (\S+)",
    r"HA group: (\d+) unable to reach member: (\S+)\. Manual Recover or Auto Recovery will not be able to recover "
    r"this member",
)


def test_luna_lines() -> None:
    away = sight(seen("hsm1"), seen("hsm2", False, attempts=1), seen("hsm3"))
    gone = sight(seen("hsm1"), seen("hsm2", False, attempts=1, given_up=True), seen("hsm3"))
    lines = [line for event in run(away, away, gone, UP)[1] if (line := luna(event)) is not None]
    for pattern in PATTERNS:
        assert sum(re.fullmatch(pattern, line) is not None for line in lines) == 1, (pattern, lines)


def test_what_was_told_survives_json() -> None:
    told, events = run(DOWN, DOWN)
    told = msgspec.structs.replace(told, undelivered=tuple(events))
    assert msgspec.json.decode(msgspec.json.encode(told), type=Told) == told
    assert told.members["hsm1"] == MemberTold()


def test_a_token_nearly_full_is_told_once_and_not_again_for_one_object_more_or_less() -> None:
    def room(share: float | None) -> Sight:
        return sight(seen("hsm1"), seen("hsm2", room=share), seen("hsm3"))

    _, events = run(room(0.5), room(0.09), room(0.11), room(0.09), room(None), room(0.09), room(0.2), room(0.2))
    assert [(event.kind.value, event.member) for event in events] == [
        ("token nearly full", "hsm2"),
        ("token has room again", "hsm2"),
    ]


def test_a_broken_event_log_is_told_once() -> None:
    broken = msgspec.structs.replace(UP, log_broken="event 7 is missing")
    away = msgspec.structs.replace(broken, journal=False, log_broken=None)
    _, events = run(UP, broken, broken, away, broken, UP, UP)
    assert kinds(events) == [
        "event log broken",
        "journal unreachable",
        "journal back",
        "event log whole again",
    ]


def test_a_destroyed_key_that_is_there_again_is_told() -> None:
    back = Noted(number=7, kind="object reappeared", member="hsm1", text="1 object")
    assert kinds(run(sight(newest=7, noted=(back,)))[1]) == ["tombstoned key reappeared"]


def test_a_member_that_is_connected_for_the_first_time_is_not_lost() -> None:
    starting = sight(seen("hsm1"), seen("hsm2", False, starting=True), seen("hsm3"))
    assert run(*[starting] * 10, *[UP] * 2)[1] == []
    assert kinds(run(starting, starting, DOWN, DOWN)[1]) == ["member failed", "group degraded"]
