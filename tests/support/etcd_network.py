"""What may happen between a journal and etcd (the model or real nodes): requests and answers that are lost, requests
that are carried out late, watches that break or bring nothing any more."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from typing import Any
from unittest.mock import patch

import requests
from etcd3gw.exceptions import ConnectionTimeoutError, Etcd3Exception

from hagroup.journal import EtcdJournal

Json = dict[str, Any]
_CLIENT = "hagroup.journal.etcd_client"


class Fate(StrEnum):
    LOST = "never carried out"
    DONE = "carried out, and the answer lost"
    LATE = "carried out when everybody gave it up"


class Network:
    """Each client that is made under ``between`` goes through it. What fails is decided for the transactions of the
    thread that made the network, never by time: the same plan comes to the same each time."""

    def __init__(self, connect: Callable[..., Any]) -> None:
        self._connect = connect
        self._driver = threading.get_ident()
        self._plan: list[Fate] = []
        self._cut_after = self._cut = self._at_work = False
        self._late: list[Callable[[], object]] = []
        self.broken: set[object] = set()
        """Journals whose watch breaks."""
        self._elapsed = 0.0
        self._watches: list[Watch] = []

    @contextmanager
    def between(self) -> Iterator[None]:
        """In place of the connections of journals that are opened here. Waiting for nobody takes no time."""
        clock = types.SimpleNamespace(monotonic=lambda: self._elapsed, sleep=self._sleep)
        with patch(f"{_CLIENT}.Etcd3Client", self._client), patch(f"{_CLIENT}.time", clock):
            yield

    def _sleep(self, seconds: float) -> None:
        self._elapsed += seconds

    def _client(self, **options: Any) -> Client:
        return Client(self._connect(**options), self)

    # -- what is to happen ---------------------------------------------------------------------------------------

    def plan(self, fates: Sequence[Fate], *, cut: bool) -> None:
        """
        :param fates: of the next transactions.
        :param cut: with the first of them nothing is answered any more, until ``disturbed`` ends.
        """
        self._plan, self._cut_after = list(fates), cut

    @contextmanager
    def disturbed(self) -> Iterator[None]:
        """The plan is carried out; what is left of it, the next time."""
        self._at_work = True
        try:
            yield
        finally:
            if self._cut:
                self._plan = []
            self._at_work = self._cut = False

    def arrive(self) -> None:
        """What was on its way all the time."""
        late, self._late = self._late, []
        for request in late:
            with suppress(Etcd3Exception):
                request()

    def break_watches(self, journal: EtcdJournal, *, silently: bool) -> None:
        """The connection breaks; or the node brings nothing any more, and does not say so."""
        for watch in self._watches:
            if watch.client in journal._client._clients:
                watch.silent, watch.broken = silently, not silently

    def fate(self, path: str, body: Json) -> Fate | None:
        if path.endswith("/kv/txn") and body.get("compare") and threading.get_ident() != self._driver:
            return Fate.LOST  # what is settled in the background would be at another moment each time
        if not self._at_work or threading.get_ident() != self._driver:
            return None
        if self._plan and path.endswith("/kv/txn") and body.get("compare"):
            self._cut = self._cut_after
            return self._plan.pop(0)
        return Fate.LOST if self._cut else None

    def late(self, request: Callable[[], object]) -> None:
        self._late.append(request)


class Client:
    """``etcd3gw``'s client with this network before it."""

    def __init__(self, inner: Any, network: Network) -> None:
        self._inner, self._network = inner, network
        self.session = Session(self, inner.session, network)
        self.get_url = inner.get_url

    def post(self, url: str, *, json: Json, headers: dict[str, str]) -> Json:
        def carried_out() -> Json:
            answer: Json = self._inner.post(url, json=json, headers=headers)
            return answer

        fate = self._network.fate(url, json)
        if fate is None:
            return carried_out()
        if fate is Fate.DONE:
            carried_out()
        elif fate is Fate.LATE:
            self._network.late(carried_out)
        raise ConnectionTimeoutError("no answer")


class Watch:
    """One that is under way."""

    def __init__(self, client: Client, inner: Any) -> None:
        self.client, self._inner = client, inner
        self.silent = self.broken = False

    def iter_lines(self, **more: Any) -> Iterator[bytes]:
        for line in self._inner.iter_lines(**more):
            if self.broken:
                raise requests.ConnectionError("Connection broken")
            if not self.silent:
                yield line


class Session:
    def __init__(self, client: Client, inner: Any, network: Network) -> None:
        self._client, self._inner, self._network = client, inner, network
        self.close = inner.close

    @contextmanager
    def post(self, url: str, **more: Any) -> Iterator[Watch]:
        with self._inner.post(url, **more) as answer:
            watch = Watch(self._client, answer)
            self._network._watches.append(watch)
            try:
                yield watch
            finally:
                self._network._watches.remove(watch)
