"""What a SQLite journal's decisions cost when it is full: steps of SQLite's machine (the same on every machine, however
busy), and milliseconds. Objects and tombstones are copies of real rows, put in by SQL."""

from __future__ import annotations

import argparse
import json
import sqlite3
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from group import scratch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from hagroup.core.records import OwedKind, OwedRow
from hagroup.journal import SqliteJournal
from tests.support.journals import (
    LABEL,
    SqliteBackend,
    ask,
    confirm,
    destroyed,
    installed,
    make_live,
    member,
    new_object,
    revision_of,
)

NAMES = ("hsm1", "hsm2", "hsm3")
CHANGES = 100
_NUMBERS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"


def fill(path: Path, objects: int) -> None:
    """So many copies of the one object there is, and of the one tombstone."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA cache_size = -400000")  # KiB: the indexes are filled in random order
    columns = [row[1] for row in connection.execute("PRAGMA table_info(objects)") if row[1] != "number"]
    own = {"uid": "randomblob(16)", "label": "CAST('label ' || i AS BLOB)", "twin": "randomblob(32)"}
    chosen = ", ".join(own.get(name, name) for name in columns)
    first, last = connection.execute("SELECT min(number), max(number) FROM objects").fetchone()
    source = f"n, (SELECT * FROM objects WHERE number = {first})"
    connection.execute(
        f"{_NUMBERS} INSERT INTO objects ({', '.join(columns)}) SELECT {chosen} FROM {source}", (objects,)
    )
    connection.execute(
        "INSERT INTO copies SELECT o.uid, c.member, c.revision, c.locator FROM objects o, copies c "
        f"WHERE c.uid = (SELECT uid FROM objects WHERE number = {first}) AND o.number > {last}"
    )
    connection.execute(
        f"{_NUMBERS} INSERT INTO tombstones SELECT randomblob(16), change, time, locators, fingerprint, given_up "
        "FROM n, (SELECT * FROM tombstones LIMIT 1)",
        (objects,),
    )
    connection.execute("UPDATE head SET live = live + ?1, tombstones = tombstones + ?1", (objects,))
    connection.commit()
    connection.close()


class Steps:
    """Counts what SQLite executes for a journal."""

    def __init__(self, journal: SqliteJournal) -> None:
        self.count = 0
        database: Any = journal._database
        connect = database._connect

        def counted() -> sqlite3.Connection:
            connection: sqlite3.Connection = connect()
            connection.set_progress_handler(self._step, 10)
            return connection

        database._close_idle()
        database._connect = counted

    def _step(self) -> int:
        self.count += 10
        return 0


def decisions(journal: SqliteJournal) -> dict[str, Callable[[], object]]:
    """Each is done several times."""

    def status() -> None:
        journal.view()
        journal.counts()
        for name in NAMES:
            journal.owed(name)
        journal.events(limit=50)

    def create_and_destroy() -> None:
        made = make_live(journal, *NAMES, record=new_object(b"new"))
        journal.destroy(made.uid, asking=ask(*NAMES), membership_revision=revision_of(journal))
        confirm(journal, *(destroyed(name, made.uid) for name in NAMES))

    def admit(name: str, *, low: int) -> list[OwedRow]:
        revision = revision_of(journal)
        return journal.admit(name, barrier=journal.barrier(), low=low, lease=None, membership_revision=revision)

    def resync() -> None:
        """The journal's part of bringing a member up to date after so many changes."""
        records = [make_live(journal, "hsm1", "hsm2", record=new_object(b"owed")) for _ in range(CHANGES)]
        owed = journal.owed("hsm3")
        rows = [(row.member, row.uid) for row in owed if row.kind is OwedKind.INSTALL]
        journal.claim(rows, worker="worker-hsm3", membership_revision=revision_of(journal))
        confirm(journal, *(installed("hsm3", record) for record in records))
        assert not admit("hsm3", low=journal.barrier())

    label = {LABEL: b"label 7"}
    return {
        "status": status,
        "admission": lambda: admit("hsm2", low=0),
        "find by label": lambda: journal.search(label),
        "create and destroy": create_and_destroy,
        f"resync of {CHANGES} changes": resync,
    }


def measure(folder: Path, objects: int) -> dict[str, dict[str, float]]:
    folder.mkdir()
    backend = SqliteBackend(folder, [member(name) for name in NAMES])
    journal = backend.open()
    make_live(journal, *NAMES)
    gone = make_live(journal, *NAMES)
    journal.destroy(gone.uid, asking=ask(*NAMES), membership_revision=revision_of(journal))
    confirm(journal, *(destroyed(name, gone.uid) for name in NAMES))
    fill(backend.path, objects)
    steps = Steps(journal)
    found = {}
    for name, decide in decisions(journal).items():
        counts, times = [], []
        for _ in range(3 if name.startswith("resync") else 15):
            steps.count, begun = 0, time.perf_counter()
            decide()
            times.append(time.perf_counter() - begun)
            counts.append(steps.count)
        found[name] = {"steps": statistics.median(counts), "milliseconds": min(times) * 1000}
    backend.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/journal", description=__doc__)
    parser.add_argument("--objects", default="1000,1000000", help="sizes to compare (default 1000,1000000)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    sizes = [int(number) for number in options.objects.split(",")]
    with scratch() as folder:
        found = {size: measure(folder / str(size), size) for size in sizes}
    first = found[sizes[0]]
    print(f"{'decision':26} {'objects':>9} {'steps':>10} {'ratio':>6} {'ms':>9} {'ratio':>6}")
    for name in first:
        for size in sizes:
            one, base_ = found[size][name], first[name]
            ratios = [one[unit] / (base_[unit] or 1) for unit in ("steps", "milliseconds")]
            line = f"{name:26} {size:>9} {one['steps']:>10.0f} {ratios[0]:>6.2f}"
            print(f"{line} {one['milliseconds']:>9.2f} {ratios[1]:>6.2f}")
    if options.json:
        options.json.write_text(json.dumps({str(size): rows for size, rows in found.items()}, indent=1))


if __name__ == "__main__":
    main()
