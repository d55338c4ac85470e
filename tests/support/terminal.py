"""A program on a terminal of its own: what it shows there, and what a person types."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


class Terminal:
    """Runs ``command`` (absolute path first) with a terminal as its standard streams."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        columns: int = 80,
    ) -> None:
        self.output = b""
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            try:
                fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
                if cwd is not None:
                    os.chdir(cwd)
                arguments = [str(word) for word in command]
                os.execve(arguments[0], arguments, {**os.environ, "TERM": "xterm", **(env or {})})
            finally:
                os._exit(127)

    @property
    def text(self) -> str:
        return self.output.decode(errors="replace")

    def _read(self, timeout: float) -> bool:
        """False: the program closed its end."""
        ready, _, _ = select.select([self._descriptor], [], [], timeout)
        if not ready:
            return True
        try:
            more = os.read(self._descriptor, 4096)
        except OSError:
            return False
        self.output += more
        return bool(more)

    def expect(self, text: str, timeout: float = 120.0, *, after: int = 0) -> int:
        """Until it has shown ``text``, behind its first ``after`` characters. Returns the place behind it."""
        deadline = time.monotonic() + timeout
        while text not in self.text[after:]:
            assert time.monotonic() < deadline, self.text
            assert self._read(0.1), self.text
        return self.text.index(text, after) + len(text)

    def send(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def end(self, timeout: float = 120.0) -> int:
        """Its exit status, once it has ended by itself."""
        deadline = time.monotonic() + timeout
        while self._read(0.1):
            assert time.monotonic() < deadline, self.text
        os.close(self._descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
