"""How quickly members take new objects, each compared with the quickest. Pure: times in, a factor out.

Every member is asked to take every new object, so these times compare like with like, whatever is made. Those of single
operations would not: a signature by another key or over more data takes longer on the best of members. Until a member
took its first new object, what tells is the proof of the domain's keys, the same calls on each when it is connected.
"""

from __future__ import annotations

SLOW = 3.0
"""Less than so many times the quickest one's time is no difference: busy machines waver by as much."""
_WEIGHT = 0.3
_SHORTEST = 0.05
"""Seconds; among members that are quicker than this there is no slow one."""
_FRESH = 60.0
"""Seconds after which a time tells nothing any more."""


class Paces:
    """Moving averages by the members' names."""

    def __init__(self) -> None:
        self._times: dict[str, tuple[float, float]] = {}
        self._proofs: dict[str, float] = {}

    def proved(self, name: str, seconds: float) -> None:
        """This member, just connected, proved its keys in so many seconds."""
        self._proofs[name] = seconds

    def told(self, name: str, seconds: float, now: float) -> None:
        """This member took new objects in so many seconds. :param now: boot time."""
        before, when = self._times.get(name, (seconds, now))
        if now - when > _FRESH:
            before = seconds
        self._times[name] = (before + (seconds - before) * _WEIGHT, now)

    def slower(self, name: str, now: float) -> float:
        """How many times the quickest member's time this one takes; 1.0 where it does not matter.

        One of which nothing is known while others are counts as slow: it just came, and will be asked like all others.
        """
        fresh = {one: seconds for one, (seconds, when) in self._times.items() if now - when <= _FRESH}
        if name in fresh:
            return _slower(name, fresh)
        return max(SLOW if fresh else 1.0, _slower(name, self._proofs))


def _slower(name: str, times: dict[str, float]) -> float:
    if name not in times:
        return 1.0
    factor = times[name] / max(_SHORTEST, min(times.values()))
    return factor if factor >= SLOW else 1.0
