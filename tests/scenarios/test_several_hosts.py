"""Several hosts, one group: the journal on a real etcd cluster (issue: several hosts). Hosts are processes with a
configuration of their own; the members are tokens that all of them reach, each by its own module instance."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
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
from tests.support import forked_admin, networks, plain
from tests.support.clients import clients
from tests.support.etcd import Cluster
from tests.support.groups import PIN, GroupFixture, address, make_group, run_client, wait_until
from tests.support.hosts import Host, own_configuration
from tests.support.networks import Network

ROUNDS = int(os.environ.get("HAGROUP_ETCD_ROUNDS", "1"))
"""Of the mixed load. HAGROUP_ETCD_ROUNDS=20 is a matter of minutes, and uses four hosts."""
OUTAGE = 3.0


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """The tests are at a place of their own, too."""
    made = networks.make()
    with made.place().inside():
        yield made
        forked_admin.close_idle(networks.number_here())
    made.close()


@pytest.fixture(autouse=True)
def said(network: Network, record_property: Callable[[str, object], None]) -> None:
    record_property(networks.SAID, str(network))


@pytest.fixture(scope="module")
def nodes(network: Network) -> Iterator[Cluster]:
    made = Cluster(3, network=network)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def group(nodes: Cluster, fast_folder: Path) -> GroupFixture:
    section = nodes.section()
    options = ["--journal", str(section.url), "--journal-ca", str(section.ca)]
    options += ["--journal-cert", str(section.cert), "--journal-key", str(section.key)]
    return make_group(fast_folder / "several-hosts", *options)


@pytest.fixture(scope="module")
def hosts(group: GroupFixture, network: Network) -> Iterator[list[Host]]:
    """The second one stops without the journal."""
    opened = []
    for name in ("one", "two", "three", "four")[: 2 if ROUNDS == 1 else 4]:
        offline_serving = "refuse" if name == "two" else "allow"
        own = own_configuration(group, name, offline_serving=offline_serving)
        opened.append(Host(own, network.place()))
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

    def waits_for_nobody() -> bool:
        hosts[0].do("aes", "brief")
        if hosts[0].ask("destroy", "brief")["took"] < 5.0:
            return True
        run_client(new, "pass")
        return False

    # a program that etcd does not answer in time when it ends is waited for
    assert any(waits_for_nobody() for _ in range(3)), "the program that ended is waited for"


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
        pipe = subprocess.PIPE
        status = subprocess.Popen(command, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, text=True)
        wait_until(
            lambda: "JournalUnavailable" in two.ask("sign", "signer").get("error", []), "the one with refuse stops"
        )
        assert one.do("sign", "signer") == 128
        shown, said = status.communicate(timeout=60)
        assert json.loads(shown)["journal"]["ok"] is False
        assert "Traceback" not in said
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


def test_a_host_that_was_cut_off_serves_nothing_stale(group: GroupFixture, hosts: list[Host]) -> None:
    """From the journal and from one member, while others delete and rename keys."""
    one, two = hosts[:2]
    with clients(group, 1) as [client]:
        doomed, renamed = client.aes("doomed"), client.aes("old name")
        for host in (one, two):
            for label in ("signer", "doomed", "old name"):
                wait_until(lambda host=host, label=label: host.do("find", label) > 0, f"the host finds {label}")
            host.do("encrypt", "doomed")
        one.do("begin signing", "")
        with one.cut_off("hsm2") as separate, two.cut_off():
            began = time.monotonic()
            client.session.destroy(doomed)  # returns when the registrations of those that are cut off have run out
            assert time.monotonic() - began < 20
            if separate:
                _goes_on_or_stops(one, two)
            client.rename(renamed, "new name")
        signed, longest, failed = one.do("end signing", "")
        if separate:
            assert signed > 0
            assert failed == []
            assert longest < 5.0, "the timeout of a call"
    for host in (one, two):
        wait_until(lambda host=host: "ok" in host.ask("aes", "woken"), "changes go on by themselves")
        assert {"ObjectHandleInvalid", "KeyHandleInvalid"} & set(host.ask("encrypt", "doomed").get("error", []))
        assert [host.do("find", label) for label in ("doomed", "old name", "new name", "never")] == [0, 0, 1, 0]
    told: Callable[[], str] = lambda: group.admin("journal", "list", "--event", "passed over").stdout  # noqa: E731
    assert "did not acknowledge" in told()
    assert group.admin("journal", "verify").returncode == 0


def _goes_on_or_stops(one: Host, two: Host) -> None:
    """Where both were cut off, and others deleted a key since."""
    refused = two.ask("encrypt", "doomed")
    assert "JournalUnavailable" in refused["error"], "it stopped before the key was deleted"
    gone = one.ask("encrypt", "doomed")
    assert {"ObjectHandleInvalid", "KeyHandleInvalid"} & set(gone.get("error", [])), "no member has it"
    assert one.do("encrypt", "old name") == 32, "this one goes on with what it knew"
    refused = one.ask("aes", "never")
    assert "JournalUnavailable" in refused["error"], refused
    assert "majority" in refused["text"]
    assert refused["took"] < 1.0, "at once, once it is known"
    assert one.do("sign", "signer") == 128


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
    """Frozen, cut off (where the system allows it) and killed; twice the leader in each way, then each node in turn."""
    node = nodes.leader() if number < 6 else nodes.nodes[number % 3]
    with contextlib.ExitStack() as back:
        way = number % 3 if number < 6 else number // 3 % 3
        if (way == 0 and not back.enter_context(nodes.places[node].cut_off())) or way == 1:
            nodes.signal(node, signal.SIGSTOP)
        elif way == 2:
            nodes.kill(node)
        time.sleep(OUTAGE)  # how long it lasts, not a race
    nodes.heal()
