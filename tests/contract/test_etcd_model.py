"""The model of etcd answers what a real node answers."""

from __future__ import annotations

from typing import Any

import msgspec
from etcd3gw.exceptions import Etcd3Exception

from hagroup.journal.etcd_client import EtcdClient, after_all, b64, range_of
from tests.support.etcd import one_node
from tests.support.etcd_model import ModelEtcd

Json = dict[str, Any]
ROOT = "/model/"
_REVISIONS = ("revision", "create_revision", "mod_revision", "start_revision", "compact_revision")


def key(name: str) -> Json:
    return {"key": b64(ROOT + name)}


def every() -> Json:
    return {"key": b64(ROOT), "range_end": b64(after_all(ROOT))}


def put(name: str, value: str = "", **more: str) -> Json:
    return {"request_put": {**key(name), "value": b64(value), **more}}


def requests(base: int, lease: str) -> list[tuple[str, Json]]:
    """At revision ``base`` there is nothing below the root."""

    def at(number: int) -> str:
        return str(base + number)

    def compared(target: str, result: str, where: Json, **value: str) -> tuple[str, Json]:
        compare = {**where, "target": target, "result": result, **value}
        return "/kv/txn", {"compare": [compare], "failure": [{"request_range": range_of(ROOT + "a")}]}

    return [
        ("/kv/range", every()),
        ("/kv/put", {**key("a"), "value": b64("1")}),  # base + 1
        ("/kv/put", {**key("a"), "value": ""}),
        ("/kv/put", {**key("b"), "value": b64("leased"), "lease": lease}),
        ("/kv/put", {**key("c"), "value": "", "lease": "12345"}),
        ("/kv/txn", {"success": [put("c", "3"), put("d", "4"), {"request_range": every()}]}),  # + 4
        ("/kv/txn", {"success": [put("c"), put("c")]}),
        ("/kv/txn", {"success": [put("c"), {"request_delete_range": every()}]}),
        ("/kv/txn", {"success": [put(str(n)) for n in range(129)]}),
        ("/kv/txn", {"success": [{"request_range": {**every(), "revision": at(1)}}]}),
        ("/kv/txn", {"success": [{"request_range": {**every(), "revision": at(99)}}]}),
        ("/kv/txn", {"success": [{"request_delete_range": key("d")}, {"request_delete_range": key("none")}]}),  # + 5
        ("/kv/range", {**every(), "limit": 2}),
        ("/kv/range", {**every(), "keys_only": True}),
        ("/kv/range", {**every(), "count_only": True}),
        ("/kv/range", {**every(), "revision": at(4)}),
        compared("MOD", "EQUAL", key("a"), mod_revision=at(2)),
        compared("MOD", "EQUAL", key("a"), mod_revision=at(1)),
        compared("MOD", "EQUAL", key("none"), mod_revision="0"),
        compared("MOD", "LESS", every(), mod_revision=at(5)),
        compared("MOD", "LESS", every(), mod_revision=at(4)),
        compared("CREATE", "EQUAL", every(), create_revision="0"),
        compared("CREATE", "EQUAL", {"key": b64("/nowhere/"), "range_end": b64("/nowhere0")}, create_revision="0"),
        compared("CREATE", "GREATER", key("a"), create_revision="0"),
        compared("CREATE", "GREATER", key("d"), create_revision="0"),
        compared("VERSION", "EQUAL", key("a"), version="2"),
        compared("VALUE", "EQUAL", key("c"), value=b64("3")),
        compared("VALUE", "NOT_EQUAL", key("none"), value=b64("3")),
        ("/lease/keepalive", {"ID": lease}),
        ("/lease/revoke", {"ID": lease}),  # + 6
        ("/lease/keepalive", {"ID": lease}),
        ("/lease/revoke", {"ID": lease}),
        ("/kv/put", {**key("d"), "value": b64("again")}),
        ("/kv/compaction", {"revision": at(6)}),
        ("/kv/compaction", {"revision": at(6)}),
        ("/kv/range", {**every(), "revision": at(5)}),
        ("/kv/range", {**every(), "revision": at(6)}),
        ("/kv/deleterange", every()),
        ("/kv/deleterange", every()),
        ("/kv/range", {**every(), "revision": at(99)}),
    ]


def answers(client: Any) -> list[Json]:
    def post(path: str, body: Json) -> Json:
        try:
            answer: Json = client.post(client.get_url(path), json=body, headers={})
        except Etcd3Exception as error:
            return {"error": msgspec.json.decode(error.detail_text or "")["error"]}
        return answer

    base = int(post("/kv/range", every())["header"]["revision"])
    lease = post("/lease/grant", {"TTL": 60, "ID": 0})["ID"]
    found = [told(post(path, body), base) for path, body in requests(base, lease)]
    watched = [told(one, base) for start in (5, 7) for one in watch(client, base + start)]
    return [*found, *watched]


def watch(client: Any, start: int) -> list[Json]:
    asked = {"create_request": {**every(), "start_revision": str(start)}}
    seen: list[Json] = []
    with client.session.post(client.get_url("/watch"), json=asked, headers={}, stream=True, timeout=(5, 5)) as answer:
        for line in answer.iter_lines(chunk_size=None):
            seen.append(msgspec.json.decode(line)["result"])
            kinds = [event.get("type") for one in seen for event in one.get("events", [])]
            if seen[-1].get("canceled") or "DELETE" in kinds:
                break
    assert seen[0]["created"] is True
    return [{"events": [event for one in seen for event in one.get("events", [])], **_canceled(seen[-1])}]


def _canceled(last: Json) -> Json:
    return {name: last[name] for name in ("canceled", "compact_revision") if name in last}


def told(answer: Any, base: int) -> Any:
    """Revisions counted from the base; without what is another node's or lease's name."""
    if isinstance(answer, list):
        return [told(one, base) for one in answer]
    if not isinstance(answer, dict):
        return answer
    return {
        name: int(value) - base if name in _REVISIONS else told(value, base)
        for name, value in answer.items()
        if name not in ("cluster_id", "member_id", "raft_term", "ID", "lease", "header")
        or (name == "header" and "revision" in value)
    }


def test_the_model_answers_what_a_real_node_answers() -> None:
    real, model = answers(EtcdClient(one_node().section())._clients[0]), answers(ModelEtcd().client())
    for asked, expected, found in zip(requests(0, "1"), real, model, strict=False):
        assert found == expected, asked
    assert model == real, "watches too"
