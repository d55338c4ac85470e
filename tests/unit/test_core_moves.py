"""Which tokens of an older epoch are as a planned move of the journal left them."""

from __future__ import annotations

from hagroup.core.moves import JOURNAL_MOVED, MEMBER_FOLLOWED, is_expected, moved
from hagroup.core.records import Event

MOVE = moved("1-a", "2-b")


def event(kind: str, member: str | None = None, **data: str) -> Event:
    return Event(number=1, time=0.0, kind=kind, member=member, text="", data={**MOVE, **data})


def test_only_the_epoch_that_it_was_moved_from_and_only_once() -> None:
    log = [event(JOURNAL_MOVED)]
    assert is_expected(log, "hsm1", shown=("1-a", 5), epoch="2-b")
    assert not is_expected([], "hsm1", shown=("1-a", 5), epoch="2-b")
    assert not is_expected(log, "hsm1", shown=("0-z", 5), epoch="2-b"), "an epoch before that one"
    assert not is_expected(log, "hsm1", shown=("1-a", 5), epoch="3-c"), "the journal was rebuilt since"
    log.append(event(MEMBER_FOLLOWED, "hsm1"))
    assert not is_expected(log, "hsm1", shown=("1-a", 5), epoch="2-b"), "it was put back"
    assert is_expected(log, "hsm2", shown=("1-a", 5), epoch="2-b")


def test_a_token_that_was_put_back_before_the_move() -> None:
    log = [event(JOURNAL_MOVED, **{"confirmed:hsm1": "7"})]
    assert is_expected(log, "hsm1", shown=("1-a", 7), epoch="2-b")
    assert not is_expected(log, "hsm1", shown=("1-a", 6), epoch="2-b")
