"""The tables of a SQLite journal, and how it is told that a file is one, in a version that we know.

``head`` is one row that every noticed transaction reads and updates: the counters that would otherwise need a scan.
``moved`` is an append-only list (change, UID), trimmed at its old end: what :meth:`Journal.changes` answers from.
"""

from __future__ import annotations

import sqlite3

APPLICATION_ID = 0x68616A6C  # "hajl", in the file's header: file(1) and we tell by it that this is a journal
VERSION = 1

MOVED_KEPT = 20_000
"""Changes that ``moved`` goes back; who saw less reads everything anew."""
MOVED_TRIM = 1_000
CLOSED_KEPT = 100_000
"""Changes for which the outcome of a closed intent is remembered (a stopped owner may wake and ask)."""

SCHEMA = """
CREATE TABLE head (
    only                INTEGER PRIMARY KEY CHECK (only = 1),
    epoch               TEXT    NOT NULL,
    boot                TEXT    NOT NULL,  -- boot times in this file are of this boot
    membership_revision INTEGER NOT NULL,
    change              INTEGER NOT NULL,  -- newest change number
    view                INTEGER NOT NULL,  -- newest view number
    moved_from          INTEGER NOT NULL,  -- "moved" is complete for changes above this
    members_change      INTEGER NOT NULL,  -- last change of the group record or a member's
    live                INTEGER NOT NULL,
    creating            INTEGER NOT NULL,
    tombstones          INTEGER NOT NULL,
    intents             INTEGER NOT NULL,
    owed                INTEGER NOT NULL
) STRICT;

CREATE TABLE identity (
    only             INTEGER PRIMARY KEY CHECK (only = 1),
    label            TEXT    NOT NULL,
    serial           TEXT    NOT NULL,
    domain_key_id    BLOB    NOT NULL,
    partition_key_id BLOB    NOT NULL,
    reference        BLOB    NOT NULL,
    machine          TEXT    NOT NULL,  -- where this file is the journal, and not a copy of it
    inode            INTEGER NOT NULL,
    device           INTEGER NOT NULL,
    cleared          TEXT    NOT NULL DEFAULT '',  -- epoch that began when the group was emptied last
    rotation         BLOB                          -- the newest rotation of the domain's keys
) STRICT;

CREATE TABLE members (
    name      TEXT PRIMARY KEY,
    position  INTEGER NOT NULL,
    record    BLOB NOT NULL,     -- MemberRecord without what moves often
    low       INTEGER NOT NULL,
    announced INTEGER NOT NULL,
    confirmed INTEGER NOT NULL
) STRICT;

CREATE TABLE objects (
    number        INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of creation
    uid           BLOB    NOT NULL UNIQUE,
    class         INTEGER NOT NULL,
    key_type      INTEGER,
    label         BLOB,      -- NULL: the object has no such attribute
    cka_id        BLOB,      -- as the application sees it
    member_id     BLOB,
    state         TEXT    NOT NULL,
    revision      INTEGER NOT NULL,
    change        INTEGER NOT NULL,
    intent        TEXT,
    twin          BLOB    NOT NULL,  -- digest of fingerprint and locator
    fingerprint   BLOB    NOT NULL,
    answered_only BLOB    NOT NULL,
    attributes    BLOB    NOT NULL,
    envelope      BLOB
) STRICT;
CREATE INDEX objects_label  ON objects (label);
CREATE INDEX objects_id     ON objects (cka_id, label);
CREATE INDEX objects_class  ON objects (class, key_type);
CREATE INDEX objects_twin   ON objects (twin);
CREATE INDEX objects_intent ON objects (intent) WHERE intent IS NOT NULL;

CREATE TABLE copies (
    uid      BLOB    NOT NULL,
    member   TEXT    NOT NULL,
    revision INTEGER NOT NULL,
    locator  BLOB    NOT NULL,
    PRIMARY KEY (uid, member)
) STRICT, WITHOUT ROWID;
CREATE INDEX copies_member ON copies (member, uid);

CREATE TABLE owed (
    uid          BLOB    NOT NULL,
    member       TEXT    NOT NULL,
    kind         TEXT    NOT NULL,
    revision     INTEGER NOT NULL,
    owner        TEXT,
    change       INTEGER NOT NULL,
    settled      INTEGER NOT NULL,
    asked_before INTEGER NOT NULL,
    reason       TEXT,
    attempts     BLOB,               -- NULL: none is outstanding
    locators     BLOB,               -- those besides the record's own
    PRIMARY KEY (uid, member)
) STRICT, WITHOUT ROWID;
CREATE INDEX owed_member   ON owed (member, change);
CREATE INDEX owed_hinders  ON owed (member, change) WHERE attempts IS NULL AND reason IS NULL;
CREATE INDEX owed_attempts ON owed (member, change) WHERE attempts IS NOT NULL;
CREATE INDEX owed_owner    ON owed (owner) WHERE owner IS NOT NULL;

CREATE TABLE tombstones (
    uid         BLOB PRIMARY KEY,
    change      INTEGER NOT NULL,
    time        REAL    NOT NULL,
    locators    BLOB    NOT NULL,
    fingerprint BLOB    NOT NULL,
    given_up    INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE INDEX tombstones_change ON tombstones (change);

CREATE TABLE intents (
    id      TEXT PRIMARY KEY,  -- begins with its change number, so that they sort
    change  INTEGER NOT NULL,
    owner   TEXT    NOT NULL,
    outcome TEXT,              -- NULL: open
    record  BLOB    NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX intents_open ON intents (owner) WHERE outcome IS NULL;

CREATE TABLE moved (
    change INTEGER NOT NULL,
    uid    BLOB    NOT NULL,
    PRIMARY KEY (change, uid)
) STRICT, WITHOUT ROWID;

CREATE TABLE owners (
    owner   TEXT PRIMARY KEY,
    process INTEGER NOT NULL,
    since   REAL    NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE leases (
    name    TEXT PRIMARY KEY,
    owner   TEXT,              -- NULL: given back; the token stays
    token   INTEGER NOT NULL,
    expires REAL    NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE logins (
    member    TEXT NOT NULL,
    source    TEXT NOT NULL,
    stamp     TEXT NOT NULL,
    state     TEXT NOT NULL,
    owner     TEXT NOT NULL,
    boot_time REAL NOT NULL,
    before    BLOB,            -- while trying: what to go back to if no attempt was made
    PRIMARY KEY (member, source)
) STRICT, WITHOUT ROWID;

CREATE TABLE observations (
    member    TEXT    NOT NULL,
    observer  TEXT    NOT NULL,
    site      TEXT,
    ok        INTEGER NOT NULL,
    kind      TEXT    NOT NULL,
    boot_time REAL    NOT NULL,
    PRIMARY KEY (member, observer)
) STRICT, WITHOUT ROWID;

CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    time   REAL NOT NULL,
    kind   TEXT NOT NULL,
    member TEXT,
    text   TEXT NOT NULL,
    data   BLOB NOT NULL
) STRICT;

CREATE TABLE sealed (
    only   INTEGER PRIMARY KEY CHECK (only = 1),  -- no row: changes are taken
    sealed BLOB NOT NULL
) STRICT;

CREATE TABLE seal (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    seal BLOB NOT NULL
) STRICT;
"""


