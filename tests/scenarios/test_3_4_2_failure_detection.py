"""T 3.4.2: a member that stops is noticed within the bound, with no application running, and people are told."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from hagroup.core.records import LoginState, Membership
from hagroup.engine.membership import BEING_REMOVED
from hagroup.journal import SqliteJournal
from tests.support.groups import GroupFixture, make_group, wait_until
from tests.support.watchdogs import (
    BOUND,
    INTERVAL,
    Receiver,
    Watchdog,
    configure,
    events,
    free_port,
    get,
    kinds,
    make_hook,
    watching,
)

SLACK = 3.0
"""Seconds for what comes after the detection, on a machine of two busy cores."""


@pytest.fixture(scope="module")
def shared_group(fast_folder: Path) -> GroupFixture:
    """Making one takes longer than all that is tested here."""
    return make_group(fast_folder / "detection")


@pytest.fixture
def group(shared_group: GroupFixture) -> Iterator[GroupFixture]:
    """The shared one, as it was made: its configuration and PINs, all members there."""
    text, pin = shared_group.toml.read_text(), shared_group.folder / "hsm1" / "pin"
    right = pin.read_text()
    yield shared_group
    shared_group.toml.write_text(text)
    pin.write_text(right)
    for name in shared_group.members:
        if not shared_group.token_folder(name).exists():
            shared_group.bring_back(name)


def one_feed_message(port: int, wanted: str, timeout: float) -> str:
    """Read the page's live feed until a message has ``wanted``."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/events", timeout=timeout) as feed:
        deadline = time.monotonic() + timeout
        for line in feed:
            if line.startswith(b"data: ") and wanted in line.decode():
                return str(line.decode())
            assert time.monotonic() < deadline, f"the feed did not show {wanted}"
    raise AssertionError("the feed ended")


def test_stopped_member_is_told_everywhere_within_the_bound(group: GroupFixture) -> None:
    receiver, port = Receiver(500), free_port()
    secret = group.folder / "secret"
    secret.write_text("s3cret")
    secret.chmod(0o600)
    hook, told = make_hook(group.folder)
    webhook = f'webhook = {{ url = "{receiver.url}", secret_file = "secret" }}'
    configure(group, hook, webhook, f'listen = "127.0.0.1:{port}"')
    with watching(group) as watchdog:
        wait_until(lambda: json.loads(get(port, "/status.json"))["groups"][0]["group"]["state"] == "ok", "fine")
        assert 'hagroup_member_up{group="payments",member="hsm2"} 1.0' in get(port, "/metrics")
        group.take_away("hsm2")
        group.workers(watchdog.pid)["hsm2"].send_signal(signal.SIGKILL)
        begun = time.monotonic()
        wait_until(lambda: '"event": "member failed"' in watchdog.log.read_text(), "log line")
        noticed = time.monotonic() - begun
        one_feed_message(port, "member hsm2 failed", 10)
        wait_until(lambda: "member failed" in kinds(told), "hook")
        hooked = time.monotonic() - begun
        wait_until(lambda: "member failed" in receiver.kinds(), "webhook")
        posted = time.monotonic() - begun
        status = json.loads(get(port, "/status.json"))["groups"][0]
        print(f"bound {BOUND:.1f} s: log {noticed:.2f} s, hook {hooked:.2f} s, webhook (second try) {posted:.2f} s")
        assert noticed < BOUND + SLACK
        assert status["group"]["state"] == "degraded"
        assert {member["name"]: member["state"] for member in status["members"]}["hsm2"] == "failed"
        assert status["watchdog"]["detection_bound"] == BOUND
        metrics = get(port, "/metrics")
        assert 'hagroup_member_up{group="payments",member="hsm2"} 0.0' in metrics
        assert 'hagroup_events_total{group="payments",kind="member failed"} 1.0' in metrics
        assert "EventSource" in get(port, "/")
        admin = group.admin("status")
        assert admin.returncode == 1
        assert "hsm2" in admin.stdout
        before = watchdog.log.read_text().count("recovery attempt failed")
        wait_until(lambda: watchdog.log.read_text().count("recovery attempt failed") >= before + 3, "more heartbeats")
        assert kinds(told) == ["member failed", "group degraded"]  # once, however long it lasts
        wait_until(lambda: "group degraded" in receiver.kinds(), "webhook")
        assert receiver.kinds() == ["member failed", "member failed", "group degraded"]  # the first was refused once
    receiver.stop()


