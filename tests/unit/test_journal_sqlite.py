"""The SQLite journal's file: what it refuses, what it survives."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hagroup.config.model import JournalSection, SqliteUrl
from hagroup.core.records import OwedKind
from hagroup.errors import JournalMismatch, JournalUnavailable
from hagroup.journal import SqliteJournal, binding, open_journal, owners, schema, view
from hagroup.journal.database import Database
from hagroup.members.lock import WorkerLock
from tests.support.journals import (
    LABEL,
    SqliteBackend,
    ask,
    claim,
    make_live,
    member,
    new_object,
    revision_of,
)


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[SqliteBackend]:
    made = SqliteBackend(tmp_path / "state", [member("a"), member("b")])
    yield made
    made.close()


@pytest.fixture
def journal(backend: SqliteBackend) -> SqliteJournal:
    return backend.open()


# -- the file ----------------------------------------------------------------------------------------------------


def test_create_makes_a_private_file_in_a_private_folder(backend):
    assert stat.S_IMODE(os.stat(backend.path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(backend.path.parent).st_mode) == 0o700
    assert [entry.name for entry in backend.path.parent.iterdir()] == ["journal.db"], "no draft is left"


def test_create_refuses_what_exists(backend, tmp_path):
    with pytest.raises(JournalUnavailable, match="already"):
        SqliteBackend(tmp_path / "state", [])
    left = tmp_path / "other"
    left.mkdir(mode=0o700)
    (left / "journal.db-wal").write_bytes(b"the log of a journal that is gone")
    with pytest.raises(JournalUnavailable, match="already"):
        SqliteBackend(left, [])


def test_files_are_private(journal, backend):
    make_live(journal, "a")
    for entry in backend.path.parent.iterdir():
        assert stat.S_IMODE(entry.stat().st_mode) & 0o077 == 0, entry


def test_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(JournalUnavailable, match=r"does not exist.*group create"):
        SqliteJournal.open(tmp_path / "none.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_others_may_write_is_refused(backend, what):
    path = backend.path if what == "file" else backend.path.parent
    path.chmod(path.stat().st_mode | stat.S_IWGRP)
    with pytest.raises(JournalUnavailable, match=r"chmod go-w"):
        backend.open()


def test_other_databases_are_refused(tmp_path):
    path = tmp_path / "address-book.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE people (name)")
    connection.close()
    with pytest.raises(JournalUnavailable, match="not a journal"):
        SqliteJournal.open(path)
    path.write_bytes(b"not even a database" * 100)
    with pytest.raises(JournalUnavailable, match=r"not a journal|damaged"):
        SqliteJournal.open(path)


def test_newer_format_is_refused(backend):
    connection = sqlite3.connect(backend.path)
    connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    connection.close()
    with pytest.raises(JournalUnavailable, match="newer hagroup"):
        backend.open()


def test_a_copy_is_refused_until_adopted(journal, backend, tmp_path):
    record = make_live(journal, "a")
    epoch = journal.group().epoch
    journal.close()
    copy = tmp_path / "copy.db"
    shutil.copy(backend.path, copy)
    copy.chmod(0o600)
    with pytest.raises(JournalMismatch, match="journal adopt"):
        SqliteJournal.open(copy)
    assert SqliteJournal.adopt_file(copy) > epoch
    adopted = SqliteJournal.open(copy)
    assert adopted.changes(adopted.group().change, epoch).everything
    assert adopted.object(record.uid) == record
    adopted.close()


def test_another_machine_is_refused(backend, tmp_path, monkeypatch):
    elsewhere = tmp_path / "machine-id"
    elsewhere.write_text("0123456789abcdef\n")
    monkeypatch.setattr(binding, "MACHINE_ID", elsewhere)
    with pytest.raises(JournalMismatch, match="another machine"):
        backend.open()


def test_file_replaced_or_removed_while_open(journal, backend, tmp_path):
    away = tmp_path / "away.db"
    backend.path.rename(away)
    with pytest.raises(JournalUnavailable, match="cannot be reached"):
        journal.members()
    backend.path.write_bytes(b"")
    with pytest.raises(JournalMismatch, match="replaced"):
        journal.event("kind", "text")
    away.rename(backend.path)
    journal.event("kind", "it goes on by itself")
    assert len(journal.events()) == 1


def test_damage_is_reported_and_the_file_kept(journal, backend):
    for number in range(50):
        make_live(journal, "a", record=new_object(b"%d" % number))
    journal.close()
    size = backend.path.stat().st_size
    with backend.path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * (size - 8192))
    with pytest.raises(JournalUnavailable, match="damaged"):
        backend.open()
    assert backend.path.stat().st_size == size


def test_open_by_url(backend):
    journal = open_journal(JournalSection(url=SqliteUrl(path=backend.path)), clock=backend.clock)
    assert journal.guarantees.durable
    assert not journal.guarantees.shared_by_hosts
    journal.close()


def test_read_only(journal, backend):
    record = make_live(journal, "a")
    looking = SqliteJournal.open(backend.path, read_only=True)
    assert looking.object(record.uid) == record
    with pytest.raises(JournalUnavailable, match="reading only"):
        looking.event("kind", "text")
    with pytest.raises(JournalUnavailable, match="reading only"):
        looking.worker_lock("a")
    assert looking.owner == ""
    looking.close()


# -- trouble ---------------------------------------------------------------------------------------------------------


def test_full_disk_writes_nothing_and_passes(journal, monkeypatch):
    before = journal.counts()
    journal._database._close_idle()
    connect = Database._connect

    def cramped(self):
        connection = connect(self)
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    monkeypatch.setattr(Database, "_connect", cramped)
    large = [new_object(b"x" * 4000) for _ in range(50)]
    with pytest.raises(JournalUnavailable, match="disk is full"):
        journal.begin_create(large, asking=ask("a"), membership_revision=revision_of(journal))
    assert journal.counts() == before
    assert journal.intents() == []
    monkeypatch.setattr(Database, "_connect", connect)
    journal._database._close_idle()
    journal.begin_create(large, asking=ask("a"), membership_revision=revision_of(journal))


def test_locked_by_another_is_bounded_and_passes(journal, backend):
    seen = journal.view_number()
    holder = sqlite3.connect(backend.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    journal._database.busy_timeout = 0.05
    with pytest.raises(JournalUnavailable, match="locked"):
        journal.event("kind", "text")
    assert journal.members(), "readers are not in its way"
    holder.execute("ROLLBACK")
    holder.close()
    journal.event("kind", "text")
    assert journal.view_number() == seen


def test_closed_journal_says_so(journal):
    journal.close()
    journal.close()
    with pytest.raises(JournalUnavailable, match="closed"):
        journal.members()


def test_refused_change_keeps_the_connection(journal):
    record = make_live(journal, "a")
    [before] = journal._database._idle
    with pytest.raises(ValueError, match="for ever"):
        journal.begin_create([record], asking=[], membership_revision=revision_of(journal))
    assert journal._database._idle == [before]


# -- view number -----------------------------------------------------------------------------------------------------


def test_removed_view_file_is_made_anew_and_everybody_looks_again(journal, backend):
    other = backend.open()
    seen = other.view_number()
    Path(f"{backend.path}.view").unlink()
    make_live(journal, "a")
    other.members()  # any transaction finds out
    assert other.view_number() not in (seen, 0)
    again = other.view_number()
    make_live(journal, "a")
    assert other.view_number() != again


def test_opening_makes_everybody_look_again(journal, backend):
    """One who died between commit and moving the view number is made up for by the next start."""
    seen = journal.view_number()
    backend.open()
    assert journal.view_number() != seen


def test_changes_go_back_a_bounded_way(journal, monkeypatch):
    monkeypatch.setattr(schema, "MOVED_KEPT", 20)
    monkeypatch.setattr(schema, "MOVED_TRIM", 10)
    since, epoch = journal.group().change, journal.group().epoch
    for number in range(40):
        journal.update_member("a", draining=bool(number % 2))
    record = make_live(journal, "a")
    assert journal.changes(since, epoch).everything
    near = journal.group().change - 1
    assert journal.changes(near, epoch).uids == {record.uid}


def test_a_process_that_was_stopped_with_the_view_file_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view, "_PATIENCE", 0.05)
    with (tmp_path / "view").open("w") as stopped:
        fcntl.flock(stopped, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            view.ViewNumber(tmp_path / "view").attach()
    view.ViewNumber(tmp_path / "view").attach()


# -- owners, workers, boots ------------------------------------------------------------------------------------------


def test_who_asks_for_an_owner_that_just_registers_does_not_hold_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be stopped, or forked, while it asks: then another name is taken."""
    names = iter(["asked for", "free"])
    held = []
    flock = fcntl.flock

    def asked_first(descriptor: int, how: int) -> None:
        if not held:
            held.append(os.open(tmp_path / "asked for", os.O_RDONLY))
            flock(held[0], fcntl.LOCK_SH)
        assert how & fcntl.LOCK_NB, "it would wait for ever"
        flock(descriptor, how)

    monkeypatch.setattr(owners.secrets, "token_hex", lambda _: next(names))
    monkeypatch.setattr(owners.fcntl, "flock", asked_first)
    registration = owners.Registration(tmp_path)
    monkeypatch.undo()
    assert registration.owner == "free"
    assert owners.is_held(tmp_path, "free")
    registration.release()
    os.close(held[0])


