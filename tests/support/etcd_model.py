"""etcd's v3 API in memory, as far as the journal uses it: revisions, transactions, leases, watches, compaction.

It takes the place of ``etcd3gw``'s client, so that all of hagroup's own code runs over it. A test compares its answers
with a real node's.
"""

from __future__ import annotations

import base64
import bisect
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import requests
from etcd3gw.exceptions import Etcd3Exception

Json = dict[str, Any]

_OPERATIONS = 128
_BYTES = 1_500_000
_COMPARED = {"CREATE": "create_revision", "MOD": "mod_revision", "VERSION": "version"}
_TRUE = {
    "EQUAL": lambda a, b: a == b,
    "NOT_EQUAL": lambda a, b: a != b,
    "GREATER": lambda a, b: a > b,
    "LESS": lambda a, b: a < b,
}


class Version(NamedTuple):
    """What a key held from a revision on; without a value: nothing."""

    mod_revision: int
    create_revision: int = 0
    version: int = 0
    value: bytes | None = None
    lease: int = 0


_NOTHING = Version(0)


class Refusal(Exception):
    """An error that etcd answers."""


class ModelEtcd:
    """One cluster. Any thread may use it."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._revision = 1
        self._compacted = 0
        self._history: dict[bytes, list[Version]] = {}
        self._names: list[bytes] = []
        self._events: list[tuple[int, bytes, Json]] = []
        self._leases: dict[int, int] = {}
        self._numbers = itertools.count(1000)

    def client(self, **options: Any) -> ModelClient:
        """As the constructor of ``etcd3gw``'s client."""
        return ModelClient(self)

    def answer(self, path: str, body: Json) -> Json:
        """
        :raises Etcd3Exception: etcd does not do it.
        """
        methods = {
            "/kv/range": self._range,
            "/kv/put": self._put_alone,
            "/kv/deleterange": self._delete_alone,
            "/kv/txn": self._transaction,
            "/kv/compaction": self._compact,
            "/lease/grant": self._grant,
            "/lease/keepalive": self._keep_alive,
            "/lease/revoke": self._revoke,
        }
        with self._news:
            try:
                return methods[path](body)
            except Refusal as error:
                raise Etcd3Exception(json.dumps({"error": str(error)}), "Bad Request") from error

    # -- keys ----------------------------------------------------------------------------------------------------

    def _header(self) -> Json:
        """Within a transaction as of what it wrote already."""
        written = self._events[-1][0] if self._events else 0
        return {"revision": str(max(self._revision, written))}

    def _at(self, name: bytes, revision: int) -> Version:
        versions = self._history.get(name, [])
        return next((one for one in reversed(versions) if one.mod_revision <= revision), _NOTHING)

    def _within(self, body: Json, revision: int) -> list[tuple[bytes, Version]]:
        """What is there, in order."""
        first = _bytes(body["key"])
        if "range_end" in body:
            here = bisect.bisect_left(self._names, first), bisect.bisect_left(self._names, _bytes(body["range_end"]))
            names = self._names[slice(*here)]
        else:
            names = [first]
        found = ((name, self._at(name, revision)) for name in names)
        return [(name, one) for name, one in found if one.value is not None]

    def _check_revision(self, body: Json) -> None:
        revision = int(body.get("revision", 0))
        if revision > self._revision:
            raise Refusal("etcdserver: mvcc: required revision is a future revision")
        if 0 < revision < self._compacted:
            raise Refusal("etcdserver: mvcc: required revision has been compacted")

    def _range(self, body: Json) -> Json:
        self._check_revision(body)
        return self._found(body, self._revision)

    def _found(self, body: Json, now: int) -> Json:
        found = self._within(body, int(body.get("revision", 0)) or now)
        answer: Json = {"header": self._header()}
        if found:
            answer["count"] = str(len(found))
        limit = int(body.get("limit", 0)) or len(found)
        if found and not body.get("count_only"):
            answer["kvs"] = [_shown(name, one, keys_only=body.get("keys_only", False)) for name, one in found[:limit]]
            if len(found) > limit:
                answer["more"] = True
        return answer

    def _write(self, name: bytes, version: Version, revision: int) -> None:
        if name not in self._history:
            bisect.insort(self._names, name)
        self._history.setdefault(name, []).append(version)
        kind: Json = {"type": "DELETE"} if version.value is None else {}
        self._events.append((revision, name, {**kind, "kv": _shown(name, version)}))

    def _put(self, body: Json, revision: int) -> Json:
        name, before = _bytes(body["key"]), self._at(_bytes(body["key"]), revision)
        created = before.create_revision if before.value is not None else revision
        number = before.version + 1 if before.value is not None else 1
        lease = int(body.get("lease", 0))
        self._write(name, Version(revision, created, number, _bytes(body.get("value", "")), lease), revision)
        return {"header": {"revision": str(revision)}}

    def _delete(self, body: Json, revision: int) -> Json:
        found = self._within(body, revision)
        for name, _ in found:
            self._write(name, Version(revision), revision)
        return {"header": {"revision": str(revision)}, **({"deleted": str(len(found))} if found else {})}

    def _check_lease(self, body: Json) -> None:
        if int(body.get("lease", 0)) not in (0, *self._leases):
            raise Refusal("etcdserver: requested lease not found")

    def _put_alone(self, body: Json) -> Json:
        self._check_lease(body)
        self._put(body, self._revision + 1)
        return self._written()

    def _delete_alone(self, body: Json) -> Json:
        answer = self._delete(body, self._revision + 1)
        return {**answer, **self._written()}

    def _written(self) -> Json:
        if self._events and self._events[-1][0] > self._revision:
            self._revision += 1
            self._news.notify_all()
        return {"header": self._header()}

    # -- transactions --------------------------------------------------------------------------------------------

    def _transaction(self, body: Json) -> Json:
        branches = [body.get(name, []) for name in ("compare", "success", "failure")]
        if any(len(one) > _OPERATIONS for one in branches):
            raise Refusal("etcdserver: too many operations in txn request")
        if len(json.dumps(body)) * 3 // 4 > _BYTES:
            raise Refusal("etcdserver: request is too large")
        for branch in branches[1:]:
            _check_once(branch)
        held = all(self._holds(one) for one in branches[0])
        chosen = branches[1 if held else 2]
        for one in chosen:
            self._check_revision(one.get("request_range", {}))
            self._check_lease(one.get("request_put", {}))
        revision = self._revision + 1
        responses = [self._operation(one, revision) for one in chosen]
        answer: Json = self._written()
        if held:
            answer["succeeded"] = True
        if responses:
            answer["responses"] = responses
        return answer

    def _operation(self, one: Json, revision: int) -> Json:
        if "request_range" in one:
            return {"response_range": self._found(one["request_range"], revision)}
        if "request_put" in one:
            return {"response_put": self._put(one["request_put"], revision)}
        return {"response_delete_range": self._delete(one["request_delete_range"], revision)}

    def _holds(self, compare: Json) -> bool:
        found = [one for _, one in self._within(compare, self._revision)]
        result = _TRUE[compare["result"]]
        if compare["target"] == "VALUE":
            return bool(found) and all(result(one.value, _bytes(compare["value"])) for one in found)
        field = _COMPARED[compare["target"]]
        return all(result(getattr(one, field), int(compare.get(field, 0))) for one in found or [_NOTHING])

    def _compact(self, body: Json) -> Json:
        revision = int(body["revision"])
        self._check_revision(body)
        if revision <= self._compacted:
            raise Refusal("etcdserver: mvcc: required revision has been compacted")
        self._compacted = revision
        for name, versions in self._history.items():
            kept = self._at(name, revision)
            self._history[name] = [one for one in versions if one is kept or one.mod_revision > revision]
        self._events = [one for one in self._events if one[0] > revision]
        return {"header": self._header()}

    # -- leases --------------------------------------------------------------------------------------------------

    def _grant(self, body: Json) -> Json:
        number = int(body.get("ID", 0)) or next(self._numbers)
        self._leases[number] = int(body["TTL"])
        return {"header": self._header(), "ID": str(number), "TTL": str(self._leases[number])}

    def _keep_alive(self, body: Json) -> Json:
        number = int(body["ID"])
        ttl = {"TTL": str(self._leases[number])} if number in self._leases else {}
        return {"result": {"header": self._header(), "ID": str(number), **ttl}}

    def _revoke(self, body: Json) -> Json:
        """Also what happens to one that ran out."""
        number = int(body["ID"])
        self._check_lease({"lease": number})
        del self._leases[number]
        for name in list(self._names):
            now = self._at(name, self._revision)
            if now.value is not None and now.lease == number:
                self._write(name, Version(self._revision + 1), self._revision + 1)
        return self._written()

    # -- watches -------------------------------------------------------------------------------------------------

    def watch(self, body: Json, silence: float) -> Iterator[Json]:
        """
        :raises requests.ConnectionError: for so long there was no news.
        """
        asked = body["create_request"]
        first, end = _bytes(asked["key"]), _bytes(asked["range_end"])
        with self._news:
            start = int(asked.get("start_revision", 0)) or self._revision + 1
        yield {"result": {"header": self._header(), "created": True}}
        while True:
            with self._news:
                if start > self._compacted and start > self._revision and not self._news.wait(silence):
                    raise requests.ConnectionError("Read timed out.")
                compacted = start <= self._compacted
                found = [event for at, name, event in self._events if at >= start and first <= name < end]
                header, start = self._header(), self._revision + 1
            if compacted:
                yield {"result": {"header": header, "canceled": True, "compact_revision": str(self._compacted)}}
                return
            if found:
                yield {"result": {"header": header, "events": found}}


