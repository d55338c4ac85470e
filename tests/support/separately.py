"""What the members can do when each is used alone: plain python-pkcs11, a process and four threads for each member."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.support.faults import build_interposer, fault_env
from tests.support.faulty import FaultGroup
from tests.support.softhsm import SOFTHSM

_PROGRAM = r"""
import ctypes, json, sys, threading, time
import pkcs11
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass
from pkcs11.util.ec import encode_named_curve_parameters

class InitializeArgs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("create", "destroy", "lock", "unlock")] + [
        ("flags", ctypes.c_ulong), ("reserved", ctypes.c_void_p)]

asked = json.loads(sys.stdin.readline())
# As pkcs11.lib does it the module would run without locks, and fail under threads (DESIGN.md 8, trap 1).
lib = pkcs11.lib(asked["module"])
functions = ctypes.POINTER(ctypes.c_void_p)()
assert ctypes.CDLL(asked["module"]).C_GetFunctionList(ctypes.byref(functions)) == 0
initialize, finalize = (ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_void_p)(functions[n]) for n in (1, 2))
assert finalize(None) == 0
assert initialize(ctypes.addressof(arguments := InitializeArgs(flags=2))) == 0
token = lib.get_token(token_serial=asked["serial"].encode())
with token.open(rw=True, user_pin=asked["pin"]) as first:
    start = threading.Event()
    made = []

    def work():
        with token.open(rw=True) as session:
            if asked["what"] == "sign":
                key = session.get_key(object_class=ObjectClass.PRIVATE_KEY, label=asked["label"])
                step = lambda: key.sign(b"data", mechanism=Mechanism.SHA256_RSA_PKCS)
            else:
                curve = session.create_domain_parameters(
                    KeyType.EC, {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}, local=True)
                step = lambda: made.append(curve.generate_keypair(store=False))
            ready.release()
            start.wait()
            for _ in range(asked["calls"]):
                step()

    ready = threading.Semaphore(0)
    threads = [threading.Thread(target=work) for _ in range(asked["threads"])]
    for thread in threads:
        thread.start()
        ready.acquire()
    print("ready", flush=True)
    sys.stdin.readline()
    begun = time.monotonic()
    start.set()
    for thread in threads:
        thread.join()
    print(json.dumps(asked["threads"] * asked["calls"] / (time.monotonic() - begun)), flush=True)
"""


def rate_of_each(
    faulty: FaultGroup, what: str, *, threads: int, calls: int, names: list[str] | None = None, label: str = ""
) -> dict[str, float]:
    """Operations per second of each member, all used at the same time. ``what``: ``sign`` or ``generate``."""
    clients = {}
    for name in names or faulty.names:
        member = faulty.group.members[name]
        asked: dict[str, Any] = {"module": str(build_interposer()), "serial": member["serial"], "pin": "1234"}
        asked |= {"what": what, "threads": threads, "calls": calls, "label": label}
        clients[name] = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | member["env"] | fault_env(faulty.controls[name], SOFTHSM),
        )
        assert clients[name].stdin is not None
        clients[name].stdin.write(json.dumps(asked) + "\n")  # type: ignore[union-attr]
        clients[name].stdin.flush()  # type: ignore[union-attr]
    for client in clients.values():
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
    for client in clients.values():
        assert client.stdin is not None
        client.stdin.write("go\n")
        client.stdin.flush()
    rates = {}
    for name, client in clients.items():
        answer, _ = client.communicate(timeout=120)
        rates[name] = float(answer)
    return rates
