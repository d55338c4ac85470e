"""The port for machines and people: ``/metrics``, ``/status.json``, ``/`` and its live feed ``/events``. Reads only."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST

from hagroup.config.logging import get_logger
from hagroup.config.model import Endpoint
from hagroup.watchdog.group import Report

log = get_logger(__name__)

MOST_FEEDS = 32
KEEP_ALIVE = 15.0
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


class Board:
    """The latest reports, and a bell for those who wait for newer ones."""

    def __init__(self, reports: Callable[[], Iterable[Report]]) -> None:
        self._reports = reports
        self._changed = threading.Condition()
        self._number = 0
        self.closed = False
        self.feeds = threading.BoundedSemaphore(MOST_FEEDS)

    def ring(self) -> None:
        with self._changed:
            self._number += 1
            self._changed.notify_all()

    def close(self) -> None:
        self.closed = True
        self.ring()

    def wait(self, seen: int, timeout: float) -> int:
        """The number of the newest state; waits until it is not ``seen``."""
        with self._changed:
            self._changed.wait_for(lambda: self._number != seen or self.closed, timeout)
            return self._number

    def document(self) -> bytes:
        return msgspec.json.encode({"groups": [_shown(report) for report in self._reports()]})


def _shown(report: Report) -> dict[str, Any]:
    """What ``ha-admin status --json`` has, and what only a watchdog knows."""
    found: dict[str, Any] = {} if report.status is None else msgspec.to_builtins(report.status)
    found.setdefault("group", {"label": report.label, "serial": report.serial, "state": "unknown", "in_sync": None})
    if "journal" in found or not report.journal:
        found.setdefault("journal", {})["ok"] = report.journal
    for member in found.get("members", []):
        beat = report.beats.get(member["name"])
        member["heartbeat"] = None if beat is None else msgspec.to_builtins(beat)
    bound = found.get("detection") or {}
    found["watchdog"] = {**bound, "active": report.active, "detection_bound": report.bound, "time": report.time}
    found["events"] = msgspec.to_builtins(report.events[-20:])
    return found


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, endpoint: Endpoint, board: Board, metrics: Callable[[], bytes]) -> None:
        self.board = board
        self.metrics = metrics
        self.names = {*_LOOPBACK, endpoint.host}
        if ":" in endpoint.host:
            self.address_family = socket.AF_INET6
        super().__init__((endpoint.host, endpoint.port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A reader that went away is nobody's concern."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "ha-watchdog"
    sys_version = ""
    timeout = 30

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition("@")[2]
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name not in self.server.names:  # else any web page could read it under a name that it points here
            self._send(403, "text/plain", b"not under this name\n")
            return
        match self.path.partition("?")[0]:
            case "/":
                self._send(
                    200, "text/html; charset=utf-8", files("hagroup.watchdog").joinpath("page.html").read_bytes()
                )
            case "/status.json":
                self._send(200, "application/json", self.server.board.document())
            case "/metrics":
                self._send(200, CONTENT_TYPE_LATEST, self.server.metrics())
            case "/events":
                self._feed()
            case _:
                self._send(404, "text/plain", b"there are /, /status.json, /metrics and /events\n")

    def _head(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", _POLICY)

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self._head(status, kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _feed(self) -> None:
        board = self.server.board
        if not board.feeds.acquire(blocking=False):
            self._send(503, "text/plain", b"too many readers\n")
            return
        try:
            self._head(200, "text/event-stream")
            self.end_headers()
            seen = board.wait(-1, 0.0)
            while not board.closed:
                self.wfile.write(b"data: " + board.document() + b"\n\n")
                self.wfile.flush()
                while (number := board.wait(seen, KEEP_ALIVE)) == seen and not board.closed:
                    self.wfile.write(b": still here\n\n")
                    self.wfile.flush()
                seen = number
        finally:
            board.feeds.release()

    def log_message(self, format: str, *args: object) -> None:
        """Not every reader is worth a line."""


class Page:
    """The server on one address."""

    def __init__(self, endpoint: Endpoint, board: Board, metrics: Callable[[], bytes]) -> None:
        self._server = _Server(endpoint, board, metrics)
        self.address = f"http://{Endpoint(endpoint.host, int(self._server.server_address[1]))}/"
        if endpoint.host not in _LOOPBACK:
            log.warning("page.not-on-loopback", address=self.address, reason="anybody who reaches it can read it")
        self._thread = threading.Thread(target=self._server.serve_forever, name="watchdog-page", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
