"""T 3.4.4 to 3.4.7: what happened while a member was away is right on it before it serves again; no human step."""

from __future__ import annotations

import json

from hagroup import Attribute
from tests.support import plain
from tests.support.groups import GroupFixture, run_client, wait_until

SYNC = """
import time
from tests.support.groups import wait_until
"""


def converge(group: GroupFixture) -> None:
    """A new client starts; that is all."""
    program = (
        "import time, subprocess, json\n"
        "deadline = time.monotonic() + 60\n"
        f"command = [sys.executable, '-m', 'hagroup.admin.cli', '--config', {str(group.toml)!r}, 'status', '--json']\n"
        "while True:\n"
        "    done = subprocess.run(command, capture_output=True, text=True)\n"
        "    if done.returncode == 0: break\n"
        "    assert time.monotonic() < deadline, done.stdout + done.stderr\n"
        "    time.sleep(0.2)\n"
    )
    run_client(group, program)


def all_labels(group: GroupFixture) -> list[list[str]]:
    return [plain.labels(member) for member in group.members.values()]


def test_3_4_4_recovery(group: GroupFixture) -> None:
    group.take_away("hsm2")
    run_client(group, "session.generate_key(KeyType.AES, 256, store=True, label='made while away')\n")
    group.bring_back("hsm2")
    converge(group)
    assert all_labels(group) == [["made while away"]] * 3


def test_3_4_5_attribute_change(group: GroupFixture) -> None:
    run_client(group, "session.generate_keypair(KeyType.RSA, 2048, store=True, label='before')\n")
    group.take_away("hsm2")
    run_client(
        group,
        "for key in session.get_objects({Attribute.LABEL: 'before'}): key[Attribute.LABEL] = 'after'\n",
    )
    group.bring_back("hsm2")
    converge(group)
    assert all_labels(group) == [["after", "after"]] * 3
    for member in group.members.values():
        assert plain.use(member, "sign", 3, "after", b"data", "SHA256_RSA_PKCS")


def test_3_4_6_create_in_split_brain(group: GroupFixture) -> None:
    group.take_away("hsm1")
    run_client(group, "session.generate_key(KeyType.AES, 256, store=True, label='one')\n")
    group.bring_back("hsm1")
    group.take_away("hsm2")
    group.take_away("hsm3")
    run_client(group, "session.generate_key(KeyType.AES, 256, store=True, label='two')\n")
    group.bring_back("hsm2")
    group.bring_back("hsm3")
    converge(group)
    assert all_labels(group) == [["one", "two"]] * 3


def test_3_4_7_delete_in_split_brain(group: GroupFixture) -> None:
    run_client(
        group,
        "for label in ('one', 'two', 'kept'): session.generate_key(KeyType.AES, 256, store=True, label=label)\n",
    )
    group.take_away("hsm1")
    run_client(group, "session.get_key(label='one').destroy()\n")
    group.bring_back("hsm1")
    group.take_away("hsm2")
    group.take_away("hsm3")
    run_client(group, "session.get_key(label='two').destroy()\n")
    group.bring_back("hsm2")
    group.bring_back("hsm3")
    converge(group)
    assert all_labels(group) == [["kept"]] * 3
    converge(group)
    assert all_labels(group) == [["kept"]] * 3


def test_sync_does_it_too(group: GroupFixture) -> None:
    group.take_away("hsm3")
    run_client(group, "session.generate_key(KeyType.AES, 256, store=True, label='late')\n")
    behind = group.admin("status", "--json")
    assert behind.returncode == 1
    members = {member["name"]: member for member in json.loads(behind.stdout)["members"]}
    assert members["hsm3"]["missing"] == 1
    assert members["hsm3"]["state"] == "failed"
    group.bring_back("hsm3")

    def synced() -> bool:
        return group.admin("sync").returncode == 0

    wait_until(synced, "ha-admin sync")
    assert group.admin("status").returncode == 0
    assert all_labels(group) == [["late"]] * 3
    assert Attribute.LABEL  # the names of pkcs11 come through hagroup
