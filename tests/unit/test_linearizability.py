"""The checker of histories finds what cannot have happened, and nothing else."""

from __future__ import annotations

import pytest

from tests.support.linearizability import Kind, Observed, Operation, linearizable

CREATE, SET, DESTROY, LABEL, THERE, NOT_THERE = Kind


def op(kind: Kind, called: int, returned: int | None, label: bytes | None = None) -> Operation:
    return Operation(kind, called, returned, label)


CREATED = op(CREATE, 1, 2, b"a")
RIGHT = {
    "nothing": [],
    "one after the other": [CREATED, op(SET, 3, 4, b"b"), op(LABEL, 5, 6, b"b"), op(DESTROY, 7, 8)],
    "seen before its create returned": [op(CREATE, 1, 9, b"a"), op(THERE, 2, 3)],
    "two changes at once, either may be the last": [
        CREATED,
        op(SET, 3, 6, b"b"),
        op(SET, 4, 7, b"c"),
        op(LABEL, 8, 9, b"b"),
    ],
    "a change of unknown outcome that comes late": [
        CREATED,
        op(SET, 3, None, b"b"),
        op(LABEL, 4, 5, b"a"),
        op(LABEL, 6, 7, b"b"),
    ],
    "a change of unknown outcome that never comes": [CREATED, op(SET, 3, None, b"b"), op(LABEL, 4, 5, b"a")],
    "a destroy of unknown outcome": [CREATED, op(DESTROY, 3, None), op(THERE, 4, 5), op(NOT_THERE, 6, 7)],
    "not there before it was made": [op(NOT_THERE, 1, 2), op(CREATE, 3, 4, b"a")],
    "a create of unknown outcome, never seen": [op(CREATE, 1, None, b"a"), op(NOT_THERE, 2, 3)],
}
WRONG = {
    "lost": [CREATED, op(NOT_THERE, 3, 4)],
    "back after it was destroyed": [CREATED, op(DESTROY, 3, 4), op(THERE, 5, 6)],
    "back after somebody saw that it is gone": [CREATED, op(DESTROY, 3, None), op(NOT_THERE, 4, 5), op(THERE, 6, 7)],
    "an old label": [CREATED, op(SET, 3, 4, b"b"), op(LABEL, 5, 6, b"a")],
    "a change that was seen and went away": [
        CREATED,
        op(SET, 3, None, b"b"),
        op(LABEL, 4, 5, b"b"),
        op(LABEL, 6, 7, b"a"),
    ],
    "two changes at once, each the last for somebody": [
        CREATED,
        op(SET, 3, 6, b"b"),
        op(SET, 4, 7, b"c"),
        op(LABEL, 8, 9, b"b"),
        op(LABEL, 10, 11, b"c"),
    ],
    "destroyed twice": [CREATED, op(DESTROY, 3, 5), op(DESTROY, 4, 6)],
    "changed after it was destroyed": [CREATED, op(DESTROY, 3, 4), op(SET, 5, 6, b"b")],
    "read before it was made": [op(LABEL, 1, 2, b"a"), op(CREATE, 3, 4, b"a")],
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_can_have_happened(name: str) -> None:
    assert linearizable(RIGHT[name])


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_have_happened(name: str) -> None:
    assert not linearizable(WRONG[name])


def test_many_unknown_outcomes_are_quick() -> None:
    operations = [CREATED, *(op(SET, 3 + n, None, b"%d" % n) for n in range(12)), op(LABEL, 100, 101, b"12")]
    assert not linearizable(operations)


def test_a_search_says_something_of_every_object() -> None:
    seen = Observed()
    made = seen.now()
    seen.done(b"one", CREATE, made, b"a")
    seen.searched(seen.now(), [b"one"])
    assert seen.unexplained() is None
    seen.searched(seen.now(), [])
    assert (seen.unexplained() or "").startswith(f"no order explains what was told of {b'one'.hex()}")
    seen = Observed()
    seen.searched(seen.now(), [b"two"])
    assert seen.unexplained() is not None  # nobody made it