def test_hung_member_is_told_within_the_bound(group: GroupFixture) -> None:
    """It answers nothing at all: each heartbeat costs its timeout, and only its own."""
    hook, told = make_hook(group.folder)
    port = free_port()
    configure(group, hook, f'listen = "127.0.0.1:{port}"')
    with watching(group) as watchdog:
        wait_until(lambda: json.loads(get(port, "/status.json"))["groups"][0]["group"]["state"] == "ok", "fine")
        worker = group.workers(watchdog.pid)["hsm2"]
        begun = time.monotonic()
        worker.send_signal(signal.SIGSTOP)
        group.take_away("hsm2")
        try:
            wait_until(lambda: "member failed" in kinds(told), "hook")
        finally:
            if worker.is_running():
                worker.send_signal(signal.SIGCONT)
        assert time.monotonic() - begun < BOUND + SLACK
        assert [event["member"] for event in events(told) if event["kind"] == "member failed"] == ["hsm2"]


def test_without_a_pin_it_detects_and_says_that_it_cannot_resync(group: GroupFixture) -> None:
    hook, told = make_hook(group.folder)
    configure(group, hook)
    group.toml.write_text(re.sub(r"(?m)^pin .*\n", "", group.toml.read_text()))
    with watching(group):
        wait_until(lambda: kinds(told).count("cannot resync") == 3, "saying so")
        group.take_away("hsm1")
        wait_until(lambda: "member failed" in kinds(told), "detection")
        group.bring_back("hsm1")
        wait_until(lambda: "member recovered" in kinds(told), "recovery")
        assert kinds(told).count("cannot resync") == 3


def test_systemd_signals_and_a_bounded_end(group: GroupFixture) -> None:
    configure(group)
    address = group.folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(address))
        systemd.settimeout(20)
        got: list[str] = []

        def heard(text: str) -> bool:
            got.append(systemd.recv(4096).decode())
            return text in got[-1]

        with watching(group, NOTIFY_SOCKET=str(address)) as watchdog:
            wait_until(lambda: heard("READY=1"), "READY")
            wait_until(lambda: heard("WATCHDOG=1"), "WATCHDOG")
            _reload(group, watchdog.log, watchdog.pid)
            wait_until(lambda: heard("RELOADING=1"), "RELOADING")
            worker = group.workers(watchdog.pid)["hsm2"]
            worker.send_signal(signal.SIGSTOP)  # a module that hangs does not hold it up
            begun = time.monotonic()
            assert watchdog.end() == 0
            took = time.monotonic() - begun
            print(f"end with a hung module: {took:.2f} s")
            assert took < 5.0
            wait_until(lambda: heard("STOPPING=1"), "STOPPING")
            if worker.is_running():
                worker.send_signal(signal.SIGKILL)


def _reload(group: GroupFixture, log: Path, pid: int) -> None:
    good = group.toml.read_text()
    group.toml.write_text(good.replace(f"interval = {INTERVAL}", "interval = nonsense"))
    os.kill(pid, signal.SIGHUP)
    wait_until(lambda: "configuration.not-reloaded" in log.read_text(), "refusal")
    group.toml.write_text(good.replace(f"interval = {INTERVAL}", "interval = 0.7"))
    os.kill(pid, signal.SIGHUP)
    wait_until(lambda: "configuration.reloaded" in log.read_text(), "reload")
    wait_until(lambda: log.read_text().count("watchdog.watching") == 2, "watching again")
    assert '"detection_bound": 1.8' in log.read_text()


