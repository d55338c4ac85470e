"""What was measured: a row for each cell, and the tables made of them."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KEY = ("operation", "kind", "members", "threads", "processes", "cached", "network", "disturbed")


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def summary(answers: list[Row]) -> Row:
    """Of all processes of a cell; times in seconds. ``last third``: the rate after a disturbance half way."""
    calls = sorted(
        ((begun, took) for answer in answers for begun, took in answer["calls"] if begun + took > 0.0),
        key=lambda call: call[1],
    )
    times = [took for _, took in calls]
    errors = [error for answer in answers for error in answer["errors"]]
    if not times:
        return {"rate": 0.0, "calls": 0, "last third": 0.0, "errors": errors} | dict.fromkeys(_NUMBERS, 0.0)
    seconds = max(answer["seconds"] for answer in answers)
    late = sum(_within(call, seconds * 2 / 3, seconds) for call in calls)
    return {
        "rate": sum(_within(call, 0.0, a["seconds"]) / a["seconds"] for a in answers for call in a["calls"]),
        "calls": len(times),
        "last third": late / (seconds / 3),
        "median": statistics.median(times),
        "p90": times[int(len(times) * 0.90)],
        "p99": times[int(len(times) * 0.99)],
        "longest": times[-1],
        "processor": sum(answer["processor"] for answer in answers) / sum(_within(one, 0.0, math.inf) for one in calls),
        "memory": sum(answer["memory"] for answer in answers),
        "errors": errors,
    }


def _within(call: tuple[float, float], begin: float, end: float) -> float:
    """The part of a call that lies in this time. Whole calls would count too little or too much where they are long,
    and waiting for the last one would count time in which the other threads do nothing."""
    begun, took = call
    return max(0.0, min(end, begun + took) - max(begin, begun)) / took


_TIMES = ("median", "p90", "p99", "longest")
_NUMBERS = (*_TIMES, "processor", "memory")
"""``processor``: seconds of processor time for a call, in all processes of the clients; ``memory``: MiB, at most."""


def opponents(rows: list[Row]) -> dict[tuple[Any, ...], Row]:
    """What each cell is compared with: the members separately where that was measured, else plain python-pkcs11."""
    found: dict[tuple[Any, ...], Row] = {}
    for kind in ("plain", "separately"):
        for row in rows:
            if row["kind"] == kind:
                found[key({**row, "kind": None})] = row
    return found


def show(rows: list[Row], network: Any = None) -> None:
    against = opponents(rows)
    print("calls per second; ratio: to the members used separately if measured, else to plain python-pkcs11 on one")
    allowed = f" {'/ model':>8}" if network else ""
    times = "".join(f"{name + ' ms':>11}" for name in _TIMES) + f"{'cpu µs':>10}{'MiB':>6}"
    print(f"{'operation':24} {'kind':10} {'members':>7} {'threads':>9} {'per s':>9} {'ratio':>6}{allowed}{times}")
    for row in rows:
        other = against.get(key({**row, "kind": None}))
        ratio = f"{row['rate'] / other['rate']:.2f}" if other and other["rate"] and other is not row else "-"
        threads = f"{row['processes']} x {row['threads']}" if row["processes"] > 1 else str(row["threads"])
        name = row["operation"] + ("" if row["cached"] else " (anew)")
        line = f"{name:24} {row['kind']:10} {row['members']:>7} {threads:>9} {row['rate']:>9.1f} {ratio:>6}"
        if network:
            members = 1 if row["kind"] == "plain" else row["members"]
            line += f" {row['rate'] / network.allows(row['threads'] * row['processes'], members):>8.2f}"
        line += "".join(f"{row[name] * 1000:>11.2f}" for name in _TIMES)
        print(f"{line}{row['processor'] * 1e6:>10.0f}{row['memory']:>6.0f}")
        if row["disturbed"] in ("hung", "killed"):
            print(f"{'':24} after the member was {row['disturbed']}, last third: {row['last third']:.1f} per s")
        for error in sorted(set(row["errors"])):
            print(f"{'':24} error: {error}")


def read(path: Path) -> tuple[str, list[Row]]:
    """Machine and rows of a file that ``run --json`` wrote; ends the program with a sentence where it is none."""
    try:
        found = json.loads(path.read_text())
        for row in found["results"]:
            key(row)
        return found["machine"], found["results"]
    except OSError as error:
        sys.exit(f"{path} cannot be read: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        sys.exit(f"{path} is not a file of results: make one with tools/bench/run --json {path}")
