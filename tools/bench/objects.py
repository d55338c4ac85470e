"""Searches by label, and a member's resync of a hundred changes, among few and many objects on real SoftHSM tokens.

Token time is not the group's: the resync's cost is the number of calls that the member got.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from group import ROOT, Group, scratch
from operations import PIN

CHANGES = 100
LOOKS = 100
_THREADS = 4


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/objects", description=__doc__)
    parser.add_argument("--objects", default="100,1000", help="numbers of AES keys (default 100,1000)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--step", nargs=2, metavar=("NAME", "TOML"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(STEPS[options.step[0]](options.step[1], int(options.objects))))
        sys.stdout.flush()
        os._exit(0)
    found = {}
    for number in map(int, options.objects.split(",")):
        with scratch() as folder:
            found[number] = measure(folder, number)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    show(found)


def measure(folder: Path, number: int) -> dict[str, float]:
    group = Group(folder / "group", 2, "process", faults=True, journal=None)
    step(group, "fill", number)
    sync(group)  # so that the tokens show that all of it is finished there, as they do a moment later in daily life
    found: dict[str, float] = step(group, "search", number)
    away, control = group.folder / group.members[1]["name"], group.controls[1]
    (away / "tokens").rename(away / "tokens.away")
    step(group, "change", number)
    (away / "tokens.away").rename(away / "tokens")
    control.reset()
    begun = time.perf_counter()
    sync(group)
    found["resync, calls to the member"] = sum(control.counts().values())
    found["resync, seconds with the program's start"] = time.perf_counter() - begun
    return found


def sync(group: Group) -> None:
    command = [sys.executable, "-m", "hagroup.admin.cli", "--config", group.toml, "sync", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"ha-admin sync: {done.stdout}{done.stderr}")


def step(group: Group, name: str, number: int) -> dict[str, float]:
    """In a program of its own: each begins with nothing but what is on the tokens and in the journal."""
    command = [sys.executable, __file__, "--step", name, group.toml, "--objects", str(number)]
    found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def _open(toml: str) -> Any:
    sys.path.append(str(ROOT))
    import hagroup

    token = hagroup.lib(toml).get_token(token_label="bench")
    return token, token.open(rw=True, user_pin=PIN)


def fill(toml: str, number: int) -> dict[str, float]:
    from pkcs11 import KeyType

    token, _ = _open(toml)

    def some(first: int) -> None:
        with token.open(rw=True) as session:
            for place in range(first, number, _THREADS):
                session.generate_key(KeyType.AES, 256, store=True, label=f"key {place}")

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(some, range(_THREADS)))
    return {}


def search(toml: str, number: int) -> dict[str, float]:
    _, session = _open(toml)
    times = []
    for look in range(LOOKS):
        begun = time.perf_counter()
        session.get_key(label=f"key {look * number // LOOKS}")
        times.append(time.perf_counter() - begun)
    return {"find by label, ms": statistics.median(times) * 1000}


def change(toml: str, number: int) -> dict[str, float]:
    """A hundred changes: new labels, destructions and new keys."""
    from pkcs11 import Attribute, KeyType

    _, session = _open(toml)
    for place in range(CHANGES // 4):
        session.generate_key(KeyType.AES, 256, store=True, label=f"new {place}")
        session.get_key(label=f"key {place}").destroy()
    for place in range(CHANGES // 4, 3 * CHANGES // 4):
        session.get_key(label=f"key {place}")[Attribute.LABEL] = f"renamed {place}"
    return {}


STEPS = {"fill": fill, "search": search, "change": change}


def show(found: dict[int, dict[str, float]]) -> None:
    numbers = list(found)
    print(f"{'':42}" + "".join(f"{number:>12} objects" for number in numbers) + f"{'ratio':>8}")
    for name, first in found[numbers[0]].items():
        values = [found[number][name] for number in numbers]
        ratio = values[-1] / first if first else 0.0
        print(f"{name:42}" + "".join(f"{value:>20.3f}" for value in values) + f"{ratio:>8.2f}")


if __name__ == "__main__":
    main()
