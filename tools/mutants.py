"""Put one deliberate bug at a time into a copy of the code, and see that the test named for it fails."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.mutations.table import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("hagroup", "tests", "tools", "softhsm-fixtures", "pyproject.toml", "README.md")
FAILED, PASSED = 1, 0
"""Exit statuses of pytest; all others mean that it did not get as far as running the test."""


def copy_tree(target: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
        else:
            shutil.copy(source, target / name)
    # make-group would install all packages once more; PYTHONPATH comes before the tree that was installed
    (target / ".venv").symlink_to(Path(sys.executable).parents[1])


def run_tests(tree: Path, *tests: str) -> tuple[int, str]:
    """pytest's exit status and its output."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", *tests]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def caught(tree: Path, mutation: Mutation) -> str | None:
    """None: its test failed, as it should. Else what is wrong."""
    path = tree / mutation.file
    right = path.read_text(encoding="utf-8")
    if right.count(mutation.old) != 1:
        return f"its old text stands {right.count(mutation.old)} times in {mutation.file}"
    path.write_text(right.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        compile(path.read_text(encoding="utf-8"), str(path), "exec")
        status, output = run_tests(tree, mutation.test)
    finally:
        path.write_text(right, encoding="utf-8")
    if status == PASSED:
        return f"not caught: {mutation.test} passes"
    if status != FAILED:
        return f"{mutation.test} could not be run:\n{output[-2000:]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names of mutations (default: all)")
    parser.add_argument("--test", help="run this test instead of the one named for it")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.names or any(part in m.name for part in options.names)]
    if not chosen:
        parser.error("there is no mutation of that name; tests/README.md lists them")
    if options.test:
        chosen = [mutation._replace(test=options.test) for mutation in chosen]
    bad = 0
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="hagroup-mutants-", dir=shm if shm.is_dir() else None) as folder:
        tree = Path(folder)
        copy_tree(tree)
        status, output = run_tests(tree, *dict.fromkeys(mutation.test for mutation in chosen))
        if status != PASSED:
            print(f"a test fails without any mutation:\n{output[-2000:]}")
            return 1
        for mutation in chosen:
            wrong = caught(tree, mutation)
            bad += wrong is not None
            print(f"{'caught' if wrong is None else 'NOT OK':7} {mutation.name}" + (f": {wrong}" if wrong else ""))
            sys.stdout.flush()
    print(f"{len(chosen) - bad} of {len(chosen)} caught")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
