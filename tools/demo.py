"""The demonstration: see `tools/demo`. Every claim it makes is checked on the members' own tokens."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

import hagroup as pkcs11
from hagroup.config.load import load

ROOT = Path(__file__).resolve().parents[1]
PIN = "1234"
THREADS = 12
CONSOLE = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


class Failed(Exception):
    """What was promised and did not happen."""


@contextmanager
def step(text: str) -> Iterator[None]:
    """One line of progress: a spinner on a terminal, plain lines elsewhere."""
    begun = time.monotonic()
    if CONSOLE.is_terminal:
        with CONSOLE.status(text):
            yield
    else:
        CONSOLE.print(f"... {text}")
        yield
    CONSOLE.print(f"ok  {text} ({time.monotonic() - begun:.1f} s)")


def demand(condition: Any, text: str) -> None:
    if not condition:
        raise Failed(text)


def wait_until(condition: Callable[[], Any], what: str, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        demand(time.monotonic() < deadline, f"{what} did not happen within {timeout:g} s")
        time.sleep(0.05)


class Signers:
    """Twelve threads that sign without a pause, and what became of each call."""

    def __init__(self, key: Any) -> None:
        self._key = key
        self._running = True
        self.errors: list[str] = []
        self.times: list[float] = []
        self._threads = [threading.Thread(target=self._sign) for _ in range(THREADS)]

    def _sign(self) -> None:
        while self._running:
            begun = time.monotonic()
            try:
                self._key.sign(b"one payment", mechanism=pkcs11.Mechanism.SHA256_RSA_PKCS)
            except Exception as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                return
            self.times.append(time.monotonic() - begun)

    def __enter__(self) -> Signers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        for thread in self._threads:
            thread.join()

    def more(self, count: int) -> None:
        target = len(self.times) + count
        wait_until(lambda: len(self.times) >= target or self.errors, f"{count} more signatures")


READ = r"""
import json, sys, pkcs11
from pkcs11 import Attribute, ObjectClass, Mechanism
asked = json.load(sys.stdin)
token = pkcs11.lib(asked["module"]).get_token(token_serial=asked["serial"].encode())
with token.open(user_pin=asked["pin"]) as session:
    answer = {"labels": []}
    for item in session.get_objects():
        if not item[Attribute.LABEL].startswith(("hagroup:", "hagroup ")):
            answer["labels"].append(item[Attribute.LABEL])
    key = session.get_key(object_class=ObjectClass.PRIVATE_KEY, label="signer")
    answer["signature"] = key.sign(b"proof", mechanism=Mechanism.SHA256_RSA_PKCS).hex()
    answer["extractable"] = key[Attribute.EXTRACTABLE]
    aes = session.get_key(object_class=ObjectClass.SECRET_KEY, label="vault")
    answer["ciphertext"] = aes.encrypt(b"proof", mechanism_param=b"0123456789abcdef").hex()
