"""Which member gets the next call (DESIGN.md 3, "Load"). Pure: loads and preferences in, an index out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar


class Candidate(Protocol):
    """What selection looks at."""

    outstanding: int
    """Calls in progress on this member from this process."""
    standby: bool
    rank: tuple[int, int]
    """(0 near, 1 far; priority): lower first, from ``site`` and ``priority``."""
    last_used: int
    """Grows with each use: the least recent has the lowest."""


C = TypeVar("C", bound="Candidate")


def rank(here: str | None, there: str | None, priority: int) -> tuple[int, int]:
    """A member's rank for a process.

    :param here: the process's ``[group] site``; None: not told, and then every member is as near as any other.
    :param there: the member's ``site``; None: not told.
    """
    return int(None not in (here, there) and here != there), priority


def outstanding(candidate: Candidate) -> float:
    """The load of a member as long as all are about as quick."""
    return candidate.outstanding


def choose(candidates: Sequence[C], last: C | None, load: Callable[[C], float] = outstanding) -> C | None:
    """The member with the fewest outstanding calls, then rank, then least recent; standby only without an active one.

    ``last`` is where the calling thread was: it stays there while that is as good.

    :param load: what counts in place of the outstanding calls.
    """
    best: C | None = None
    for candidate in candidates:
        if best is None or _better(candidate, best, load(candidate), load(best)):
            best = candidate
    if best is None or last is None or best is last:
        return best
    if (
        any(candidate is last for candidate in candidates)
        and last.standby == best.standby
        and load(last) <= load(best)
        and last.rank <= best.rank
    ):
        return last
    return best


def _better(one: Candidate, other: Candidate, load: float, others: float) -> bool:
    if one.standby != other.standby:
        return other.standby
    if load != others:
        return load < others
    if one.rank != other.rank:
        return one.rank < other.rank
    return one.last_used < other.last_used
