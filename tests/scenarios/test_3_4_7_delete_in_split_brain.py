"""T 3.4.7: keys are deleted on both sides of a split brain; they stay deleted, everywhere."""

from __future__ import annotations

from tests.support.groups import GroupFixture, run_client
from tests.support.recovery import all_labels, converge


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
