"""Every interaction of the commands that take members in and out and make, hand on and change the domain's keys
(issue 3): ha-admin is killed there, the journal does what it was asked for and gives no answer, or a member fails.

Then a fresh program finds a group that works, and the same command again completes what was begun: every token holds
what it should and nothing else. Over simulated members, so that all of them can be had; `test_crash_points` kills
real processes over SoftHSM.

A run of the suite kills at every interaction; of journals that do not answer and members that fail it takes a sample
(``HAGROUP_CRASH_ALL=1``: all).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hagroup.core.attributes import CKA, CKO, pack_bool
from hagroup.core.records import Membership
from hagroup.engine import unfinished
from hagroup.journal import SqliteJournal
from tests.support.history import FATES, Broken, History, Step
from tests.support.simulated import CKU_USER, Fate, SimObject
from tests.support.simulated_admin import Administered, Command, Done
from tests.support.simulation import PIN

ALL = bool(os.environ.get("HAGROUP_CRASH_ALL"))
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
    prepare: Callable[[Administered], None] = lambda _: None


def _shares(group: Administered) -> list[str]:
    folder = group.folder / "shares"
    shutil.rmtree(folder, ignore_errors=True)  # those of an attempt that was cut off are nobody's
    return ["domain", "shares", "--shares", "2-of-3", "--shares-folder", str(folder), "--yes", *group.officer()]


def _create(group: Administered) -> list[str]:
    return ["group", "create", "--yes", *group.officer()]


def _only_one(group: Administered) -> None:
    """One member holds the keys of a domain."""
    assert group.admin("domain", "create", "--yes", *group.officer()).status == 0
    for name in ("hsm2", "hsm3"):
        group.members[name].token.objects.clear()


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
    "group create, joined": Operation(_create, grouped=False, completed="was created already", prepare=_only_one),
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
            operation.prepare(group)
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


def play(
    name: str,
    arm: Arm,
    sprung: Callable[[Command, Done], bool],
    *,
    then: Arm | None = None,
    late: bool = False,
    records: int = 1,
) -> bool:
    """One command in trouble, and once more. False: the trap was not sprung.

    :param then: kills the same command when it is run again. False: that one was not killed.
    :param late: see :func:`judge`. :param records: see :class:`History`.
    """
    operation = OPERATIONS[name]
    with ready(operation) as (group, history):
        history.records = records
        done = group.admin(*operation.words(group), arm=arm)
        found = sprung(group.command, done)
        group.faults.clear()
        if found and then is not None:
            again = group.admin(*operation.words(group), arm=then)
            found = again.status is None
            assert found or not again.status or operation.completed in again.err, again
        if found:
            if operation.grouped:
                use(history)
            complete(group, operation)
        elif then is None:
            assert done.status == 0, done
        judge(group, history, operation, late=late)
        return found


def all_of(
    name: str, trap: Callable[[int], Arm], sprung: Callable[[Command, Done], bool], *, step: int = 1, **more: Any
) -> int:
    """How many there are. :param step: of so many one is tried."""
    for number in itertools.count(0, step):
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


@pytest.mark.parametrize("name", OPERATIONS if ALL else ["member add", "domain rotate"])
def test_killed_twice(name: str) -> None:
    """And the same command again is killed, too."""

    def killed(number: int) -> Arm:
        return lambda command: setattr(command, "kill_in", 2 * number)

    def dead(_: Command, done: Done) -> bool:
        return done.status is None

    total = 0
    for place in range(1, 200) if ALL else range(9, 200, 45):
        if not play(name, killed(place), dead):
            break
        for number in itertools.count(0, 1 if ALL else 11):
            try:
                if not play(name, killed(place), dead, then=killed(number)):
                    break
            except BaseException as error:
                error.add_note(f"{name}, killed at {place}, then at {number}")
                raise
            total += 1
    assert total
    print(f"{name}: {total} pairs")


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_journal_gives_no_answer(name: str) -> None:
    def trap(number: int) -> Arm:
        return lambda command: setattr(command, "journal_lost_in", number)

    count = all_of(name, trap, lambda command, _: command.journal_lost_in is None, step=1 if ALL else 12)
    print(f"{name}: no answer to one of {count} transactions")


@pytest.mark.parametrize("member", ["hsm1", "hsm2", "hsm3", "hsm4"] if ALL else ["hsm2"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_member_fails(name: str, member: str) -> None:
    """At each call that changes its token, each way."""
    total = 0
    for fate in FATES if ALL else (Fate.TORN, Fate.LATE):

        def trap(number: int, fate: Fate = fate) -> Arm:
            def arm(command: Command) -> None:
                command.simulation.faults[member] = [(number, fate, True)]

            return arm

        records = 2 if (name, fate) == ("domain rotate", Fate.LATE) else 1
        try:
            total += all_of(
                name,
                trap,
                lambda command, _: not command.simulation.faults[member],
                step=1 if ALL else 5,
                late=True,
                records=records,
            )
        except BaseException as error:
            error.add_note(fate)
            raise
    print(f"{name}: failures of {member} at up to {total} calls")


def _killed_while(bring: Callable[[Administered, History], tuple[list[str], dict[bytes, bytes | None]]]) -> int:
    """A command that brings objects in is killed at an interaction, and repeated. Returns how many there are.

    :param bring: gives the command, and what there is afterwards: labels with the keys' values.
    """
    for number in itertools.count(0, 1 if ALL else 15):
        with ready(Operation(lambda _: [])) as (group, history):
            words, expected = bring(group, history)
            done = group.admin(*words, arm=lambda command, place=number: setattr(command, "kill_in", 2 * place))
            again = done if done.status is not None else group.admin(*words)
            assert again.status == 0, (number, again)
            client = group.client("reader")
            records = [one for one in group.journal.objects() if one.object_class == CKO.SECRET_KEY]
            labels = sorted(one.attributes[CKA.LABEL] for one in records)
            assert labels == sorted(expected), (number, again)
            client.background()
            for member in group.listed():
                there = [item for item in member.token.objects.values() if item.label in expected]
                found = {item.label: item.secret for item in there if item.object_class == CKO.SECRET_KEY}
                assert found == expected and len(there) == len(found), (number, member.name, again)
            if done.status is not None:
                return number
    raise AssertionError


def test_restore_is_killed() -> None:
    """An object that was given up with whoever restored it is restored by the same command."""

    def bring(group: Administered, history: History) -> tuple[list[str], dict[bytes, bytes | None]]:
        file = str(group.folder / "backup")
        history.run(KEY)
        assert group.admin("backup", "create", file).status == 0
        client = history.client(0)
        assert client is not None
        client.bury()
        with contextlib.closing(sqlite3.connect(group.path)) as journal, journal:
            for table in ("objects", "copies", "owed"):
                journal.execute(f"DELETE FROM {table}")
            journal.execute("UPDATE head SET live = 0, owed = 0")
        keys = [item for item in group.members["hsm1"].token.objects.values() if item.object_class == CKO.SECRET_KEY]
        return ["backup", "restore", "--yes", file], {i.label: i.secret for i in keys if i.label.isdigit()}

    print(f"backup restore: killed at one of {_killed_while(bring)} interactions")


def test_adoption_is_killed() -> None:
    def bring(group: Administered, history: History) -> tuple[list[str], dict[bytes, bytes | None]]:
        client = history.client(0)
        assert client is not None
        client.bury()
        token = group.members["hsm2"].token
        one = next(
            item for item in token.objects.values() if item.object_class == CKO.SECRET_KEY and item.label == b"1"
        )
        number = group.members["hsm2"].next_number()
        attributes = {**one.attributes, int(CKA.LABEL): b"strange", int(CKA.EXTRACTABLE): pack_bool(True)}
        token.objects[number] = SimObject(number, attributes, b"s" * 32, None)
        return ["sync", "--adopt"], {b"1": one.secret, b"strange": b"s" * 32}

    print(f"sync --adopt: killed at one of {_killed_while(bring)} interactions")


def test_a_mark_counts_only_where_no_group_shows_itself() -> None:
    """Keys that are in use never go for it."""
    with ready(OPERATIONS["member add"]) as (group, _):
        ids = group.domain[0]
        for name, pairs in (("hsm1", set()), ("hsm4", {ids})):
            member = group.members[name]
            member.script, member.after = lambda *_: Fate.FINE, lambda *_: None
            connection = member.connect(1, None, "")
            connection.login(CKU_USER, PIN, timeout=1)
            unfinished.mark(connection, ids, timeout=1)
            marked = unfinished.marked(connection, timeout=1)
            assert marked.any and marked.pairs == pairs


def test_a_sealed_group_is_not_made_of_keys_that_can_leave() -> None:
    with ready(OPERATIONS["domain create"]) as (group, _):
        assert group.admin(*OPERATIONS["domain create"].words(group)).status == 0
        before = {name: set(member.token.objects) for name, member in group.members.items()}
        done = group.admin(*_create(group), "--sealed")
        assert done.status == 2 and "domain rotate --sealed" in done.err
        assert {name: set(member.token.objects) for name, member in group.members.items()} == before
        assert group.admin(*_create(group)).status == 0


def test_a_domain_without_shares_is_not_completed_as_one_with_shares() -> None:
    """Who asks for shares gets them, or is told that there are none."""
    operation, shares = OPERATIONS["domain create"], ["--shares", "2-of-3", "--shares-folder"]
    for place in itertools.count():
        with ready(operation) as (group, _):
            done = group.admin(*operation.words(group), arm=lambda c, n=place: setattr(c, "kill_in", 2 * n))
            folder = group.folder / "shares"
            again = group.admin(*operation.words(group), *shares, str(folder))
            made = len(list(folder.glob("*-share-*"))) if folder.exists() else 0
            assert (again.status, made) in ((0, 6), (2, 0)), (place, again)
            assert again.status == 0 or "domain shares" in again.err, again
            if done.status is not None:
                break
