"""Two files of results side by side: what became faster, what slower; exit status 1 if something became slower.

Machines and moments differ: where both files have an opponent (plain python-pkcs11, or the members separately), the
ratios to it are compared, else the calls per second."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from results import Row, key, opponents, read


def relative(rows: list[Row]) -> dict[object, tuple[float, bool]]:
    """Each cell's ratio to its opponent (True), or its rate."""
    against = opponents(rows)
    found: dict[object, tuple[float, bool]] = {}
    for row in rows:
        other = against.get(key({**row, "kind": None}))
        if row["kind"] in ("plain", "separately"):
            continue
        found[key(row)] = (row["rate"] / other["rate"], True) if other and other["rate"] else (row["rate"], False)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--worse", type=float, default=0.15, help="how much slower counts (default 0.15)")
    options = parser.parse_args()
    (old_machine, old_rows), (new_machine, new_rows) = read(options.before), read(options.after)
    print(f"before: {old_machine}\nafter:  {new_machine}")
    old, new = relative(old_rows), relative(new_rows)
    lost = False
    print(f"{'operation':24} {'kind':10} {'members':>7} {'threads':>9} {'before':>9} {'after':>9} {'change':>7}")
    for row in new_rows:
        if key(row) not in old or key(row) not in new:
            continue
        (before, ratio), (after, also) = old[key(row)], new[key(row)]
        if ratio != also or not before:
            continue
        change = after / before - 1
        lost = lost or change < -options.worse
        threads = f"{row['processes']} x {row['threads']}"
        name = row["operation"] + ("" if row["cached"] else " (anew)")
        line = f"{name:24} {row['kind']:10} {row['members']:>7} {threads:>9}"
        print(f"{line} {before:>9.2f} {after:>9.2f} {change:>+7.0%}")
    if not set(old) & set(new):
        sys.exit("the two files have no measurement in common")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
