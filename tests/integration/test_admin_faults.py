"""Every command of ha-admin in every kind of trouble (issue 4): one sentence, the right exit status, nothing half-done.

The commands run in this process, so that the whole matrix costs less than a few of them as programs.
"""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from hagroup.admin import cli
from hagroup.core.records import Lease
from hagroup.journal import SqliteJournal
from tests.support import plain
from tests.support.commands import run_here
from tests.support.groups import PIN, GroupFixture, copy_group, make_group, run_client
from tests.support.newcomers import private

FINE, DEGRADED, USAGE, UNREACHABLE = 0, 1, 2, 3

READING = {
    "group show": [],
    "status": [],
    "objects": [],
    "member list": [],
    "journal list": [],
    "journal tail": [],
    "journal verify": [],
    "journal todo": [],
    "sync --dry-run": [],
}
"""Need the journal alone."""
ASKING = {
    "objects --member hsm2": [],
    "verify": [],
    "domain show": [],
    "sync": [],
    "recover": [],
    "sync --adopt": [],
    "backup create": ["{folder}/new-backup"],
}
"""Ask members, and change nothing where nothing is to be changed."""
CHANGING = {
    "journal note": ["a note"],
    "member standby hsm2": [],
    "member backup hsm2": [],
    "member activate hsm2": [],
    "member drain hsm2": [],
    "member resume hsm2": [],
    "backup restore --yes": ["{folder}/backup"],
    "domain join hsm2": ["--so-pin-file", "{folder}/so-pin"],
    "domain shares --shares 2-of-3 --yes": [
        *("--shares-folder", "{folder}/new-shares"),
        *("--so-pin-file", "{folder}/so-pin"),
    ],
    "domain rotate --yes": ["--so-pin-file", "{folder}/so-pin"],
    "member remove hsm3 --yes": [],
    "group delete --yes": [],
    "clear --yes": [],
    "journal rebuild --yes": [],
    "journal adopt --yes": [],
}
ALONE = (
    "journal rebuild --yes",
    "journal adopt --yes",
    "backup restore --yes",
    "domain join hsm2",
    "domain shares --shares 2-of-3 --yes",
    "domain rotate --yes",
    "member remove hsm3 --yes",
    "clear --yes",
    "sync --adopt",
)
"""Take several steps: one administrator at a time."""
ALL = {**READING, **ASKING, **CHANGING, "doctor": [], "group create --yes": ["--so-pin-file", "{folder}/so-pin"]}


def test_every_command_is_in_the_matrix() -> None:
    known = {" ".join(word for word in line.split() if not word.startswith("-")) for line in ALL}
    elsewhere = {  # they need a new token, tokens without a group, or people
        "member add": "test_admin_members",
        "domain create": "test_admin_domain_create",
        "group join": "test_group_join",
        "journal move": "test_journal_move",
    }
    for command in _commands(typer.main.get_command(cli.app)):
        if command not in elsewhere:
            assert any(line == command or line.startswith(command + " ") for line in known), command