def test_journal_away_and_back_is_told_and_members_are_watched_meanwhile(group: GroupFixture) -> None:
    hook, told = make_hook(group.folder)
    configure(group, hook)
    journal, away = group.folder / "journal.db", group.folder / "journal.away"
    with watching(group):
        journal.rename(away)
        try:
            wait_until(lambda: "journal unreachable" in kinds(told), "saying so")
            group.take_away("hsm3")
            wait_until(lambda: "member failed" in kinds(told), "detection without the journal")
        finally:
            away.rename(journal)
        wait_until(lambda: "journal back" in kinds(told), "return")
        group.bring_back("hsm3")
        wait_until(lambda: "group whole" in kinds(told), "recovery")
    assert sorted(kinds(told)) == [
        "group degraded",
        "group whole",
        "journal back",
        "journal unreachable",
        "member failed",
        "member recovered",
    ]


def test_fewer_than_min_replicas_and_none_at_all_are_told_once(fast_folder: Path) -> None:
    group = make_group(fast_folder / "levels")  # of which nothing was told before
    hook, told = make_hook(group.folder)
    configure(group, hook)
    with watching(group):
        for name, last in (("hsm2", "group degraded"), ("hsm3", "below min_replicas"), ("hsm1", "all members lost")):
            group.take_away(name)
            wait_until(lambda last=last: last in kinds(told), last)
        assert group.admin("status").returncode == 3
        group.bring_back("hsm1")
        wait_until(lambda: "group serves again" in kinds(told), "that one serves")
        group.bring_back("hsm2")
        wait_until(lambda: "min_replicas reached" in kinds(told), "that enough serve")
        group.bring_back("hsm3")
        wait_until(lambda: "group whole" in kinds(told), "that all serve")
        shown = group.admin("status").stdout
        assert "has all of its members in service" in shown
        assert "was delivered" not in shown, "people are shown what happened"
    levels = [kind for kind in kinds(told) if not kind.startswith("member ")]
    assert [kind for kind in levels if kind not in ("out of sync", "resync done")] == [
        "group degraded",
        "below min_replicas",
        "all members lost",
        "group serves again",
        "min_replicas reached",
        "group whole",
    ]
    assert kinds(told).count("member failed") == kinds(told).count("member recovered") == 3


def test_a_watchdog_that_begins_without_the_journal_tells_it(fast_folder: Path) -> None:
    group = make_group(fast_folder / "blind")
    hook, told = make_hook(group.folder)
    port = free_port()
    configure(group, hook, f'listen = "127.0.0.1:{port}"')
    (group.folder / "journal.db").rename(group.folder / "journal.away")
    watchdog = Watchdog(group)
    try:
        wait_until(lambda: "journal unreachable" in kinds(told), "saying so")
        (shown,) = json.loads(get(port, "/status.json"))["groups"]
        assert (shown["journal"]["ok"], shown["watchdog"]["active"]) == (False, False)
        (group.folder / "journal.away").rename(group.folder / "journal.db")
        wait_until(lambda: "journal back" in kinds(told), "return")
    finally:
        watchdog.end()
    assert kinds(told) == ["journal unreachable", "journal back"]


