"""Everything that is read is of one revision, everything that is written is one compare-and-swap.

Optimistic: nothing is locked. The commit compares that what was read is still so; if not, the method that runs the
transaction is run again from its beginning (:class:`Conflict`). So a rule decides on rows of one instant, and what it
decided takes effect only while that is still how things are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from hagroup.core.records import Tombstone
from hagroup.journal.etcd_client import EtcdClient, Json, Pair, after_all, b64, range_of
from hagroup.journal.etcd_keys import Document, Keys, encode
from hagroup.journal.etcd_snapshot import hindering, only_listed, read_all, snapshot
from hagroup.journal.transaction import Transaction, Trying

decode = msgspec.msgpack.decode


class Conflict(Exception):
    """What was read changed before it could be committed. Nothing was written: again from the beginning."""


class OwnerLost(Exception):
    """This process's lease ran out (it was frozen or cut off): to others it is dead. Nothing was written."""


class Swap(Transaction):
    """What a transaction has read, and what it will write."""

    def __init__(
        self,
        client: EtcdClient,
        keys: Keys,
        *,
        owner: str,
        now: float,
        wall: float,
        boot: str,
        history: Callable[[], int],
        owner_lease: int,
        localised: Callable[[Document], Document],
    ) -> None:
        self._client, self._keys = client, keys
        self.owner, self.now, self.wall, self._boot = owner, now, wall, boot
        self._history = history
        self._owner_lease = owner_lease
        self._localised = localised
        self._was = snapshot(client, keys, owner)
        self._head = self._was.head
        self._members = {member.name: member for member in self._was.members}
        self._documents: dict[bytes, tuple[int, Document, Document]] = {}
        """Revision (0: there is none), as read, and as it becomes."""
        self._stones: dict[bytes, Tombstone | None] = {}
        self._read: dict[str, tuple[int, bytes | None]] = {}
        self._compares: list[Json] = [is_at(keys.group, self._was.head_modified)]
        self._puts: dict[str, tuple[bytes, int]] = {}
        self._deletes: set[str] = set()
        self._living: dict[str, bool] = {owner: True}
        self._logins: dict[tuple[str, str], Trying] | None = None
        self._created = 0
        self.alive = self._is_alive

    # -- reading -------------------------------------------------------------------------------------------------

    def _ranges(self, *asked: Json) -> list[list[Pair]]:
        """As of this transaction's revision."""
        return read_all(self._client, [{**one, "revision": self._was.revision} for one in asked])[1]

    def _get(self, key: str) -> bytes | None:
        """One key, as this transaction sees it; the commit compares it."""
        if key in self._puts:
            return self._puts[key][0]
        if key in self._deletes:
            return None
        if key not in self._read:
            [found] = self._ranges(range_of(key))
            one = found[0] if found else None
            self._read[key] = (0, None) if one is None else (one.modified, one.value)
            self._compares.append(is_at(key, self._read[key][0]))
        return self._read[key][1]

    def _scan(self, prefix: str) -> list[Pair]:
        """A range; the commit compares that nothing came or changed there (what went does no harm to those who ask)."""
        [found] = self._ranges(range_of(prefix, after_all(prefix)))
        unchanged = {"range_end": b64(after_all(prefix)), "mod_revision": str(self._was.revision + 1)}
        self._compares.append({"key": b64(prefix), "target": "MOD", "result": "LESS", **unchanged})
        return found

    def _is_alive(self, owner: str) -> bool:
        if owner not in self._living:
            [found] = self._ranges(range_of(f"{self._keys.owners}{owner}", keys_only=True))
            self._living[owner] = bool(found)
        return self._living[owner]

    def prefetch(self, uids: Sequence[bytes]) -> None:
        """Many documents in one request."""
        wanted = [uid for uid in dict.fromkeys(uids) if uid not in self._documents]
        if not wanted:
            return
        asked = [range_of(self._keys.object(uid)) for uid in wanted] + [
            range_of(self._keys.stone(uid)) for uid in wanted
        ]
        found = self._ranges(*asked)
        for uid, documents, stones in zip(wanted, found, found[len(wanted) :], strict=False):
            modified, document = 0, Document(uid=uid)
            if documents:
                modified, document = documents[0].modified, decode(documents[0].value, type=Document)
                document = self._listed(self._localised(document))
            self._documents[uid] = (modified, document, document)
            self._stones[uid] = decode(stones[0].value, type=Tombstone) if stones else None

    def _listed(self, document: Document) -> Document:
        return only_listed(document, self._members)

    def _document(self, uid: bytes) -> Document:
        if uid not in self._documents:
            self.prefetch([uid])
        return self._documents[uid][2]

    def _change_document(self, uid: bytes, **values: Any) -> None:
        modified, before, after = self._documents[uid]
        self._documents[uid] = (modified, before, replace(after, **values))

    @property
    def shows(self) -> bool:
        """Whether it writes what others watch."""
        return any(key.startswith(self._keys.view) for key in (*self._puts, *self._deletes))

    @property
    def changed(self) -> list[bytes]:
        """Objects that it changes."""
        return [uid for uid, (_, before, after) in self._documents.items() if before != after]

    # -- writing -------------------------------------------------------------------------------------------------

    def _put(self, key: str, value: bytes, lease: int = 0) -> None:
        self._deletes.discard(key)
        self._puts[key] = (value, lease)

    def _delete(self, key: str) -> None:
        self._puts.pop(key, None)
        self._deletes.add(key)

    def request(self, id_: str, transaction_lease: int) -> Json | None:
        """The compare-and-swap that writes it all; None where nothing was written."""
        self._finish_documents()
        if self._head != self._was.head:
            self._put(self._keys.group, encode(self._head))
        if not self._puts and not self._deletes:
            return None
        tx = f"{self._keys.tx}{id_}"
        if not self._was.registered and self.owner:
            raise OwnerLost
        registered = [] if not self.owner else [_exists(f"{self._keys.owners}{self.owner}")]
        put = {key: _put(key, value, lease) for key, (value, lease) in sorted(self._puts.items())}
        return {
            "compare": [is_at(tx, 0), *registered, *self._compares],
            "success": [
                *put.values(),
                *({"request_delete_range": {"key": b64(key)}} for key in sorted(self._deletes)),
                _put(tx, b"done", transaction_lease),
            ],
            "failure": [
                {"request_range": range_of(tx)},
                {"request_range": range_of(f"{self._keys.owners}{self.owner}")},
            ],
        }

    def _finish_documents(self) -> None:
        for uid, (modified, before, after) in self._documents.items():
            self._compares.append(is_at(self._keys.object(uid), modified))
            if before == after:
                continue
            self._index(before, after)
            if after.empty:
                self._delete(self._keys.object(uid))
            else:
                self._put(self._keys.object(uid), encode(replace(after, boot=self._boot)))

    def _index(self, before: Document, after: Document) -> None:
        keys = self._keys
        old, new = hindering(before), hindering(after)
        for member, change in old - new:
            self._delete(keys.owed(member, change, after.uid))
        for member, change in new - old:
            self._put(keys.owed(member, change, after.uid), b"")
        places = [
            (keys.place(record.locator) + record.uid.hex(), encode(record.fingerprint)) if record is not None else None
            for record in (before.record, after.record)
        ]
        if places[0] != places[1]:
            if places[0] is not None:
                self._delete(places[0][0])
            if places[1] is not None:
                self._put(*places[1])


def is_at(key: str, modified: int) -> Json:
    return {"key": b64(key), "target": "MOD", "result": "EQUAL", "mod_revision": str(modified)}


def _exists(key: str) -> Json:
    return {"key": b64(key), "target": "CREATE", "result": "GREATER", "create_revision": "0"}


def _put(key: str, value: bytes, lease: int = 0) -> Json:
    return {"request_put": {"key": b64(key), "value": b64(value), **({"lease": str(lease)} if lease else {})}}
