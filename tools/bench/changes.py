"""Changes a second in a SQLite and an etcd journal (three nodes on loopback), with one client and with several.

A change is a key made, or destroyed, on three members that answer at once: what the journal does for it, less the
members' own time. Each client is a process with changes of its own."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

from group import scratch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from hagroup.config.model import JournalSection, SqliteUrl
from hagroup.journal import SystemClock, create_journal, open_journal
from hagroup.journal.api import Journal
from tests.support.etcd import Cluster
from tests.support.journals import ask, confirm, destroyed, make_live, member, revision_of

NAMES = ("hsm1", "hsm2", "hsm3")


def change(journal: Journal, seconds: float) -> list[float]:
    """Make and destroy keys for so long. How long each took."""
    took: list[float] = []
    end = time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        made = make_live(journal, *NAMES)
        took.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        journal.destroy(made.uid, asking=ask(*NAMES), membership_revision=revision_of(journal))
        confirm(journal, *(destroyed(name, made.uid) for name in NAMES))
        took.append(time.perf_counter() - begun)
    return took


def client(section: JournalSection, seconds: float, ready: Barrier, answers: Queue[list[float]]) -> None:
    journal = open_journal(section)
    try:
        make_live(journal, *NAMES)  # connections are open, programs loaded
        ready.wait()
        answers.put(change(journal, seconds))
    finally:
        journal.close()


def measure(section: JournalSection, clients: int, seconds: float) -> dict[str, float]:
    spawn = multiprocessing.get_context("spawn")
    ready, answers = spawn.Barrier(clients), spawn.Queue()
    processes = [spawn.Process(target=client, args=(section, seconds, ready, answers)) for _ in range(clients)]
    for one in processes:
        one.start()
    took = [seconds_ for _ in processes for seconds_ in answers.get(timeout=seconds + 120)]
    for one in processes:
        one.join()
    return {
        "rate": len(took) / seconds,
        "median": statistics.median(took) * 1000,
        "p99": statistics.quantiles(took, n=100)[98] * 1000,
        "longest": max(took) * 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/changes", description=__doc__)
    parser.add_argument("--clients", default="1,8", help="numbers of clients to compare (default 1,8)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default 5)")
    parser.add_argument(
        "--folder", type=Path, help="where both journals are (default: in memory, so that no disk counts)"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    print(f"{'journal':8} {'clients':>7} {'changes/s':>10} {'median ms':>10} {'99 % ms':>9} {'longest ms':>11}")
    with scratch(options.folder) as folder:
        nodes = Cluster(3, folder)
        try:
            sections = {
                "sqlite": JournalSection(url=SqliteUrl(path=folder / "journal.db")),
                "etcd": nodes.section("changes"),
            }
            for name, section in sections.items():
                make_journal(section)
                for clients in (int(number) for number in options.clients.split(",")):
                    one = found[f"{name} {clients}"] = measure(section, clients, options.seconds)
                    line = f"{name:8} {clients:>7} {one['rate']:>10.0f} {one['median']:>10.1f} {one['p99']:>9.1f}"
                    print(f"{line} {one['longest']:>11.1f}", flush=True)
        finally:
            nodes.stop()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def make_journal(section: JournalSection) -> None:
    create_journal(
        section,
        label="payments",
        serial="74007601",
        members=[member(name) for name in NAMES],
        domain_key_id=b"domain",
        partition_key_id=b"partition",
        reference=b"reference",
        clock=SystemClock(),
    )


if __name__ == "__main__":
    main()
