"""The program that a worker process runs, started by its path: ``python -I -S launch.py MEMBER``.

It takes over the import path of the process that started it, which works whatever the working directory, the
environment or the way of installing is. The package ``hagroup`` itself is entered without its ``__init__``, which
offers an application's names and would load what a worker never needs.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType


def main() -> None:
    sys.path[:] = os.environ.pop("HAGROUP_WORKER_PATH").split(os.pathsep)
    control = int(os.environ.pop("HAGROUP_WORKER_CONTROL"))
    package = ModuleType("hagroup")
    package.__path__ = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    sys.modules["hagroup"] = package
    # msgspec does without typing_extensions where typing has all of it, and that one loads inspect, ast, dis, tokenize:
    # a quarter of a worker's start.
    sys.modules["typing_extensions"] = None  # type: ignore[assignment]
    from hagroup.members.worker import run

    del sys.modules["typing_extensions"]
    run(control)


if __name__ == "__main__":
    main()
