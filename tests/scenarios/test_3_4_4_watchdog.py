"""T 3.4.4 by the watchdog alone, and who is the active one when a watchdog dies or hangs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hagroup.watchdog.group import GroupWatch
from hagroup.watchdog.verify import Verifier
from tests.support import plain
from tests.support.groups import GroupFixture, make_group, run_client, wait_until
from tests.support.watchdogs import (
    configure,
    events,
    idle_cost,
    kinds,
    make_hook,
    watching,
)

T_TABLE_5_2 = (
    r"^\d\d:\d\d:\d\d \[\d+\] HA group: {group} has dropped member: {member}$",
    r"^\d\d:\d\d:\d\d \[\d+\] HA group: {group} recovery attempt #\d+ failed for member: {member}$",
    r"^\d\d:\d\d:\d\d \[\d+\] HA group: {group} recovery attempt #\d+ succeeded for member: {member}$",
)


@pytest.fixture(scope="module")
def group(fast_folder: Path) -> GroupFixture:
    """One for all tests here: making one takes longer than what is tested."""
    return make_group(fast_folder / "watched")


def test_returning_member_is_resynced_and_serves_without_anybody(group: GroupFixture) -> None:
    """A member is away while a short-lived program makes a key; nothing but the watchdog runs when it comes back."""
    hook, told = make_hook(group.folder)
    configure(group, hook, log_style="luna")
    with watching(group) as watchdog:
        begun = time.monotonic()
        group.take_away("hsm2")
        wait_until(lambda: "member failed" in kinds(told), "detection")
        noticed = time.monotonic()
        run_client(group, "session.generate_key(KeyType.AES, 256, store=True, label='made while away')\n")
        wait_until(lambda: "out of sync" in kinds(told), "out of sync")
        made = time.monotonic()
        group.bring_back("hsm2")
        wait_until(lambda: {"member recovered", "resync done", "group whole"} <= set(kinds(told)), "recovery")
        back = time.monotonic()
        assert all("made while away" in plain.labels(member) for member in group.members.values())
        serial, text = group.status()["group"]["serial"], watchdog.log.read_text()
        for pattern in T_TABLE_5_2:
            wanted = pattern.format(group=serial, member=group.members["hsm2"]["serial"])
            assert re.search(wanted, text, re.MULTILINE), (wanted, text)
    assert group.status()["group"]["state"] == "ok"
    assert sorted(kinds(told)) == [
        "group degraded",
        "group whole",
        "member failed",
        "member recovered",
        "out of sync",
        "resync done",
    ]
    print(
        f"noticed after {noticed - begun:.2f} s, key made and missed after {made - noticed:.2f} s, "
        f"back in service and in sync {back - made:.2f} s after its return; {back - begun:.2f} s in all"
    )


LOSE = """
import sys, pkcs11
token = pkcs11.lib(sys.argv[1]).get_token(token_serial=sys.argv[2].encode())
with token.open(rw=True, user_pin="1234") as session:
    session.get_key(label="lost later").destroy()
