"""Whether what clients saw of one object can be explained by its changes happening one after the other.

The question of Wing and Gong: is there an order of all operations, each at one instant between its call and its return,
in which every answer is right? An operation whose outcome nobody learnt may have happened at any time after its call,
or never. A depth-first search; what was tried (which operations are over, in which state) is not tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

State = bytes | None
"""The object's label while it lives; else one of the two below."""
UNBORN: State = None
DESTROYED: State = b"\0destroyed"


class Kind(StrEnum):
    """What an operation did, or was told."""

    CREATE = "create"
    SET = "set"
    DESTROY = "destroy"
    LABEL = "has the label"
    THERE = "is there"
    NOT_THERE = "is not there"


@dataclass(frozen=True)
class Operation:
    """One operation on the object. Instants are whole numbers; they only say what came before what."""

    kind: Kind
    called: int
    returned: int | None
    """None: its outcome was never learnt. It may have happened at any time after ``called``, or never."""
    label: bytes | None = None
    """The new one (create, set), or what was read."""

    def __str__(self) -> str:
        label = "" if self.label is None else f" {self.label!r}"
        return f"{self.called}..{'?' if self.returned is None else self.returned} {self.kind}{label}"


def _live(state: State) -> bool:
    return state is not UNBORN and state != DESTROYED


_APPLY: dict[Kind, Callable[[State, Operation], tuple[bool, State]]] = {
    Kind.CREATE: lambda state, op: (state is UNBORN, op.label),
    Kind.SET: lambda state, op: (_live(state), op.label),
    Kind.DESTROY: lambda state, op: (_live(state), DESTROYED),
    Kind.LABEL: lambda state, op: (state == op.label, state),
    Kind.THERE: lambda state, op: (_live(state), state),
    Kind.NOT_THERE: lambda state, op: (not _live(state), state),
}
"""(whether it can have happened in this state, the state after it)."""


def linearizable(operations: Sequence[Operation]) -> bool:
    """Whether some order explains all of them."""
    ordered = sorted(operations, key=lambda op: op.called)
    must = sum(1 << place for place, op in enumerate(ordered) if op.returned is not None)
    tried: set[tuple[int, State]] = set()
    waiting: list[tuple[int, State]] = [(0, UNBORN)]
    while waiting:
        over, state = waiting.pop()
        if over & must == must:
            return True
        if (over, state) in tried:
            continue
        tried.add((over, state))
        for place in _next(ordered, over):
            possible, after = _APPLY[ordered[place].kind](state, ordered[place])
            if possible:
                waiting.append((over | 1 << place, after))
    return False


def _next(ordered: Sequence[Operation], over: int) -> Iterable[int]:
    """Operations that may be the next one: called before every other one that is left had returned."""
    left = [place for place in range(len(ordered)) if not over >> place & 1]
    first_return = min((op.returned for op in (ordered[i] for i in left) if op.returned is not None), default=None)
    return [place for place in left if first_return is None or ordered[place].called <= first_return]


class Observed:
    """What clients were told in one history, object by object."""

    def __init__(self) -> None:
        self._instant = 0
        self._operations: dict[bytes, list[Operation]] = {}
        self._searches: list[tuple[int, int, frozenset[bytes]]] = []

    def now(self) -> int:
        """An instant after all earlier ones."""
        self._instant += 1
        return self._instant

    def done(self, uid: bytes, kind: Kind, called: int, label: bytes | None = None) -> None:
        self._operations.setdefault(uid, []).append(Operation(kind, called, self.now(), label))

    def unknown(self, uid: bytes, kind: Kind, called: int, label: bytes | None = None) -> None:
        self._operations.setdefault(uid, []).append(Operation(kind, called, None, label))

    def searched(self, called: int, found: Iterable[bytes]) -> None:
        """A search that every live object matches."""
        self._searches.append((called, self.now(), frozenset(found)))

    def of(self, uid: bytes) -> list[Operation]:
        found = [
            Operation(Kind.THERE if uid in shown else Kind.NOT_THERE, called, returned)
            for called, returned, shown in self._searches
        ]
        return sorted([*self._operations.get(uid, []), *found], key=lambda op: op.called)

    def unexplained(self) -> str | None:
        """The first object of which no order explains what was told; None: all is explained."""
        uids = set(self._operations).union(*(shown for _, _, shown in self._searches))
        for uid in sorted(uids):
            operations = self.of(uid)
            if not linearizable(operations):
                return f"no order explains what was told of {uid.hex()}:\n  " + "\n  ".join(map(str, operations))
        return None
