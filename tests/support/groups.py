"""Groups of SoftHSM members for tests: made by the same command that users have."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from hagroup.journal import binding
from tests.support import forked_admin
from tests.support.forked_admin import Done

ROOT = Path(__file__).resolve().parents[2]
MAKE_GROUP = ROOT / "softhsm-fixtures" / "make-group"
PIN, SO_PIN = "1234", "12345678"
FAST = "hagroup-test-"
"""How names of folders for tests begin."""


@dataclass
class GroupFixture:
    """A group on disk, and what a test does to it from outside."""

    toml: Path
    members: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.toml.parent

    def reload(self) -> None:
        """Read the members from the configuration."""
        config = tomllib.loads(self.toml.read_text())
        for member in config["member"]:
            env = {
                name: value if value.startswith("/") else str(self.folder / value)
                for name, value in member.get("env", {}).items()
                if "/" in value or value
            }
            module = member.get("env", {}).get("HAGROUP_FAULT_MODULE", member["module"])
            plain_env = {name: value for name, value in env.items() if name.startswith("SOFTHSM")}
            self.members[member["name"]] = {"module": module, "serial": member["token_serial"], "env": plain_env}

    def admin(self, *arguments: str, **more: Any) -> Done:
        """Run ha-admin on this group; see :meth:`tests.support.forked_admin.ForkedAdmin.run`."""
        return forked_admin.run("--config", str(self.toml), *arguments, **more)

    def status(self) -> dict[str, Any]:
        done = self.admin("status", "--json")
        assert done.stdout, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def token_folder(self, name: str) -> Path:
        return self.folder / name / "tokens"

    def take_away(self, name: str) -> None:
        """The member's token is gone from its slot (as when an HSM is unplugged)."""
        self.token_folder(name).rename(self.folder / name / "tokens.away")

    def bring_back(self, name: str) -> None:
        (self.folder / name / "tokens.away").rename(self.token_folder(name))

    def workers(self, pid: int | None = None) -> dict[str, psutil.Process]:
        """Worker processes of a client by member's name; those of other groups that it has open do not count."""
        found = {}
        for process in psutil.Process(pid or os.getpid()).children(recursive=True):
            try:
                command, environment = process.cmdline(), process.environ()
            except psutil.Error:
                continue
            member = self.members.get(command[-1]) if command and "launch" in " ".join(command) else None
            if member is not None and member["env"].items() <= environment.items():
                found[command[-1]] = process
        return found

    def stop(self, name: str) -> None:
        """Take the token away and kill this process's worker: the member is off."""
        self.take_away(name)
        worker = self.workers().get(name)
        if worker is not None:
            worker.send_signal(signal.SIGKILL)


_made: dict[tuple[object, ...], GroupFixture] = {}
"""Groups that nobody uses: each is made once, and then copied."""


def make_group(
    folder: Path, *options: str, members: int = 3, isolation: str = "process", anew: bool = False
) -> GroupFixture:
    """A group as ``make-group`` makes it: a copy of one that was made before in the same way, where there is one, with
    tokens of the same serial numbers and keys (making one takes seconds, for the RSA keys of the domain's transport).

    :param anew: with tokens and keys of its own.
    """
    base = next((one for one in folder.parents if one.name.startswith(FAST)), None)
    if anew or base is None or "--journal" in options:
        return _make(folder, *options, members=members, isolation=isolation)
    key = (base, options, members, isolation)
    if key not in _made:
        _made[key] = _make(base / f"made{len(_made)}", *options, members=members, isolation=isolation)
    return copy_group(_made[key], folder)


def _make(folder: Path, *options: str, members: int, isolation: str) -> GroupFixture:
    command = [str(MAKE_GROUP), str(folder), "--members", str(members), "--isolation", isolation, "--label", "payments"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    group = GroupFixture(Path(done.stdout.strip().splitlines()[-1]))
    group.reload()
    return group


def copy_group(source: GroupFixture, folder: Path) -> GroupFixture:
    """A group made earlier, again: tokens of its own, and a journal of its own, as if it had been made there."""
    shutil.copytree(source.folder, folder, symlinks=True)
    for file in (file for file in folder.rglob("*") if file.is_file() and file.suffix in (".toml", ".conf")):
        file.write_text(file.read_text().replace(str(source.folder), str(folder)))
    place = binding.place_of(folder / "journal.db")
    with contextlib.closing(sqlite3.connect(folder / "journal.db")) as journal, journal:
        journal.execute(
            "UPDATE identity SET machine = ?, inode = ?, device = ?", (place.machine, place.inode, place.device)
        )
    group = GroupFixture(folder / source.toml.name)
    group.reload()
    return group


def address(group: GroupFixture, name: str, **change: Any) -> list[str]:
    """Where a member is, as options of ``ha-admin group join``."""
    member = group.members[name] | change
    options = ["--module", str(member["module"]), "--token-serial", member["serial"]]
    return [*options, *(word for key, value in member["env"].items() for word in ("--env", f"{key}={value}"))]


def wait_until(condition: Callable[[], Any], what: str, timeout: float = 90.0) -> Any:
    """The first true value of ``condition``, asked again and again until ``timeout`` seconds have passed."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not happen in {timeout} s"
        time.sleep(0.02)


def run_client(group: GroupFixture, program: str, *arguments: str, timeout: float = 120) -> str:
    """A short-lived application: a Python program with ``hagroup`` as ``pkcs11`` and a logged-in ``session``."""
    prologue = (
        "import sys\nimport hagroup as pkcs11\nfrom hagroup import Attribute, KeyType, Mechanism, ObjectClass\n"
        f"lib = pkcs11.lib({str(group.toml)!r})\ntoken = lib.get_token(token_label='payments')\n"
        f"session = token.open(rw=True, user_pin={PIN!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-", *arguments],
        input=prologue + program,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
