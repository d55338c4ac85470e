"""ha-watchdog as a process, what it costs, and what listens to it: a hook's file, a webhook, systemd's socket."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from hagroup.config.load import load
from hagroup.core.states import State
from hagroup.journal import open_journal
from hagroup.watchdog.group import GroupWatch
from tests.support.groups import GroupFixture, wait_until

INTERVAL, THRESHOLD, PROBE = 0.8, 2, 0.4
BOUND = round(INTERVAL * THRESHOLD + PROBE, 6)
HOOK = """#!/bin/sh
cat >> "{file}"
"""


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def configure(group: GroupFixture, *lines: str, log_style: str = "json") -> None:
    """A [watchdog] section with short times."""
    text = group.toml.read_text().partition("[watchdog]")[0].rstrip()
    text = re.sub(r"(?m)^probe .*$", f"probe = {PROBE}", text)
    section = ["[watchdog]", f"interval = {INTERVAL}", f"threshold = {THRESHOLD}", "retry_interval = 0.5", *lines]
    group.toml.write_text("\n".join([text, "", *section, f'log_style = "{log_style}"', ""]))


def make_hook(folder: Path) -> tuple[str, Path]:
    """(line for [watchdog], file that gets one event per line)."""
    file, script = folder / "told", folder / "hook"
    file.unlink(missing_ok=True)
    script.write_text(HOOK.format(file=file))
    script.chmod(0o700)
    return f'hook = ["{script}"]', file


def events(file: Path) -> list[dict[str, Any]]:
    """In order; one that was told again after a kill, under the same id, counts once, as it does for a receiver."""
    lines = file.read_text().splitlines() if file.exists() else []
    return list({event["id"]: event for event in map(json.loads, lines)}.values())


def kinds(file: Path) -> list[str]:
    return [event["kind"] for event in events(file)]


class Watchdog:
    """One process; its log is in ``log``."""

    def __init__(self, group: GroupFixture, name: str = "watchdog", **environment: str) -> None:
        self.log = group.folder / f"{name}.log"
        self.log.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "hagroup.watchdog.cli", "--config", str(group.toml)]
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONFAULTHANDLER": "1", **environment},
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def said(self, text: str) -> bool:
        return text in self.log.read_text()

    def wait_for(self, text: str, timeout: float = 90.0) -> None:
        try:
            wait_until(lambda: self.said(text), text, timeout)
        except AssertionError as error:
            self.signal(signal.SIGABRT)  # its threads' stacks are what explains it
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            raise AssertionError(f"{error}\n{self.log.read_text()}") from None

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, timeout: float = 60.0) -> int:
        self.signal(signal.SIGTERM)
        return self.process.wait(timeout)


@contextlib.contextmanager
def watching(
    group: GroupFixture, name: str = "watchdog", *, active: bool = True, **environment: str
) -> Iterator[Watchdog]:
    """A watchdog that has begun; ended at the end, whatever became of it."""
    watchdog = Watchdog(group, name, **environment)
    try:
        watchdog.wait_for("watchdog.watching" if active else "watchdog.standing-by")
        yield watchdog
    finally:
        with contextlib.suppress(ProcessLookupError):
            watchdog.signal(signal.SIGCONT)
            watchdog.signal(signal.SIGTERM)
        try:
            watchdog.process.wait(10)
        except subprocess.TimeoutExpired:
            watchdog.process.kill()
            watchdog.process.wait()


@dataclass
class Idle:
    """Seconds of processor time."""

    own: float
    workers: float
    heartbeats: int


def idle_cost(group: GroupFixture, watchdog: Watchdog, *, heartbeats: int) -> Idle:
    """What so many heartbeats of a watchdog that has settled cost, with all that it does between them."""
    journal = open_journal(load(group.toml).journal)

    def newest() -> float:
        return max((one.boot_time for one in journal.observations("hsm1")), default=0.0)

    def after(number: int) -> None:
        for _ in range(number):
            before = newest()
            wait_until(lambda before=before: newest() > before, "a heartbeat")

    def spent() -> tuple[float, float]:
        processes = [psutil.Process(watchdog.pid), *group.workers(watchdog.pid).values()]
        own, *others = (sum(process.cpu_times()[:2]) for process in processes)
        return own, sum(others)

    try:
        after(2)
        own, workers = spent()
        after(heartbeats)
        own_then, workers_then = spent()
    finally:
        journal.close()
    return Idle(own_then - own, workers_then - workers, heartbeats)


@dataclass
class Cost:
    megabytes: float
    files: int
    threads: int


def heartbeats_with_a_flapping_member(
    group: GroupFixture, heartbeats: int, *, every: int, told: Callable[[int, Cost], None] = lambda number, cost: None
) -> list[Cost]:
    """Heartbeats one after the other, without the pauses between, in this process; hsm2 goes and comes each hundred.

    :param every: after so many (a multiple of 200), and when all members are back, it is measured.
    """
    watch, process = GroupWatch(group.toml), psutil.Process()
    others = {child.pid for child in process.children()}  # of tests before this one
    costs = []

    def all_back() -> bool:
        engine = watch._engine
        for member in [] if engine is None else engine.roster.members.values():
            member.next_attempt = 0.0  # it came and went so often that the next one may be minutes away
        watch.step()
        states = set(watch.report.states.values())
        workers = [child for child in process.children() if child.pid not in others]
        return states == {State.IN_SERVICE.value} and len(workers) == len(group.members)

    for number in range(1, heartbeats + 1):
        watch.step()
        if number % 100 == 0:
            (group.bring_back if number % 200 == 0 else group.take_away)("hsm2")
        if number % every == 0:
            wait_until(all_back, "no more than a worker for each member")
            gc.collect()
            costs.append(Cost(process.memory_info().rss / 1e6, process.num_fds(), process.num_threads()))
            told(number, costs[-1])
    watch.stop()
    watch.run()
    return costs


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as reply:
        return str(reply.read().decode())


class Receiver:
    """A webhook's other end; answers with ``statuses`` first, then 200."""

    def __init__(self, *statuses: int) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        left = list(statuses)
        got = self.got

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                got.append((dict(self.headers.items()), body))
                self.send_response(left.pop(0) if left else 200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/alarm"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def kinds(self) -> list[str]:
        return [json.loads(body)["kind"] for _, body in self.got]

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
