"""Runs a measurement: plain python-pkcs11 and groups in turns, so that a busy moment of the machine hits all."""

from __future__ import annotations

import argparse
import json
import os
import platform
import threading
from pathlib import Path
from typing import Any

from group import Client, Group, Network, scratch
from operations import FIRST_USE, PREPARE
from results import Row, show, summary

QUICK = [
    "sign RSA-2048",
    "sign EC P-256",
    "verify RSA-2048",
    "AES-CBC 16 B",
    "AES-CBC 1 MiB",
    "random 16 B",
    "find key",
]
ALL = [*PREPARE, FIRST_USE]
KINDS = ("plain", "separately", "process", "none")
DISTURBANCES = ("slow", "busy", "hung", "killed")


def numbers(text: str) -> list[int]:
    """``1,4-6`` is 1, 4, 5 and 6."""
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    if min(found) < 1:
        raise ValueError(text)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/bench/run", description=__doc__)
    parser.add_argument("--members", type=numbers, default=[2], help="members of the group, such as 1-3,8 (default 2)")
    parser.add_argument("--threads", type=numbers, default=[1, 16], help="threads of each process (default 1,16)")
    parser.add_argument("--processes", type=numbers, default=[1], help="processes that use the group (default 1)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement (default 0.5)")
    parser.add_argument("--warm-up", type=float, help="seconds before each (default 0.3, with --network 2)")
    parser.add_argument("--rounds", type=int, default=3, help="turns; the best of each is kept (default 3)")
    parser.add_argument("--operations", default=",".join(QUICK), help=f"of: {', '.join(ALL)}; or `all`")
    parser.add_argument("--kinds", default="plain,process,none", help=f"of: {', '.join(KINDS)}")
    parser.add_argument("--not-cached", action="store_true", help="open a session and find the keys for each call, too")
    parser.add_argument(
        "--network", type=Network, metavar="MS:N", help="members as network HSMs: service time, at once"
    )
    parser.add_argument("--disturb", choices=DISTURBANCES, help="what happens to the second member (half way)")
    parser.add_argument("--journal", metavar="URL", help="of the groups (default: SQLite beside the configuration)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    options.operations = ALL if options.operations == "all" else options.operations.split(",")
    options.kinds = options.kinds.split(",")
    if options.warm_up is None:
        options.warm_up = 0.3 if options.network is None else 2.0
    for what, given, known in (("operation", options.operations, ALL), ("kind", options.kinds, KINDS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"no such {what}: {unknown[0]}")
    if options.disturb == "slow" and options.network is None:
        parser.error("a slow member needs the model of a network HSM: --network 5:8")
    if options.disturb in ("hung", "killed") and options.kinds != ["process"]:
        parser.error(f"a member is {options.disturb} only where it has a process of its own: --kinds process")
    return options


def main() -> None:
    options = parse()
    with scratch() as folder:
        rows = [row for members in options.members for row in Measurement(folder, members, options).run()]
    found = {"machine": machine(), "results": rows}
    print(found["machine"])
    show(rows, options.network)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def machine() -> str:
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    load = f"load {os.getloadavg()[0]:.1f} at the end"
    return f"{platform.machine()}, {os.cpu_count()} cores, {system}, SoftHSM, {load}"


class Measurement:
    """All cells for groups of one size."""

    def __init__(self, folder: Path, members: int, options: argparse.Namespace) -> None:
        self._options = options
        self._members = members
        faults = options.network is not None or options.disturb is not None
        isolations = [kind for kind in ("process", "none") if kind in options.kinds] or ["process"]
        self._groups = {
            isolation: Group(folder / f"{isolation}{members}", members, isolation, faults=faults, journal=self._url())
            for isolation in isolations
        }
        self._any = next(iter(self._groups.values()))
        for group in self._groups.values():
            client = group.client()
            client.ask({"do": "make keys"})
            client.answer()
            client.end()
            group.serve(options.network, slow=options.disturb == "slow")

    def _url(self) -> str:
        return self._options.journal or "sqlite:journal.db"

    def run(self) -> list[Row]:
        best: dict[tuple[Any, ...], Row] = {}
        for _ in range(self._options.rounds):
            for cell in self._cells():
                row = self._measure(cell)
                key = tuple(sorted(cell.items()))
                if key not in best or row["rate"] > best[key]["rate"]:
                    best[key] = row
        return list(best.values())

    def _cells(self) -> list[dict[str, Any]]:
        options = self._options
        return [
            {"operation": operation, "threads": threads, "processes": processes, "cached": cached, "kind": kind}
            for operation in options.operations
            for threads in (options.threads if operation != FIRST_USE else [1])
            for processes in options.processes
            for cached in ([True, False] if options.not_cached and operation != FIRST_USE else [True])
            for kind in options.kinds
        ]

    def _clients(self, cell: dict[str, Any]) -> list[tuple[Client, int]]:
        """Processes, and how many threads each has."""
        if cell["kind"] == "plain":
            return [(self._any.client(0), cell["threads"]) for _ in range(cell["processes"])]
        if cell["kind"] == "separately":  # the same threads in all, dealt out to the members
            every = cell["threads"] * cell["processes"]
            shares = [every // self._members + (n < every % self._members) for n in range(self._members)]
            return [(self._any.client(number), share) for number, share in enumerate(shares) if share]
        return [(self._groups[cell["kind"]].client(), cell["threads"]) for _ in range(cell["processes"])]

    def _measure(self, cell: dict[str, Any]) -> Row:
        seconds = self._options.seconds
        clients = self._clients(cell)
        group = self._groups.get(cell["kind"], self._any)
        busy = self._make_busy(group, cell) if self._options.disturb == "busy" else None
        if cell["operation"] == FIRST_USE:
            clients = clients[:1]
            clients[0][0].ask({"do": "first use"})
        else:
            self._start(clients, cell)
        disturbing = threading.Timer(self._options.warm_up + seconds / 2, self._disturb, (group, clients[0][0].pid))
        if self._options.disturb in ("hung", "killed"):
            disturbing.start()
        answers = [client.answer() for client, _ in clients]
        disturbing.cancel()
        group.heal()
        for client, _ in clients:
            client.end()
        if busy is not None:
            busy.answer()
            busy.end()
        network = self._options.network
        return {
            **cell,
            "members": self._members,
            "network": network.text if network else None,
            "disturbed": self._options.disturb,
            **summary(answers),
        }

    def _start(self, clients: list[tuple[Client, int]], cell: dict[str, Any]) -> None:
        question = {"do": "cell", "operation": cell["operation"], "cached": cell["cached"]}
        question["warm up"] = self._options.warm_up
        for client, threads in clients:
            client.ask({**question, "threads": threads, "seconds": self._options.seconds})
        for client, _ in clients:
            client.hear()
        for client, _ in clients:
            client.tell("go")

    def _make_busy(self, group: Group, cell: dict[str, Any]) -> Client:
        """Somebody else uses the second member with plain python-pkcs11 for as long as this is measured."""
        other = group.client(min(1, self._members - 1))
        self._start([(other, 16)], {**cell, "cached": True})
        return other

    def _disturb(self, group: Group, client: int) -> None:
        if self._options.disturb == "hung":
            group.hang()
        else:
            group.kill(client)


if __name__ == "__main__":
    main()
