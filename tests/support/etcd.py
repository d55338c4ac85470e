"""Real etcd nodes on tmpfs: one for all tests of a process that need no more, started by the first; or a cluster."""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from hagroup.config.model import Endpoint, EtcdUrl, JournalSection
from hagroup.core.records import MemberRecord
from hagroup.journal import EtcdJournal
from tests.support import networks
from tests.support.journals import FakeClock

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import etcd_cluster

_numbers = itertools.count(1)
_PREFIX = "hagroup-etcd-"


class Cluster:
    """Some nodes, and what is done to them."""

    def __init__(self, count: int, parent: Path | None = None, network: networks.Network | None = None) -> None:
        """
        :param network: in which each node has a place of its own.
        """
        base = parent or (Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir()))
        _remove_stale(base)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
        atexit.register(self._stop_at_exit, os.getpid())
        network = network or networks.Loopback()
        places = [network.place() for _ in range(count)]
        addresses = [place.address for place in places]
        self.endpoints = etcd_cluster.start(self.folder, count, addresses, lambda number: places[number].inside())
        self._nodes = etcd_cluster.read_nodes(self.folder)
        self.nodes = [str(node["name"]) for node in self._nodes]
        self.places = dict(zip(self.nodes, places, strict=True))

    def section(self, name: str | None = None, **more: object) -> JournalSection:
        """``[journal]`` for a group of its own."""
        endpoints = tuple(
            Endpoint(host=host, port=int(port)) for host, _, port in (one.partition(":") for one in self.endpoints)
        )
        url = EtcdUrl(endpoints=endpoints, name=name or f"test{os.getpid()}-{next(_numbers)}")
        files = {"ca": self.folder / "ca.pem", "cert": self.folder / "client.pem", "key": self.folder / "client.key"}
        return JournalSection(url=url, **files, **more)  # type: ignore[arg-type]

    def signal(self, node: str, number: signal.Signals) -> None:
        os.kill(int((self.folder / f"{node}.pid").read_text()), number)

    def kill(self, node: str) -> None:
        self.signal(node, signal.SIGKILL)

    def restart(self, node: str) -> None:
        one = next(one for one in self._nodes if one["name"] == node)
        with self.places[node].inside():
            etcd_cluster.start_node(self.folder, self._nodes, one)

    def leader(self) -> str:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = etcd_cluster.leader(self.folder, self._nodes)
            if found is not None:
                return found
            time.sleep(0.05)
        raise AssertionError("the cluster has no leader")

    def heal(self) -> None:
        """All nodes run, and answer."""
        for node in self.nodes:
            pid = int((self.folder / f"{node}.pid").read_text())
            if etcd_cluster.is_ours(pid, self.folder):
                os.kill(pid, signal.SIGCONT)
            else:
                self.restart(node)
        self.wait()

    def wait(self) -> None:
        etcd_cluster.wait_until_ready(self.folder, self._nodes)

    def stop(self) -> None:
        etcd_cluster.stop(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _stop_at_exit(self, process: int) -> None:
        if os.getpid() == process:  # not in a forked child
            self.stop()


def _remove_stale(base: Path) -> None:
    """Nodes and files of test runs that were killed."""
    for folder in base.glob(f"{_PREFIX}[0-9]*-*"):
        if not Path(f"/proc/{folder.name.split('-')[2]}").exists():
            etcd_cluster.stop(folder)
            shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def one_node() -> Cluster:
    """For what is the same whatever the number of nodes."""
    return Cluster(1)


class EtcdBackend:
    """See :class:`tests.support.journals.Backend`."""

    def __init__(self, folder: Path, members: list[MemberRecord], section: JournalSection | None = None) -> None:
        self.clock = FakeClock()
        self.section = section or one_node().section()
        self._opened: list[EtcdJournal] = []
        EtcdJournal.create(
            self.section,
            label="payments",
            serial="74007601",
            members=members,
            domain_key_id=b"domain",
            partition_key_id=b"partition",
            reference=b"reference",
        )

    def open(self) -> EtcdJournal:
        journal = EtcdJournal.open(self.section, clock=self.clock)
        self._opened.append(journal)
        return journal

    def close(self) -> None:
        for journal in self._opened:
            journal.close()
