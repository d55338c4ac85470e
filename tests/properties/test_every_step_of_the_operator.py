"""Every interaction of the commands that take members in and out and make, hand on and change the domain's keys
(issue 3): ha-admin is killed there, the journal does what it was asked for and gives no answer, or a member fails.

Then a fresh program finds a group that works, and the same command again completes what was begun: every token holds
what it should and nothing else. Over simulated members, so that all of them can be had; `test_crash_points` kills
real processes over SoftHSM.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hagroup.core.records import Membership
from hagroup.journal import SqliteJournal
from tests.support.history import FATES, Broken, History, Step
from tests.support.simulated import Fate
from tests.support.simulated_admin import Administered, Command, Done

Arm = Callable[[Command], object]
KEY: Step = ("create", 0, 0, 0)
PAIR: Step = ("create", 0, 3, 0)
TICK: Step = ("tick", 0, 0, 0)


@dataclass(frozen=True)
class Operation:
    """A command, and what is the case before it."""

    words: Callable[[Administered], list[str]]
    before: list[Step] = field(default_factory=list)
    grouped: bool = True
    completed: str = ""
    """What it says where there is nothing to do any more, and refuses."""
    after: Callable[[Administered], list[str]] | None = None
    """What follows it."""


def _shares(group: Administered) -> list[str]:
    folder = group.folder / "shares"
    shutil.rmtree(folder, ignore_errors=True)  # those of an attempt that was cut off are nobody's
    return ["domain", "shares", "--shares", "2-of-3", "--shares-folder", str(folder), "--yes", *group.officer()]


def _create(group: Administered) -> list[str]:
    return ["group", "create", "--yes", *group.officer()]


WIPED: list[Step] = [("wipe", 1, 1, 0), TICK, TICK]
OPERATIONS = {
    "member add": Operation(Administered.member_add, completed='has a member "hsm4" already'),
    "member remove": Operation(lambda _: ["member", "remove", "hsm3", "--yes"], completed="no member 'hsm3'"),
    "domain rotate": Operation(lambda group: ["domain", "rotate", "--yes", *group.officer()]),
    "domain join": Operation(lambda group: ["domain", "join", "hsm2", *group.officer()], before=WIPED),
    "domain shares": Operation(_shares),
    "domain create": Operation(
        lambda group: ["domain", "create", "--yes", *group.officer()],
        grouped=False,
        completed="keys of a domain are there already",
        after=_create,
    ),
    "group create": Operation(_create, grouped=False, completed="was created already"),
}


@contextmanager
def ready(operation: Operation) -> Iterator[tuple[Administered, History]]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        group = Administered(Path(folder), 3, grouped=operation.grouped)
        with group.running():
            history = History(group, [None])
            if operation.grouped:
                for step in [KEY, PAIR, *operation.before]:
                    history.run(step)
            yield group, history


def complete(group: Administered, operation: Operation) -> Done:
    """The same command again."""
    done = group.admin(*operation.words(group))
    if done.status and not (operation.completed and operation.completed in done.err):
        raise Broken(f"the same command again: {done}")
    return done


def use(history: History) -> None:
    """A program that starts now can work."""
    history.client(0)
    before = len(history.things)
    for step in (TICK, KEY, ("sign", 0, 0, 0), ("set_label", 0, 1, 0), ("destroy", 0, before, 0), TICK):
        history.run(step)
    if len(history.things) != before + 1 or history.things[before].state != "gone":
        raise Broken("a program can make and destroy no key")


def judge(group: Administered, history: History, operation: Operation, *, late: bool) -> None:
    """All of it is done, for everybody.

    :param late: members may still execute what they were given up for.
    """
    if operation.after is not None:
        done = group.admin(*operation.after(group))
        assert done.status == 0, done
    if not operation.grouped:
        group.journal = SqliteJournal.open(group.path, clock=group.clock)
    if late:
        use(history)
        history.heal()  # what a member may still execute it executes now
        group.admin("sync")
    use(history)
    away = {one.name: one.reason for one in group.journal.members() if one.membership is not Membership.ADMITTED}
    if away:
        raise Broken(f"not admitted: {away}")
    group.check_domain(at_rest=False)
    history.finish(late=late)
    if late:
        assert group.admin("sync").status == 0
    group.check_domain(at_rest=late)


def play(name: str, arm: Arm, sprung: Callable[[Command, Done], bool], *, late: bool = False, records: int = 1) -> bool:
    """One command in trouble, and once more. False: the trap was not sprung.

    :param late: see :func:`judge`. :param records: see :class:`History`.
    """
    operation = OPERATIONS[name]
    with ready(operation) as (group, history):
        history.records = records
        done = group.admin(*operation.words(group), arm=arm)
        found = sprung(group.command, done)
        group.faults.clear()
        if found:
            if operation.grouped:
                use(history)
            complete(group, operation)
        else:
            assert done.status == 0, done
        judge(group, history, operation, late=late)
        return found


def all_of(name: str, trap: Callable[[int], Arm], sprung: Callable[[Command, Done], bool], **more: Any) -> int:
    """How many there are."""
    for number in itertools.count():
        try:
            if not play(name, trap(number), sprung, **more):
                return number
        except BaseException as error:
            error.add_note(f"{name}, at interaction {number}")
            raise
    raise AssertionError


@pytest.mark.parametrize("name", OPERATIONS)
def test_killed(name: str) -> None:
    """After each interaction, and before the first one. (Before one is after the one before it: nothing else runs.)"""

    def trap(number: int) -> Arm:
        return lambda command: setattr(command, "kill_in", 2 * number)

    count = all_of(name, trap, lambda command, done: done.status is None)
    print(f"{name}: killed at each of {count} interactions")
    assert count > 5


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_journal_gives_no_answer(name: str) -> None:
    def trap(number: int) -> Arm:
        return lambda command: setattr(command, "journal_lost_in", number)

    count = all_of(name, trap, lambda command, _: command.journal_lost_in is None)
    print(f"{name}: no answer to each of {count} transactions")


@pytest.mark.parametrize("member", ["hsm1", "hsm2", "hsm3", "hsm4"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_member_fails(name: str, member: str) -> None:
    """Each way, at each call that changes its token."""
    total = 0
    for fate in FATES:

        def trap(number: int, fate: Fate = fate) -> Arm:
            def arm(command: Command) -> None:
                command.simulation.faults[member] = [(number, fate, True)]

            return arm

        records = 2 if (name, fate) == ("domain rotate", Fate.LATE) else 1
        try:
            total += all_of(
                name, trap, lambda command, _: not command.simulation.faults[member], late=True, records=records
            )
        except BaseException as error:
            error.add_note(fate)
            raise
    print(f"{name}: {total} failures of {member}, {len(FATES)} kinds")
