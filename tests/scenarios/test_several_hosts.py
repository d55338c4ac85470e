"""Several hosts, one group: the journal on a real etcd cluster (issue: several hosts). Hosts are processes with a
configuration of their own; the members are tokens that all of them reach, each by its own module instance."""

from __future__ import annotations

import json
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import plain
from tests.support.etcd import Cluster, cluster
from tests.support.groups import PIN, GroupFixture, make_group, wait_until

pytestmark = pytest.mark.xdist_group("etcd")

HOST = """
import json, sys, threading, time
import hagroup as pkcs11
from hagroup import Attribute, KeyType, Mechanism
lib = pkcs11.lib(sys.argv[1])
session = lib.get_token(token_label="payments").open(rw=True, user_pin=sys.argv[2])
kept = {}
longest, signed, failed, busy = [0.0], [0], [], threading.Event()

def sign_on():
    key = kept["signer"]
    while busy.is_set():
        began = time.monotonic()
        try:
            key.sign(b"data", mechanism=Mechanism.SHA256_RSA_PKCS)
            signed[0] += 1
        except Exception as error:
            failed.append(repr(error))
        longest[0] = max(longest[0], time.monotonic() - began)

def act(what, label, *more):
    if what == "pair":
        kept[label] = session.generate_keypair(KeyType.RSA, 1024, store=True, label=label)[1]
    elif what == "aes":
        kept[label] = session.generate_key(KeyType.AES, 256, store=True, label=label)
    elif what == "find":
        found = [one for one in session.get_objects({Attribute.LABEL: label})]
        if found:
            kept[label] = found[-1]
        return len(found)
    elif what == "rename":
        kept[label][Attribute.LABEL] = more[0]
    elif what == "destroy":
        kept[label].destroy()
    elif what == "encrypt":
        return len(kept[label].encrypt(bytes(16), mechanism_param=bytes(16)))
    elif what == "sign":
        return len(kept[label].sign(b"data", mechanism=Mechanism.SHA256_RSA_PKCS))
    elif what == "begin signing":
        busy.set()
        threading.Thread(target=sign_on, daemon=True).start()
    elif what == "end signing":
        busy.clear()
        return [signed[0], longest[0], failed[:3]]

print("ready", flush=True)
for line in sys.stdin:
    began = time.monotonic()
    try:
        answer = {"ok": act(*json.loads(line))}
    except Exception as error:
        answer = {"error": [one.__name__ for one in type(error).__mro__], "text": str(error)}
    print(json.dumps({**answer, "took": time.monotonic() - began}), flush=True)
"""


class Host:
    """A program on another host: it does what it is told, one thing after the other."""

    def __init__(self, toml: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOST, str(toml), PIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"

    def _line(self, timeout: float = 60.0) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        assert ready, "the program on the other host gives no answer"
        return self.process.stdout.readline().strip()

    def tell(self, *what: str) -> None:
        assert self.process.stdin is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._line())
        return found

    def ask(self, *what: str) -> dict[str, Any]:
        self.tell(*what)
        return self.answer()

    def do(self, *what: str) -> Any:
        answer = self.ask(*what)
        assert "ok" in answer, answer
        return answer["ok"]

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    yield cluster()
    cluster().heal()


@pytest.fixture(scope="module")
def group(nodes: Cluster, fast_folder: Path) -> GroupFixture:
    section = nodes.section()
    options = ["--journal", str(section.url), "--journal-ca", str(section.ca)]
    options += ["--journal-cert", str(section.cert), "--journal-key", str(section.key)]
    return make_group(fast_folder / "several-hosts", *options)


@pytest.fixture(scope="module")
def hosts(group: GroupFixture) -> Iterator[list[Host]]:
    """Each with a configuration of its own."""
    opened = []
    for name in ("one", "two"):
        folder = group.folder / name
        folder.mkdir(mode=0o700)
        toml = folder / "hagroup.toml"
        shutil.copy(group.toml, toml)
        text = toml.read_text()
        for member in group.members:
            text = text.replace(f'"{member}/', f'"../{member}/')
        if name == "two":
            text = text.replace('offline_serving = "allow"', 'offline_serving = "refuse"')
            assert '"refuse"' in text
        toml.write_text(text)
        toml.chmod(0o600)
        opened.append(Host(toml))
    yield opened
    for host in opened:
        host.close()


