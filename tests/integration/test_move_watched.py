"""A planned move of the journal is no alarm; a token that was put back to before it is one. With a real watchdog."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.support.groups import GroupFixture, make_group, run_client, wait_until
from tests.support.watchdogs import configure, events, kinds, make_hook, watching


def listed(group: GroupFixture, kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(group.admin("journal", "list", "--event", kind, "--json").stdout)
    return found


def whole(group: GroupFixture) -> bool:
    status = group.status()
    return status["group"]["state"] == "ok" and status["group"]["in_sync"]


def test_a_planned_move_is_no_alarm_and_an_older_token_is_one(fast_folder: Path) -> None:
    group = make_group(fast_folder / "move-watched")
    hook, told = make_hook(group.folder)
    configure(group, hook)
    run_client(group, "session.generate_key(KeyType.AES, 128, store=True, label='kept')\n")
    assert group.admin("sync").returncode == 0
    with watching(group):
        wait_until(lambda: listed(group, "watchdog"), "it begins to remember what it told")
    before = group.folder / "hsm2" / "tokens.before"
    shutil.copytree(group.token_folder("hsm2"), before)
    done = group.admin("journal", "move", "sqlite:journal.db", "sqlite:moved.db", "--yes")
    assert done.returncode == 0, done.stderr
    group.toml.write_text(group.toml.read_text().replace("sqlite:journal.db", "sqlite:moved.db"))
    with watching(group, "after"):
        wait_until(lambda: len(listed(group, "member followed the journal")) == 3, "each member was looked through")
        wait_until(lambda: whole(group), "all serve again")
    assert len(listed(group, "journal moved")) == 1
    assert "alarm" not in kinds(told) and listed(group, "alarm") == []

    shutil.rmtree(group.token_folder("hsm2"))
    before.rename(group.token_folder("hsm2"))
    with watching(group, "restored"):
        wait_until(lambda: "alarm" in kinds(told), "people hear of it")
        wait_until(lambda: whole(group), "it is repaired")
    (alarm,) = [event for event in events(told) if event["kind"] == "alarm"]
    assert "hsm2: its token is of an older epoch of the group" in alarm["text"]
