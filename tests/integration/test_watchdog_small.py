"""What one ``ha-watchdog`` says of several groups, and of changes that applications wait for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.groups import GroupFixture, make_group, wait_until
from tests.support.hosts import Host
from tests.support.watchdogs import configure, free_port, get, watching


@pytest.fixture(scope="module")
def group(fast_folder: Path) -> GroupFixture:
    return make_group(fast_folder / "small")


def test_changes_that_an_application_waits_for_are_counted(group: GroupFixture) -> None:
    port = free_port()
    configure(group, f'listen = "127.0.0.1:{port}"')
    host = Host(group)
    try:
        host.started()
        host.do("aes", "first")
        with watching(group):

            def shows(count: str) -> bool:
                line = 'hagroup_member_unanswered_changes{group="payments",member="hsm2"} '
                return line + count in get(port, "/metrics")

            wait_until(lambda: shows("0.0"), "nothing is unanswered")
            worker = group.workers(host.process.pid)["hsm2"]
            worker.send_signal(signal.SIGSTOP)
            host.do("aes", "second")
            wait_until(lambda: shows("1.0"), "hsm2 did not answer")
            assert "calls of this watchdog alone" in get(port, "/metrics")
            worker.send_signal(signal.SIGCONT)
            wait_until(lambda: shows("0.0"), "it answered")
    finally:
        host.close()


def test_several_files_say_the_same_of_the_log(group: GroupFixture, fast_folder: Path) -> None:
    other = make_group(fast_folder / "small-other", members=2, anew=True)
    configure(group, log_style="json")
    configure(other, log_style="luna")
    command = [sys.executable, "-m", "hagroup.watchdog.cli", "--config", str(group.toml), "--config", str(other.toml)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2 and refused.stdout == ""
    (line,) = refused.stderr.strip().splitlines()
    assert "log_style" in line and str(group.toml) in line and str(other.toml) in line

    configure(other, log_style="json")
    log = group.folder / "both.log"
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ.copy())
    try:
        wait_until(lambda: log.read_text().count("watchdog.watching") == 2, "both are watched")
        configure(other, log_style="luna")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: "configuration.not-reloaded" in log.read_text(), "it says why not")
        assert "configuration.reloaded" not in log.read_text(), "both keep what they have"
        configure(group, log_style="luna")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: log.read_text().count("configuration.reloaded") == 2, "the new ones are taken")
    finally:
        process.terminate()
        assert process.wait(30) == 0
