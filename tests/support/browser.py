"""A real browser without a screen, driven over a pipe: Chrome's DevTools protocol, JSON messages ended by a NUL."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
PATIENCE = 60.0


class Browser:
    """One tab."""

    def __init__(self, to: int, from_: int) -> None:
        self._to = to
        self._messages = self._read(from_)
        self._number = 0
        self._session: str | None = None
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    @staticmethod
    def _read(descriptor: int) -> Iterator[dict[str, Any]]:
        waiting = b""
        while got := os.read(descriptor, 1 << 20):
            *whole, waiting = (waiting + got).split(b"\0")
            yield from map(json.loads, whole)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        answer = next(one for one in self._messages if one.get("id") == self._number)
        assert "error" not in answer, answer
        found: dict[str, Any] = answer["result"]
        return found

    def open(self, url: str, *, width: int, height: int, phone: bool) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self._ask("Emulation.setDeviceMetricsOverride", **size)
        self._ask("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """What JavaScript makes of it."""
        return self._ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait_for(self, text: str) -> str:
        """Everything that a reader sees, once ``text`` is part of it."""
        deadline = time.monotonic() + PATIENCE
        while text not in (seen := str(self.evaluate("document.body && document.body.innerText"))):
            assert time.monotonic() < deadline, f"the page never showed {text}: {seen}"
            time.sleep(0.05)
        return seen

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"]))


def _high(descriptor: int) -> int:
    """The same, out of the way of 3 and 4."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 20)
    os.close(descriptor)
    return moved


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Chromium with a profile of its own in ``folder``."""
    program = shutil.which("chromium")
    if program is None:
        pytest.fail("no chromium: tools/test installs it")
    its_in, our_out = map(_high, os.pipe())
    our_in, its_out = map(_high, os.pipe())
    # the browser reads from descriptor 3 and writes to 4 (dash knows no descriptors above 9)
    started = [
        "bash",
        "-c",
        f'exec "$@" 3<&{its_in} 4>&{its_out}',
        "bash",
        program,
        *OPTIONS,
        f"--user-data-dir={folder}",
    ]
    process = subprocess.Popen(
        started, pass_fds=(its_in, its_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(its_in)
    os.close(its_out)
    try:
        yield Browser(our_out, our_in)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(our_out)
        os.close(our_in)
