"""The service: one thread for each group, one page for each address, signals, and systemd."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdnotify import SystemdNotifier

from hagroup.config.load import load
from hagroup.config.logging import get_logger
from hagroup.config.model import Endpoint, GroupConfig, LogStyle
from hagroup.core.watch import lease_time
from hagroup.engine.status import Status, gather, without_journal
from hagroup.errors import ConfigurationError, JournalUnavailable
from hagroup.journal import open_journal
from hagroup.journal.clock import SystemClock
from hagroup.watchdog import lines
from hagroup.watchdog.group import GroupWatch, Report
from hagroup.watchdog.metrics import Metrics
from hagroup.watchdog.page import Board, Page

log = get_logger(__name__)

STOP_TIME = 4.0
"""Seconds for an orderly end; the promise is 5."""
_LOOK = 1.0


def _looked_at(config: GroupConfig) -> Status:
    """By this process alone, as ``ha-admin status`` does: another watchdog is active, or the journal is away."""
    try:
        journal = open_journal(config.journal, clock=SystemClock())
    except JournalUnavailable as error:
        return without_journal(config, str(error))
    try:
        return gather(config, journal)
    except JournalUnavailable as error:
        return without_journal(config, str(error))
    finally:
        journal.close()


def _log_style(configs: Mapping[Path, GroupConfig]) -> LogStyle:
    """All groups of one process write into one log.

    :raises ConfigurationError: they do not say the same of it.
    """
    styles = {path: config.watchdog.log_style for path, config in configs.items()}
    if len(set(styles.values())) > 1:
        said = ", ".join(f'"{style}" in {path}' for path, style in styles.items())
        raise ConfigurationError(
            f"[watchdog] log_style has to be the same in all files of one ha-watchdog: it is {said}"
        )
    return next(iter(styles.values()))


class Service:
    """All groups of one ``ha-watchdog``."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.watches = [GroupWatch(path, published=self._published) for path in paths]
        serials = [watch.config.group.serial for watch in self.watches]
        for watch in self.watches:
            if watch.config.group.serial is None:
                raise ConfigurationError(
                    f"{watch.path}: [group] serial is not set: the group was not created yet; "
                    f"run `ha-admin --config {watch.path} group create`"
                )
        if len(set(serials)) < len(serials):
            raise ConfigurationError("two of the configuration files are of one group")
        lines.configure(_log_style(self._configs()))
        self.metrics = Metrics(self._reports)
        self.board = Board(self._reports)
        self._pages: dict[Endpoint, Page] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._reload = False
        self._notifier = SystemdNotifier()

    def _configs(self) -> dict[Path, GroupConfig]:
        return {watch.path: watch.config for watch in self.watches}

    def _reports(self) -> list[Report]:
        return [watch.report for watch in self.watches]

    def _published(self, report: Report) -> None:
        self.metrics.count(report)
        self.board.ring()

    # -- running -------------------------------------------------------------------------------------------
    def run(self) -> int:
        """Until SIGTERM or SIGINT."""
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_stop)
        signal.signal(signal.SIGHUP, self._on_reload)
        self._open_pages()
        threads = [
            threading.Thread(target=watch.run, name=f"watch-{watch.config.group.label}", daemon=True)
            for watch in self.watches
        ]
        for thread in threads:
            thread.start()
        told_ready = False
        while not self._stopping:
            if not told_ready and all(watch.ready.is_set() for watch in self.watches):
                self._notifier.notify("READY=1")
                told_ready = True
            if self._reload:
                self._load_again()
            if self._alive():
                self._notifier.notify(f"WATCHDOG=1\nSTATUS={self._status()}")
            self._wake.wait(_LOOK if told_ready else 0.05)
            self._wake.clear()
        self._end(threads)
        return 0

    def once(self) -> int:
        """A few heartbeats, telling what is new; exit status as of ``ha-admin status``."""
        worst = 0
        for watch in self.watches:
            for _ in range(watch.config.watchdog.threshold):
                watch.step()
            report = watch.report
            status = report.status or _looked_at(watch.config)
            whole = report.journal and status.journal.ok
            also = ", the journal cannot be reached" if not whole else "" if report.active else ", watched by another"
            state = status.group.state
            print(f"{report.label} ({report.serial}): {state}{also}; a failure is told within {report.bound:g} s")
            for member in status.members:
                print(f"  {member.name}: {member.state}{'' if member.in_sync else ', out of sync'}")
            worst = max(worst, 3 if state == "down" else 0 if state == "ok" and whole else 1)
            watch.stop()
            watch.run()
        return worst

    def _on_stop(self, _number: int, _frame: object) -> None:
        self._stopping = True
        self._wake.set()

    def _on_reload(self, _number: int, _frame: object) -> None:
        self._reload = True
        self._wake.set()

    def _load_again(self) -> None:
        self._reload = False
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._notifier.notify(f"RELOADING=1\nMONOTONIC_USEC={now}")
        try:
            _log_style(self._configs() | self._as_written())
        except ConfigurationError as error:
            log.error("configuration.not-reloaded", reason=str(error))
            self._notifier.notify("READY=1")
            return
        for watch in self.watches:
            watch.ready.clear()
            watch.reload()
        for watch in self.watches:
            watch.ready.wait(2 * watch.config.watchdog.interval)
        lines.configure(self.watches[0].config.watchdog.log_style)
        self._open_pages()
        self._notifier.notify("READY=1")

    def _as_written(self) -> dict[Path, GroupConfig]:
        """The files that can be read now; of the others each group's watch says why, and keeps what it has."""
        found = {}
        for watch in self.watches:
            with contextlib.suppress(ConfigurationError):
                found[watch.path] = load(watch.path)
        return found

    def _open_pages(self) -> None:
        wanted = {listen for watch in self.watches if (listen := watch.config.watchdog.listen) is not None}
        for endpoint in [endpoint for endpoint in self._pages if endpoint not in wanted]:
            self._pages.pop(endpoint).stop()
        for endpoint in wanted:
            if endpoint in self._pages:
                continue
            try:
                self._pages[endpoint] = Page(endpoint, self.board, self.metrics.render)
            except OSError as error:  # watching matters more than being looked at
                log.error("page.not-opened", address=str(endpoint), reason=error.strerror or str(error))
            else:
                log.info("page.opened", address=self._pages[endpoint].address)

    def _alive(self) -> bool:
        """No group's loop hangs: else systemd shall start us anew."""
        now = time.monotonic()
        for watch in self.watches:
            section, timeouts = watch.config.watchdog, watch.config.timeouts
            most = 30.0 + section.interval + lease_time(section.interval, section.threshold, timeouts.probe)
            if now - watch.alive > most:
                return False
        return True

    def _status(self) -> str:
        def shown(report: Report) -> str:
            if not report.active:
                return "standing by"
            return "starting" if report.status is None else report.status.group.state

        return ", ".join(f"{report.label}: {shown(report)}" for report in self._reports())

    # -- the end -------------------------------------------------------------------------------------------
    def _end(self, threads: list[threading.Thread]) -> None:
        self._notifier.notify("STOPPING=1")
        deadline = time.monotonic() + STOP_TIME
        for watch in self.watches:
            watch.stop()
        self.board.close()
        for page in self._pages.values():
            page.stop()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            # A module hangs, or the journal does. The workers see that we are gone; what was under way is in doubt in
            # the journal, and the next one looks after it.
            log.warning("watchdog.stopped-by-force")
            sys.stderr.flush()
            os._exit(0)
        log.info("watchdog.stopped")
