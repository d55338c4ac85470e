"""Each interaction of each kind of change, one after the other (issue 3): the client is killed there, the journal does
what it was asked for and gives no answer, or a member refuses, loses, hangs or executes late what it was asked for.

Over simulated members, so that all of them can be had in seconds. What must hold then is what must hold in any history.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hagroup.core.attributes import CKA, CKK, CKM, CKO, pack_bool, pack_ulong
from hagroup.core.calls import Template
from hagroup.engine.session import VirtualSession
from tests.support.history import FATES, History, Step, Thing, Unknown
from tests.support.linearizability import Kind
from tests.support.simulated import CKM_AES_CMAC, CKM_AES_ECB_ENCRYPT_DATA, Fate, seal
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
    "unwrap": [],
    "derive": [],
    "set": [RENAME],
    "destroy": [("destroy", 0, 0, 0)],
    "resync": [TICK, TICK, TICK],
    "an emptied token": [TICK, TICK, TICK],
    "a restored token": [TICK, TICK, TICK],
}


Make = Callable[[VirtualSession, Template], bytes]


def made(history: History, make: Make) -> None:
    """A key that comes of another one."""
    history.number += 1
    label, called = b"%d" % history.number, history.observed.now()
    outcome, uid = history.call(0, lambda one: make(one.ready(), [(int(CKA.LABEL), label)]))
    if outcome == "done":
        history.observed.done(uid, Kind.CREATE, called, label)
        history.things.append(Thing(uid, history.number, {label}, CKO.SECRET_KEY, mechanism=CKM_AES_CMAC))
    elif outcome != "refused":
        history.unknown.append(Unknown(history.number, label, 1, called))
    history.check()


def copied(history: History) -> Make:
    return lambda session, name: session.copy(history.things[0].uid, name)


def unwrapped(history: History) -> Make:
    secret = history.things[0].secret
    assert secret is not None
    mechanism, wrapped = (int(CKM.AES_KEY_WRAP_PAD), None), seal(secret, b"k" * 32, b"wrap")
    return lambda session, name: session.unwrap(
        mechanism, history.things[0].uid, wrapped, [*_SECRET, *name], assign_id=True
    )


def derived(history: History) -> Make:
    client = history.client(0)
    assert client is not None
    base: Template = [(int(CKA.DERIVE), pack_bool(True)), (int(CKA.VALUE_LEN), pack_ulong(32))]
    made(history, lambda session, name: session.generate(_AES, [*_SECRET, *name, *base], assign_id=True))
    uid, mechanism = history.things[-1].uid, (CKM_AES_ECB_ENCRYPT_DATA, b"x" * 16)
    return lambda session, name: session.derive(mechanism, uid, [*_SECRET, *name, base[1]], assign_id=True)


_AES = (int(CKM.AES_KEY_GEN), None)
_SECRET: Template = [
    (int(CKA.CLASS), pack_ulong(CKO.SECRET_KEY)),
    (int(CKA.KEY_TYPE), pack_ulong(CKK.AES)),
    (int(CKA.TOKEN), pack_bool(True)),
]
FROM_ANOTHER: dict[str, Callable[[History], Make]] = {"copy": copied, "unwrap": unwrapped, "derive": derived}


def play(change: str, arm: Arm, then: Arm | None = None) -> bool:
    """One history. False: the trap was not sprung.

    :param then: sets another trap for whoever comes next. False: that one was not.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        simulation = Simulation(Path(folder), 3)
        with simulation.running():
            history = History(simulation, [None, None])
            for step in [KEY, PAIR, *BEFORE.get(change, [])]:
                history.run(step)
            make = FROM_ANOTHER[change](history) if change in FROM_ANOTHER else None
            client = history.client(0)
            assert client is not None
            sprung = arm(simulation, client)
            for step in CHANGES[change]:
                history.run(step)
            if make is not None:
                made(history, make)
            found = sprung()
            if found and then is not None:
                sprung = then(simulation, client)
                for step in [TICK, LATER, TICK, TICK]:
                    history.run(step)
                found = sprung()
                simulation.kill_next_in = None
            client.kill_in = client.journal_lost_in = None
            simulation.faults.clear()
            history.finish()
            return found


def killed(number: int) -> Arm:
    """After so many interactions."""

    def arm(_: Simulation, client: Client) -> Callable[[], bool]:
        client.kill_in = 2 * number
        return lambda: client.dead

    return arm


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
    """After each interaction, and before the first one. (Before one is after the one before it: nothing else runs.)"""

    count = all_of(change, killed)
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
    """Each way, at each call that changes its token. (Without HAGROUP_CRASH_ALL: three ways.)"""
    total = 0
    for fate in FATES if os.environ.get("HAGROUP_CRASH_ALL") else (Fate.LOST_AFTER, Fate.TORN, Fate.LATE):

        def trap(number: int, fate: object = fate) -> Arm:
            def arm(simulation: Simulation, _: Client) -> Callable[[], bool]:
                simulation.faults["hsm2"] = waiting = [(number, fate, True)]  # type: ignore[list-item]
                return lambda: not waiting

            return arm

        total += all_of(change, trap)
    print(f"{change}: {total} failures of a member")
    assert total >= 3


@pytest.mark.parametrize("change", CHANGES if os.environ.get("HAGROUP_CRASH_ALL") else ["set", "destroy"])
def test_killed_and_the_next_one_too(change: str) -> None:
    """Who comes after the one that was killed is killed while it puts things right, at each of its interactions."""

    def next_killed(number: int) -> Arm:
        def arm(simulation: Simulation, _: Client) -> Callable[[], bool]:
            simulation.kill_next_in = 2 * number
            return lambda: sum(one.dead and one.kill_in == -1 for one in simulation.owners.values()) == 2

        return arm

    _two(change, killed, next_killed, "the next one")


@pytest.mark.parametrize("change", CHANGES if os.environ.get("HAGROUP_CRASH_ALL") else ["set", "destroy"])
def test_a_member_executes_late_and_the_client_is_killed(change: str) -> None:
    def late(number: int) -> Arm:
        def arm(simulation: Simulation, _: Client) -> Callable[[], bool]:
            simulation.faults["hsm2"] = waiting = [(number, Fate.LATE, True)]
            return lambda: not waiting

        return arm

    _two(change, late, killed, "the client")


def _two(change: str, first: Callable[[int], Arm], second: Callable[[int], Arm], what: str) -> None:
    """The second one at each of its places, for each place of the first one (without HAGROUP_CRASH_ALL: each 50th)."""
    total, place = 0, 0
    while play(change, first(place)):
        for number in itertools.count():
            try:
                if not play(change, first(place), second(number)):
                    break
            except Exception as error:
                error.add_note(f"{change}, first at {place}, then at {number}")
                raise
            total += 1
        place += 1 if os.environ.get("HAGROUP_CRASH_ALL") else 50
    print(f"{change}: {total} pairs of faults, the second one: {what} is killed")
    assert total
