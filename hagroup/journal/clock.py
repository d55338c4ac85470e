"""The machine's own clock."""

from __future__ import annotations

import time
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_time() -> float:
    """Seconds since the machine was started, those that it slept among them: what leases are counted in."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class SystemClock:
    """CLOCK_BOOTTIME (it does not stop while the machine is suspended, as CLOCK_MONOTONIC does), and the wall clock."""

    def __init__(self) -> None:
        self._boot_id = _BOOT_ID.read_text(encoding="ascii").strip()

    def boot(self) -> float:
        return boot_time()

    def wall(self) -> float:
        return time.time()

    def boot_id(self) -> str:
        return self._boot_id
