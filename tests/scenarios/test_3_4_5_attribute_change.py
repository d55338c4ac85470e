"""T 3.4.5: a label is changed while a member is away; it converges, with no human step."""

from __future__ import annotations

from tests.support import plain
from tests.support.groups import GroupFixture, run_client
from tests.support.recovery import all_labels, converge


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
