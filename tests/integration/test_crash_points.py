"""G7: a client that is killed before and after every journal transaction and every changing call to a member.

Each client first has to find the group whole again after the one before it was killed (all or nothing, nothing owed,
no open intent, nothing acknowledged lost), then makes the next change and is killed in it. What is on the tokens is
read with plain python-pkcs11 at the end of each kind of change.

Every kind has 40 to 60 points to be killed at. A run takes a sample of them, evenly spread (``HAGROUP_CRASH_ALL=1``:
all); the number of interactions is printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from cryptography.hazmat.primitives.keywrap import aes_key_wrap

from tests.support import plain
from tests.support.groups import PIN, GroupFixture

SAMPLE = 2
"""Points of each kind."""
BOUND = 30.0
"""Seconds in which a fresh client must have put everything right."""

_CLIENT = r"""
import json, os, signal, sys, threading, time

asked = json.load(sys.stdin)
import hagroup as pkcs11
from hagroup import Attribute, KeyType, Mechanism, ObjectClass
from hagroup import bootstrap
from hagroup.journal import SqliteJournal
from hagroup.members.connection import MessageConnection

def say(**what):
    os.write(1, json.dumps(what).encode() + b"\n")  # whole lines, whichever threads write

groups = []
started = bootstrap.start_group
def start_group(*args, **kwargs):
    groups.append(started(*args, **kwargs))
    return groups[-1]
bootstrap.start_group = start_group

lock, count, armed = threading.Lock(), 0, False

def interaction(name):
    global count
    if not armed:
        return
    with lock:
        count += 1
        if count == asked["kill_at"]:
            say(killed=name)
            os.kill(os.getpid(), signal.SIGKILL)

def hook(owner, name):
    method = getattr(owner, name)
    def hooked(*args, **kwargs):
        interaction("before " + name)
        result = method(*args, **kwargs)
        interaction("after " + name)
        return result
    setattr(owner, name, hooked)

for name in ("begin_create", "go_live", "abandon_create", "begin_set", "commit_set", "rollback_set", "destroy", "claim",
             "confirm", "undone", "give_up", "owe", "clear_doubt", "resolve_attempts", "manifest_confirmed"):
    hook(SqliteJournal, name)
for name in ("create", "copy", "destroy", "set", "unwrap", "generate", "generate_pair", "derive"):
    hook(MessageConnection, name)

def wait_for_peace(journal):
    deadline = time.monotonic() + asked["bound"]
    while True:
        owed, intents = journal.owed(), journal.intents()
        if not owed and not intents:
            return
        if time.monotonic() > deadline:
            say(restless=[repr(row) for row in owed] + [repr(one) for one in intents])
            os._exit(3)
        time.sleep(0.02)

def found(session, label):
    return sorted(
        (int(item[Attribute.CLASS]), item[Attribute.ID].hex()) for item in session.get_objects({Attribute.LABEL: label})
    )

def generate(session, label):
    session.generate_keypair(KeyType.RSA, 1024, store=True, label=label, id=label.encode())

def create(session, label):
    session.create_object({
        Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.KEY_TYPE: KeyType.AES, Attribute.VALUE: b"x" * 16,
        Attribute.TOKEN: True, Attribute.LABEL: label, Attribute.ID: label.encode(),
    })

def prepare(session, label):
    session.generate_key(KeyType.AES, 128, store=True, label=label + " old", id=label.encode())

def copy(session, label):
    session.get_key(label=label + " old").copy({Attribute.LABEL: label})

def change(session, label):
    session.get_key(label=label + " old")[Attribute.LABEL] = label

def destroy(session, label):
    session.get_key(label=label + " old").destroy()

def prepare_wrapping(session, label):
    session.create_object({
        Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.KEY_TYPE: KeyType.AES, Attribute.VALUE: b"w" * 16,
        Attribute.TOKEN: True, Attribute.LABEL: label + " old", Attribute.ID: label.encode(),
        Attribute.UNWRAP: True, Attribute.DERIVE: True,
    })

def unwrap(session, label):
    session.get_key(label=label + " old").unwrap_key(
        ObjectClass.SECRET_KEY, KeyType.AES, bytes.fromhex(asked["wrapped"]), mechanism=Mechanism.AES_KEY_WRAP,
        store=True, label=label, id=label.encode() + b"u")

def derive(session, label):
    key = session.get_key(label=label + " old")
    key.derive_key(KeyType.AES, 128, mechanism=Mechanism.AES_ECB_ENCRYPT_DATA, mechanism_param=b"p" * 16, store=True,
                   label=label, id=label.encode() + b"d")

changes = {"generate": (None, generate), "create": (None, create), "copy": (prepare, copy), "set": (prepare, change),
           "destroy": (prepare, destroy), "unwrap": (prepare_wrapping, unwrap), "derive": (prepare_wrapping, derive)}

lib = pkcs11.lib(asked["toml"])
token = lib.get_token(token_label="payments")
began = time.monotonic()
session = token.open(rw=True, user_pin=asked["pin"])
journal = groups[0].journal
wait_for_peace(journal)
groups[0].supervisor.settle()
states = [member.state.value for member in groups[0].roster.members.values()]
say(whole_after=time.monotonic() - began, states=states,
    found={label: found(session, label) for label in asked["look"]})
