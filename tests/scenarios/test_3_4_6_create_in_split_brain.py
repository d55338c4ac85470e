"""T 3.4.6: keys are made on both sides of a split brain; every member has both in the end."""

from __future__ import annotations

from tests.support.groups import GroupFixture, run_client
from tests.support.recovery import all_labels, converge


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
