"""Run random histories of a simulated group, look for one that breaks, and show it as short as it can be made."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.history import Step, play, random_steps

_PER_TASK = 20
_PATIENCE = 120
"""Seconds for one history; it takes a fifth of one."""
_SHOWN = 500
"""After so many histories it says how far it is."""


class Hangs(BaseException):
    """A history does not come to its end."""


def _hangs(*_: object) -> None:
    raise Hangs(f"no end after {_PATIENCE} s")


def failure(steps: list[Step], seed: int, log: list[str] | None = None) -> BaseException | None:
    """What broke, if anything."""
    signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(_PATIENCE)
    try:
        play(steps, seed, log=log)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return error
    finally:
        signal.alarm(0)
    return None


def kind_of(error: BaseException) -> str:
    """The same for failures that are likely one bug: the text without what differs from history to history."""
    text = re.sub(r"b'[^']*'|b\"[^\"]*\"|\d+", "_", str(error).split("\n")[0])
    return f"{type(error).__name__}: {text[:100]}"


def _run(seeds: range, steps: int) -> list[tuple[int, str]]:
    broken = []
    for seed in seeds:
        error = failure(random_steps(seed, steps), seed)
        if error is not None:
            broken.append((seed, kind_of(error)))
    return broken


def shortened(steps: list[Step], seed: int, kind: str) -> list[Step]:
    """Steps left out as long as the same thing breaks."""
    size = max(1, len(steps) // 2)
    while True:
        start, changed = 0, False
        while start < len(steps):
            fewer = steps[:start] + steps[start + size :]
            error = failure(fewer, seed)
            if error is not None and kind_of(error) == kind:
                steps, changed = fewer, True
            else:
                start += size
        if size == 1 and not changed:
            return steps
        size = max(1, size // 2)


def show(seed: int, length: int, *, shorten: bool) -> int:
    steps = random_steps(seed, length)
    error = failure(steps, seed)
    if error is None:
        print(f"seed {seed}: {length} steps, nothing broke")
        return 0
    if shorten:
        steps = shortened(steps, seed, kind_of(error))
    log: list[str] = []
    error = failure(steps, seed, log) or error
    print("\n".join(log))
    print(f"seed {seed}, {len(steps)} of {length} steps:")
    print("".join(traceback.format_exception(error, limit=-6)))
    return 1


def _tasks(first: int, histories: int) -> Iterator[range]:
    for start in range(first, first + histories, _PER_TASK):
        yield range(start, min(start + _PER_TASK, first + histories))


def explore(first: int, histories: int, steps: int, jobs: int) -> int:
    started = time.monotonic()
    kinds: Counter[str] = Counter()
    examples: dict[str, int] = {}
    with ProcessPoolExecutor(max_workers=jobs) as pool:
        futures = [pool.submit(_run, seeds, steps) for seeds in _tasks(first, histories)]
        for number, future in enumerate(futures, start=1):
            done = min(number * _PER_TASK, histories)
            for seed, kind in future.result():
                kinds[kind] += 1
                if examples.setdefault(kind, seed) == seed:
                    print(f"seed {seed}: {kind}", flush=True)
            if done % _SHOWN < _PER_TASK:
                print(f"{done} of {histories} histories, {sum(kinds.values())} broke", file=sys.stderr, flush=True)
    took = time.monotonic() - started
    print(f"{histories} histories of {steps} steps from seed {first}, {sum(kinds.values())} broke, {took:.0f} s")
    for kind, count in kinds.most_common():
        print(f"{count:6} {kind}\n       tools/explore --seed {examples[kind]} --steps {steps}")
    return 1 if kinds else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/explore", description=__doc__)
    parser.add_argument("--histories", type=int, default=1000, help="how many (default %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="steps of each (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one for each core)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default %(default)s)")
    parser.add_argument("--seed", type=int, help="run this one again and show every interaction; shortened first")
    parser.add_argument("--whole", action="store_true", help="with --seed: do not shorten it")
    options = parser.parse_args()
    if options.seed is not None:
        return show(options.seed, options.steps, shorten=not options.whole)
    return explore(options.first, options.histories, options.steps, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
