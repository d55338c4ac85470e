"""Telling people: log, command hook, webhook. Nothing here ever holds up a heartbeat: hook and webhook have a thread
each, and what they cannot give away yet waits in their queues.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
import os
import queue
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from hagroup.config import permissions
from hagroup.config.logging import get_logger
from hagroup.config.model import WatchdogSection, Webhook
from hagroup.core.watch import WatchEvent, luna
from hagroup.errors import ConfigurationError

log = get_logger(__name__)

HOOK_TIMEOUT = 10.0
WEBHOOK_TIMEOUT = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0
_ATTEMPTS = 60
"""About an hour; then the event is dropped, and the log says so."""
_RETRIED = frozenset({408, 425, 429})
"""Refusals that may pass; other 4xx are final."""
_OURS = frozenset({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "CREDENTIALS_DIRECTORY"})
"""Variables that are not a hook's business."""


class NotTaken(Exception):
    """A channel did not take an event; ``final``: it never will."""

    def __init__(self, why: str, *, final: bool = False) -> None:
        super().__init__(why)
        self.final = final


class Channel:
    """A thread that gives events away one by one, in order, and tries again with growing pauses."""

    def __init__(self, name: str, give: Callable[[WatchEvent], None], *, attempts: int) -> None:
        self.name = name
        self._give = give
        self._attempts = attempts
        self._queue: queue.Queue[WatchEvent | None] = queue.Queue()
        self._open: set[str] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watchdog-{name}", daemon=True)
        self._thread.start()

    def put(self, event: WatchEvent) -> None:
        with self._lock:
            self._open.add(event.id)
        self._queue.put(event)

    def waiting(self) -> set[str]:
        """Ids of events that were not given away yet."""
        with self._lock:
            return set(self._open)

    def stop(self, timeout: float) -> None:
        self._queue.put(None)
        self._thread.join(timeout)
        self._stopping.set()

    def _run(self) -> None:
        while (event := self._queue.get()) is not None and not self._stopping.is_set():
            if self._deliver(event):
                with self._lock:
                    self._open.discard(event.id)

    def _deliver(self, event: WatchEvent) -> bool:
        """False: stopped before it was given away."""
        pause = _FIRST_PAUSE
        for attempt in range(1, self._attempts + 1):
            try:
                self._give(event)
            except NotTaken as error:
                last = error.final or attempt == self._attempts
                shown = "event dropped" if last else "will be tried again"
                log.warning(f"{self.name}.failed", id=event.id, reason=str(error), attempt=attempt, then=shown)
                if last:
                    return True
            except Exception:
                log.exception(f"{self.name} failed; it goes on", id=event.id)
                return True
            else:
                return True
            if self._stopping.wait(pause):
                return False
            pause = min(pause * 2, _LONGEST_PAUSE)
        return True


class Hook:
    """Runs the command with the event as JSON on its standard input."""

    def __init__(
        self, command: tuple[str, ...], timeout: float = HOOK_TIMEOUT, *, hidden: frozenset[str] = frozenset()
    ) -> None:
        self._command = command
        self._hidden = hidden | _OURS
        self._timeout = timeout

    def __call__(self, event: WatchEvent) -> None:
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # so that all that it started can be ended with it
                cwd="/",
                env={name: value for name, value in os.environ.items() if name not in self._hidden},
            )
        except OSError as error:
            raise NotTaken(f"{self._command[0]}: {os.strerror(error.errno or 0)}") from None
        try:
            process.communicate(msgspec.json.encode(event) + b"\n", timeout=self._timeout)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise NotTaken(f"{self._command[0]} did not end within {self._timeout:g} seconds", final=True) from None
        if process.returncode != 0:
            raise NotTaken(f"{self._command[0]} ended with status {process.returncode}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST becomes a GET of who knows what."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Post:
    """Posts the event as JSON, signed: ``X-Hagroup-Signature: sha256=<HMAC-SHA256 of the body, hex>``."""

    def __init__(self, webhook: Webhook, timeout: float = WEBHOOK_TIMEOUT) -> None:
        self._webhook = webhook
        self._timeout = timeout
        self._opener = urllib.request.build_opener(_NoRedirects)

    def __call__(self, event: WatchEvent) -> None:
        body = msgspec.json.encode(event)
        headers = {"Content-Type": "application/json", "User-Agent": "ha-watchdog", "X-Hagroup-Event-Id": event.id}
        if self._webhook.secret_file is not None:
            headers["X-Hagroup-Signature"] = signature(_secret(self._webhook.secret_file), body)
        request = urllib.request.Request(self._webhook.url, data=body, headers=headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout):
                return
        except urllib.error.HTTPError as error:
            error.close()
            final = error.code < 500 and error.code not in _RETRIED
            raise NotTaken(f"the webhook answered {error.code}", final=final) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise NotTaken(f"the webhook cannot be reached: {reason}") from None


def signature(secret: bytes, body: bytes) -> str:
    """What the receiver computes anew and compares."""
    return f"sha256={hmac.new(secret, body, hashlib.sha256).hexdigest()}"


def _secret(path: Path) -> bytes:
    try:
        with open(permissions.open_file(path, secret=True), "rb") as opened:
            return opened.read(4096).strip()
    except permissions.Unsafe as unsafe:
        raise NotTaken(f"webhook.secret_file {unsafe}") from None


class Teller:
    """Tells each event it is given, everywhere."""

    def __init__(self, config: WatchdogSection, *, hidden: frozenset[str] = frozenset()) -> None:
        """:param hidden: environment variables that a hook does not get, since they hold PINs."""
        self._luna = config.log_style == "luna"
        self._channels: list[Channel] = []
        if config.hook is not None:
            self._channels.append(Channel("hook", Hook(config.hook, hidden=hidden), attempts=3))
        if config.webhook is not None:
            if config.webhook.secret_file is not None and not config.webhook.secret_file.exists():
                raise ConfigurationError(f"[watchdog] webhook.secret_file {config.webhook.secret_file} does not exist")
            self._channels.append(Channel("webhook", Post(config.webhook), attempts=_ATTEMPTS))

    def log(self, event: WatchEvent) -> None:
        """The log line alone."""
        fields: dict[str, object] = {"group": event.group, "serial": event.serial, "text": event.text, "id": event.id}
        if event.member is not None:
            fields |= {"member": event.member, "member_serial": event.member_serial}
        if event.attempt is not None:
            fields["attempt"] = event.attempt
        if self._luna and (line := luna(event)) is not None:
            fields["luna"] = line
        write = {"info": log.info, "warning": log.warning}.get(event.severity, log.error)
        write(event.kind.value, **fields)

    def tell(self, event: WatchEvent) -> None:
        """Log it, and hand it to hook and webhook."""
        self.log(event)
        for channel in self._channels:
            channel.put(event)

    def undelivered(self) -> set[str]:
        return {id_ for channel in self._channels for id_ in channel.waiting()}

    def stop(self, timeout: float) -> None:
        for channel in self._channels:
            channel.stop(timeout / max(1, len(self._channels)))
