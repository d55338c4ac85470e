"""The second place for envelopes when ``[journal] mirror`` names one (G1): a file on another disk.

It holds what a lost journal is rebuilt from, in place of record objects on the members: each object's record with its
envelope, sealed as in the journal, and the UIDs of what was destroyed.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from hagroup.core.records import ObjectRecord
from hagroup.errors import JournalUnavailable

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (uid BLOB PRIMARY KEY, revision INTEGER NOT NULL, record BLOB) STRICT;
"""


class Mirror:
    """One file; a writer opens it for each change, so that a disk that went away and came back is used again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def _write(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        try:
            with self._lock:
                connection = sqlite3.connect(self._path, timeout=5.0, isolation_level=None)
                try:
                    connection.execute("PRAGMA synchronous = FULL")
                    connection.executescript(_SCHEMA)
                    connection.execute("BEGIN IMMEDIATE")
                    connection.executemany(statement, rows)
                    connection.execute("COMMIT")
                finally:
                    connection.close()
        except sqlite3.Error as error:
            raise JournalUnavailable(
                f"the mirror {self._path} cannot be written ({error}), so no new key could survive the loss of the "
                "journal: nothing was changed; make it writable, or take [journal] mirror out"
            ) from error

    def put(self, records: Sequence[ObjectRecord]) -> None:
        """Durable before it returns; an older revision never replaces a newer one."""
        rows = [(record.uid, record.revision, msgspec.msgpack.encode(record)) for record in records]
        self._write(
            "INSERT INTO records VALUES (?, ?, ?) ON CONFLICT (uid) DO UPDATE SET revision = excluded.revision, "
            "record = excluded.record WHERE excluded.revision >= records.revision AND records.record IS NOT NULL",
            rows,
        )

    def drop(self, uid: bytes) -> None:
        """The object was destroyed: its record goes, that it was there stays."""
        self._write("INSERT INTO records VALUES (?, 0, NULL) ON CONFLICT (uid) DO UPDATE SET record = NULL", [(uid,)])

    def read(self) -> tuple[list[ObjectRecord], list[bytes]]:
        """The records, and the UIDs of what was destroyed. A record with an envelope is proved when that is opened.

        :raises JournalUnavailable: the file cannot be read.
        """
        if not self._path.exists():
            raise JournalUnavailable(f"the mirror {self._path} is not there: [journal] mirror names it")
        try:
            connection = sqlite3.connect(self._path, timeout=5.0, isolation_level=None)
            try:
                found = connection.execute("SELECT uid, record FROM records").fetchall()
            finally:
                connection.close()
            records = [msgspec.msgpack.decode(record, type=ObjectRecord) for _, record in found if record is not None]
        except (sqlite3.Error, msgspec.DecodeError) as error:
            raise JournalUnavailable(f"the mirror {self._path} cannot be read ({error})") from error
        return records, [uid for uid, record in found if record is None]