def _commands(group: Any, before: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{before}{name} ")
        else:
            yield before + name


@pytest.fixture(scope="module")
def template(fast_folder: Path) -> GroupFixture:
    group = make_group(fast_folder / "matrix", members=3)
    private(group.folder / "so-pin", "12345678")
    run_client(group, "for n in range(2):\n    session.generate_key(KeyType.AES, 256, store=True, label=f'key {n}')\n")
    assert group.admin("backup", "create", str(group.folder / "backup")).returncode == FINE
    return group


@pytest.fixture
def group(template: GroupFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Matrix:
    for method in (SqliteJournal.open, SqliteJournal.expect_replaceable):
        monkeypatch.setitem(method.__func__.__kwdefaults__, "busy_timeout", 0.1)  # type: ignore[attr-defined]
    return Matrix(template, capsys, monkeypatch)


class Matrix:
    """Runs commands on the group, in this process."""

    def __init__(
        self, group: GroupFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.group, self.capsys, self.monkeypatch = group, capsys, monkeypatch
        self.toml: Path | None = group.toml

    def run(self, line: str, more: list[str]) -> tuple[int, str, str]:
        """(exit status, standard output, standard error)."""
        words = [word.replace("{folder}", str(self.group.folder)) for word in [*line.split(), *more]]
        before = [] if self.toml is None else ["--config", str(self.toml)]
        (self.group.folder / "new-backup").unlink(missing_ok=True)
        shutil.rmtree(self.group.folder / "new-shares", ignore_errors=True)
        return run_here(self.monkeypatch, self.capsys, *before, *words)

    def refused(self, line: str, more: list[str], *statuses: int) -> str:
        """Refused with one sentence."""
        status, out, err = self.run(line, more)
        assert status in statuses, f"{line}: {status}: {out}{err}"
        assert err.startswith("ha-admin: ") and len(err.splitlines()) == 1, f"{line}: {err!r}"
        return err


def test_no_configuration(group: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HAGROUP_CONFIG", raising=False)
    group.toml = None
    for line, more in ALL.items():
        assert "HAGROUP_CONFIG" in group.refused(line, more, USAGE)
    group.toml = group.group.folder / "none.toml"
    for line, more in ALL.items():
        if line != "doctor":
            assert "does not exist" in group.refused(line, more, USAGE), line


@pytest.mark.parametrize("what", ["hagroup.toml", "journal.db"])
def test_wrong_permissions(group: Matrix, what: str) -> None:
    file = group.group.folder / what
    before = file.stat().st_mode & 0o777
    file.chmod(0o666)
    try:
        for line, more in ALL.items():
            if line not in ("doctor", "status") and not (line.startswith("group create") and what == "journal.db"):
                assert "chmod" in group.refused(line, more, USAGE), line
    finally:
        file.chmod(before)


def test_journal_locked_by_another_process(group: Matrix) -> None:
    """Readers do not mind, writers say so; nothing was changed."""
    journal = sqlite3.connect(group.group.folder / "journal.db", isolation_level=None)
    journal.execute("BEGIN IMMEDIATE")
    try:
        for line, more in ALL.items():
            if line not in ("doctor", "status", "group create --yes"):
                assert "locked" in group.refused(line, more, USAGE), line
    finally:
        journal.execute("ROLLBACK")
        journal.close()


@pytest.fixture
def read_only(group: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that is mounted read-only (root may write in spite of a file's mode)."""
    true = sqlite3.connect

    def connect(name: str, *arguments: Any, **keywords: Any) -> sqlite3.Connection:
        return true(name.replace("mode=rw", "mode=ro"), *arguments, **keywords)

    monkeypatch.setattr(sqlite3, "connect", connect)


@pytest.mark.usefixtures("read_only")
def test_journal_read_only(group: Matrix) -> None:
    for line, more in ALL.items():
        if line not in ("doctor", "status", "group create --yes"):
            assert "cannot be written" in group.refused(line, more, USAGE), line


def test_two_administrators(group: Matrix) -> None:
    other = SqliteJournal.open(group.group.folder / "journal.db")
    lease = other.acquire_lease("administration", ttl=60)
    assert isinstance(lease, Lease)
    try:
        for line in ALONE:
            assert "another ha-admin" in group.refused(line, ALL[line], UNREACHABLE), line
    finally:
        other.close()
    assert group.run("sync", [])[0] == FINE


@pytest.fixture
def changed(group: Matrix, fast_folder: Path) -> Iterator[Matrix]:
    """A copy of the group that may be spoilt."""
    folder = fast_folder / "matrix-copy"
    copy = copy_group(group.group, folder)
    group.group, group.toml = copy, copy.toml
    yield group
    shutil.rmtree(folder)


def test_one_member_down(changed: Matrix) -> None:
    """Everything goes on without it, says so, and what it missed is done when it is back."""
    assert changed.run("sync", [])[0] == FINE
    changed.group.take_away("hsm2")
    fine = [
        *READING,
        "domain show",
        "member standby hsm2",
        "member backup hsm2",
        "member activate hsm2",
        "member resume hsm2",
        "journal note",
        "backup create",
        "backup restore --yes",
        "sync --adopt",
        "member drain hsm2",
        "domain shares --shares 2-of-3 --yes",
    ]
    for line, more in ALL.items():
        status, out, err = changed.run(line, more)
        wanted = (FINE, DEGRADED) if line in fine else (DEGRADED,)
        if line in ("objects --member hsm2", "domain join hsm2"):
            wanted = (UNREACHABLE,)
        elif line in ("group create --yes", "group delete --yes"):  # there is one, and it has objects
            wanted = (USAGE,)
        elif line == "member remove hsm3 --yes":
            wanted = (FINE,)
        assert status in wanted, f"{line}: {status}: {out}{err}"
    changed.group.bring_back("hsm2")
    # the keys that it missed were in the journal that was replaced: people have to give them to it
    assert changed.run("domain join hsm2", ALL["domain join hsm2"])[0] == FINE
    assert changed.run("member resume hsm2", [])[0] == FINE
    assert changed.run("sync", [])[0] == FINE
    assert changed.run("verify", [])[0] == FINE
    for name in ("hsm1", "hsm2"):
        assert plain.labels(changed.group.members[name]) == [], "cleared, the one that was away too"


def test_all_members_down(group: Matrix) -> None:
    for name in group.group.members:
        group.group.take_away(name)
    journal_alone = ("journal note", "member resume hsm2", "member standby hsm2", "member backup hsm2")
    journal_alone += ("member activate hsm2",)
    try:
        for line, more in {**ASKING, **CHANGING, "status": []}.items():
            status, out, err = group.run(line, more)
            wanted: tuple[int, ...] = (UNREACHABLE,)
            if line in journal_alone:
                wanted = (FINE,)
            elif line in ("verify", "domain show"):
                wanted = (DEGRADED, UNREACHABLE)
            elif line in ("member drain hsm2", "member remove hsm3 --yes", "group delete --yes"):
                wanted = (USAGE, UNREACHABLE)
            assert status in wanted, f"{line}: {status}: {out}{err}"
    finally:
        for name in group.group.members:
            group.group.bring_back(name)
    assert group.run("sync", [])[0] == FINE


STOPPED_IN = {
    "journal rebuild --yes": "create",
    "group delete --yes": "event",
    "domain rotate --yes": "rewrap",
    "backup restore --yes": "begin_create",
    "member remove hsm3 --yes": "remove_member",
    "clear --yes": "clear_some",
    "sync": "acquire_lease",
}


@pytest.mark.parametrize("line", STOPPED_IN)
def test_ctrl_c_in_the_middle(changed: Matrix, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the same command again completes it."""
    main = threading.current_thread()
    true: Callable[..., Any] = getattr(SqliteJournal, STOPPED_IN[line])
    stopped = []

    def stop(*arguments: Any, **keywords: Any) -> Any:
        if threading.current_thread() is main and not stopped:
            stopped.append(line)
            raise KeyboardInterrupt
        return true(*arguments, **keywords)

    if line == "backup restore --yes":  # something has to be missing, and it never was destroyed
        changed.run("sync", [])
        with sqlite3.connect(changed.group.folder / "journal.db") as journal:
            for table in ("objects", "copies", "owed"):
                journal.execute(f"DELETE FROM {table}")
            journal.execute("UPDATE head SET live = 0, owed = 0")
    if line == "group delete --yes":
        assert changed.run("clear --yes", [])[0] == FINE
    monkeypatch.setattr(SqliteJournal, STOPPED_IN[line], staticmethod(stop) if hasattr(true, "__self__") else stop)
    status, _, err = changed.run(line, ALL[line])
    assert stopped and status == 130, err
    assert "run the same command again" in err
    status, out, err = changed.run(line, ALL[line])
    assert status == FINE, out + err
    if line == "group delete --yes":
        assert "group create" in changed.refused("status", [], USAGE)
        return
    if line == "journal rebuild --yes":
        assert changed.run("sync", [])[0] == FINE
    status, out, err = changed.run("verify", [])
    assert status == FINE, out + err
    assert PIN not in out
