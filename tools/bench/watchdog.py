"""What a watchdog costs: processor time of a real ha-watchdog that has nothing to tell, with its members' workers;
memory, descriptors and threads over very many heartbeats with a member that goes and comes."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from group import scratch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from tests.support.groups import GroupFixture, make_group, run_client
from tests.support.watchdogs import Cost, heartbeats_with_a_flapping_member, idle_cost, watching

KEYS = 20


def section(group: GroupFixture, *lines: str) -> None:
    text = group.toml.read_text().partition("[watchdog]")[0].rstrip()
    group.toml.write_text("\n".join([text, "", "[watchdog]", *lines, ""]))


def idle(group: GroupFixture, interval: float, seconds: float) -> dict[str, float]:
    section(group, f"interval = {interval}")
    with watching(group) as watchdog:
        begun = time.monotonic()
        found = idle_cost(group, watchdog, heartbeats=max(1, round(seconds / interval)))
        took = time.monotonic() - begun
    share = 100 * (found.own + found.workers) / took
    print(
        f"idle, {len(group.members)} members, {KEYS} keys, a heartbeat each {interval:g} s: {share:.2f} % of one core "
        f"({100 * found.own / took:.2f} % ha-watchdog, {100 * found.workers / took:.2f} % its members' workers; "
        f"{found.heartbeats} heartbeats in {took:.0f} s)"
    )
    return {"percent": share, "heartbeats": found.heartbeats, "seconds": took}


def show(number: int, cost: Cost) -> None:
    print(
        f"{number:>8} heartbeats: {cost.megabytes:.1f} MB, {cost.files} descriptors, {cost.threads} threads", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between heartbeats while idle (5)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long it is idle (60)")
    parser.add_argument("--heartbeats", type=int, default=10_000, help="with the flapping member (10000)")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    asked = parser.parse_args()
    with scratch() as folder:
        group = make_group(folder / "group")
        run_client(
            group,
            f"for number in range({KEYS}):\n"
            "    session.generate_key(KeyType.AES, 256, store=True, label=f'key {number}')\n",
        )
        found: dict[str, object] = {"idle": idle(group, asked.interval, asked.seconds)}
        section(group, "verify_rate = 0")
        begun = time.monotonic()
        step = max(200, asked.heartbeats // 2000 * 200)  # when the member is back
        costs = heartbeats_with_a_flapping_member(group, asked.heartbeats, every=step, told=show)
        print(f"{(time.monotonic() - begun) / asked.heartbeats * 1000:.1f} ms each, without pauses")
    found["heartbeats"] = [[cost.megabytes, cost.files, cost.threads] for cost in costs]
    if asked.json is not None:
        asked.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