def _check_once(branch: list[Json]) -> None:
    """etcd refuses a transaction that writes a key twice."""
    names = [_bytes(one["request_put"]["key"]) for one in branch if "request_put" in one]
    ranges = [one["request_delete_range"] for one in branch if "request_delete_range" in one]
    ends = [(_bytes(one["key"]), _bytes(one["range_end"]) if "range_end" in one else None) for one in ranges]
    gone = any(name == a if b is None else a <= name < b for name in names for a, b in ends)
    if gone or len(set(names)) < len(names):
        raise Refusal("etcdserver: duplicate key given in txn request")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)


def _shown(name: bytes, one: Version, *, keys_only: bool = False) -> Json:
    """Zeros are left out."""
    shown: Json = {"key": base64.b64encode(name).decode()}
    for field in ("create_revision", "mod_revision", "version", "lease"):
        if getattr(one, field):
            shown[field] = str(getattr(one, field))
    if one.value and not keys_only:
        shown["value"] = base64.b64encode(one.value).decode()
    return shown


class ModelClient:
    """As ``etcd3gw``'s client and its session."""

    def __init__(self, etcd: ModelEtcd) -> None:
        self._etcd = etcd
        self.session = ModelSession(etcd)

    def get_url(self, path: str) -> str:
        return path

    def post(self, url: str, *, json: Json, headers: dict[str, str]) -> Json:
        return self._etcd.answer(url, json)


class ModelSession:
    def __init__(self, etcd: ModelEtcd) -> None:
        self._etcd = etcd

    @contextmanager
    def post(self, url: str, *, json: Json, timeout: tuple[float, float], **more: Any) -> Iterator[ModelStream]:
        yield ModelStream(self._etcd.watch(json, timeout[1]))

    def close(self) -> None:
        pass


class ModelStream:
    def __init__(self, answers: Iterator[Json]) -> None:
        self._answers = answers

    def iter_lines(self, **more: Any) -> Iterator[bytes]:
        return (json.dumps(one).encode() for one in self._answers)
