"""Several hosts, one group: the journal on a real etcd cluster (issue: several hosts). Hosts are processes with a
configuration of their own; the members are tokens that all of them reach, each by its own module instance."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hagroup.core.attributes import CKA
from hagroup.errors import JournalUnavailable
from hagroup.journal.etcd_client import EtcdClient, Unanswered
from tests.support import plain
from tests.support.clients import clients
from tests.support.etcd import Cluster
from tests.support.groups import PIN, GroupFixture, address, make_group, run_client, wait_until
from tests.support.hosts import Host

ROUNDS = int(os.environ.get("HAGROUP_ETCD_ROUNDS", "1"))
"""Of the mixed load. HAGROUP_ETCD_ROUNDS=20 is a matter of minutes, and uses four hosts."""
OUTAGE = 3.0


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    made = Cluster(3)
    yield made
    made.stop()


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
    for name in ("one", "two", "three", "four")[: 2 if ROUNDS == 1 else 4]:
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
    for host in opened:
        host.started()
    yield opened
    for host in opened:
        host.close()


def test_what_one_host_changes_the_other_knows_within_a_second(group: GroupFixture, hosts: list[Host]) -> None:
    one, two = hosts[:2]
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


def test_a_new_host_comes_from_one_members_address_and_the_pin(group: GroupFixture, hosts: list[Host]) -> None:
    """The journal is used as it is: nothing begins anew, and the other hosts go on."""
    new = GroupFixture(group.folder / "new" / "hagroup.toml")
    command = [
        sys.executable,
        "-m",
        "hagroup.admin.cli",
        "--config",
        new.toml,
        "group",
        "join",
        *address(group, "hsm2"),
    ]
    done = subprocess.run(
        [*command, "--pin-env", "IT", "--json"],
        env=os.environ | {"IT": PIN},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["rebuilt"] is None
    new.reload()
    assert new.members == group.members
    sign = "session.get_key(object_class=ObjectClass.PRIVATE_KEY, label='signer')"
    signed = run_client(new, f"print({sign}.sign(b'data', mechanism=Mechanism.SHA256_RSA_PKCS).hex())")
    assert bytes.fromhex(signed) == plain.use(group.members["hsm1"], "sign", 3, "signer", b"data", "SHA256_RSA_PKCS")
    assert hosts[0].do("sign", "signer") == 128


def test_the_leader_is_killed_in_the_middle(group: GroupFixture, nodes: Cluster, hosts: list[Host]) -> None:
    one, two = hosts[:2]
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
    one, two = hosts[:2]
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
        command = [sys.executable, "-m", "hagroup.admin.cli", "--config", str(group.toml), "status", "--json"]
        status = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        wait_until(
            lambda: "JournalUnavailable" in two.ask("sign", "signer").get("error", []), "the one with refuse stops"
        )
        assert one.do("sign", "signer") == 128
        assert json.loads(status.communicate(timeout=60)[0])["journal"]["ok"] is False
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
    one, two = hosts[:2]
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


def test_what_was_under_way_when_the_registration_ran_out_is_soon_whole_or_gone(
    group: GroupFixture, nodes: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that was cut off for so long comes back as another owner, and knows what its former calls came to."""
    other = EtcdClient(nodes.section())
    with clients(group, 1) as [client]:
        journal, confirm, calls = client.journal, client.journal.confirm, itertools.count(1)

        def cut_off(*what: Any, **more: Any) -> list[bool]:
            if next(calls) > len(group.members):
                return confirm(*what, **more)  # type: ignore[no-any-return]
            with contextlib.suppress(JournalUnavailable):  # it was already
                other.revoke(journal._lease)
            raise Unanswered("cut off")

        monkeypatch.setattr(journal, "confirm", cut_off)
        before = journal.owner
        try:
            uid = client.aes("cut off")
        except JournalUnavailable:
            client.sync()  # in less than the minutes for which calls of the dead may still be executed
            assert not journal.search({CKA.LABEL: b"cut off"})
        else:
            client.sync()
            client.use(uid)
            client.session.destroy(uid)
            client.sync()
        assert journal.owner != before
    assert all("cut off" not in plain.labels(member) for member in group.members.values())


def test_no_acknowledged_change_is_lost_while_nodes_go(group: GroupFixture, nodes: Cluster, hosts: list[Host]) -> None:
    """A mixed load while the leader, then each node in turn, is frozen and killed."""
    for number, host in enumerate(hosts):
        host.do("find", "signer")
        host.do("begin signing", "")
        host.do("begin changing", f"host{number}")
    for number in range(ROUNDS):
        _outage(nodes, number)
    found = [host.do("end changing", "") for host in hosts]
    signed = [host.do("end signing", "") for host in hosts]
    print(json.dumps([[one["changes"], one["longest"], *more] for one, more in zip(found, signed, strict=True)]))
    assert all(failed == [] for _, _, failed in signed), signed
    assert all(count > 0 for count, _, _ in signed) and all(one["changes"] > 0 for one in found)
    alive = {label for one in found for label in one["alive"]}
    dead = {label for one in found for label in one["dead"]}
    unknown = {label for one in found for label in one["unknown"]}

    def mine(member: str) -> list[str]:
        return [label for label in sorted(plain.labels(group.members[member])) if label.startswith("host")]

    def settled() -> bool:
        """What was left half done is finished, and all members agree."""
        held = [mine(member) for member in group.members]
        return held.count(held[0]) == len(held) and group.admin("sync").returncode == 0

    wait_until(settled, "all members hold the same")
    for member in group.members:
        held = mine(member)
        assert {label for label in held if label not in unknown} == alive, "none lost"
        assert not dead & set(held), "a deleted key is alive"
        assert len(set(held)) == len(held), "a refused change was made twice"
    assert group.admin("verify").returncode == 0
    assert group.admin("journal", "verify").returncode == 0


def _outage(nodes: Cluster, number: int) -> None:
    node = nodes.leader() if number < 2 else nodes.nodes[number % 3]
    if number % 2 == 0:
        nodes.signal(node, signal.SIGSTOP)
    else:
        nodes.kill(node)
    time.sleep(OUTAGE)  # how long it lasts, not a race
    nodes.heal()
