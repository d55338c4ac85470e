"""``ha-admin group delete``: nothing of an empty group is left on any token, and another one can be made there."""

from __future__ import annotations

from pathlib import Path

from tests.support import plain
from tests.support.groups import SO_PIN, make_group, run_client
from tests.support.newcomers import private


def test_group_delete(fast_folder: Path) -> None:
    group = make_group(fast_folder / "deleted", members=2)
    text = group.toml.read_text()
    run_client(group, "session.generate_key(KeyType.AES, 256, store=True, label='a key')\n")
    refused = group.admin("group", "delete", "--yes")
    assert refused.returncode == 2
    assert "has 1 objects" in refused.stderr
    assert group.admin("clear", "--yes").returncode == 0
    refused = group.admin("group", "delete")
    assert refused.returncode == 2
    assert "not confirmed" in refused.stderr
    group.take_away("hsm2")
    half = group.admin("group", "delete", "--yes")
    assert half.returncode == 3
    assert "run the same command again" in half.stderr
    group.bring_back("hsm2")
    done = group.admin("group", "delete", "--yes")
    assert done.returncode == 0, done.stderr
    for member in group.members.values():
        assert plain.objects(member, own=True) == []
    assert "serial" not in group.toml.read_text().split("[[member]]")[0]
    assert not list(group.folder.glob("journal.db")) and list(group.folder.glob("journal.db.deleted-*"))
    assert "group create" in group.admin("status").stderr
    so_pin = private(group.folder / "so-pin", SO_PIN)
    again = group.admin("group", "create", "--yes", "--so-pin-file", str(so_pin))
    assert again.returncode == 0, again.stderr
    assert group.toml.read_text() != text
    run_client(group, "session.generate_key(KeyType.AES, 256, store=True, label='a new key')\n")
    assert plain.labels(group.members["hsm1"]) == ["a new key"]
