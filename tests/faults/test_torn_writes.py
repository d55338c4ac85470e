"""A worker dies inside SoftHSM's writes: what is on the token then is neither there nor gone (DESIGN.md 8, trap 3).

A change writes hundreds of times to the token's folder. A run dies in some of them, evenly spread
(``HAGROUP_CRASH_ALL=1``: in 40 of each); what is on the tokens afterwards is read by other processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hagroup import Attribute, KeyType, ObjectClass
from hagroup.engine import manifest
from hagroup.engine.opening import CONNECTION_LOST
from tests.faults.test_changes import VICTIM, change_label, create, destroy, generate
from tests.support.faulty import FaultGroup, engine
from tests.support.killpoint import Killpoint

POINTS = 40 if os.environ.get("HAGROUP_CRASH_ALL") else 3


def generate_pair(session: Any, label: str) -> None:
    session.generate_keypair(KeyType.RSA, 2048, store=True, label=label)


def store_data(session: Any, label: str) -> None:
    session.create_object(
        {
            Attribute.CLASS: ObjectClass.DATA,
            Attribute.TOKEN: True,
            Attribute.LABEL: label,
            Attribute.VALUE: b"data",
        }
    )


@pytest.fixture(scope="module")
def killpoint(faulty: FaultGroup) -> Killpoint:
    return Killpoint(faulty.group.folder)


@pytest.fixture(scope="module")
def client(faulty: FaultGroup, killpoint: Killpoint) -> Iterator[Any]:
    here = f'SOFTHSM2_CONF = "{VICTIM}'
    preloaded = ", ".join(f'{name} = "{value}"' for name, value in killpoint.env.items())
    toml = faulty.variant("preloaded", here, f"{preloaded}, {here}")
    with faulty.client(toml=toml) as session:
        yield session


def show(session: Any) -> None:
    """The member's manifest is made anew, as it is from time to time."""
    group = engine(session)
    member = group.roster.members[VICTIM]
    manifest.show_seal(group.view, member, member.life, timeout=10.0)


@pytest.mark.parametrize("operation", [generate, generate_pair, create, store_data, change_label, destroy])
def test_a_worker_dies_inside_a_write(
    faulty: FaultGroup, session: Any, killpoint: Killpoint, operation: Callable[[Any, str], None]
) -> None:
    def prepare(label: str) -> None:
        if operation in (change_label, destroy):
            session.generate_key(KeyType.AES, 256, store=True, label=f"{label} before")
        faulty.heal(session)
        faulty.prefer(session, VICTIM)

    prepare("counted")
    killpoint.arm()
    operation(session, "counted")
    faulty.heal(session)
    total = killpoint.writes
    points = sorted({1 + (total - 1) * number // (POINTS - 1) for number in range(POINTS)})
    print(f"{operation.__name__}: {total} writes, dies in {points}")
    died = 0
    for point in points:
        label = f"{operation.__name__} at {point}"
        prepare(label)
        killpoint.arm(point)
        operation(session, label)
        faulty.heal(session)
        died += not killpoint.armed  # what else is written in the background may have been in the number of writes
        killpoint.arm()
        faulty.check_tokens(session, shown_once=False)
        assert len(list(session.get_objects({Attribute.LABEL: label}))) == {destroy: 0, generate_pair: 2}.get(
            operation, 1
        )
    assert died > POINTS // 2
    for item in list(session.get_objects({Attribute.TOKEN: True})):
        item.destroy()


def test_a_worker_dies_while_it_renews_what_its_member_shows(
    faulty: FaultGroup, session: Any, killpoint: Killpoint
) -> None:
    """No row of the journal tells of that: the token is swept because the worker was lost."""
    faulty.heal(session)
    killpoint.arm()
    show(session)
    total = killpoint.writes
    died = 0
    for number in range(POINTS * 2):
        killpoint.arm(1 + (total - 1) * number // (POINTS * 2 - 1))
        with contextlib.suppress(CONNECTION_LOST):
            show(session)
        if killpoint.armed:  # what else was written in the background may have been in the number of writes
            killpoint.arm()
            continue
        died += 1
        faulty.wait_failed(session, VICTIM)
        faulty.heal(session)
        faulty.check_tokens(session, shown_once=False)
    assert died > POINTS
    show(session)  # it takes the place of all that stayed
    faulty.check_tokens(session)


_SHOWS = f"""
import sys
import hagroup
from hagroup.engine import manifest
from tests.support.faulty import engine
from tests.support.groups import PIN, wait_until
session = hagroup.lib(sys.argv[1]).get_token(token_label="payments").open(rw=True, user_pin=PIN)
group = engine(session)
member = group.roster.members["{VICTIM}"]
wait_until(lambda: len(group.roster.serving()) == len(group.roster.members), "all members are in service")
group.supervisor.stop()  # its writes would count too
print("ready", flush=True)
sys.stdin.readline()
manifest.show_seal(group.view, member, member.life, timeout=10.0)
"""


def test_a_program_dies_with_its_member_inside_a_write(faulty: FaultGroup, session: Any, killpoint: Killpoint) -> None:
    """Nobody is left who knows of that, and no row of the journal tells: the next one finds the worker's mark."""

    def show_in_a_program(die_at: int) -> int:
        command = [sys.executable, "-c", _SHOWS, str(faulty.inline)]
        with subprocess.Popen(
            command, env=os.environ | killpoint.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as program:
            assert program.stdin is not None and program.stdout is not None
            assert program.stdout.readline() == "ready\n"
            killpoint.arm(die_at)
            program.stdin.write("\n")
            program.stdin.close()
            return program.wait(60)

    faulty.heal(session)
    assert show_in_a_program(0) == 0
    total = killpoint.writes
    halves = 0
    for point in sorted({5, 10} | {1 + (total // 2) * number // POINTS for number in range(POINTS)}):
        assert show_in_a_program(point) == -signal.SIGKILL
        halves += "" in faulty.labels(own=True)[VICTIM]
        done = faulty.group.admin("sync")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "" not in faulty.labels(own=True)[VICTIM]
        faulty.check_tokens(session, shown_once=False)
    assert halves >= 2, "an object's first dozen writes come before its class and label"
    show(session)  # it takes the place of all that stayed
    faulty.check_tokens(session)
