"""The journal of one host: a SQLite file that many processes share (WAL, ``synchronous = FULL``)."""

from __future__ import annotations

import os
import re
import secrets
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import msgspec

from hagroup.core.clock import Clock
from hagroup.core.records import MemberRecord
from hagroup.errors import JournalUnavailable
from hagroup.journal import binding, schema
from hagroup.journal.api import Contents, Guarantees
from hagroup.journal.binding import Place
from hagroup.journal.changing import Changing
from hagroup.journal.clearing import Clearing
from hagroup.journal.clock import SystemClock
from hagroup.journal.database import BUSY_TIMEOUT, Database, unavailable
from hagroup.journal.epoch import new_epoch
from hagroup.journal.filling import fill
from hagroup.journal.membership import Members
from hagroup.journal.moving import Moving
from hagroup.journal.notes import Notes
from hagroup.journal.owing import Owing
from hagroup.journal.reading import Reading
from hagroup.journal.rotating import Rotating
from hagroup.journal.sealed import Sealed, Why
from hagroup.journal.sqlite_transaction import Head, SqliteTransaction, read_sealed


class SqliteJournal(Changing, Owing, Members, Notes, Clearing, Rotating, Moving, Reading):
    """See :class:`hagroup.journal.api.Journal`. Any thread may use it.

    Never open the file otherwise (``open``, ``shutil.copy``) in a process that has it open here: closing any
    descriptor of a file drops all of the process's POSIX locks on it, SQLite's too.
    """

    guarantees = Guarantees(durable=True, shared_by_processes=True, shared_by_hosts=False)

    @classmethod
    def create(
        cls,
        path: Path | str,
        *,
        label: str,
        serial: str,
        members: Sequence[MemberRecord],
        domain_key_id: bytes,
        partition_key_id: bytes,
        reference: bytes,
        contents: Contents | None = None,
        command: str = "",
        aside: Path | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Make the journal of a new group. It appears whole or not at all.

        :param contents: what is known of the group where its journal was lost, or is moved here.
        :param command: it is left sealed (:meth:`open_up`); this command goes on from there.
        :param aside: the file that is there is kept under this name; at every instant one of the two is there. It is
            one that :func:`fold` could fold.

        :raises JournalUnavailable: there is a file already, or none can be made there.
        """
        path = Path(path)
        clock = clock or SystemClock()
        if aside is None:
            _refuse_existing(path)
        # Under another name first: what is found under the right one is always complete.
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
        try:
            if not path.parent.is_dir():
                path.parent.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise JournalUnavailable(f"no journal can be made at {path} ({error}): nothing was made") from error
        try:
            os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            try:
                place = binding.place_of(draft)
                with _plain(draft) as connection:
                    connection.execute("PRAGMA journal_mode = WAL")
                    connection.execute("PRAGMA synchronous = FULL")
                    connection.execute("BEGIN IMMEDIATE")
                    schema.install(connection)
                    epoch = new_epoch(None) if contents is None else contents.epoch or new_epoch(contents.epoch_before)
                    _fill(connection, epoch, clock.boot_id())
                    connection.execute(
                        "INSERT INTO identity (only, label, serial, domain_key_id, partition_key_id, reference, "
                        "machine, inode, device) VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?)",
                        (
                            label,
                            serial,
                            domain_key_id,
                            partition_key_id,
                            reference,
                            place.machine,
                            place.inode,
                            place.device,
                        ),
                    )
                    t = SqliteTransaction(
                        connection, owner="", now=clock.boot(), wall=clock.wall(), alive=lambda owner: False
                    )
                    for member in members:
                        t.insert_member(member)
                    if contents is not None:
                        fill(t, contents, [member.name for member in members])
                    if command:
                        t.seal(Sealed(Why.MAKING, command, epoch))
                    t.head.membership_revision = 1
                    t.finish()
                    connection.execute("COMMIT")
                if aside is None:
                    os.link(draft, path)  # unlike a rename, this fails where another process was quicker
                else:
                    os.link(path, aside)
                    _drop_log(path)
                    os.rename(draft, path)
                _make_durable(path.parent)
            finally:
                draft.unlink(missing_ok=True)
        except FileExistsError:
            _refuse_existing(path)
            raise
        except (OSError, sqlite3.Error) as error:
            raise JournalUnavailable(f"no journal can be made at {path} ({error}): nothing was made") from error

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        clock: Clock | None = None,
        read_only: bool = False,
        for_moving: bool = False,
        busy_timeout: float = BUSY_TIMEOUT,
    ) -> SqliteJournal:
        """Open it, register this process as an owner, and tidy up after dead ones.

        :param read_only: for looking only: no registration, every change is refused.
        :param for_moving: by the one who moves it: although it is sealed.
        :raises JournalUnavailable: missing, damaged, not a journal, of a newer format, or others may write it; or it is
            being moved.
        :raises JournalMismatch: a copy, or restored from a backup; or it was moved elsewhere.
        """
        path = Path(path)
        _expect_bound(path)
        database = Database(path, read_only=read_only, busy_timeout=busy_timeout)
        journal = cls(database, clock or SystemClock(), for_moving=for_moving)
        try:
            journal._attach()
            sealed = journal._read(read_sealed)
            if sealed is not None and not for_moving:
                raise sealed.refusal_to_open(f"sqlite:{path}")
            if not read_only:
                journal._register()
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def expect_replaceable(cls, path: Path | str, *, busy_timeout: float = BUSY_TIMEOUT) -> None:
        """Before a file that is there is replaced by another one: damaged or a copy it may be, but not in use just now.

        :raises JournalUnavailable: others may write it, it is locked, or it cannot be written.
        """
        path = Path(path)
        binding.check_safe(path)
        try:
            with _plain(path, busy_timeout) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("CREATE TABLE may_be_written (x)")
                connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_READONLY):
                raise unavailable(path, error) from error

    @classmethod
    def adopt_file(cls, path: Path | str) -> str:
        """Make a copied or restored file the journal of this place. Returns the new epoch.

        It may be behind the group, so a new epoch begins: each member is taken through a full inventory before it
        serves. Nobody else may use the other file any more.
        """
        path = Path(path)
        binding.check_safe(path)
        try:
            with _plain(path) as connection:
                _expect_journal(path, connection)
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("BEGIN IMMEDIATE")
                place = binding.place_of(path)
                (epoch,) = connection.execute("SELECT epoch FROM head").fetchone()
                epoch = new_epoch(epoch)
                connection.execute(
                    "UPDATE identity SET machine = ?, inode = ?, device = ?", (place.machine, place.inode, place.device)
                )
                connection.execute(
                    "UPDATE head SET epoch = ?, change = change + 1, view = view + 1, members_change = change + 1, "
                    "moved_from = change + 1",
                    (epoch,),
                )
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise unavailable(path, error) from error
        return str(epoch)


def fold(path: Path) -> bool:
    """All that is in the journal's log goes into its file. False: it cannot (damaged, or in use without end)."""
    try:
        with _plain(path) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except sqlite3.Error:
        return False
    log = Path(f"{path}-wal")
    return not log.exists() or not log.stat().st_size


def _drop_log(path: Path) -> None:
    """Of a file that was folded: it would be applied to the one that takes its place."""
    for end in ("-wal", "-shm"):
        Path(f"{path}{end}").unlink(missing_ok=True)


def tidy(path: Path) -> None:
    """What attempts to make it left that were cut off. Nobody else may be making it now."""
    for left in path.parent.glob(f".{path.name}.*"):
        if re.search(r"\.[0-9a-f]{8}\.new(-wal|-shm|-journal)?$", left.name):
            left.unlink(missing_ok=True)


def set_aside(path: Path, aside: Path) -> None:
    """Move a journal's file that cannot be read out of the way, with its log. Nobody may have it open here."""
    for end in ("-wal", "-shm", ""):  # the file last: as long as it is there, nothing is made in its place
        there = path.with_name(path.name + end)
        if there.exists():
            there.rename(aside.with_name(aside.name + end))
    _make_durable(path.parent)


class _plain:  # noqa: N801 - a context manager, used like a function
    """A connection for setting up, outside any :class:`Database`."""

    def __init__(self, path: Path, busy_timeout: float = BUSY_TIMEOUT) -> None:
        quoted = str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        self._connection = sqlite3.connect(
            f"file:{quoted}?mode=rw", uri=True, timeout=busy_timeout, isolation_level=None
        )

    def __enter__(self) -> sqlite3.Connection:
        return self._connection

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def _fill(connection: sqlite3.Connection, epoch: str, boot: str) -> None:
    head = Head(epoch, boot, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    marks = ", ".join("?" * len(Head.__struct_fields__))
    connection.execute(f"INSERT INTO head VALUES (1, {marks})", msgspec.structs.astuple(head))


def _refuse_existing(path: Path) -> None:
    for there in (path, Path(f"{path}-wal")):  # a log of a file that is gone would be applied to the new one
        if there.exists():
            raise JournalUnavailable(
                f"there is a file {there} already: it was left as it is; move it away, or choose another [journal] url"
            )


def _make_durable(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _expect_bound(path: Path) -> None:
    binding.check_safe(path)
    try:
        with _plain(path) as connection:
            _expect_journal(path, connection)
            found = connection.execute("SELECT machine, inode, device FROM identity").fetchone()
    except sqlite3.Error as error:
        raise unavailable(path, error) from error
    binding.check_bound(path, Place(*found))


def _expect_journal(path: Path, connection: sqlite3.Connection) -> None:
    why = schema.unusable(connection)
    if why is not None:
        raise JournalUnavailable(f"{path} {why}; the file was left as it is")
