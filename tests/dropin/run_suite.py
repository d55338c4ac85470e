"""Runs python-pkcs11's own tests, of the version that is installed, against python-pkcs11 itself or against a group.

``python -m tests.dropin.run_suite --group /path/to/hagroup.toml --label L`` prints the outcome of each test as JSON;
the PINs come by HAGROUP_TEST_PIN and HAGROUP_TEST_SO_PIN.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from hagroup.members.module import ConnectionSettings

ROOT = Path(__file__).parents[2]
SHIM = Path(__file__).parent / "shim"
SOFTHSM = "/usr/lib/softhsm/libsofthsm2.so"
CACHE = Path(sys.prefix) / "cache"
PARAMETERIZED = "parameterized==0.9.0"


class SuiteUnavailable(Exception):
    """The tests cannot be had here (no network, and none in the cache)."""


def _pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        raise SuiteUnavailable(f"pip {arguments[0]}: {done.stderr.strip()[-500:]}")


def fetch_suite() -> Path:
    """A folder with python-pkcs11's ``tests`` (apart from its sources, which would hide the installed package) and what
    they import; from the cache if it is there."""
    release = version("python-pkcs11")
    ready = CACHE / f"python-pkcs11-{release}-suite"
    if ready.is_dir():
        return ready
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SuiteUnavailable(f"{CACHE} cannot be made: {error}") from None
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        here = Path(folder)
        _pip("download", "--no-deps", "--no-binary", ":all:", f"python-pkcs11=={release}", "-d", str(here))
        with tarfile.open(next(here.glob("*.tar.gz"))) as archive:
            archive.extractall(here / "source", filter="data")
        suite = here / "suite"
        suite.mkdir()
        shutil.move(next((here / "source").glob("*/tests")), suite / "tests")
        _pip("install", "--no-deps", "--target", str(suite), PARAMETERIZED)
        try:
            suite.rename(ready)
        except OSError:  # another process was first
            if not ready.is_dir():
                raise
    return ready


def run_suite(
    target: dict[str, Any],
    *,
    label: str,
    pin: str,
    so_pin: str,
    env: dict[str, str] | None = None,
    force_token: bool = False,
    only: str | None = None,
    timeout: float = 600,
) -> dict[str, dict[str, str]]:
    """Outcome and message of each test by name; ``target`` as the shim takes it."""
    suite = fetch_suite()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        environment = {
            **os.environ,
            **(env or {}),
            "PYTHONPATH": os.pathsep.join([str(SHIM), str(ROOT)]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HAGROUP_SHIM": json.dumps({**target, "force_token": force_token}),
            "HAGROUP_SHIM_RESULTS": str(results),
            "PKCS11_MODULE": SOFTHSM,
            "PKCS11_TOKEN_LABEL": label,
            "PKCS11_TOKEN_PIN": pin,
            "PKCS11_TOKEN_SO_PIN": so_pin,
        }
        arguments = ["-p", "hagroup_shim", "-p", "no:cacheprovider", "-q", "tests"]
        if only:
            arguments += ["-k", only]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--rootdir", str(suite), "-c", os.devnull, *arguments],
            cwd=suite,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if not results.exists():
            raise RuntimeError(
                f"the suite did not finish ({done.returncode}):\n{done.stdout[-3000:]}\n{done.stderr[-2000:]}"
            )
        outcomes: dict[str, dict[str, str]] = json.loads(results.read_text())
    return outcomes


def direct_target(settings: ConnectionSettings) -> dict[str, Any]:
    """The facade over a single member."""
    support = ROOT / "tests" / "support" / "direct_engine.py"
    return {"kind": "direct", "settings": msgspec.to_builtins(settings), "support": str(support)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--group", metavar="TOML", help="a group's configuration; without it: python-pkcs11 itself")
    parser.add_argument("--label", required=True, help="the token's label")
    parser.add_argument("--force-token", action="store_true", help="make token objects of all keys; empties the token")
    parser.add_argument("-k", dest="only", help="only the tests that pytest selects with this expression")
    asked = parser.parse_args()
    target = {"kind": "group", "config": os.path.abspath(asked.group)} if asked.group else {"kind": "plain"}
    outcomes = run_suite(
        target,
        label=asked.label,
        pin=os.environ["HAGROUP_TEST_PIN"],
        so_pin=os.environ["HAGROUP_TEST_SO_PIN"],
        force_token=asked.force_token,
        only=asked.only,
    )
    json.dump(outcomes, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