print(json.dumps(answer))
"""


def read_token(member: Any) -> dict[str, Any]:
    """One member's own token, read with plain python-pkcs11 in a process that does not know hagroup."""
    question = {"module": str(member.module), "serial": member.token_serial, "pin": PIN}
    done = subprocess.run(
        [sys.executable, "-c", READ],
        input=json.dumps(question),
        env=os.environ | dict(member.env),
        capture_output=True,
        text=True,
        check=False,
    )
    demand(done.returncode == 0, f"the token of {member.name} could not be read: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def worker_of(name: str) -> psutil.Process:
    """Waits for it: on a busy machine it may just be started again."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[-1:] == [name]:
                    return process
        time.sleep(0.05)
    raise Failed(f"no worker process of {name} was found")


def in_sync(toml: Path) -> bool:
    command = [sys.executable, "-m", "hagroup.admin.cli", "--config", str(toml), "status", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0 and json.loads(done.stdout)["group"]["in_sync"]


def run(folder: Path) -> list[tuple[str, str]]:
    proven: list[tuple[str, str]] = []
    with step("three independent SoftHSM members, a cloning domain, a group"):
        made = subprocess.run(
            [str(ROOT / "softhsm-fixtures" / "make-group"), str(folder), "--label", "payments", "--pin", PIN],
            capture_output=True,
            text=True,
            check=False,
        )
        demand(made.returncode == 0, made.stderr.strip())
        toml = Path(made.stdout.strip().splitlines()[-1])
    members = load(toml).members
    lib = pkcs11.lib(str(toml))
    session = lib.get_token(token_label="payments").open(rw=True, user_pin=PIN)
    with step("an RSA-2048 pair and an AES-256 key through the virtual slot"):
        public, private = session.generate_keypair(pkcs11.KeyType.RSA, 2048, store=True, label="signer")
        session.generate_key(pkcs11.KeyType.AES, 256, store=True, label="vault")
        doomed = session.generate_key(pkcs11.KeyType.AES, 128, store=True, label="doomed")

    away = folder / members[1].name / "tokens"
    with Signers(private) as signers:
        with step(f"{THREADS} threads sign"):
            signers.more(500)
        with step(f"{members[1].name} dies in the middle: its worker is killed and its token is gone"):
            away.rename(away.with_name("tokens.away"))
            worker_of(members[1].name).send_signal(signal.SIGKILL)
            signers.more(1000)
        demand(not signers.errors, f"a call failed: {signers.errors[:1]}")
        with step("while it is away: a key is generated, a key is deleted"):
            session.generate_key(pkcs11.KeyType.AES, 256, store=True, label="born meanwhile")
            doomed.destroy()
        with step(f"{members[1].name} comes back, is brought up to date and serves again"):
            away.with_name("tokens.away").rename(away)
            wait_until(lambda: in_sync(toml), "the resync")
            signers.more(500)
        demand(not signers.errors, f"a call failed: {signers.errors[:1]}")
    calls, middle, longest = len(signers.times), statistics.median(signers.times), max(signers.times)
    proven.append(
        (
            "no call failed while a member died and came back",
            f"{calls} signatures, median {middle * 1000:.1f} ms, longest {longest * 1000:.0f} ms",
        )
    )

    with step("each member's own token, read with plain pkcs11"):
        found = {member.name: read_token(member) for member in members}
        wanted = sorted(["signer", "signer", "vault", "born meanwhile"])
        for name, answer in found.items():
            demand(sorted(answer["labels"]) == wanted, f"{name} holds {sorted(answer['labels'])}, not {wanted}")
            demand(answer["extractable"] is False, f"{name} would give the key away")
            demand(
                public.verify(b"proof", bytes.fromhex(answer["signature"]), mechanism=pkcs11.Mechanism.SHA256_RSA_PKCS),
                f"the key on {name} is another one",
            )
        demand(len({answer["ciphertext"] for answer in found.values()}) == 1, "the AES keys differ")
    proven.append(("all members hold the same keys", "each signed alone; one public key verifies; one ciphertext"))
    proven.append(("the key born meanwhile is on all", "also on the member that was away"))
    proven.append(("the deleted key is on none", "not on the member that was away either"))
    proven.append(("no private key can be extracted", "CKA_EXTRACTABLE is false on every token"))
    session.close()
    lib.unload()
    return proven


def main() -> int:
    base = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="hagroup-demo-", dir=base if base.is_dir() else None))
    try:
        proven = run(folder / "group")
    except (Failed, pkcs11.PKCS11Error) as error:
        CONSOLE.print(f"FAILED: {error}", style="bold red" if CONSOLE.is_terminal else "")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = Table(box=None, header_style="bold" if CONSOLE.is_terminal else "")
    table.add_column("proven")
    table.add_column("how")
    for claim, how in proven:
        table.add_row(claim, how)
    CONSOLE.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
