"""One process of a measurement: ``worker.py plain CONF SERIAL MODULE | group TOML``.

It reads one question (JSON) a line, answers ``ready``, begins when it is told ``go``, and answers with JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from operations import PIN, PREPARE, Operation, make_keys

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


def open_token(kind: str, arguments: list[str]) -> Any:
    """The token: of a group, or a member's own with OS locking (without it, threads corrupt each other)."""
    if kind == "group":
        import hagroup

        return hagroup.lib(arguments[0]).get_token(token_label="bench")
    import pkcs11

    serial, module = arguments
    library = pkcs11.lib(module)
    functions = ctypes.POINTER(ctypes.c_void_p)()
    ctypes.CDLL(module).C_GetFunctionList(ctypes.byref(functions))
    initialize, finalize = (ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_void_p)(functions[n]) for n in (1, 2))
    finalize(None)
    arguments_ = _InitializeArgs(flags=CKF_OS_LOCKING_OK)
    initialize(ctypes.addressof(arguments_))
    return library.get_token(token_serial=serial.encode())


def processes() -> list[Path]:
    """Of this one and of its members' workers."""
    own = Path("/proc/self")
    found = [own]
    for task in (own / "task").iterdir():
        with contextlib.suppress(OSError):  # threads come and go
            found += [Path("/proc", pid) for pid in (task / "children").read_text().split()]
    return found


def processor() -> float:
    """Seconds that they used since they began."""
    ticks = 0
    for folder in processes():
        with contextlib.suppress(OSError):  # a worker that was killed
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory() -> float:
    """MiB that they had at most, each, all together."""
    found = 0
    for folder in processes():
        with contextlib.suppress(OSError):
            lines = (folder / "status").read_text().splitlines()
            found += sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return found / 1024


class Cell:
    """One operation, by so many threads of this process; each thread has a session of its own."""

    def __init__(self, token: Any, operation: str, threads: int, *, cached: bool, warm_up: float = 0.0) -> None:
        """:param warm_up: seconds of calls before those that are measured, without a pause between them: a group has
        found its keys on each member then, as plain python-pkcs11 has on its one, and queues are as long as they
        become."""
        self._token = token
        self._name = operation
        self._cached = cached
        self._warm_up = warm_up if cached and not operation.startswith("create") else 0.0
        self._calls: list[list[tuple[float, float]]] = [[] for _ in range(threads)]
        """(when it began, how long it took); the first ones before what is measured."""
        self._errors: list[str] = []
        self._made: set[bytes] = set()
        """CKA_ID of what was created."""
        self._ready = threading.Barrier(threads + 1)
        self._go = threading.Event()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(calls,)) for calls in self._calls]

    def _once(self, session: Any) -> Operation:
        if self._cached:
            return PREPARE[self._name](session)

        def everything() -> object:
            with self._token.open(rw=True) as own:
                return PREPARE[self._name](own)()

        return everything

    def _work(self, calls: list[tuple[float, float]]) -> None:
        session = self._token.open(rw=True)
        try:
            step = self._once(session)
            keep = self._name.startswith("create")
            made = [step()]  # what is done only once is not measured
            self._ready.wait()
            self._go.wait()
            while not self._stop.is_set():
                begun = time.perf_counter()
                result = step()
                calls.append((begun, time.perf_counter() - begun))
                if keep:
                    made.append(result)
            for result in made if keep else ():
                self._made |= {item.id for item in (result if isinstance(result, tuple) else (result,))}
        except Exception as error:  # whatever it is: it is the result
            self._errors.append(f"{type(error).__name__}: {error}")
            self._ready.abort()
        session.close()

    def measure(self, seconds: float) -> dict[str, Any]:
        for thread in self._threads:
            thread.start()
        try:
            self._ready.wait()
            print("ready", flush=True)
            sys.stdin.readline()
        except threading.BrokenBarrierError:
            print("ready", flush=True)
        self._go.set()
        time.sleep(self._warm_up)
        begun, used = time.perf_counter(), processor()
        time.sleep(seconds)
        self._stop.set()
        ended = time.perf_counter()
        for thread in self._threads:
            thread.join()
        used = processor() - used
        calls = [(start - begun, took) for mine in self._calls for start, took in mine]
        return {
            "calls": calls,
            "seconds": ended - begun,
            "errors": self._errors,
            "processor": used,
            "memory": memory(),
        }

    def tidy(self) -> None:
        """Destroys what ``create`` made: SoftHSM grows slower with each object."""
        if not self._made:
            return
        with self._token.open(rw=True) as session:
            for item in list(session.get_objects()):
                if getattr(item, "id", None) in self._made:
                    item.destroy()


def first_use(kind: str, arguments: list[str]) -> dict[str, Any]:
    """Time from nothing but the imports to the first signature."""
    __import__("hagroup.bootstrap" if kind == "group" else "pkcs11")
    begun = time.perf_counter()
    token = open_token(kind, arguments)
    with token.open(user_pin=PIN) as session:
        PREPARE["sign RSA-2048"](session)()
        took = time.perf_counter() - begun
    return {
        "calls": [(0.0, took)],
        "seconds": took,
        "errors": [],
        "processor": processor(),
        "memory": memory(),
    }


def main() -> None:
    kind, *arguments = sys.argv[1:]
    token: Any = None
    first: Any = None
    for line in sys.stdin:
        question = json.loads(line)
        if question["do"] == "first use":
            print(json.dumps(first_use(kind, arguments)), flush=True)
            break
        if token is None:
            token = open_token(kind, arguments)
            first = token.open(rw=True, user_pin=PIN)
        if question["do"] == "make keys":
            make_keys(first)
            print("{}", flush=True)
            continue
        cell = Cell(
            token,
            question["operation"],
            question["threads"],
            cached=question["cached"],
            warm_up=question["warm up"],
        )
        found = cell.measure(question["seconds"])
        cell.tidy()
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # nothing to tidy up; a member that was made to hang must not hold up the run