def install(connection: sqlite3.Connection) -> None:
    """Make the tables in an empty file (inside the caller's transaction)."""
    for statement in SCHEMA.split(";\n"):
        if statement.strip():
            connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {VERSION}")


def complete(connection: sqlite3.Connection) -> None:
    """What a journal of this version that was made earlier may lack."""
    connection.execute(
        "CREATE TABLE IF NOT EXISTS seal (only INTEGER PRIMARY KEY CHECK (only = 1), seal BLOB NOT NULL) STRICT"
    )
    connection.execute(
        "CREATE TABLE IF NOT EXISTS sealed (only INTEGER PRIMARY KEY CHECK (only = 1), sealed BLOB NOT NULL) STRICT"
    )
    if not any(column[1] == "given_up" for column in connection.execute("PRAGMA table_info(tombstones)")):
        connection.execute("ALTER TABLE tombstones ADD COLUMN given_up INTEGER NOT NULL DEFAULT 0")


def unusable(connection: sqlite3.Connection) -> str | None:
    """Why this file is not a journal that we can use, as the middle of a sentence; None: it is one."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if application != APPLICATION_ID:
        return "is a database, but not a journal: correct [journal] url"
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        return f"has format {version}, written by a newer hagroup (this one knows {VERSION}): upgrade hagroup here"
    return None