"""


def test_replica_that_a_member_lost_is_found_and_made_anew(group: GroupFixture) -> None:
    """Nobody used the key, nobody connected anew: background verification finds that it is gone; people hear of it."""
    hook, told = make_hook(group.folder)
    configure(group, hook, "verify_rate = 0")
    run_client(group, "session.generate_key(KeyType.AES, 256, store=True, label='lost later')\n")
    group.admin("sync")  # min_replicas had it when the program ended; here all must
    member = group.members["hsm3"]
    wait_until(lambda: "lost later" in plain.labels(member), "the key on hsm3")
    watch = GroupWatch(group.toml)
    watch.step()
    assert watch._engine is not None
    command = [sys.executable, "-c", LOSE, member["module"], member["serial"]]
    subprocess.run(command, env=os.environ | member["env"], check=True, timeout=60)
    assert "lost later" not in plain.labels(member)
    verifier = Verifier(watch._engine, 50.0, rest=0.1)

    def step_until(wanted: str) -> bool:
        watch.step()
        return wanted in kinds(told)

    try:
        wait_until(lambda: step_until("alarm"), "alarm")
        wait_until(lambda: "lost later" in plain.labels(member), "repair")
        assert verifier.so_far.wrong == 1
    finally:
        verifier.stop()
        watch.stop()
        watch.run()
    assert [event["member"] for event in events(told) if event["kind"] == "alarm"] == ["hsm3"]


def test_intent_of_a_killed_program_is_finished(group: GroupFixture) -> None:
    """A program dies in the middle of making keys; with no other program running nothing half-made stays."""
    configure(group)
    program = (
        "import os, signal, threading\n"
        "def end():\n"
        "    import time\n"
        "    time.sleep(0.15)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "threading.Thread(target=end).start()\n"
        "while True: session.generate_key(KeyType.AES, 256, store=True, label='many')\n"
    )
    with watching(group):
        try:
            run_client(group, program)
        except AssertionError:
            pass  # it was killed

        def settled() -> bool:
            labels = [len(plain.labels(member)) for member in group.members.values()]
            status = group.status()
            return bool(status["group"]["in_sync"]) and labels == [status["objects"]] * 3

        wait_until(settled, "every member to have the same", 60)


def test_another_watchdog_takes_over(group: GroupFixture) -> None:
    """SIGKILL, then SIGSTOP of the active one: the next goes on from what was told, and nothing is told twice."""
    hook, told = make_hook(group.folder)
    configure(group, hook)
    with (
        watching(group, "first") as first,
        watching(group, "second", active=False) as second,
        watching(group, "third", active=False) as third,
    ):
        group.take_away("hsm2")
        wait_until(lambda: "group degraded" in kinds(told), "detection")
        first.signal(signal.SIGKILL)
        begun = time.monotonic()
        watchers = (second, third)
        wait_until(lambda: any(one.said("watchdog.watching") for one in watchers), "takeover")
        print(f"takeover after SIGKILL: {time.monotonic() - begun:.2f} s")
        group.bring_back("hsm2")
        wait_until(lambda: "group whole" in kinds(told), "recovery")
        active, standing = (second, third) if second.said("watchdog.watching") else (third, second)
        assert not standing.said("watchdog.watching")
        active.signal(signal.SIGSTOP)
        begun = time.monotonic()
        standing.wait_for("watchdog.watching")
        print(f"takeover after SIGSTOP: {time.monotonic() - begun:.2f} s")
        group.take_away("hsm3")
        wait_until(lambda: kinds(told).count("group degraded") == 2, "detection by the third")
        active.signal(signal.SIGCONT)
        active.wait_for("watchdog.standing-by")
        wait_until(lambda: active.log.read_text().count("watchdog.standing-by") >= 1, "standing by")
        group.bring_back("hsm3")
        wait_until(lambda: kinds(told).count("group whole") == 2, "recovery")
    once = ["member failed", "group degraded", "member recovered", "group whole"]
    # A slow machine may also have found a member out of sync for a moment.
    said = [(event["kind"], event["member"]) for event in events(told) if event["kind"] in once]
    assert [(kind, member) for kind, member in said if member] == [
        ("member failed", "hsm2"),
        ("member recovered", "hsm2"),
        ("member failed", "hsm3"),
        ("member recovered", "hsm3"),
    ]
    assert [kind for kind, _ in said] == once * 2
    assert len({event["id"] for event in events(told)}) == len(events(told))


def test_an_idle_watchdog_costs_next_to_nothing(group: GroupFixture) -> None:
    """Processor time, not the clock's: what else the machine does makes no difference. With the default, a heartbeat
    each 5 s, the share is a good deal lower; ``tools/bench/watchdog`` measures that."""
    configure(group)
    with watching(group) as watchdog:
        found = idle_cost(group, watchdog, heartbeats=6)
    each = (found.own + found.workers) / found.heartbeats
    print(f"{each * 1000:.1f} ms of processor time for each heartbeat: {each / 5:.2%} of one core at one in 5 s")
    assert each < 0.05, "1 % of one core at one in 5 s"
