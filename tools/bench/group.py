"""The members that are measured: made for one run, under the fault interposer where something is done to them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT / "softhsm-fixtures"))

from faultcontrol import FaultControl  # noqa: E402

SOFTHSM = "/usr/lib/softhsm/libsofthsm2.so"
DISTURBED = 1
"""Number of the member that something is done to: the second, where there is one."""


@contextmanager
def scratch(parent: Path | None = None) -> Iterator[Path]:
    """A folder, in memory where there is no parent; it goes whatever ends the program, SIGTERM too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    base = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="hagroup-bench-", dir=parent or (base if base.is_dir() else None)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Network:
    """The model of a network HSM: ``milliseconds:concurrency`` of each member."""

    def __init__(self, text: str) -> None:
        found = re.fullmatch(r"(\d+(?:\.\d+)?):(\d+)", text)
        if found is None:
            raise ValueError(f"{text!r} is not MILLISECONDS:CONCURRENCY, such as 5:8")
        self.milliseconds, self.concurrency = float(found[1]), int(found[2])
        self.text = text

    def allows(self, threads: int, members: int) -> float:
        """Calls per second that so many threads can get from so many members."""
        return min(threads, members * self.concurrency) / (self.milliseconds / 1000)


class Group:
    """A group on disk, and its members' fault controls."""

    def __init__(self, folder: Path, members: int, isolation: str, *, faults: bool, journal: str | None) -> None:
        command = [str(ROOT / "softhsm-fixtures" / "make-group"), str(folder), "--label", "bench"]
        command += ["--members", str(members), "--isolation", isolation]
        self.module = SOFTHSM
        if faults:
            self.module = _run(str(ROOT / "softhsm-fixtures" / "build-interposer"))
            command += ["--module", self.module, "--env", f"HAGROUP_FAULT_MODULE={SOFTHSM}"]
            command += ["--env", "HAGROUP_FAULT_CONTROL={dir}/faults"]
        if journal is not None:
            command += ["--journal", journal]
        self.toml = _run(*command).splitlines()[-1]
        self.members: list[dict[str, Any]] = tomllib.loads(Path(self.toml).read_text())["member"]
        self.folder = folder
        self.controls = [FaultControl(folder / member["name"] / "faults").init() for member in self.members if faults]

    def serve(self, network: Network | None, *, slow: bool = False) -> None:
        for number, control in enumerate(self.controls):
            if network is not None:
                times = 10 if slow and number == self._disturbed else 1
                control.service(network.milliseconds * times, network.concurrency)

    @property
    def _disturbed(self) -> int:
        return min(DISTURBED, len(self.members) - 1)

    def hang(self) -> None:
        self.controls[self._disturbed].add("device", "hang")

    def kill(self, client: int) -> None:
        """SIGKILL to the worker process that this client has for the member (isolation ``process``)."""
        name = self.members[self._disturbed]["name"]
        for task in Path(f"/proc/{client}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):  # that thread has ended meanwhile
                for child in (task / "children").read_text().split():
                    if name in Path(f"/proc/{child}/cmdline").read_text().split("\0"):
                        os.kill(int(child), signal.SIGKILL)

    def heal(self) -> None:
        for control in self.controls:
            control.clear()

    def client(self, number: int | None = None) -> Client:
        """A process that uses the group, or the member of that number with plain python-pkcs11."""
        if number is None:
            return Client(["group", self.toml], {})
        return Client(["plain", self.members[number]["token_serial"], self.module], self.environment(number))

    def environment(self, number: int) -> dict[str, str]:
        """The member's variables; paths in the file are relative to it."""
        found = {name: (Path(self.toml).parent / value, value) for name, value in self.members[number]["env"].items()}
        return {name: str(path) if path.exists() else value for name, (path, value) in found.items()}


class Client:
    """One process of a measurement (``worker.py``)."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self.pid = self._process.pid

    def tell(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()

    def ask(self, question: dict[str, Any]) -> None:
        self.tell(json.dumps(question))

    def hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a process of the measurement failed with exit status {self._process.wait()}; see above")
        return line.strip()

    def answer(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.hear())
        return found

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.strip()
