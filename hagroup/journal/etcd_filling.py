"""What an etcd journal begins with that takes the place of another: too much for one transaction.

Until all of it is there the journal is sealed, and opens for nobody. Interrupted, the same is done again from the
beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from hagroup.core.records import MemberRecord
from hagroup.errors import JournalUnavailable
from hagroup.journal.api import Contents
from hagroup.journal.etcd_client import EtcdClient, Json, after_all, b64
from hagroup.journal.etcd_keys import Document, KeptEvent, KeptLogin, Keys, encode, part
from hagroup.journal.etcd_snapshot import hindering
from hagroup.journal.moving import owed_at_first

_PUTS = 100
_BYTES = 700_000
"""In one request: etcd takes 128 operations and 1.5 MB, of which base64 costs a third."""
_FIRST = 1
"""The change number of all that it begins with."""


class Filler:
    """Writes as long as the sealed head is the one that it found: a request without an answer, carried out late, must
    not change a journal that is in use by then."""

    def __init__(self, client: EtcdClient, keys: Keys) -> None:
        self._client, self._keys = client, keys
        head = client.get(keys.group)
        assert head is not None
        self._still = {
            "key": b64(keys.group),
            "target": "MOD",
            "result": "EQUAL",
            "mod_revision": str(head.modified),
        }

    def fill(self, members: Sequence[MemberRecord], contents: Contents, *, boot: str) -> None:
        """In place of what an earlier attempt left."""
        keys = self._keys
        ends = ((keys.root, keys.group), (keys.group + "\0", after_all(keys.root)))
        self._do([{"request_delete_range": {"key": b64(a), "range_end": b64(b)}} for a, b in ends])
        self.put(_keys_of(keys, members, contents, boot))

    def put(self, values: Iterable[tuple[str, bytes]]) -> None:
        batch: list[Json] = []
        size = 0
        for key, value in values:
            if batch and (len(batch) == _PUTS or size + len(value) > _BYTES):
                self._do(batch)
                batch, size = [], 0
            batch.append({"request_put": {"key": b64(key), "value": b64(value)}})
            size += len(value)
        if batch:
            self._do(batch)

    def _do(self, operations: list[Json]) -> None:
        answer = self._client.call("/kv/txn", {"compare": [self._still], "success": operations})
        if not answer.get("succeeded"):
            raise JournalUnavailable(
                f"the journal {self._client.url} is being made by somebody else: look for that first"
            )


def _keys_of(keys: Keys, members: Sequence[MemberRecord], contents: Contents, boot: str) -> Iterable[tuple[str, bytes]]:
    for member in members:
        yield f"{keys.members}{part(member.name)}", encode(member)
        yield f"{keys.announced}{part(member.name)}", b""
    for document in _documents(contents, [member.name for member in members]):
        yield keys.object(document.uid), encode(replace(document, boot=boot))
        for name, change in hindering(document):
            yield keys.owed(name, change, document.uid), b""
        record = document.record
        if record is not None:
            yield keys.place(record.locator) + record.uid.hex(), encode(record.fingerprint)
    for stone in contents.tombstones:
        stone = replace(stone, change=_FIRST)
        yield keys.stone(stone.uid), encode(stone)
        yield f"{keys.gone}{stone.change:016x}/{stone.uid.hex()}", b""
    for intent in contents.intents:
        yield f"{keys.intents}{intent.id}", encode(intent)
    for login in contents.logins:
        yield keys.login(login.member, login.source), encode(KeptLogin(login, None))
    number = 0
    for event in contents.events:
        number = event.number or number + 1
        yield keys.event(number), encode(KeptEvent(event.time, event.kind, event.member, event.text, event.data))
    if number:
        yield keys.last_event, str(number).encode()
    if contents.seal is not None:
        yield keys.seal, encode(contents.seal)


def _documents(contents: Contents, members: Sequence[str]) -> Iterable[Document]:
    found: dict[bytes, Document] = {}
    for place, record in enumerate(contents.records):
        record = replace(record, change=_FIRST)
        found[record.uid] = Document(uid=record.uid, record=record, created=(0, place))
    for copy in contents.copies:
        before = found.get(copy.uid, Document(uid=copy.uid))
        found[copy.uid] = replace(before, copies={**before.copies, copy.member: copy})
    for row in owed_at_first(contents, members):
        before = found.get(row.uid, Document(uid=row.uid))
        found[row.uid] = replace(before, owed={**before.owed, row.member: replace(row, change=_FIRST)})
    return found.values()
