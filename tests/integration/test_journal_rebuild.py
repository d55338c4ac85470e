"""A journal that was lost, copied or put back (issue 3, 6): real members, real commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import plain
from tests.support.groups import GroupFixture, copy_group, make_group, run_client

_MAKE = """
for n in range(2):
    session.generate_key(KeyType.AES, 256, store=True, label=f"key {n}")
session.generate_keypair(KeyType.RSA, 2048, store=True, label="signer")
doomed = session.generate_key(KeyType.AES, 256, store=True, label="doomed")
doomed.destroy()
"""
_NAMES = ["key 0", "key 1", "signer", "signer"]
_LIST = "print(sorted(o.label for o in session.get_objects()))\n"


@pytest.fixture(scope="module")
def template(fast_folder: Path) -> GroupFixture:
    group = make_group(fast_folder / "rebuild-template", members=2)
    run_client(group, _MAKE)
    assert group.admin("sync").returncode == 0
    return group


@pytest.fixture
def group(template: GroupFixture, fast_folder: Path) -> Iterator[GroupFixture]:
    folder = fast_folder / "rebuild"
    yield copy_group(template, folder)
    shutil.rmtree(folder)


def lose(group: GroupFixture) -> None:
    for end in ("", "-wal", "-shm", ".view"):
        (group.folder / f"journal.db{end}").unlink(missing_ok=True)


def test_a_lost_journal_is_rebuilt_and_the_group_replicates_again(group: GroupFixture) -> None:
    lose(group)
    refused = group.admin("status")
    assert "journal rebuild" in refused.stdout + refused.stderr
    done = group.admin("journal", "rebuild", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    told = json.loads(done.stdout)
    assert told["objects"] == 4 and told["doubtful"] == [] and told["not_replicable"] == []
    assert any("destroyed before now" in text for text in told["unknown"])
    synced = group.admin("sync")
    assert synced.returncode == 0, synced.stderr + synced.stdout
    made = run_client(group, 'session.generate_key(KeyType.AES, 256, store=True, label="new")\n' + _LIST)
    assert made.strip().endswith(str(sorted([*_NAMES, "new"])))
    for name in group.members:
        assert sorted(plain.labels(group.members[name])) == sorted([*_NAMES, "new"])

    # one that is well is not overwritten without a word
    again = group.admin("journal", "rebuild")
    assert again.returncode == 2 and "nothing was changed" in again.stderr
    assert group.admin("verify").returncode == 0
