"""T 3.4.4: a member is away while a short-lived program makes a key; the next client brings it up to date."""

from __future__ import annotations

import json

from tests.support.groups import GroupFixture, run_client, wait_until
from tests.support.recovery import all_labels, converge


def test_3_4_4_recovery(group: GroupFixture) -> None:
    group.take_away("hsm2")
    run_client(group, "session.generate_key(KeyType.AES, 256, store=True, label='made while away')\n")
    group.bring_back("hsm2")
    converge(group)
    assert all_labels(group) == [["made while away"]] * 3


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
