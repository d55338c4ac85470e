"""Every command of ha-admin in every kind of trouble (issue 4): one sentence, the right exit status, nothing half-done.

The commands run in this process, so that the whole matrix costs less than a few of them as programs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from hagroup.admin import cli
from hagroup.core.records import Lease
from hagroup.journal import SqliteJournal
from tests.support import plain
from tests.support.admin_commands import ALL, ASKING, CHANGING, FOUNDING, READING, make_site, toml_of, words_of
from tests.support.commands import run_here
from tests.support.groups import PIN, ROOT, GroupFixture, copy_group
from tests.support.interactions import FROZEN
from tests.support.newcomers import private
from tests.support.terminal import Terminal

FINE, DEGRADED, USAGE, UNREACHABLE = 0, 1, 2, 3
JOIN = "group join --yes"
MOVE = "journal move sqlite:journal.db sqlite:moved.db --yes"
Ran = tuple[int, str, str]

ALONE = (
    "journal rebuild --yes",
    "journal adopt --yes",
    "backup restore --yes",
    "domain join hsm2",
    "domain shares --shares 2-of-3 --yes",
    "domain rotate --yes",
    "member add hsm4 --yes",
    "member remove hsm3 --yes",
    "clear --yes",
    "sync --adopt",
)
"""Take several steps: one administrator at a time."""
NO_JOURNAL = {
    "domain create --yes": "comes before the group, and so before its journal",
    "group create --yes": "makes the journal: any file in its place is refused, whatever it is like",
}
"""Why what is wrong with a journal cannot be in their way. (``group join`` makes it too, or finds one that an
interrupted attempt left.)"""
SAYS_WHAT_IS_WRONG = ("doctor", "status")
"""These are for that: they tell of the trouble among all else."""


def test_every_command_is_in_the_matrix() -> None:
    known = {" ".join(word for word in line.split() if not word.startswith("-")) for line in ALL}
    for command in _commands(typer.main.get_command(cli.app)):
        assert any(line == command or line.startswith(command + " ") for line in known), command


def _commands(group: Any, before: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{before}{name} ")
        else:
            yield before + name


@pytest.fixture(scope="module")
def template(fast_folder: Path) -> GroupFixture:
    """Its new host's folder is as an interrupted ``group join`` leaves it: the journal is there, no configuration."""
    group = make_site(fast_folder / "matrix", isolation="process")
    join = toml_of(group, JOIN)
    done = group.admin("--config", str(join), *words_of(group, JOIN))
    assert done.returncode == FINE, done.stdout + done.stderr
    join.unlink()
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

    def run(self, line: str, more: list[str] | None = None, *, toml: str | None = "hagroup.toml") -> Ran:
        """(exit status, standard output, standard error).

        :param toml: the configuration's name in the folder that the command is for; None: it is not named.
        """
        words = words_of(self.group, line, more)
        before = [] if toml is None else ["--config", str(toml_of(self.group, line).with_name(toml))]
        (self.group.folder / "new-backup").unlink(missing_ok=True)
        shutil.rmtree(self.group.folder / "new-shares", ignore_errors=True)
        return run_here(self.monkeypatch, self.capsys, *before, *words)

    def refused(self, line: str, *statuses: int, toml: str | None = "hagroup.toml") -> str:
        """Refused with one sentence."""
        status, out, err = self.run(line, toml=toml)
        assert status in statuses, f"{line}: {status}: {out}{err}"
        assert err.startswith("ha-admin: ") and len(err.splitlines()) == 1, f"{line}: {err!r}"
        return err

    @property
    def rack(self) -> GroupFixture:
        """The tokens without a group."""
        found = GroupFixture(toml_of(self.group, "group create --yes"))
        found.reload()
        return found


