"""Requests to etcd: several endpoints with failover, short timeouts, plain errors (DESIGN.md 4.8).

``etcd3gw`` carries them; it knows one endpoint only, and its session would obey ``REQUESTS_CA_BUNDLE`` and proxies, so
each endpoint has a client with a session of its own. **An error is not a no**: a request without an answer may still be
carried out, which :class:`Unanswered` says.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import requests
from etcd3gw.client import Etcd3Client
from etcd3gw.exceptions import ConnectionFailedError, ConnectionTimeoutError, Etcd3Exception
from requests.adapters import HTTPAdapter

from hagroup.config.model import EtcdUrl, JournalSection
from hagroup.errors import ConfigurationError, JournalUnavailable

TIMEOUT = 1.0
"""Seconds for one request to one endpoint."""
PATIENCE = 5.0
"""Seconds over all endpoints: an election takes one to two and a half."""
_CONNECTIONS = 32
_PAGE = 200

Json = dict[str, Any]


class Unanswered(JournalUnavailable):
    """No endpoint answered: what was asked for may have been done, or may yet be."""


class Refused(JournalUnavailable):
    """etcd answered that it does not do this. It was not done."""


class Compacted(Exception):
    """The revision is not kept any more."""


class Pair(msgspec.Struct, frozen=True):
    """A key with its value."""

    key: str
    value: bytes
    created: int
    modified: int


def b64(data: str | bytes) -> str:
    return base64.b64encode(data.encode() if isinstance(data, str) else data).decode()


def after_all(prefix: str) -> str:
    """The end of the range of keys with this prefix."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def pair(found: Mapping[str, str]) -> Pair:
    return Pair(
        base64.b64decode(found["key"]).decode(),
        base64.b64decode(found.get("value", "")),
        int(found["create_revision"]),
        int(found["mod_revision"]),
    )


def range_of(key: str, end: str | None = None, *, revision: int = 0, limit: int = 0, **more: Any) -> Json:
    """A range request, linearizable: never a serializable one, whose answer may be old."""
    asked: Json = {"key": b64(key), **more}
    if end is not None:
        asked["range_end"] = b64(end)
    if revision:
        asked["revision"] = revision
    if limit:
        asked["limit"] = limit
    return asked