if asked["change"]:
    before, now = changes[asked["change"]]
    if before:
        before(session, asked["label"])
        wait_for_peace(journal)
    armed = True
    now(session, asked["label"])
    say(acknowledged=True)
    wait_for_peace(journal)
    say(interactions=count)
    armed = False
session.close()
"""


@dataclass
class Told:
    """What a client said before its end."""

    found: dict[str, list[list[Any]]]
    whole_after: float
    acknowledged: bool = False
    interactions: int | None = None
    killed: str | None = None


class Crasher:
    """Runs one client after the other."""

    def __init__(self, group: GroupFixture) -> None:
        self.group = group
        self.slowest = 0.0

    def client(self, change: str | None, label: str, kill_at: int, look: list[str]) -> Told:
        asked = {
            "toml": str(self.group.toml),
            "pin": PIN,
            "change": change,
            "label": label,
            "kill_at": kill_at,
            "look": look,
            "bound": BOUND,
            "wrapped": aes_key_wrap(b"w" * 16, b"k" * 16).hex(),
        }
        done = subprocess.run(
            [sys.executable, "-c", _CLIENT],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        said: dict[str, Any] = {}
        for line in done.stdout.splitlines():
            said |= json.loads(line)
        restless = "\n".join(said.get("restless", []))
        assert not restless, f"{change} {label}:\n{restless}\n{done.stderr}"
        assert "found" in said, (change, label, done.stdout, done.stderr)
        assert set(said["states"]) == {"in service"}, (said["states"], done.stderr)
        assert ("killed" in said) == (done.returncode == -9), (done.returncode, done.stderr)
        if change is not None and "killed" not in said:
            assert done.returncode == 0, done.stderr
        self.slowest = max(self.slowest, said["whole_after"])
        return Told(
            found=said["found"],
            whole_after=said["whole_after"],
            acknowledged="acknowledged" in said,
            interactions=said.get("interactions"),
            killed=said.get("killed"),
        )


def points(interactions: int) -> list[int]:
    if os.environ.get("HAGROUP_CRASH_ALL"):
        return list(range(1, interactions + 1))
    count = min(SAMPLE, interactions)
    return sorted({round(1 + index * (interactions - 1) / max(1, count - 1)) for index in range(count)})


def judge(change: str, label: str, told: Told, found: dict[str, list[list[Any]]]) -> None:
    """All or nothing, and nothing acknowledged lost."""
    new, old = found[label], found[label + " old"]
    where = f"{change} killed {told.killed} (acknowledged: {told.acknowledged}): {found}"
    if change == "generate":
        assert [item[0] for item in new] in ([], [2, 3]), where
    else:
        assert len(new) in (0, 1), where
    if change in ("copy", "unwrap", "derive"):
        assert len(old) == 1, where
    elif change == "set":
        assert len(new) + len(old) == 1, where
    elif change == "destroy":
        assert len(old) in (0, 1), where
    if told.acknowledged:
        assert new if change != "destroy" else not old, where
    if told.acknowledged and change == "set":
        assert not old, where


@pytest.mark.parametrize("change", ["generate", "create", "copy", "unwrap", "derive", "set", "destroy"])
def test_killed_anywhere(crasher: Crasher, change: str) -> None:
    began = time.monotonic()
    label = f"{change} whole"
    told = crasher.client(change, label, 0, [])
    assert told.acknowledged and told.interactions
    total = told.interactions
    chosen = points(total)
    expected: Counter[str] = Counter()
    look = [label, label + " old"]
    for point in [*chosen, None]:
        before, before_label = told, label
        label = f"{change} {point}"
        told = crasher.client(None if point is None else change, label, point or 0, look)
        judge(change, before_label, before, told.found)
        expected.update({name: len(items) for name, items in told.found.items() if items})
        look = [label, label + " old"]
    print(
        f"\n{change}: {total} interactions, killed at {len(chosen)} of them; whole again after at most "
        f"{crasher.slowest:.1f} s; {time.monotonic() - began:.0f} s"
    )
    for name, member in crasher.group.members.items():
        items = plain.objects(member, 0x102, own=True)
        mine = Counter(item["label"] for item in items if item["label"].startswith(change))
        assert mine == expected, name
        records = sum(1 for item in items if item["label"].startswith("hagroup:object:"))
        others = sum(1 for item in items if not item["label"].startswith("hagroup"))
        assert records == others, f"{name}: {records} records for {others} objects"
        shown = sum(1 for item in items if item["label"].startswith("hagroup:manifest:"))
        assert shown in (1, 2), f"{name}: {shown} manifests"  # an older one goes when the next is written
    status = crasher.group.status()
    assert status["group"]["in_sync"], status


@pytest.fixture(scope="module")
def crasher(tmp_path_factory: pytest.TempPathFactory, fast_folder: Any) -> Crasher:
    from tests.support.groups import make_group

    return Crasher(make_group(fast_folder / "crashes"))