def test_no_configuration(group: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HAGROUP_CONFIG", raising=False)
    for line in ALL:
        assert "HAGROUP_CONFIG" in group.refused(line, USAGE, toml=None)
    for line in ALL:
        if line not in ("doctor", JOIN):  # joining makes it
            assert "does not exist" in group.refused(line, USAGE, toml="none.toml"), line
    there = private(toml_of(group.group, JOIN), "")
    assert "exists already: this host is in a group, or was" in group.refused(JOIN, USAGE)
    there.unlink()


@contextlib.contextmanager
def opened_to_all(*files: Path) -> Iterator[None]:
    modes = {file: file.stat().st_mode & 0o777 for file in files}
    for file in files:
        file.chmod(0o777 if file.is_dir() else 0o666)
    yield
    for file, mode in modes.items():
        file.chmod(mode)


@contextlib.contextmanager
def journal_in_its_place(group: Matrix) -> Iterator[None]:
    """Nothing is made where a file is, and no token is touched."""
    file = private(group.rack.folder / "journal.db", "")
    for line in NO_JOURNAL:
        said = group.refused(line, USAGE)
        assert "journal.db exists already" in said and "nothing was changed" in said, line
    yield
    file.unlink()


def test_wrong_permissions_of_the_configuration(group: Matrix) -> None:
    tomls = {toml_of(group.group, line) for line in ALL if line != JOIN}
    with opened_to_all(*tomls, toml_of(group.group, JOIN).parent):  # there it is the folder: the file is made
        for line in ALL:
            if line not in SAYS_WHAT_IS_WRONG:
                assert "chmod" in group.refused(line, USAGE), line


def journals(group: Matrix) -> list[Path]:
    return [group.group.folder / "journal.db", toml_of(group.group, JOIN).with_name("journal.db")]


def test_wrong_permissions_of_the_journal(group: Matrix) -> None:
    with opened_to_all(*journals(group)), journal_in_its_place(group):
        for line in ALL:
            if line not in (*SAYS_WHAT_IS_WRONG, *NO_JOURNAL):
                assert "chmod" in group.refused(line, USAGE), line


def test_journal_locked_by_another_process(group: Matrix) -> None:
    """Readers do not mind, writers say so; nothing was changed."""
    with contextlib.ExitStack() as until_done:
        for file in journals(group):
            journal = until_done.enter_context(contextlib.closing(sqlite3.connect(file, isolation_level=None)))
            journal.execute("BEGIN IMMEDIATE")
        for line in ALL:
            if line not in (*SAYS_WHAT_IS_WRONG, *NO_JOURNAL):
                assert "locked" in group.refused(line, USAGE), line


@pytest.fixture
def read_only(group: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that is mounted read-only (root may write in spite of a file's mode)."""
    true = sqlite3.connect

    def connect(name: str, *arguments: Any, **keywords: Any) -> sqlite3.Connection:
        return true(name.replace("mode=rw", "mode=ro"), *arguments, **keywords)

    monkeypatch.setattr(sqlite3, "connect", connect)


@pytest.mark.usefixtures("read_only")
def test_journal_read_only(group: Matrix) -> None:
    for line in ALL:
        if line not in (*SAYS_WHAT_IS_WRONG, *NO_JOURNAL):
            assert "cannot be written" in group.refused(line, USAGE), line


def test_folder_that_cannot_be_written(group: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the journal is to be made, or the configuration to be written: nothing comes to be, on no token either."""
    true = os.open

    def read_only(path: Any, flags: int, *more: Any, **others: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(group.group.folder)) and ".locks" not in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return true(path, flags, *more, **others)

    host = toml_of(group.group, JOIN).parent
    host.rename(host.with_suffix(".aside"))
    with monkeypatch.context() as here:
        here.setattr(os, "open", read_only)
        host.mkdir(mode=0o700)
        for line in (*FOUNDING, "member add hsm4 --yes", MOVE):
            if line != "domain create --yes":  # writes no file
                assert "Read-only" in group.refused(line, USAGE), line
    assert not any(host.iterdir())
    host.rmdir()
    host.with_suffix(".aside").rename(host)
    for member in group.rack.members.values():
        assert plain.objects(member, own=True) == []
    assert group.run("verify")[0] == FINE
    cancel = ["--cancel"]
    assert group.run(MOVE, cancel)[0] == FINE
    assert group.run("journal note")[0] == FINE, "and the journal takes changes"


def test_another_administrator_is_at_work(group: Matrix) -> None:
    """(Two of them at once: ``test_admin_two_at_once``.)"""
    other = SqliteJournal.open(group.group.folder / "journal.db")
    lease = other.acquire_lease("administration", ttl=60)
    assert isinstance(lease, Lease)
    try:
        for line in ALONE:
            assert "another ha-admin" in group.refused(line, UNREACHABLE), line
    finally:
        other.close()
    for line in (*FOUNDING, "journal rebuild --yes", "journal adopt --yes"):
        folder = os.open(toml_of(group.group, line).parent, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)
        try:
            assert "another ha-admin" in group.refused(line, USAGE, UNREACHABLE), line
        finally:
            os.close(folder)
    assert group.run("sync")[0] == FINE


@pytest.fixture
def changed(group: Matrix, fast_folder: Path) -> Iterator[Matrix]:
    """A copy of the group that may be spoilt."""
    folder = fast_folder / "matrix-copy"
    group.group = copy_group(group.group, folder)
    for file in toml_of(group.group, JOIN).parent.glob("journal.db*"):  # a copy: it would be refused
        file.unlink()
    yield group
    shutil.rmtree(folder)


def test_one_member_down(changed: Matrix) -> None:
    """Everything goes on without it, says so, and what it missed is done when it is back."""
    assert changed.run("sync")[0] == FINE
    changed.group.take_away("hsm2")
    changed.rack.take_away("hsm2")
    fine = [
        *READING,
        "domain show",
        "member standby hsm2",
        "member backup hsm2",
        "member activate hsm2",
        "member resume hsm2",
        "journal note",
        MOVE,
        "backup create",
        "backup restore --yes",
        "sync --adopt",
        "member drain hsm2",
        "domain shares --shares 2-of-3 --yes",
        "member add hsm4 --yes",
    ]
    for line in ALL:
        status, out, err = changed.run(line)
        wanted = (FINE, DEGRADED) if line in fine else (DEGRADED,)
        if line in ("objects --member hsm2", "domain join hsm2"):
            wanted = (UNREACHABLE,)
        elif line in NO_JOURNAL:  # a group begins with all its members
            wanted = (UNREACHABLE,)
            assert '"hsm2" cannot be used' in err and "nothing was changed" in err, err
        elif line == "group delete --yes":  # it has objects
            wanted = (USAGE,)
        elif line == "member remove hsm3 --yes":
            wanted = (FINE,)
        assert status in wanted, f"{line}: {status}: {out}{err}"
        if line == MOVE:
            toml = changed.group.toml
            toml.write_text(toml.read_text().replace("sqlite:journal.db", "sqlite:moved.db"))
    changed.group.bring_back("hsm2")
    for member in changed.rack.members.values():
        if member["serial"] != changed.rack.members["hsm2"]["serial"]:
            assert plain.objects(member, own=True) == []
    # the keys that it missed were in the journal that was replaced: people have to give them to it
    assert changed.run("domain join hsm2")[0] == FINE
    assert changed.run("member resume hsm2")[0] == FINE
    assert changed.run("sync")[0] == FINE
    assert changed.run("verify")[0] == FINE
    for name in ("hsm1", "hsm2"):
        assert plain.labels(changed.group.members[name]) == [], "cleared, the one that was away too"


def test_all_members_down(changed: Matrix) -> None:
    rack = changed.rack
    for name in changed.group.members:
        changed.group.take_away(name)
    for name in rack.members:
        rack.take_away(name)
    journal_alone = ("journal note", "member resume hsm2", "member standby hsm2", "member backup hsm2")
    journal_alone += ("member activate hsm2",)
    for line in [one for one in (*ASKING, *CHANGING, "status", *FOUNDING) if one != MOVE]:
        status, out, err = changed.run(line)
        wanted: tuple[int, ...] = (UNREACHABLE,)
        if line in journal_alone:
            wanted = (FINE,)
        elif line in ("verify", "domain show"):
            wanted = (DEGRADED, UNREACHABLE)
        elif line in ("member drain hsm2", "member remove hsm3 --yes", "group delete --yes"):
            wanted = (USAGE, UNREACHABLE)
        assert status in wanted, f"{line}: {status}: {out}{err}"
    left = toml_of(changed.group, JOIN).parent
    assert not [file for file in left.iterdir() if ".locks" not in file.name], "no journal, no configuration"
    for name in changed.group.members:
        changed.group.bring_back(name)
    for name in rack.members:
        rack.bring_back(name)
    assert plain.objects(rack.members["hsm1"], own=True) == []
    assert changed.run("sync")[0] == FINE
    for name in changed.group.members:
        changed.group.take_away(name)
    assert changed.run(MOVE)[0] == FINE, "no member is asked"
    for name in changed.group.members:
        changed.group.bring_back(name)
    toml = changed.group.toml
    toml.write_text(toml.read_text().replace("sqlite:journal.db", "sqlite:moved.db"))
    assert changed.run("sync")[0] == FINE


def test_a_newcomer_that_is_down(group: Matrix) -> None:
    """The member that a command is about: nothing is changed."""
    text = group.group.toml.read_text()
    for line, name in (("member add hsm4 --yes", "hsm4"), (JOIN, "hsm1")):
        group.group.take_away(name)
        try:
            assert "nothing was changed" in group.refused(line, UNREACHABLE), line
        finally:
            group.group.bring_back(name)
    assert group.group.toml.read_text() == text
    assert not toml_of(group.group, JOIN).exists()
    assert group.run("sync")[0] == FINE


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("domain rotate --yes", "journal rewrap"),
        ("domain rotate --yes", "member wrap"),
        ("member add hsm4 --yes", "member unwrap"),
        (MOVE, "file link"),
    ],
)
def test_ctrl_c_at_a_terminal(changed: Matrix, line: str, place: str) -> None:
    """A program of its own, frozen at a known place; Ctrl-C goes to its workers as well. (Every command at several
    places: ``test_admin_ctrl_c``.)"""
    toml = toml_of(changed.group, line)
    program = [sys.executable, "-m", "tests.support.interactions", str(changed.group.folder), place]
    terminal = Terminal([*program, "--config", toml, *words_of(changed.group, line)], cwd=ROOT)
    terminal.expect(FROZEN)
    terminal.send("\x03")
    assert terminal.end() == 130, terminal.text
    assert "ha-admin: stopped; run the same command again to complete it" in terminal.text
    assert "Traceback" not in terminal.text
    status, out, err = changed.run(line)
    assert status == FINE or 'the group has a member "hsm4" already' in err, out + err  # it was over nearly at once
    if line == MOVE:
        toml.write_text(toml.read_text().replace("sqlite:journal.db", "sqlite:moved.db"))
        assert changed.run("sync")[0] == FINE
    status, out, err = changed.run("verify")
    assert status == FINE, out + err
    assert PIN not in terminal.text.split()
