"""64 MiB of AES-CBC as a stream: plain python-pkcs11 and the group in both isolations, by turns in one process.

Each turn is compared with plain's in the same round, and the median of the ratios counts, so that other users of the
machine matter little. They matter least in processor time, which is this process's and its workers' together."""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from group import SOFTHSM, Group, scratch
from operations import IV, MIB, PIN, make_keys
from pkcs11 import Mechanism, ObjectClass
from worker import open_token, processes

import hagroup

TOTAL = 64 * MIB
Figures = tuple[float, float, float]
"""Milliseconds, milliseconds of the processor, page faults of this process."""


def stream(session: Any, part: int) -> Callable[[], None]:
    key = session.get_key(object_class=ObjectClass.SECRET_KEY, label="bench aes")
    block = os.urandom(part)

    def parts() -> Iterator[bytes]:
        for _ in range(TOTAL // part):
            yield block

    def encrypt() -> None:
        for _ in key.encrypt(parts(), mechanism=Mechanism.AES_CBC, mechanism_param=IV):
            pass

    return encrypt


def processor() -> float:
    """Seconds of this process and its workers, by their own clocks, which are finer than /proc."""
    workers = [int(folder.name) for folder in processes() if folder.name.isdigit()]
    return time.process_time() + sum(time.clock_gettime(~pid << 3 | 2) for pid in workers)


def once(call: Callable[[], None]) -> Figures:
    faults, used, begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, processor(), time.perf_counter()
    call()
    took, used = time.perf_counter() - begun, processor() - used
    return took * 1e3, used * 1e3, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def measure(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[Figures]]:
    """In a thread of its own, as programs do it: glibc gives memory back differently in the first one."""
    found: dict[str, list[Figures]] = {name: [] for name in calls}

    def work() -> None:
        for number in range(rounds + 1):
            for name, call in calls.items():
                figures = once(call)
                if number:  # what is done only once is not measured
                    found[name].append(figures)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found


def show(part: int, found: dict[str, list[Figures]]) -> None:
    print(f"parts of {part // 1024} KiB      ms   cpu ms   page faults   rate / plain   plain's cpu / cpu")
    for name, rows in found.items():
        ms, cpu, faults = (statistics.median(row[number] for row in rows) for number in range(3))
        rate, processor_ratio = (
            statistics.median(plain[number] / row[number] for plain, row in zip(found["plain"], rows, strict=True))
            for number in range(2)
        )
        print(f"  {name:14} {ms:8.1f} {cpu:8.1f} {faults:13.0f} {rate:14.2f} {processor_ratio:19.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/streams", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each (default 15)")
    parser.add_argument("--part", type=int, default=1024, metavar="KIB", help="length of a part (default 1024)")
    options = parser.parse_args()
    part = options.part * 1024
    with scratch() as folder:
        calls, libraries = {}, []
        for isolation in ("none", "process"):
            group = Group(folder / isolation, 2, isolation, faults=False, journal="sqlite:journal.db")
            libraries.append(hagroup.lib(group.toml))
            session = libraries[-1].get_token(token_label="bench").open(rw=True, user_pin=PIN)
            make_keys(session)
            calls[isolation] = stream(session, part)
        os.environ |= group.environment(0)
        plain = open_token("plain", [group.members[0]["token_serial"], SOFTHSM]).open(user_pin=PIN)
        show(part, measure({"plain": stream(plain, part), **calls}, options.rounds))
        for library in libraries:
            library.unload()


if __name__ == "__main__":
    main()
