"""SoftHSM tokens for tests: each in a folder of its own, made by a short-lived process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SOFTHSM = "/usr/lib/softhsm/libsofthsm2.so"

# PINs come by standard input: a command line is readable by everybody.
_MAKE = """
import ctypes, json, sys, types
sys.modules["hagroup"] = types.ModuleType("hagroup")  # only what is needed: this runs for every token
sys.modules["hagroup"].__path__ = [sys.argv[1]]
from hagroup.members.cryptoki import Cryptoki, CkTokenInfo
asked = json.load(sys.stdin)
c = Cryptoki(ctypes.CDLL(asked["module"]))
c.C_Initialize(None)
slots, count = (ctypes.c_ulong * 64)(), ctypes.c_ulong(64)
c.C_GetSlotList(1, slots, ctypes.byref(count))
slot = slots[count.value - 1]
so_pin, user_pin = asked["so_pin"].encode(), asked["user_pin"].encode()
c.C_InitToken(slot, so_pin, len(so_pin), asked["label"].encode().ljust(32))
session = ctypes.c_ulong()
c.C_OpenSession(slot, 6, None, None, ctypes.byref(session))
c.C_Login(session.value, 0, so_pin, len(so_pin))
c.C_InitPIN(session.value, user_pin, len(user_pin))
info = CkTokenInfo()
c.C_GetTokenInfo(slot, ctypes.byref(info))
print(bytes(info.serialNumber).decode().strip())
c.C_Finalize(None)
"""


@dataclass(frozen=True)
class TokenFixture:
    """An initialised token: what a member's configuration needs to use it."""

    conf: Path
    env: dict[str, str]
    serial: str
    label: str
    so_pin: str
    user_pin: str
    token_dir: Path
    module: str = SOFTHSM


def make_token(directory: Path | str, label: str, so_pin: str = "12345678", user_pin: str = "1234") -> TokenFixture:
    """Initialises a token in ``directory`` (made if missing); a second call there adds a token."""
    directory = Path(directory).absolute()
    token_dir = directory / "tokens"
    token_dir.mkdir(parents=True, exist_ok=True)
    conf = directory / "softhsm2.conf"
    conf.write_text(
        f"directories.tokendir = {token_dir}\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n"
    )
    env = {"SOFTHSM2_CONF": str(conf)}
    asked = {"module": SOFTHSM, "label": label, "so_pin": so_pin, "user_pin": user_pin}
    package = Path(__file__).absolute().parents[2] / "hagroup"
    made = subprocess.run(
        [sys.executable, "-c", _MAKE, str(package)],
        input=json.dumps(asked),
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if made.returncode:
        raise RuntimeError(f"no token could be made in {directory}: {made.stderr}")
    return TokenFixture(conf, env, made.stdout.strip(), label, so_pin, user_pin, token_dir)


@contextmanager
def token_folder() -> Iterator[Path]:
    """A fresh folder on tmpfs where there is one: SoftHSM writes every object with an fsync (trap 3)."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="hagroup-test-", dir=where) as folder:
        yield Path(folder)
