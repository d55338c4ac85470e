"""``journal todo`` per client host and member: who was passed over by a destruction is an action until that is over."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.support.etcd import one_node
from tests.support.groups import GroupFixture, make_group, run_client, wait_until
from tests.support.hosts import Host

HERE = socket.gethostname()


@pytest.fixture(scope="module")
def group(fast_folder: Path) -> GroupFixture:
    section = one_node().section()
    options = ["--journal", str(section.url), "--journal-ca", str(section.ca)]
    options += ["--journal-cert", str(section.cert), "--journal-key", str(section.key)]
    return make_group(fast_folder / "client-hosts", *options, members=3)


@pytest.fixture(autouse=True)
def same_host(group: GroupFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks of programs on one host are in one folder."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(group.folder))


def todo(group: GroupFixture, *more: str) -> list[dict[str, Any]]:
    """For hosts. (A member may still owe what a short-lived program left.)"""
    found: list[dict[str, Any]] = json.loads(group.admin("journal", "todo", "--json", *more).stdout)
    return [one for one in found if one["hosts"]]


def passed_over(group: GroupFixture, label: str) -> Host:
    """A program that is frozen while a key that it may use is destroyed, for longer than its registration lasts."""
    host = Host(group)
    host.started()
    host.do("aes", label)
    host.process.send_signal(signal.SIGSTOP)
    run_client(group, f"session.get_key(label={label!r}).destroy()\n")
    return host


def test_who_was_passed_over_is_named_until_it_is_heard_of_again(group: GroupFixture) -> None:
    host = passed_over(group, "doomed")
    try:
        (action,) = todo(group)
        assert action["hosts"] == {HERE: "to do"} and action["members"] == {} and not action["complete"]
        assert f"process {host.process.pid} of host {HERE}" in action["action"]
        shown = group.admin("journal", "todo")
        assert shown.returncode == 1
        assert f"host {HERE}" in shown.stdout.splitlines()[0] and "to do" in shown.stdout, shown.stdout
        (one,) = group.status()["passed_over"]
        assert (one["host"], one["process"]) == (HERE, host.process.pid) and one["since"]
        assert f"host {HERE}: process {host.process.pid} did not acknowledge" in group.admin("status").stdout
        host.process.send_signal(signal.SIGCONT)
        wait_until(lambda: group.status()["passed_over"] == [], "it is heard of again")
        assert host.do("find", "doomed") == 0
        assert todo(group) == []
    finally:
        host.close()
    assert todo(group) == [] and group.status()["passed_over"] == [], "it stays over"
    (action,) = todo(group, "--all")
    assert action["complete"] and action["hosts"] == {HERE: "done"}


def test_who_ended_meanwhile_is_over(group: GroupFixture) -> None:
    host = passed_over(group, "doomed too")
    assert len(todo(group)) == 1
    host.close()
    assert todo(group) == [], "its own host can tell that"


def test_a_person_says_that_it_is_over(group: GroupFixture) -> None:
    host = passed_over(group, "doomed as well")
    try:
        (action,) = todo(group)
        note = ["journal", "note", "that host was reinstalled", "--action", str(action["number"])]
        assert group.admin(*note, "--done", "nowhere").returncode == 2
        done = group.admin(*note, "--done", HERE)
        assert done.returncode == 0, done.stderr
        assert todo(group) == [] and group.status()["passed_over"] == []
    finally:
        host.close()


def test_a_member_that_this_hosts_file_lacks(group: GroupFixture) -> None:
    whole = group.toml.read_text()
    parts = whole.split("[[member]]")
    assert '"hsm3"' in parts[-1]
    group.toml.write_text("[[member]]".join(parts[:-1]))
    try:
        (action,) = todo(group)
        assert action["hosts"] == {HERE: "to do"} and action["members"] == {"hsm3": "to do"}
    finally:
        group.toml.write_text(whole)
    assert todo(group) == []
