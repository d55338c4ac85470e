"""``ha-admin status`` says since when a member is in the state that it shows, or nothing where nobody knows."""

from __future__ import annotations

import re
import signal
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from hagroup.journal import SqliteJournal
from tests.support.groups import GroupFixture, make_group, wait_until
from tests.support.hosts import Host
from tests.support.terminal import Terminal
from tests.support.watchdogs import BOUND, configure, kinds, make_hook, watching


@pytest.fixture(scope="module")
def group(fast_folder: Path) -> GroupFixture:
    return make_group(fast_folder / "since")


def shown(group: GroupFixture, name: str = "hsm2") -> dict[str, Any]:
    return next(one for one in group.status()["members"] if one["name"] == name)


def between(text: str, first: float, last: float) -> bool:
    """Shown in whole seconds."""
    return int(first) <= datetime.fromisoformat(text).timestamp() <= last


def next_second() -> float:
    """The next whole second has begun: what happens from now on is shown to be later than what was."""
    before = int(time.time())
    wait_until(lambda: int(time.time()) > before, "the next second")
    return time.time()


def wait_for_a_heartbeat(group: GroupFixture) -> None:
    """Of the watchdog, missed by hsm2."""
    journal = SqliteJournal.open(group.folder / "journal.db")
    try:
        newest = max((one.boot_time for one in journal.observations("hsm2")), default=0.0)
        wait_until(lambda: any(one.boot_time > newest for one in journal.observations("hsm2")), "a heartbeat")
    finally:
        journal.close()


def test_failed_since_a_running_program_lost_it(group: GroupFixture) -> None:
    host = Host(group)
    try:
        host.started()
        admitted = shown(group)
        assert admitted["state"] == "in service" and admitted["since"]
        worker, begun = group.workers(host.process.pid)["hsm2"], next_second()
        group.take_away("hsm2")
        worker.send_signal(signal.SIGKILL)
        wait_until(lambda: shown(group)["since"] not in ("", admitted["since"]), "the program says that it lost it")
        lost = shown(group)
        assert lost["state"] == "failed"
        assert between(lost["since"], begun, time.time())
        when = lost["since"].replace("T", " ").removesuffix("+00:00")
        done = group.admin("status")
        assert re.search(rf"^hsm2 .*failed .*{when}", done.stdout, re.MULTILINE), done.stdout
        assert f"hsm2: failed (since {when} UTC): " in done.stdout
        terminal = Terminal([sys.executable, "-m", "hagroup.admin.cli", "--config", str(group.toml), "status"])
        terminal.end()
        text = re.sub(r"\x1b\[[0-9;]*m", "", terminal.text).replace("\r", "")
        assert f"since (UTC) {when}" in text and all(len(line) <= 80 for line in text.splitlines()), text
        host.close()
        assert shown(group)["since"] == "", "whoever knew it is gone"
        assert "hsm2: failed: " in group.admin("status").stdout
    finally:
        host.close()
        group.bring_back("hsm2")
    assert shown(group)["since"] == admitted["since"]


def test_failed_and_back_since_the_watchdog_noticed(group: GroupFixture) -> None:
    hook, told = make_hook(group.folder)
    configure(group, hook)
    with watching(group):
        begun = time.time()
        group.take_away("hsm2")
        wait_until(lambda: "member failed" in kinds(told), "detection")
        wait_until(lambda: shown(group)["since"], "what was told stands in the journal")
        failed = shown(group)
        assert failed["state"] == "failed"
        assert between(failed["since"], begun, begun + BOUND + 1.0)
        for _ in range(2):
            wait_for_a_heartbeat(group)
            next_second()
        assert shown(group)["since"] == failed["since"], "not since the newest heartbeat"
        back = time.time()
        group.bring_back("hsm2")
        wait_until(lambda: "member recovered" in kinds(told), "recovery")
        wait_until(lambda: shown(group)["since"] > failed["since"], "what was told stands in the journal")
        assert shown(group)["state"] == "in service"
        assert between(shown(group)["since"], back, time.time())
    assert between(shown(group)["since"], back, time.time()), "it came back then, whoever watches now"


def test_drained_and_resumed(group: GroupFixture) -> None:
    begun = next_second()
    assert group.admin("member", "drain", "hsm2").returncode == 0
    drained = shown(group)
    assert drained["state"] == "draining" and between(drained["since"], begun, time.time())
    resumed = next_second()
    assert group.admin("member", "resume", "hsm2").returncode == 0
    assert shown(group)["state"] == "in service" and between(shown(group)["since"], resumed, time.time())
