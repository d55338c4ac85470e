"""What a clock is. It is injected everywhere, so that no test sleeps and no decision hangs on the wall clock."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """Boot time decides; wall clock is for people."""

    def boot(self) -> float:
        """Seconds since the machine started, suspension included (CLOCK_BOOTTIME); the same for all processes."""
        ...

    def wall(self) -> float:
        """Seconds since 1970, as good as the machine knows."""
        ...

    def boot_id(self) -> str:
        """Names this start of the machine: boot times of two starts cannot be compared."""
        ...
