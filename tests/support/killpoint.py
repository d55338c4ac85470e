"""Kills a member's worker inside a write of SoftHSM's (``killpoint.c`` says how): what a crashed HSM leaves behind."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_suffix(".c")
_CONTROL = struct.Struct("=QQ")


class Killpoint:
    """The control of one member's workers; ``env`` is what they need beside the member's own variables."""

    def __init__(self, folder: Path) -> None:
        library, control = folder / "killpoint.so", folder / "killpoint"
        command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O2", "-o", str(library), str(_SOURCE), "-ldl"]
        subprocess.run(command, check=True, timeout=60)
        control.write_bytes(bytes(_CONTROL.size))
        with control.open("r+b") as file:
            self._control = mmap.mmap(file.fileno(), _CONTROL.size)
        self.env = {"LD_PRELOAD": str(library), "HAGROUP_KILLPOINT": str(control)}

    @property
    def writes(self) -> int:
        """How many there were since :meth:`arm`."""
        return int(_CONTROL.unpack(self._control)[0])

    @property
    def armed(self) -> bool:
        return bool(_CONTROL.unpack(self._control)[1])

    def arm(self, die_at: int = 0) -> None:
        """The next worker that comes to this write dies in it; 0: writes are only counted."""
        self._control[:] = _CONTROL.pack(0, die_at)
