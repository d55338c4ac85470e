"""Runs a measurement: plain python-pkcs11 and groups in turns, so that a busy moment of the machine hits all."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
QUICK = [
    "sign RSA-2048",
    "sign EC P-256",
    "verify RSA-2048",
    "AES-CBC 16 B",
    "AES-CBC 1 MiB",
    "random 16 B",
    "find key",
]
ALL = [*QUICK, "AES-CBC 4 KiB", "digest 4 KiB", "wrap AES-256", "generate AES-256", "generate RSA-2048"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/bench/run", description=__doc__)
    parser.add_argument("--members", type=int, default=2, help="members of the group (default 2)")
    parser.add_argument("--threads", default="1,16", help="numbers of threads (default 1,16)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement (default 0.5)")
    parser.add_argument("--rounds", type=int, default=3, help="turns; the best of each is kept (default 3)")
    parser.add_argument("--operations", default=",".join(QUICK), help=f"of: {', '.join(ALL)}; or `all`")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    options.operations = ALL if options.operations == "all" else options.operations.split(",")
    unknown = [name for name in options.operations if name not in ALL]
    if unknown:
        parser.error(f"no such operation: {unknown[0]}")
    options.threads = [int(number) for number in options.threads.split(",")]
    return options


def ask(kind: str, path: str, question: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(HERE / "worker.py"), kind, path],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"the measurement of {kind} {path} failed: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def make(folder: Path, name: str, members: int, isolation: str) -> str:
    command = [str(ROOT / "softhsm-fixtures" / "make-group"), str(folder / name), "--label", "bench"]
    command += ["--members", str(members), "--isolation", isolation]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    options = parse()
    base = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="hagroup-bench-", dir=base if base.is_dir() else None))
    try:
        results = measure(folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(results, options)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=2))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    process = make(folder, "process", options.members, "process")
    inline = make(folder, "none", options.members, "none")
    plain = str(folder / "process" / "hsm1" / "softhsm2.conf")
    for path in (process, inline):
        ask("group", path, {"make keys": True})
    opponents = {"plain": ("plain", plain), "process": ("group", process), "none": ("group", inline)}
    best: dict[str, dict[str, Any]] = {name: {} for name in opponents}
    for _ in range(options.rounds):
        for name, (kind, path) in opponents.items():
            question = {"operations": options.operations, "threads": options.threads, "seconds": options.seconds}
            for case, found in ask(kind, path, question).items():
                kept = best[name].get(case)
                if kept is None or found["rate"] > kept["rate"]:
                    best[name][case] = found
    return best


def machine() -> str:
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"{platform.machine()}, {os.cpu_count()} cores, {system}"


def show(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    print(f"{machine()}; SoftHSM, {options.members} members")
    print("calls per second; in brackets the ratio to plain python-pkcs11")
    print(f"{'operation':20} {'threads':>7} {'plain':>10} {'process':>18} {'none':>18} {'longest (process)':>18}")
    for case, plain in results["plain"].items():
        name, threads = case.split("|")
        columns = [
            f"{results[kind][case]['rate']:>10.0f} ({results[kind][case]['rate'] / plain['rate']:.2f})"
            for kind in ("process", "none")
        ]
        longest = results["process"][case]["longest"] * 1000
        print(f"{name:20} {threads:>7} {plain['rate']:>10.0f} {columns[0]:>18} {columns[1]:>18} {longest:>15.1f} ms")


if __name__ == "__main__":
    main()
