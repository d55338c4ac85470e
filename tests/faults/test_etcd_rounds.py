"""A mixed load from four hosts while the nodes of the journal's cluster are killed and frozen, the leader first."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import plain
from tests.support.etcd import Cluster, cluster
from tests.support.groups import PIN, GroupFixture, make_group, run_client, wait_until

pytestmark = pytest.mark.xdist_group("etcd")

ROUNDS = int(os.environ.get("HAGROUP_ETCD_ROUNDS", "1"))
"""Twenty are a matter of minutes: HAGROUP_ETCD_ROUNDS=20."""
ROUND = 4.0

LOAD = """
import json, random, sys, threading, time
import hagroup as pkcs11
from hagroup import Attribute, KeyType, Mechanism
name, seed = sys.argv[3], int(sys.argv[4])


def begin(what):
    # On a loaded machine even a healthy cluster may be without a leader for seconds: a program that starts waits.
    deadline = time.monotonic() + 60
    while True:
        try:
            return what()
        except pkcs11.PKCS11Error:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


lib = begin(lambda: pkcs11.lib(sys.argv[1]))
session = begin(lambda: lib.get_token(token_label="payments").open(rw=True, user_pin=sys.argv[2]))
chance = random.Random(seed)
found = {"alive": [], "dead": [], "unknown": [], "errors": [], "signed": 0, "changes": 0, "sign": 0.0, "change": 0.0}
stop = threading.Event()
signer = begin(lambda: session.get_key(label=name + "-signer"))

def timed(what, call):
    began = time.monotonic()
    try:
        return call()
    finally:
        found[what] = max(found[what], time.monotonic() - began)

def sign():
    while not stop.is_set():
        try:
            timed("sign", lambda: signer.encrypt(bytes(16), mechanism_param=bytes(16)))
            found["signed"] += 1
        except Exception as error:
            found["errors"].append(repr(error))
        time.sleep(0.005)

def change():
    number, keys = 0, {}
    while not stop.is_set():
        number += 1
        label = f"{name}-{number}"
        try:
            if keys and chance.random() < 0.4:
                label = chance.choice(sorted(keys))
                key = keys.pop(label)
                found["unknown"].append(label)
                found["alive"].remove(label)
                timed("change", key.destroy)
                found["unknown"].remove(label)
                found["dead"].append(label)
            else:
                found["unknown"].append(label)
                keys[label] = timed(
                    "change", lambda: session.generate_key(KeyType.AES, 128, store=True, label=label)
                )
                found["unknown"].remove(label)
                found["alive"].append(label)
            found["changes"] += 1
        except pkcs11.PKCS11Error as error:
            found.setdefault("refused", []).append(type(error).__name__)
            time.sleep(0.05)

threads = [threading.Thread(target=one) for one in (sign, change)]
for one in threads:
    one.start()
print("ready", flush=True)
sys.stdin.readline()
stop.set()
for one in threads:
    one.join()
print(json.dumps(found), flush=True)
"""


def test_no_acknowledged_change_is_lost_while_nodes_go(fast_folder: Path) -> None:
    nodes = cluster()
    section = nodes.section()
    options = ["--journal", str(section.url), "--journal-ca", str(section.ca)]
    options += ["--journal-cert", str(section.cert), "--journal-key", str(section.key)]
    group = make_group(fast_folder / "etcd-rounds", *options, members=2)
    make = 'session.generate_key(KeyType.AES, 128, store=True, label=f"host{number}-signer")'
    run_client(group, f"for number in range(4):\n    {make}\n")
    hosts = [_host(group, number) for number in range(4)]
    try:
        for number in range(ROUNDS):
            _round(nodes, number)
    finally:
        nodes.heal()
        found = [_end(host) for host in hosts]
    print(json.dumps([{name: one[name] for name in ("signed", "changes", "sign", "change")} for one in found]))
    assert all(one["errors"] == [] for one in found), [one["errors"][:2] for one in found]
    assert all(one["signed"] > 20 and one["changes"] > 0 for one in found), found
    alive = sorted(label for one in found for label in one["alive"])
    dead = {label for one in found for label in one["dead"]}
    unknown = {label for one in found for label in one["unknown"]}

    def settled() -> bool:
        """What the hosts left half done is finished by whoever comes next, and all members agree."""
        run_client(group, "pass")
        done = [sorted(plain.labels(member)) for member in group.members.values()]
        return done[0] == done[1] and group.admin("sync").returncode == 0

    wait_until(settled, "both members hold the same", 60.0)
    for member in group.members.values():
        labels = sorted(plain.labels(member))
        signers = [f"host{number}-signer" for number in range(4)]
        assert [label for label in labels if label not in unknown] == sorted(alive + signers), "none lost, none twice"
        assert not dead & set(labels), "a deleted key is alive"
        assert all(labels.count(label) <= 1 for label in unknown), "a refused change was made twice"
    assert group.admin("verify").returncode == 0
    assert group.admin("journal", "verify").returncode == 0


def _round(nodes: Cluster, number: int) -> None:
    """The leader first, then each node in turn; by turns killed and frozen."""
    node = nodes.leader() if number < 2 else nodes.nodes[number % 3]
    if number % 2 == 0:
        nodes.kill(node)
    else:
        nodes.signal(node, signal.SIGSTOP)
    time.sleep(ROUND)  # the length of the outage, not a race
    nodes.heal()


def _host(group: GroupFixture, number: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LOAD, str(group.toml), PIN, f"host{number}", str(random.randrange(1 << 30))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready", "it did not start: see what it wrote"
    return process


def _end(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate("\n", timeout=120)
    found: dict[str, Any] = json.loads(out)
    return found