class EtcdClient:
    """The endpoints of one cluster. Any thread may use it."""

    def __init__(self, section: JournalSection) -> None:
        """
        :raises ConfigurationError: the password cannot be read.
        """
        assert isinstance(section.url, EtcdUrl)
        self.url = section.url
        self._section = section
        self._password = _password(section.password_file)
        self._token = ""
        self._lock = threading.Lock()
        self._current = 0
        self.available = True
        """False while the mirror finds no endpoint with a quorum: everybody else is then refused at once."""
        self._connect()

    def _connect(self) -> None:
        section, self._clients = self._section, []
        secured = section.ca is not None or section.cert is not None
        for endpoint in self.url.endpoints:
            session = requests.Session()
            session.trust_env = False
            session.verify = str(section.ca) if section.ca is not None else True
            if section.cert is not None and section.key is not None:
                session.cert = (str(section.cert), str(section.key))
            session.mount("https://", HTTPAdapter(pool_connections=1, pool_maxsize=_CONNECTIONS))
            session.mount("http://", HTTPAdapter(pool_connections=1, pool_maxsize=_CONNECTIONS))
            self._clients.append(
                Etcd3Client(
                    host=f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host,
                    port=endpoint.port,
                    protocol="https" if secured else "http",
                    timeout=TIMEOUT,
                    api_path="/v3/",
                    session=session,
                )
            )

    def renew_after_fork(self) -> None:
        """Connections of the parent are the parent's."""
        self._lock = threading.Lock()
        self._connect()

    def close(self) -> None:
        for client in self._clients:
            client.session.close()

    # -- requests ------------------------------------------------------------------------------------------------

    def call(
        self,
        path: str,
        body: Json,
        *,
        patience: float = PATIENCE,
        always: bool = False,
        unanswered: list[str] | None = None,
    ) -> Json:
        """One request; the next endpoint is asked where one gives no answer, so it may be carried out twice.

        :param always: also where the mirror found no quorum.
        :param unanswered: gets a line for each time that it was sent and no answer came.
        :raises Unanswered: nobody answered, or nobody was asked.
        :raises Refused: etcd does not do it.
        :raises Compacted: the revision is not kept any more.
        """
        if not self.available and not always:
            raise self.unavailable("no node with a quorum answers")
        deadline = time.monotonic() + patience
        failed = 0
        while True:
            index = self._current
            try:
                return self._ask(index, path, body)
            except _NoAnswer as error:
                self.move_on(index)
                failed += 1
                if unanswered is not None:
                    unanswered.append(str(error))
                late = time.monotonic() > deadline or (not self.available and not always)
                late = late or (error.lasting and failed >= len(self._clients))
                if late or (patience == 0 and failed >= len(self._clients)):
                    raise self.unavailable(str(error)) from error
            if failed % len(self._clients) == 0:
                time.sleep(0.05)

    def move_on(self, index: int) -> None:
        """This endpoint gave no answer: the next one from now on."""
        with self._lock:
            if self._current == index:
                self._current = (index + 1) % len(self._clients)

    @property
    def current(self) -> int:
        return self._current

    def _ask(self, index: int, path: str, body: Json, *, again: bool = True) -> Json:
        client = self._clients[index]
        try:
            headers = {"Authorization": self._token} if self._token else {}
            if self._password is not None and not self._token:
                self._authenticate(index)
                headers = {"Authorization": self._token}
            answer = client.post(client.get_url(path), json=body, headers=headers)
        except (ConnectionTimeoutError, ConnectionFailedError, requests.RequestException, ValueError) as error:
            raise _NoAnswer(_short(error)) from error
        except Etcd3Exception as error:
            text = getattr(error, "detail_text", None) or str(error)
            if again and self._password is not None and ("invalid auth token" in text or "user name is empty" in text):
                self._token = ""
                return self._ask(index, path, body, again=False)
            _raise_for(self.url, text)
            raise
        assert isinstance(answer, dict)
        return answer

    def _authenticate(self, index: int) -> None:
        client = self._clients[index]
        answer = client.post(
            client.get_url("/auth/authenticate"), json={"name": self._section.user, "password": self._password}
        )
        self._token = str(answer["token"])

    def stream(self, path: str, body: Json, *, silence: float) -> Iterator[Json]:
        """Answers of a watch, from the current endpoint; it ends where nothing came for ``silence`` seconds.

        :raises Unanswered: the connection broke.
        """
        index = self._current
        client = self._clients[index]
        headers = {"Authorization": self._token} if self._token else {}
        try:
            with client.session.post(
                client.get_url(path), json=body, headers=headers, stream=True, timeout=(TIMEOUT, silence)
            ) as answer:
                for line in answer.iter_lines(chunk_size=None):
                    if line:
                        found = msgspec.json.decode(line)
                        if "error" in found:
                            raise Unanswered(str(found["error"]))
                        yield found["result"]
        except requests.RequestException as error:
            if "timed out" in str(error).lower():
                return  # silence: a node that is gone is silent too, so the caller asks for more than this
            self.move_on(index)
            raise self.unavailable(_short(error)) from error

    def unavailable(self, why: str) -> Unanswered:
        return Unanswered(
            f"the journal {self.url} cannot be reached ({why}): changes are refused until a majority of its nodes "
            "answers again; it then goes on by itself"
        )

    # -- what all need -------------------------------------------------------------------------------------------

    def grant(self, ttl: int) -> int:
        """A lease of etcd's for so many seconds."""
        return int(self.call("/lease/grant", {"TTL": ttl, "ID": 0})["ID"])

    def keep_alive(self, lease: int, **how: Any) -> bool:
        """False: it ran out."""
        answer = self.call("/lease/keepalive", {"ID": lease}, **how)
        return int(answer.get("result", {}).get("TTL", 0)) > 0

    def revoke(self, lease: int) -> None:
        self.call("/lease/revoke", {"ID": lease}, patience=0, always=True)

    def get(self, key: str) -> Pair | None:
        found = self.call("/kv/range", range_of(key)).get("kvs", [])
        return pair(found[0]) if found else None

    def prefix(self, prefix: str, **more: Any) -> list[Pair]:
        """All keys with the prefix, as of one instant."""
        return [pair(one) for one in self.call("/kv/range", range_of(prefix, after_all(prefix), **more)).get("kvs", [])]

    def pages(self, prefix: str) -> Iterator[Pair]:
        """All keys with the prefix, as of one instant, however many."""
        revision, start = 0, prefix
        while True:
            answer = self.call("/kv/range", range_of(start, after_all(prefix), revision=revision, limit=_PAGE))
            revision = revision or int(answer["header"]["revision"])
            found = [pair(one) for one in answer.get("kvs", [])]
            yield from found
            if not answer.get("more"):
                return
            start = found[-1].key + "\0"

    def count(self, prefix: str) -> int:
        asked = range_of(prefix, after_all(prefix), count_only=True)
        return int(self.call("/kv/range", asked).get("count", 0))


class _NoAnswer(Exception):
    @property
    def lasting(self) -> bool:
        """Whether asking again will not help."""
        return str(self) == _TLS


_REFUSALS = {
    "too many operations": "more operations than etcd takes at once (--max-txn-ops is below 128)",
    "request is too large": "more than etcd takes at once (1.5 MB): an object is too large for this journal",
    "database space exceeded": "etcd has no space left: compact and defragment it, then disarm its alarm",
    "requested lease not found": "this process's registration ran out; it registers anew by itself: try again",
    "permission denied": "etcd does not allow it to this user: grant it the keys below /hagroup/",
    "authentication failed": "etcd refuses the user or password: correct [journal] user and password_file",
    "authentication is not enabled": "etcd has authentication off: take [journal] user and password_file out",
    "user name is empty": "etcd has authentication on: give [journal] user and password_file",
}


def _raise_for(url: EtcdUrl, text: str) -> None:
    if "required revision has been compacted" in text or "is a future revision" in text:
        raise Compacted(text)
    for part, meaning in _REFUSALS.items():
        if part in text:
            raise Refused(f"the journal {url} refused: {meaning}; nothing was changed")
    raise _NoAnswer(text.strip()[:200])


_TLS = "TLS fails: its certificate is not of [journal] ca, or it does not take [journal] cert"


def _short(error: Exception) -> str:
    text = str(error)
    if "SSL" in text or "certificate" in text.lower() or isinstance(error.__context__, requests.exceptions.SSLError):
        return _TLS
    for part, meaning in (
        ("refused", "connection refused"),
        ("timed out", "no answer in time"),
    ):
        if part in text:
            return meaning
    return type(error).__name__


def _password(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"[journal] password_file {path} cannot be read: {error}") from None