def test_a_member_that_is_being_removed_is_no_alarm(fast_folder: Path) -> None:
    """It leaves by way of a quarantine, which may take as long as it has objects."""
    group = make_group(fast_folder / "leaving")
    hook, told = make_hook(group.folder)
    configure(group, hook)
    journal = SqliteJournal.open(group.folder / "journal.db")
    try:
        with watching(group):
            journal.update_member("hsm3", draining=True)
            journal.update_member("hsm3", membership=Membership.QUARANTINED, reason=BEING_REMOVED)
            group.take_away("hsm2")
            wait_until(lambda: "member failed" in kinds(told), "heartbeats")
            group.bring_back("hsm2")
            wait_until(lambda: "group whole" in kinds(told), "more of them")
            journal.update_member("hsm3", membership=Membership.QUARANTINED, reason="another token")
            wait_until(lambda: "member quarantined" in kinds(told), "that any other quarantine is told")
    finally:
        journal.close()
    (event,) = [event for event in events(told) if event["member"] == "hsm3"]
    assert (event["kind"], event["text"]) == ("member quarantined", "member hsm3 is quarantined: another token")


def test_given_up_after_so_many_attempts(group: GroupFixture) -> None:
    hook, told = make_hook(group.folder)
    configure(group, hook, "retry = 2", log_style="luna")
    with watching(group) as watchdog:
        group.take_away("hsm2")
        wait_until(lambda: "member given up" in kinds(told), "giving up")
        group.bring_back("hsm2")
        wanted = (
            rf"unable to reach member: {group.members['hsm2']['serial']}\. Manual Recover or Auto Recovery will not"
        )
        assert re.search(wanted, watchdog.log.read_text())
        watchdog.signal(signal.SIGHUP)  # a person acts
        wait_until(lambda: "group whole" in kinds(told), "recovery")


def test_once(group: GroupFixture, fast_folder: Path) -> None:
    configure(group)
    command = [sys.executable, "-m", "hagroup.watchdog.cli", "--config", str(group.toml), "--once"]
    fine = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (fine.returncode, f"within {BOUND:g} s" in fine.stdout) == (0, True), fine
    other = make_group(fast_folder / "other", members=1)
    both = subprocess.run(
        [*command[:-1], "--config", str(other.toml), "--once"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (both.returncode, both.stdout.count(": ok;")) == (0, 2), both
    twice = subprocess.run(
        [*command, "--config", str(group.toml)], capture_output=True, text=True, timeout=60, check=False
    )
    assert twice.returncode == 2
    group.take_away("hsm1")
    bad = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert bad.returncode == 1
    assert "hsm1: failed" in bad.stdout
    with watching(group):
        stands_by = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (stands_by.returncode, "watched by another" in stands_by.stdout) == (1, True), stands_by
    assert "hsm1: failed" in stands_by.stdout, "who only looks says what is wrong, too"
    (group.folder / "journal.db").rename(group.folder / "journal.away")
    blind = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    (group.folder / "journal.away").rename(group.folder / "journal.db")
    assert (blind.returncode, "the journal cannot be reached" in blind.stdout) == (1, True), blind
    none = subprocess.run(
        [*command[:3], "--config", "/no/such"], capture_output=True, text=True, timeout=60, check=False
    )
    assert none.returncode == 2
    assert "/no/such" in none.stderr


def test_wrong_pin_is_tried_once_and_said(group: GroupFixture) -> None:
    (group.folder / "hsm1" / "pin").write_text("0000")
    hook, told = make_hook(group.folder)
    configure(group, hook)
    with watching(group):
        wait_until(lambda: "PIN refused" in kinds(told), "saying so")
    journal = SqliteJournal.open(group.folder / "journal.db")
    try:
        (before,) = [login for login in journal.logins() if login.member == "hsm1"]
        assert before.state is LoginState.REFUSED
        with watching(group) as watchdog:  # a restart tries nothing, and tells nothing again
            begun = max((one.boot_time for one in journal.observations("hsm2")), default=0.0)
            wait_until(lambda: max(o.boot_time for o in journal.observations("hsm2")) > begun, "heartbeats")
            assert watchdog.process.poll() is None
        (after,) = [login for login in journal.logins() if login.member == "hsm1"]
        assert after == before
    finally:
        journal.close()
    assert kinds(told).count("PIN refused") == 1
    assert kinds(told).count("member quarantined") == 1
