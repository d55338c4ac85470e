"""An opened SQLite journal: its transactions, its view number, and this process's registration as an owner."""

from __future__ import annotations

import os
import socket
import sqlite3
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from msgspec.structs import replace

from hagroup.core.clock import Clock
from hagroup.core.records import Client, OwedRow, PassedOver
from hagroup.errors import JournalUnavailable
from hagroup.journal import owners, rows, schema
from hagroup.journal.database import Database
from hagroup.journal.sqlite_transaction import SqliteTransaction
from hagroup.journal.transaction import Writer
from hagroup.journal.view import ViewNumber

T = TypeVar("T")

_opened: weakref.WeakSet[Opened] = weakref.WeakSet()


class Opened(Writer):
    """What the parts of :class:`SqliteJournal` share."""

    def __init__(self, database: Database, clock: Clock, *, for_moving: bool = False) -> None:
        self._database = database
        self._for_moving = for_moving
        self._clock = clock
        self._locks = owners.folder_of(database.path)
        self._registration: owners.Registration | None = None
        self._view = ViewNumber(Path(f"{database.path}.view"))
        self.owner = ""
        """Empty where the journal was opened for reading only."""
        _opened.add(self)

    # -- transactions --------------------------------------------------------------------------------------------

    def _read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        self._attend()
        return self._database.read(query)

    @contextmanager
    def _write(self) -> Iterator[SqliteTransaction]:
        """One transaction: durable, and the view number moved, when the block was left."""
        self._attend()
        number: int | None = None
        with self._database.write() as connection:
            transaction = SqliteTransaction(
                connection,
                owner=self.owner,
                now=self._clock.boot(),
                wall=self._clock.wall(),
                alive=self.owner_alive,
            )
            sealed = None if self._for_moving else transaction.sealed
            if sealed is not None:
                raise sealed.refusal(f"sqlite:{self._database.path}")
            yield transaction
            number = transaction.finish()
        if number is not None:
            self._view.put(number)

    def _carry_out(self, attempt: Callable[[], T]) -> T:
        return attempt()

    def _attend(self) -> None:
        """The file with the view number is the one that everybody maps."""
        if not self._view.attached():
            self._attach()

    def _attach(self) -> None:
        try:
            self._view.attach()
        except OSError as error:
            raise JournalUnavailable(
                f"the journal {self._database.path} cannot be used: its file with the view number cannot be had "
                f"({error.strerror}); look at the permissions of the folder"
            ) from error

    def view_number(self) -> int:
        return self._view.get()

    # -- owners --------------------------------------------------------------------------------------------------

    def _register(self) -> None:
        """Take a registration; tidy up after the dead. Everybody looks again: one who died between its commit and
        moving the view number left others behind."""
        try:
            registration = owners.Registration(self._locks)
        except OSError as error:
            raise JournalUnavailable(
                f"the journal {self._database.path} cannot be used: {self._locks} cannot be written ({error.strerror})"
            ) from error
        self._registration, self.owner = registration, registration.owner
        try:
            with self._write() as t:
                schema.complete(t.sql)
                self._after_reboot(t)
                t.sql.execute("INSERT INTO owners VALUES (?, ?, ?)", (self.owner, os.getpid(), t.wall))
                gone = owners.clean(self._locks, lambda names: _referenced(t.sql, names))
                t.sql.executemany("DELETE FROM owners WHERE owner = ?", [(name,) for name in gone])
                t.sql.executemany("DELETE FROM observations WHERE observer = ?", [(name,) for name in gone])
                t.notice()
        except BaseException:
            self._drop_registration()
            raise

    def _after_reboot(self, t: SqliteTransaction) -> None:
        """Boot times of another boot mean nothing now: all that happened then happened before 0.0 of this one."""
        if t.head.boot == self._clock.boot_id():
            return
        t.head.boot = self._clock.boot_id()
        for row in rows.load_owed(t.sql, "w.attempts IS NOT NULL", ()):
            t.put_owed(row, _before_boot(row))
        t.sql.execute("UPDATE leases SET expires = 0.0")
        t.sql.execute("UPDATE logins SET boot_time = 0.0")
        t.sql.execute("DELETE FROM observations")

    def _drop_registration(self) -> None:
        registration, self._registration = self._registration, None
        if registration is not None:
            registration.release()

    def owner_alive(self, owner: str) -> bool:
        """Whether that owner's process lives. (One whose lock file is gone is dead: only the dead's are removed.)"""
        return owner == self.owner or bool(owners.is_held(self._locks, owner))

    def clients(self) -> list[Client]:
        statement = "SELECT owner, process, since FROM owners ORDER BY since"
        host = socket.gethostname()
        return [
            Client(owner=owner, host=host, process=process, since=since, here=True)
            for owner, process, since in self._read(lambda connection: connection.execute(statement).fetchall())
            if self.owner_alive(owner)
        ]

    def passed_over(self) -> list[PassedOver]:
        return []  # everybody looks at the same view number

    def forget_passed_over(self, owners: Collection[str]) -> None:
        pass

    def worker_lock(self, member: str) -> tuple[str, str]:
        if self._registration is None:
            raise JournalUnavailable(f"the journal {self._database.path} was opened for reading only, or was closed")
        try:
            return self._registration.worker_lock(member)
        except OSError as error:
            raise JournalUnavailable(
                f"no lock for a worker of {member} can be made in {self._locks} ({error.strerror})"
            ) from error

    def worker_dead(self, worker: str) -> bool:
        return owners.is_held(self._locks, worker) is False

    def being_changed(self, member: str) -> bool:
        return owners.being_changed(self._locks, member)

    def cut_off(self, member: str) -> list[str]:
        return owners.cut_off(self._locks, member)

    def forget_cut_off(self, workers: Collection[str]) -> None:
        owners.forget_cut_off(self._locks, workers)

    # -- life ----------------------------------------------------------------------------------------------------

    def reopen_after_fork(self) -> None:
        """In a forked child, before anything else: a registration of its own, and connections of its own.

        What the parent claimed stays the parent's.
        """
        self._database.reopened()
        self._drop_registration()
        self._attach()
        if not self._database.read_only:
            self._register()

    def after_fork_in_child(self) -> None:
        """The parent must not look alive because of us."""
        if self._registration is not None:
            self._registration.drop_inherited()

    def close(self) -> None:
        """Idempotent. The owner is dead from here on: what it has open may be adopted."""
        self._drop_registration()
        self._database.close()
        _opened.discard(self)


def _before_boot(row: OwedRow) -> OwedRow:
    attempts = tuple(replace(one, asked=0.0, doubt_since=0.0) for one in row.attempts)
    return replace(row, attempts=attempts)


def _referenced(connection: sqlite3.Connection, names: Collection[str]) -> set[str]:
    """Those of the names (owners, workers) that still stand in a row that somebody has to finish."""
    used: set[str] = set()
    for name in names:
        for table in (
            "intents WHERE outcome IS NULL AND owner",
            "owed WHERE owner",
            "logins WHERE state = 'trying' AND owner",
        ):
            if connection.execute(f"SELECT 1 FROM {table} = ? LIMIT 1", (name,)).fetchone():
                used.add(name)
    for (blob,) in connection.execute("SELECT attempts FROM owed WHERE attempts IS NOT NULL"):
        for attempt in rows.attempts_of(blob):
            used.update(name for name in (attempt.owner, attempt.worker) if name is not None)
    return used


def _after_fork_in_child() -> None:
    for journal in list(_opened):
        journal.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