def test_worker_is_dead_when_its_lock_is_free(journal):
    import fcntl

    name, path = journal.worker_lock("odd/name \u00e9")
    descriptor = os.open(path, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not journal.worker_dead(name)
    os.close(descriptor)
    assert journal.worker_dead(name)
    assert not journal.worker_dead("never heard of"), "cannot be proved"
    assert journal.worker_lock("odd/name \u00e9")[0] != name


def test_who_died_in_a_change_is_known_until_that_was_looked_for(journal, backend):
    other = backend.open()
    name, path = other.worker_lock("b")
    lock = WorkerLock(path)
    assert not journal.being_changed("b")
    with lock:
        with lock:
            assert journal.being_changed("b")
        assert journal.being_changed("b"), "another call is inside"
        assert not journal.being_changed("a")
        assert journal.cut_off("b") == [], "it lives"
        lock.release()  # as if it were killed
    other.close()
    assert not journal.being_changed("b")
    backend.open()
    assert journal.cut_off("b") == [name], "its file stays"
    journal.forget_cut_off(journal.cut_off("b"))
    assert journal.cut_off("b") == []
    backend.open()
    assert not Path(path).exists()


@pytest.mark.parametrize(
    ("one", "other"),
    [("zurich", "new-zurich"), ("hsm.1", "hsm_1"), ("x" * 40 + "1", "x" * 40 + "2"), ("1", "a-1")],
)
def test_members_whose_names_look_alike_stay_apart(journal, one, other):
    """A sweep of the one forgot what was cut off on the other: its ghost stayed."""
    name, path = journal.worker_lock(other)
    lock = WorkerLock(path)
    lock.__enter__()
    assert not journal.being_changed(one)
    lock.release()  # as if it were killed
    assert journal.cut_off(one) == []
    assert journal.cut_off(other) == [name]


def test_who_ended_between_changes_left_nothing(journal):
    _, path = journal.worker_lock("b")
    lock = WorkerLock(path)
    with lock:
        pass
    with pytest.raises(BlockingIOError):
        WorkerLock(path)
    lock.release()
    assert journal.cut_off("b") == []


def test_a_call_that_interrupts_the_showing_of_another_one(journal, monkeypatch):
    """A signal handler, or a finalizer, of the same thread: it must not wait for what it interrupted."""
    _, path = journal.worker_lock("b")
    lock = WorkerLock(path)
    show = lock._show

    def interrupted(what):
        monkeypatch.undo()
        with lock:
            pass
        show(what)

    def call():
        with lock:
            assert journal.being_changed("b")

    monkeypatch.setattr(lock, "_show", interrupted)
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert not journal.being_changed("b")
    lock.release()


def test_lock_files_of_the_dead_go_once_nothing_refers_to_them(journal, backend):
    record = make_live(journal, "a")
    dead = backend.open()
    worker, path = dead.worker_lock("b")
    assert dead.claim([("b", record.uid)], worker=worker, membership_revision=revision_of(dead))
    idle = backend.open()
    unused = Path(idle.worker_lock("b")[1])
    dead.close()
    idle.close()
    folder = Path(path).parent
    backend.open()
    assert (folder / dead.owner).exists()
    assert Path(path).exists()
    assert not unused.exists()
    assert not (folder / idle.owner).exists()
    claim(journal, "b", record.uid)
    journal.resolve_attempts("b", record.uid, [one.number for one in journal.placement(record.uid)[1]["b"].unanswered])
    backend.open()
    assert not (folder / dead.owner).exists()
    assert not Path(path).exists()


def test_times_of_another_boot_are_before_this_one(journal, backend):
    record = make_live(journal, "a")
    claim(journal, "b", record.uid)
    lease = journal.acquire_lease("x", ttl=10_000)
    journal.close()
    backend.clock.reboot()
    again = backend.open()
    [attempt] = again.placement(record.uid)[1]["b"].attempts
    assert (attempt.asked, attempt.doubt_since, attempt.since) == (0.0, 0.0, 0.0)
    newer = again.acquire_lease("x", ttl=1)
    assert newer is not None
    assert newer.token > lease.token


# -- forks -----------------------------------------------------------------------------------------------------------


def in_child(work) -> int:
    """Exit status of a forked child that does ``work``."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = work() or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_forked_child_has_to_take_up_its_own_registration(journal):
    parent = journal.owner

    def work() -> int:
        try:
            journal.members()
        except JournalUnavailable:
            journal.reopen_after_fork()
            record = make_live(journal, "a")
            fine = journal.owner != parent and journal.owner_alive(parent) and journal.object(record.uid)
            return 0 if fine else 1
        return 2

    assert in_child(work) == 0
    assert journal.counts()["live"] == 1
    make_live(journal, "a")


def test_what_a_child_commits_outlives_the_parents_close(journal, backend):
    """SQLite keeps locks in memory per process: a child that inherited it would write into a log that is removed."""
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            journal.reopen_after_fork()
            journal.members()
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            make_live(journal, "a")
            status = 0
        finally:
            os._exit(status)
    os.read(ready[0], 1)
    journal.close()
    os.write(go[1], b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert backend.open().counts()["live"] == 1


def test_fork_waits_for_transactions_of_other_threads(journal):
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            make_live(journal, "a")

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(5):

            def work() -> int:
                journal.reopen_after_fork()
                make_live(journal, "b")
                return 0

            assert in_child(work) == 0
    finally:
        stop.set()
        thread.join()
    counts = journal.counts()
    assert counts["live"] == len([one for one in journal.objects() if one.state == "live"])
    assert len(list(journal.copies("b"))) == 5


def test_child_does_not_keep_its_parent_alive(backend, journal):
    program = f"""
import os, sys
from hagroup.journal import SqliteJournal
from tests.support.journals import FakeClock
journal = SqliteJournal.open({str(backend.path)!r}, clock=FakeClock())
if os.fork() == 0:
    os.write(1, b"child\\n")  # it has run its fork handlers
    sys.stdin.read()
    os._exit(0)
os.write(1, journal.owner.encode() + b"\\n")
os._exit(0)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert parent.stdout is not None
    said = [parent.stdout.readline().strip() for _ in range(2)]
    assert "child" in said, said
    said.remove("child")
    owner = said[0]
    parent.wait(30)
    assert not journal.owner_alive(owner), "although its child goes on"
    assert parent.stdin is not None
    parent.stdin.close()
    parent.stdout.close()


def test_killed_process_is_dead_and_what_it_committed_is_there(backend, journal):
    program = f"""
import os, signal
from hagroup.journal import SqliteJournal
from tests.support.journals import FakeClock, ask, new_object
journal = SqliteJournal.open({str(backend.path)!r}, clock=FakeClock())
intent = journal.begin_create([new_object(b"dying")], asking=ask("a"), membership_revision=1)
print(journal.owner, intent.id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], check=False
    )
    owner, intent = done.stdout.split()
    assert not journal.owner_alive(owner)
    [left] = journal.intents()
    assert (left.id, left.owner) == (intent, owner)
    assert journal.adopt_intent(intent) is not None
    assert journal.abandon_create(intent)
    assert {row.kind for row in journal.owed()} == {OwedKind.DESTROY}
    assert journal.search({LABEL: b"dying"}) == []
