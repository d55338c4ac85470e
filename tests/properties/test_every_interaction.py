"""Each interaction of each kind of change, one after the other (issue 3): the client is killed there, the journal does
what it was asked for and gives no answer, or a member refuses, loses, hangs or executes late what it was asked for.

Over simulated members, so that all of them can be had in seconds. What must hold then is what must hold in any history.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hagroup.core.attributes import CKA, CKO
from tests.support.history import FATES, History, Step, Thing, Unknown
from tests.support.linearizability import Kind
from tests.support.simulated import CKM_AES_CMAC
from tests.support.simulation import Client, Simulation

Arm = Callable[[Simulation, Client], Callable[[], bool]]
"""Sets a trap, and gives what tells whether it was sprung."""

TICK: Step = ("tick", 0, 0, 0)
KEY: Step = ("create", 0, 0, 0)
PAIR: Step = ("create", 0, 3, 0)
LATER: Step = ("time", 4, 0, 0)
RENAME: Step = ("set_label", 0, 0, 0)
DESTROY: Step = ("destroy", 0, 1, 0)
AWAY: list[Step] = [("off", 1, 0, 0), ("sign", 0, 0, 0), TICK]
BACK: list[Step] = [("back", 1, 0, 0), LATER]

BEFORE: dict[str, list[Step]] = {
    "resync": [KEY, *AWAY, KEY, RENAME, DESTROY, *BACK],
    "an emptied token": [*AWAY, ("empty", 1, 0, 0), *BACK],
    "a restored token": [("snapshot", 1, 0, 0), RENAME, KEY, DESTROY, *AWAY, ("restore", 1, 0, 0), *BACK],
}
CHANGES: dict[str, Sequence[Step]] = {
    "generate": [KEY],
    "create data": [("create", 0, 2, 0)],
    "generate a pair": [PAIR],
    "copy": [],
    "set": [RENAME],
    "destroy": [("destroy", 0, 0, 0)],
    "resync": [TICK, TICK, TICK],
    "an emptied token": [TICK, TICK, TICK],
    "a restored token": [TICK, TICK, TICK],
}


def copy(history: History) -> None:
    history.number += 1
    label, called = b"%d" % history.number, history.observed.now()
    source = history.things[0].uid
    outcome, uid = history.call(0, lambda one: one.ready().copy(source, [(int(CKA.LABEL), label)]))
    if outcome == "done":
        history.observed.done(uid, Kind.CREATE, called, label)
        history.things.append(Thing(uid, history.number, {label}, CKO.SECRET_KEY, mechanism=CKM_AES_CMAC))
    elif outcome != "refused":
        history.unknown.append(Unknown(history.number, label, 1, called))
    history.check()


def play(change: str, arm: Arm) -> bool:
    """One history. False: the trap was not sprung."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        simulation = Simulation(Path(folder), 3)
        with simulation.running():
            history = History(simulation, [None, None])
            for step in [KEY, PAIR, *BEFORE.get(change, [])]:
                history.run(step)
            client = history.client(0)
            assert client is not None
            sprung = arm(simulation, client)
            for step in CHANGES[change]:
                history.run(step)
            if change == "copy":
                copy(history)
            found = sprung()
            client.kill_in = client.journal_lost_in = None
            simulation.faults.clear()
            history.finish()
            return found


def all_of(change: str, trap: Callable[[int], Arm]) -> int:
    """How many there are."""
    for number in itertools.count():
        try:
            if not play(change, trap(number)):
                return number
        except Exception as error:
            error.add_note(f"{change}, at interaction {number}")
            raise
    raise AssertionError


@pytest.mark.parametrize("change", CHANGES)
def test_killed(change: str) -> None:
    def trap(number: int) -> Arm:
        def arm(_: Simulation, client: Client) -> Callable[[], bool]:
            client.kill_in = number
            return lambda: client.dead

        return arm

    count = all_of(change, trap)
    print(f"{change}: killed at each of {count} interactions")
    assert count > 10


@pytest.mark.parametrize("change", CHANGES)
def test_the_journal_gives_no_answer(change: str) -> None:
    def trap(number: int) -> Arm:
        def arm(_: Simulation, client: Client) -> Callable[[], bool]:
            client.journal_lost_in = number
            return lambda: client.journal_lost_in is None

        return arm

    count = all_of(change, trap)
    print(f"{change}: no answer to each of {count} transactions")
    assert count > 3


@pytest.mark.parametrize("change", CHANGES)
def test_a_member_fails(change: str) -> None:
    """Each way, at each call that changes its token."""
    total = 0
    for fate in FATES:

        def trap(number: int, fate: object = fate) -> Arm:
            def arm(simulation: Simulation, _: Client) -> Callable[[], bool]:
                simulation.faults["hsm2"] = waiting = [(number, fate, True)]  # type: ignore[list-item]
                return lambda: not waiting

            return arm

        total += all_of(change, trap)
    print(f"{change}: {total} failures of a member, {len(FATES)} kinds")
    assert total >= len(FATES)
