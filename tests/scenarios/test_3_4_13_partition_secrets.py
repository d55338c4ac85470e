"""T 3.4.13: members that share the domain key but not the partition's secret are refused: the owner of the domain key
alone can have nothing cloned."""

from __future__ import annotations

from pathlib import Path

import hagroup as pkcs11
from tests.support.domains import DOMAIN, check_refused_at_create, check_refused_in_service, implant
from tests.support.faulty import engine
from tests.support.groups import PIN, make_group, wait_until


def test_group_create(fast_folder: Path) -> None:
    check_refused_at_create(fast_folder / "domains-13", (DOMAIN, b"x" * 32), "partition secret differs")


def test_a_member_shows_up_with_another_partition_key(fast_folder: Path) -> None:
    """In a running group."""
    group = make_group(fast_folder / "domains-13-live", members=2)
    lib = pkcs11.lib(str(group.toml))
    try:
        with lib.get_token(token_label="payments").open(rw=True, user_pin=PIN) as session:
            roster = engine(session).roster
            wait_until(lambda: len(roster.serving()) == 2, "both members in service")
            implant(group.members["hsm2"], None, b"x" * 32, ids=False)
            group.workers()["hsm2"].kill()
            roster.bury_the_dead()
            check_refused_in_service(group, session, "the partition secret differs")
    finally:
        lib.unload()
