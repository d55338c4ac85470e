"""Connections to the journal's file: short transactions, bounded waiting, plain errors, and forks.

**Forks.** SQLite keeps what it knows of a file's locks in memory, per process, shared by all its connections to that
file. A child that inherits that memory takes no locks of its own, not even on a connection that it opens itself: as
soon as the parent closes the file, the parent removes the write-ahead log under the child, and what the child commits
from then on is lost (reproduced). So before a fork every connection is closed, which empties that memory; parent and
child then open anew.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from hagroup.errors import JournalMismatch, JournalUnavailable

T = TypeVar("T")

BUSY_TIMEOUT = 5.0
_IDLE_KEPT = 8
_FORK_PATIENCE = 10.0

_open_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_abandoned: list[sqlite3.Connection] = []
"""Connections inherited by a fork that bypassed Python: closing them here would drop what the parent needs."""


class Database:
    """The journal's file. Any thread may use it; each transaction has a connection to itself while it lasts.

    Connections wait in a pool, not with their threads: 100 threads that come and go need only as many as work at once.
    """

    def __init__(self, path: Path, *, read_only: bool, busy_timeout: float = BUSY_TIMEOUT) -> None:
        self.path = path
        self.read_only = read_only
        self.busy_timeout = busy_timeout
        self.forked = False
        """This is a child that has not taken up a registration of its own yet."""
        self._inode = os.stat(path).st_ino
        self._make_locks()
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        _open_databases.add(self)

    def _make_locks(self) -> None:
        self._gate = threading.Condition()
        self._using = 0
        self._forking = False
        # Threads of this process queue here, and not with SQLite, whose waiting is a sleep of growing length.
        self._writing = threading.Lock()

    # -- connections ---------------------------------------------------------------------------------------------

    def _connect(self) -> sqlite3.Connection:
        mode = "ro" if self.read_only else "rw"
        quoted = str(self.path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        connection = sqlite3.connect(
            f"file:{quoted}?mode={mode}", uri=True, timeout=0, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA trusted_schema = OFF")
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """One from the pool. After an error of SQLite's it is closed: its state is unknown. Whatever else leaves the
        block by an exception rolls back."""
        with self._gate:
            while self._forking:
                self._gate.wait()
            self._check_usable()
            self._using += 1
            connection = self._idle.pop() if self._idle else None
        fine = False
        try:
            self._check_same_file()
            connection = connection or self._connect()
            try:
                yield connection
            except sqlite3.Error:
                raise
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                fine = True
                raise
            fine = True
        finally:
            with self._gate:
                if fine and connection is not None and len(self._idle) < _IDLE_KEPT and not self._closed:
                    self._idle.append(connection)
                elif connection is not None:
                    connection.close()
                self._using -= 1
                self._gate.notify_all()

    def _check_usable(self) -> None:
        if self._closed:
            raise JournalUnavailable(f"the journal {self.path} was closed in this process: open it again")
        if self.forked:
            raise JournalUnavailable(
                f"the journal {self.path} was opened before this process was forked: call reopen_after_fork() first"
            )

    def _check_same_file(self) -> None:
        try:
            inode = os.stat(self.path).st_ino
        except OSError as error:
            raise JournalUnavailable(
                f"the journal {self.path} cannot be reached ({error.strerror}): nothing was changed; bring it back, or "
                "run `ha-admin journal rebuild`"
            ) from None
        if inode != self._inode:
            raise JournalMismatch(
                f"the journal {self.path} was replaced by another file while in use: nothing was changed; put the "
                "right one back, or restart and run `ha-admin journal adopt`"
            )

    # -- transactions --------------------------------------------------------------------------------------------

    def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """One consistent read transaction. ``query`` may run twice, if a writer's recovery was in the way."""
        deadline = time.monotonic() + self.busy_timeout
        pause = 0.0005
        while True:
            try:
                with self._connection() as connection:
                    connection.execute("BEGIN")
                    answer = query(connection)
                    connection.execute("COMMIT")
                    return answer
            except sqlite3.Error as error:
                if not _is_busy(error) or time.monotonic() > deadline:
                    raise self._unavailable(error) from error
            time.sleep(pause)
            pause = min(pause * 2, 0.02)

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One write transaction: durable when the block was left, or nothing happened and it raises."""
        if self.read_only:
            raise JournalUnavailable(f"the journal {self.path} was opened for reading only: nothing was changed")
        deadline = time.monotonic() + self.busy_timeout
        writing = self._writing
        if not writing.acquire(timeout=self.busy_timeout):
            raise self._locked()
        try:
            with self._connection() as connection:
                self._begin(connection, deadline)
                yield connection
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._unavailable(error) from error
        finally:
            writing.release()

    def _begin(self, connection: sqlite3.Connection, deadline: float) -> None:
        pause = 0.0002
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() > deadline:
                    raise
            time.sleep(pause)
            pause = min(pause * 1.5, 0.005)

    def _locked(self) -> JournalUnavailable:
        return JournalUnavailable(
            f"the journal {self.path} has been locked by another process or thread for {self.busy_timeout:g} s: "
            "nothing was changed; find who holds it (fuser) and try again"
        )

    def _unavailable(self, error: sqlite3.Error) -> JournalUnavailable:
        return self._locked() if _is_busy(error) else unavailable(self.path, error)

    # -- end, and forks ------------------------------------------------------------------------------------------

    def close(self) -> None:
        with self._gate:
            self._closed = True
            self._close_idle()
        _open_databases.discard(self)

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def before_fork(self) -> None:
        deadline = time.monotonic() + _FORK_PATIENCE
        with self._gate:
            self._forking = True
            while self._using and time.monotonic() < deadline:
                self._gate.wait(deadline - time.monotonic())
            self._close_idle()

    def after_fork_in_parent(self) -> None:
        with self._gate:
            self._forking = False
            self._gate.notify_all()

    def after_fork_in_child(self) -> None:
        # Whatever is open now came by a fork that told nobody, or in a thread that does not exist here.
        self.inherited_open = bool(self._idle or self._using)
        _abandoned.extend(self._idle)
        self._idle = []
        self._make_locks()
        self.forked = True

    inherited_open = False

    def reopened(self) -> None:
        """The child has a registration of its own."""
        if self.inherited_open:
            raise JournalUnavailable(
                f"this process was forked while the journal {self.path} was in use, so its locks cannot be relied on "
                "here: start it by exec (or os.fork from Python, outside a journal call); nothing was changed"
            )
        self.forked = False


_MEANING: dict[int, tuple[str, str]] = {
    sqlite3.SQLITE_BUSY: ("is locked by another process", "find who holds it (fuser) and try again"),
    sqlite3.SQLITE_FULL: ("cannot grow, its disk is full", "free some space, it then goes on by itself"),
    sqlite3.SQLITE_READONLY: ("cannot be written (read-only file or file system)", "make it writable"),
    sqlite3.SQLITE_CANTOPEN: ("cannot be opened", "look at the permissions of the file and its folder"),
    sqlite3.SQLITE_IOERR: ("cannot be read or written (I/O error)", "look at the disk and the system's log"),
    sqlite3.SQLITE_CORRUPT: ("is damaged", "keep the file, and run `ha-admin journal rebuild`"),
    sqlite3.SQLITE_NOTADB: ("is not a journal, or is damaged", "correct [journal] url, or rebuild the journal"),
}


def unavailable(path: Path, error: sqlite3.Error) -> JournalUnavailable:
    """What went wrong, where, and what to do."""
    code = getattr(error, "sqlite_errorcode", None)
    what, remedy = _MEANING.get(-1 if code is None else code & 0xFF, (f"failed ({error})", "look at the system's log"))
    return JournalUnavailable(f"the journal {path} {what}: nothing was changed; {remedy}")


def _is_busy(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _before_fork() -> None:
    for database in list(_open_databases):
        database.before_fork()


def _after_fork_in_parent() -> None:
    for database in list(_open_databases):
        database.after_fork_in_parent()


def _after_fork_in_child() -> None:
    for database in list(_open_databases):
        database.after_fork_in_child()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