def test_what_one_host_changes_the_other_knows_within_a_second(group: GroupFixture, hosts: list[Host]) -> None:
    one, two = hosts
    one.do("pair", "signer")
    wait_until(lambda: two.do("find", "signer") == 2, "the other host finds the pair", 1.0)
    assert two.do("sign", "signer") == 128
    one.do("aes", "card")
    wait_until(lambda: two.do("find", "card") == 1, "the other host finds the key", 1.0)
    assert two.do("encrypt", "card") == 32
    one.do("rename", "card", "new card")
    assert two.do("find", "card") == 0, "an acknowledged change is known to all"
    assert two.do("find", "new card") == 1
    one.do("destroy", "card")
    refused = two.ask("encrypt", "new card")
    assert "ObjectHandleInvalid" in refused["error"], refused
    assert two.do("find", "new card") == 0
    for member in group.members.values():
        assert plain.labels(member) == ["signer", "signer"]


def test_the_leader_is_killed_in_the_middle(group: GroupFixture, nodes: Cluster, hosts: list[Host]) -> None:
    one, two = hosts
    two.do("find", "signer")
    two.do("begin signing", "")
    leader = nodes.leader()
    nodes.kill(leader)
    one.do("aes", "during")
    one.do("destroy", "during")
    one.do("aes", "after")
    nodes.restart(leader)
    signed, longest, failed = two.do("end signing", "")
    assert signed > 0
    assert failed == []
    assert longest < 3.0
    wait_until(lambda: two.do("find", "after") == 1, "the other host finds the key")
    nodes.wait()
    for member in group.members.values():
        wait_until(lambda member=member: plain.labels(member) == ["after", "signer", "signer"], "all is everywhere")
    assert group.admin("journal", "verify").returncode == 0


def test_without_a_quorum_changes_are_refused_and_the_rest_goes_on(
    group: GroupFixture, nodes: Cluster, hosts: list[Host]
) -> None:
    one, two = hosts
    for host in hosts:
        host.do("find", "signer")
    for node in nodes.nodes[:2]:
        nodes.signal(node, signal.SIGSTOP)
    try:
        refused = wait_until(lambda: _refused(one), "a change is refused", 30.0)
        assert "JournalUnavailable" in refused["error"], refused
        assert "majority" in refused["text"]
        again = one.ask("aes", "never")
        assert "error" in again
        assert again["took"] < 1.0, "at once, once it is known"
        for host in hosts:
            assert host.do("sign", "signer") == 128
            assert host.do("find", "signer") == 2
        wait_until(
            lambda: "JournalUnavailable" in two.ask("sign", "signer").get("error", []), "the one with refuse stops"
        )
        assert one.do("sign", "signer") == 128
        status = group.admin("status", "--json")
        assert json.loads(status.stdout)["journal"]["ok"] is False
    finally:
        for node in nodes.nodes[:2]:
            nodes.signal(node, signal.SIGCONT)
    wait_until(lambda: "ok" in one.ask("aes", "back"), "changes go on by themselves")
    wait_until(lambda: "ok" in two.ask("sign", "signer"), "and so does the one that stopped")
    wait_until(lambda: two.do("find", "back") == 1, "and are known")
    assert two.do("find", "never") == 0
    assert group.admin("journal", "verify").returncode == 0


def _refused(host: Host) -> dict[str, Any] | None:
    answer = host.ask("aes", "never")
    return answer if "error" in answer else None


def test_a_frozen_host_does_not_keep_the_others_and_serves_nothing_stale(
    group: GroupFixture, hosts: list[Host]
) -> None:
    one, two = hosts
    one.do("aes", "stale")
    wait_until(lambda: two.do("find", "stale") == 1, "the other host finds the key")
    two.do("encrypt", "stale")
    two.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    one.do("destroy", "stale")  # returns when the frozen one's registration has run out
    assert time.monotonic() - began < 20
    two.process.send_signal(signal.SIGCONT)
    assert {"ObjectHandleInvalid", "KeyHandleInvalid"} & set(two.ask("encrypt", "stale").get("error", []))
    told: Callable[[], str] = lambda: group.admin("journal", "list", "--event", "passed over").stdout  # noqa: E731
    assert "did not acknowledge" in told()
    wait_until(lambda: "ok" in two.ask("aes", "woken"), "it goes on by itself")
