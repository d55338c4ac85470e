"""Where each microsecond of one EC P-256 signature goes: the same call made at each layer of the path, from outside in.

What a layer adds is the difference to the next one inside. Each figure is the median of the quicker half of many calls,
made in turns, so that other users of the machine matter little."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from group import SOFTHSM, Group, scratch
from operations import PIN, PREPARE, make_keys
from pkcs11 import Mechanism, ObjectClass
from worker import open_token

import hagroup
from hagroup.core.calls import Handle

_HANDLE = (1 << 64) - 1
Call = Callable[[], object]


def layers(session: Any, isolation: str) -> dict[str, Call]:
    """Name of each layer to the call at it; the outermost comes first."""
    key = session.get_key(object_class=ObjectClass.PRIVATE_KEY, label="bench ec")
    digest = os.urandom(32)
    mechanism = (int(Mechanism.ECDSA), None)
    engine = session.engine
    group = engine._group
    key.sign(digest, mechanism=Mechanism.ECDSA)
    member = group.roster.choosing.here.last
    life = member.life
    handle: Handle = life.handles[key.uid]
    connection = life.connection

    def caller() -> object:
        return group.caller.run(
            [group.object(key.uid)],
            lambda life, handles: life.connection.sign(mechanism, handles[0], digest, pin=None, timeout=5.0),
            logged_in=True,
        )

    found: dict[str, Call] = {
        "facade: key.sign": lambda: key.sign(digest, mechanism=Mechanism.ECDSA),
        "session: view, object, visibility": lambda: engine.sign(mechanism, key.uid, digest),
        "caller: member, failover, handle": caller,
        "connection: handle's generation": lambda: connection.sign(mechanism, handle, digest, pin=None, timeout=5.0),
    }
    if isolation == "none":
        executor = connection._executor
        arguments = (connection.generation, 0, mechanism, handle & _HANDLE, None, digest)
        found["executor: session, mechanism, buffer"] = lambda: executor.sign(*arguments)
    return found


def plain(group: Group) -> dict[str, Call]:
    """The same key on the first member, used with python-pkcs11 in this process: what all is compared with."""
    os.environ |= group.environment(0)
    session = open_token("plain", [group.members[0]["token_serial"], SOFTHSM]).open(user_pin=PIN)
    return {"plain python-pkcs11": PREPARE["sign EC P-256"](session)}


def measure(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Microseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(20):
                begun = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(sorted(found)[: len(found) // 2]) * 1e6 for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/layers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=300, help="of 20 calls at each layer (default 300)")
    options = parser.parse_args()
    with scratch() as folder:
        for isolation in ("none", "process"):
            group = Group(folder / isolation, 2, isolation, faults=False, journal="sqlite:journal.db")
            token = hagroup.lib(group.toml).get_token(token_label="bench")
            with token.open(rw=True, user_pin=PIN) as session:
                make_keys(session)
                found = measure(layers(session, isolation) | plain(group), options.rounds)
            show(isolation, found)


def show(isolation: str, found: dict[str, float]) -> None:
    """The last one is plain python-pkcs11."""
    print(f"isolation {isolation}: microseconds, and what the layer adds (the innermost: to plain python-pkcs11)")
    inner = [*list(found.values())[1:], 0.0]
    for (name, took), inside in zip(found.items(), inner, strict=True):
        print(f"  {name:40} {took:8.2f} {took - inside:8.2f}")


if __name__ == "__main__":
    main()
