"""One process of a measurement: ``worker.py plain CONF | group TOML``, the question as JSON on standard input."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import sys
import threading
import time
from typing import Any

from operations import PIN, make_keys, operations

SOFTHSM = "/usr/lib/softhsm/libsofthsm2.so"
CKF_OS_LOCKING_OK = 2


class _InitializeArgs(ctypes.Structure):
    _fields_ = [
        ("create", ctypes.c_void_p),
        ("destroy", ctypes.c_void_p),
        ("lock", ctypes.c_void_p),
        ("unlock", ctypes.c_void_p),
        ("flags", ctypes.c_ulong),
        ("reserved", ctypes.c_void_p),
    ]


def open_token(kind: str, path: str) -> Any:
    """The token: of a group, or SoftHSM's with OS locking (without it, threads corrupt each other)."""
    if kind == "group":
        import hagroup

        return hagroup.lib(path).get_token(token_label="bench")
    os.environ["SOFTHSM2_CONF"] = path
    import pkcs11

    library = pkcs11.lib(SOFTHSM)
    module = ctypes.CDLL(SOFTHSM)
    module.C_Finalize(None)
    module.C_Initialize(ctypes.byref(_InitializeArgs(flags=CKF_OS_LOCKING_OK)))
    return next(token for token in library.get_tokens() if token.flags & pkcs11.TokenFlag.USER_PIN_INITIALIZED)


def run(token: Any, name: str, threads: int, seconds: float) -> list[float]:
    """Times of the calls of all threads; each thread has a session of its own, as a fair opponent would."""
    times: list[list[float]] = [[] for _ in range(threads)]
    ready = threading.Barrier(threads + 1)
    stop = threading.Event()
    first = token.open(user_pin=PIN)

    def work(mine: list[float]) -> None:
        session = token.open()
        operation = operations(session)[name]
        operation()
        ready.wait()
        while not stop.is_set():
            begun = time.perf_counter()
            operation()
            mine.append(time.perf_counter() - begun)
        session.close()

    workers = [threading.Thread(target=work, args=(mine,)) for mine in times]
    for worker in workers:
        worker.start()
    ready.wait()
    time.sleep(seconds)
    stop.set()
    for worker in workers:
        worker.join()
    first.close()
    return [value for mine in times for value in mine]


def main() -> None:
    kind, path = sys.argv[1:3]
    question = json.load(sys.stdin)
    token = open_token(kind, path)
    if question.get("make keys"):
        with token.open(rw=True, user_pin=PIN) as session:
            make_keys(session)
        print(json.dumps({}))
        return
    answer = {}
    for name in question["operations"]:
        for threads in question["threads"]:
            times = sorted(run(token, name, threads, question["seconds"]))
            answer[f"{name}|{threads}"] = {
                "rate": len(times) / question["seconds"],
                "median": statistics.median(times),
                "p99": times[int(len(times) * 0.99)],
                "longest": times[-1],
            }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # nothing to tidy up; a member that was made to hang must not hold up the run
