"""One transaction over etcd: everything read is of one revision, everything written is one compare-and-swap.

Optimistic: nothing is locked. The commit compares that what was read is still so; if not, the method that runs the
transaction is run again from its beginning (:class:`Conflict`). So a rule decides on rows of one instant, and what it
decided takes effect only while that is still how things are.

**The change number** is the revision that was read plus one: no counter is shared (133/s against 503/s). Two
transactions may have the same; what must hold is that none commits with a number up to a barrier after that barrier was
taken, and it holds because a barrier writes ``v/group``, which every transaction compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from hagroup.core.records import (
    Copy,
    Fingerprint,
    GroupRecord,
    Intent,
    Lease,
    Locator,
    LoginRecord,
    MemberRecord,
    ObjectRecord,
    ObjectState,
    Observation,
    OwedRow,
    Rotation,
    Seal,
    Tombstone,
)
from hagroup.errors import JournalUnavailable
from hagroup.journal import rules
from hagroup.journal.epoch import new_epoch
from hagroup.journal.etcd_client import PATIENCE, EtcdClient, Json, Pair, after_all, b64, pair, range_of
from hagroup.journal.etcd_keys import (
    ClosedIntent,
    Document,
    Head,
    KeptEvent,
    KeptLease,
    KeptLogin,
    Keys,
    encode,
    part,
)
from hagroup.journal.sealed import Sealed
from hagroup.journal.transaction import Transaction, Trying

decode = msgspec.msgpack.decode


class Conflict(Exception):
    """What was read changed before it could be committed. Nothing was written: again from the beginning."""


class OwnerLost(Exception):
    """This process's lease ran out (it was frozen or cut off): to others it is dead. Nothing was written."""


class Snapshot(msgspec.Struct, frozen=True):
    """The group as of one revision."""

    revision: int
    head: Head
    head_modified: int
    members: tuple[MemberRecord, ...]
    registered: bool
    modified: dict[str, int]
    """Of the members' keys."""
    seal: Seal | None
    seal_modified: int
    """0: there is none."""


def snapshot(client: EtcdClient, keys: Keys, owner: str, *, patience: float = PATIENCE) -> Snapshot:
    asked = [
        range_of(keys.group),
        range_of(keys.members, after_all(keys.members)),
        range_of(keys.announced, after_all(keys.announced), keys_only=True),
        range_of(f"{keys.owners}{owner}", keys_only=True),
        range_of(keys.seal),
    ]
    revision, found = read_all(client, asked, patience=patience)
    if not found[0]:
        raise JournalUnavailable(
            f"the journal {client.url} does not exist: run `ha-admin group create`, or correct [journal] url"
        )
    head = decode(found[0][0].value, type=Head)
    members = member_records(keys, head, found[1], found[2])
    modified = {one.key: one.modified for one in found[1]}
    return Snapshot(
        revision=revision,
        head=head,
        head_modified=found[0][0].modified,
        members=members,
        registered=bool(found[3]),
        modified=modified,
        seal=decode(found[4][0].value, type=Seal) if found[4] else None,
        seal_modified=found[4][0].modified if found[4] else 0,
    )


def member_records(keys: Keys, head: Head, kept: Iterable[Pair], announced: Iterable[Pair]) -> tuple[MemberRecord, ...]:
    """In the order of the list; ``announced`` is the revision of a key, so that nobody has to compare it."""
    by_key = {one.key: decode(one.value, type=MemberRecord) for one in kept}
    moved = {one.key: one.modified for one in announced}
    return tuple(
        replace(by_key[f"{keys.members}{part(name)}"], announced=moved.get(f"{keys.announced}{part(name)}", 0))
        for name in head.members
    )


def group_record(head: Head, change: int, seal: Seal | None) -> GroupRecord:
    return GroupRecord(
        seal=seal,
        label=head.label,
        serial=head.serial,
        epoch=head.epoch,
        membership_revision=head.membership_revision,
        change=change,
        domain_key_id=head.domain_key_id,
        partition_key_id=head.partition_key_id,
        reference=head.reference,
        cleared=head.cleared,
        rotation=head.rotation,
    )


def read_all(client: EtcdClient, asked: Sequence[Json], *, patience: float = PATIENCE) -> tuple[int, list[list[Pair]]]:
    """Several ranges in one request, as of one revision."""
    answer = client.call("/kv/txn", {"success": [{"request_range": one} for one in asked]}, patience=patience)
    found = [
        [pair(one) for one in response.get("response_range", {}).get("kvs", [])]
        for response in answer.get("responses", [])
    ]
    return int(answer["header"]["revision"]), found


class EtcdTransaction(Transaction):
    """See :class:`hagroup.journal.transaction.Transaction`."""

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
        self._compares: list[Json] = [_is_at(keys.group, self._was.head_modified)]
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
            self._compares.append(_is_at(key, self._read[key][0]))
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
            "compare": [_is_at(tx, 0), *registered, *self._compares],
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
            self._compares.append(_is_at(self._keys.object(uid), modified))
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

    # -- numbers -------------------------------------------------------------------------------------------------

    @property
    def change(self) -> int:
        return self._was.revision + 1

    @property
    def membership_revision(self) -> int:
        return self._head.membership_revision

    @property
    def sealed(self) -> Sealed | None:
        return self._head.sealed

    def seal(self, sealed: Sealed | None) -> None:
        self._head = replace(self._head, sealed=sealed)
        self.touch_all()

    def under_way(self) -> bool:
        """(Of the rows, see :meth:`EtcdJournal.begin_move`.)"""
        return bool(self._scan(self._keys.intents))

    def write_group(self) -> None:
        """Everybody who read it before has to begin again: a barrier."""
        self._put(self._keys.group, encode(self._head))

    def touch(self, uid: bytes) -> None:
        self._document(uid)

    def touch_members(self) -> None:
        pass  # their keys are watched

    def touch_all(self) -> None:
        self._put(self._keys.all, b"")

    def notice(self) -> None:
        self._put(self._keys.notice, b"")

    # -- objects, copies -----------------------------------------------------------------------------------------

    def object(self, uid: bytes) -> ObjectRecord | None:
        return self._document(uid).record

    def insert_objects(self, records: Sequence[ObjectRecord]) -> None:
        self.prefetch([record.uid for record in records])
        for record in records:
            self._change_document(record.uid, record=record, created=(self.change, self._created))
            self._created += 1

    def some_objects(self, limit: int) -> list[bytes]:
        places = self._keys.places
        [found] = self._ranges(range_of(places, after_all(places), limit=limit, keys_only=True))
        uids = [bytes.fromhex(one.key.rpartition("/")[2]) for one in found]
        self.prefetch(uids)
        return uids

    def update_object(self, record: ObjectRecord) -> None:
        self._document(record.uid)
        self._change_document(record.uid, record=record)

    def set_live(self, uid: bytes) -> None:
        record = self._document(uid).record
        assert record is not None
        self._change_document(uid, record=replace(record, state=ObjectState.LIVE, intent=None, change=self.change))

    def _in_place(self, locator: Locator) -> dict[bytes, Fingerprint]:
        found = self._scan(self._keys.place(locator))
        return {bytes.fromhex(one.key.rpartition("/")[2]): decode(one.value, type=Fingerprint) for one in found}

    def others_in_place(self, record: ObjectRecord) -> Iterable[ObjectRecord]:
        uids = [uid for uid in self._in_place(record.locator) if uid != record.uid]
        self.prefetch(uids)
        found = (self._document(uid).record for uid in uids)
        return [other for other in found if other is not None]

    def has_twin(self, record: ObjectRecord) -> bool:
        return record.fingerprint in self._in_place(record.locator).values()

    def copies(self, uid: bytes) -> dict[str, Copy]:
        return dict(self._document(uid).copies)

    def put_copy(self, copy: Copy) -> None:
        self._change_document(copy.uid, copies={**self.copies(copy.uid), copy.member: copy})

    def drop_copy(self, member: str, uid: bytes) -> None:
        self._change_document(uid, copies={name: one for name, one in self.copies(uid).items() if name != member})

    def tombstone(self, uid: bytes) -> Tombstone | None:
        self._document(uid)
        return self._stones[uid]

    def entomb(self, record: ObjectRecord, stone: Tombstone) -> None:
        self._stones[record.uid] = stone
        self._change_document(record.uid, record=None)
        self._put(self._keys.stone(record.uid), encode(stone))
        self._put(f"{self._keys.gone}{stone.change:016x}/{record.uid.hex()}", b"")

    # -- owed rows -----------------------------------------------------------------------------------------------

    def owed_of(self, uid: bytes) -> dict[str, OwedRow]:
        return dict(self._document(uid).owed)

    def insert_owed(self, new: Sequence[OwedRow]) -> None:
        for row in new:
            self.put_owed(None, row)

    def put_owed(self, before: OwedRow | None, after: OwedRow | None) -> None:
        row = after or before
        if before == after or row is None:
            return
        owed = self.owed_of(row.uid)
        owed.pop(row.member, None)
        if after is not None:
            owed[row.member] = after
        self._change_document(row.uid, owed=owed)

    def hinders(self, member: str, barrier: int, limit: int) -> list[OwedRow]:
        start, end = self._keys.owed(member, 0), self._keys.owed(member, barrier + 1)
        [found] = self._ranges(range_of(start, end, limit=min(limit, _AT_ONCE), keys_only=True))
        if not found:
            self._compares.append(
                {"key": b64(start), "range_end": b64(end), "target": "CREATE", "create_revision": "0"}
            )
            if member in self._head.filling:
                raise Conflict(f"the rows of {member} are still being written")
            return []
        uids = [bytes.fromhex(one.key.rpartition("/")[2]) for one in found]
        self.prefetch(uids)
        return [self.owed_of(uid)[member] for uid in uids if member in self.owed_of(uid)]

    # -- intents, members, group ---------------------------------------------------------------------------------

    def intent(self, id_: str | None) -> tuple[Intent, str | None] | None:
        if id_ is None:
            return None
        opened = self._get(f"{self._keys.intents}{id_}")
        if opened is not None:
            return decode(opened, type=Intent), None
        closed = self._get(f"{self._keys.closed}{id_}")
        if closed is None:
            return None
        kept = decode(closed, type=ClosedIntent)
        return kept.intent, kept.outcome

    def add_intent(self, intent: Intent) -> None:
        self._put(f"{self._keys.intents}{intent.id}", encode(intent))

    def close_intent(self, intent: Intent, outcome: str) -> None:
        kept = replace(intent, new_envelope=None, new_attributes=None)
        self._delete(f"{self._keys.intents}{intent.id}")
        self._put(f"{self._keys.closed}{intent.id}", encode(ClosedIntent(kept, outcome)), self._history())

    def adopt(self, intent: Intent) -> None:
        self._put(f"{self._keys.intents}{intent.id}", encode(replace(intent, owner=self.owner)))

    def members(self) -> list[MemberRecord]:
        return list(self._members.values())

    def insert_member(self, member: MemberRecord) -> None:
        self._members[member.name] = member
        self._head = replace(self._head, members=(*self._head.members, member.name))
        self._put(f"{self._keys.members}{part(member.name)}", encode(member))
        self.announce([member.name])

    def put_member(self, member: MemberRecord) -> None:
        key = f"{self._keys.members}{part(member.name)}"
        self._compares.append(_is_at(key, self._was.modified.get(key, 0)))
        self._members[member.name] = member
        self._put(key, encode(member))

    def drop_member(self, name: str) -> None:
        keys = self._keys
        self._members.pop(name)
        self._head = replace(
            self._head,
            members=tuple(one for one in self._head.members if one != name),
            filling=tuple(one for one in self._head.filling if one != name),
        )
        self._delete(f"{keys.members}{part(name)}")
        self._delete(f"{keys.announced}{part(name)}")
        for login, _ in self.logins():
            if login.member == name:
                self.drop_login(name, login.source)
        for one in self._scan(f"{keys.seen}{part(name)}/"):
            self._delete(one.key)

    def owe_everything(self, member: str) -> None:
        """Too many for one transaction: they are written after it, before the member can be admitted."""
        self._head = replace(self._head, filling=(*self._head.filling, member))

    def purge(self, member: str, uid: bytes) -> None:
        """What is left of a member that is not listed. (As read it is hidden already: writing it is enough.)"""
        self._document(uid)
        if member not in self._members:
            modified, before, after = self._documents[uid]
            before = replace(before, boot="")
            self._documents[uid] = (modified, before, replace(after, boot=self._boot))

    def filled(self, member: str) -> None:
        self._head = replace(self._head, filling=tuple(one for one in self._head.filling if one != member))

    def announce(self, names: Iterable[str]) -> None:
        for name in names:
            self._put(f"{self._keys.announced}{part(name)}", b"")

    def move_membership(self) -> int:
        self._head = replace(self._head, membership_revision=self._head.membership_revision + 1)
        return self._head.membership_revision

    def group(self) -> GroupRecord:
        return group_record(self._head, self._was.revision, self._was.seal)

    def update_identity(self, **values: str | bytes | Rotation) -> None:
        self._head = replace(self._head, **values)

    def begin_epoch(self) -> str:
        self._head = replace(self._head, epoch=new_epoch(self._head.epoch))
        return self._head.epoch

    # -- leases, observations, logins, events --------------------------------------------------------------------

    def lease(self, name: str) -> tuple[str | None, int, float] | None:
        found = self._get(f"{self._keys.leases}{name}")
        if found is None:
            return None, self._was.revision, 0.0  # whatever token there was, it was no higher
        kept = decode(found, type=KeptLease)
        # Another host's boot time means nothing here: its lease ends when etcd takes it away.
        return kept.owner, kept.token, kept.expires if kept.boot == self._boot else math.inf

    def put_lease(self, lease: Lease) -> None:
        kept = KeptLease(lease.owner, lease.token, lease.expires, self._boot)
        granted = self._client.grant(max(2, math.ceil(lease.expires - self.now)))
        self._put(f"{self._keys.leases}{lease.name}", encode(kept), granted)

    def free_lease(self, name: str) -> None:
        self._delete(f"{self._keys.leases}{name}")

    def observation(self, member: str, observer: str) -> Observation | None:
        found = self._get(self._keys.observation(member, observer))
        return None if found is None else decode(found, type=Observation)

    def put_observation(self, seen: Observation) -> None:
        self._put(self._keys.observation(seen.member, seen.observer), encode(seen), self._owner_lease)

    def logins(self) -> list[Trying]:
        if self._logins is None:
            kept = (decode(one.value, type=KeptLogin) for one in self._scan(self._keys.logins))
            self._logins = {(one.record.member, one.record.source): (one.record, one.before) for one in kept}
        return list(self._logins.values())

    def put_login(self, record: LoginRecord, before: LoginRecord | None = None) -> None:
        self.logins()
        assert self._logins is not None
        self._logins[record.member, record.source] = (record, before)
        self._put(self._keys.login(record.member, record.source), encode(KeptLogin(record, before)))

    def drop_login(self, member: str, source: str) -> None:
        self.logins()
        assert self._logins is not None
        self._logins.pop((member, source), None)
        self._delete(self._keys.login(member, source))

    def add_event(self, kind: str, text: str, member: str | None, data: dict[str, str]) -> None:
        # Numbered without a gap, so that one that is missing shows; only events wait for each other here.
        last = self._get(self._keys.last_event)
        number = 1 + (0 if last is None else int(last))
        self._put(self._keys.last_event, str(number).encode())
        self._put(self._keys.event(number), encode(KeptEvent(self.wall, kind, member, text, data)))

    def put_seal(self, seal: Seal) -> None:
        self._compares.append(_is_at(self._keys.seal, self._was.seal_modified))
        self._put(self._keys.seal, encode(seal))


_AT_ONCE = 30
"""Documents that one transaction reads: two operations each, of 128."""


def only_listed(document: Document, members: Iterable[str]) -> Document:
    """Without what is left of a member that was removed; with the record's own locator in each row."""
    listed = set(members)
    record = document.record
    present: tuple[Locator, ...] = () if record is None else (record.locator,)
    return replace(
        document,
        copies={name: copy for name, copy in document.copies.items() if name in listed},
        owed={
            name: replace(row, locators=rules.merged(row.locators, present))
            for name, row in document.owed.items()
            if name in listed
        },
    )


def hindering(document: Document) -> set[tuple[str, int]]:
    """Rows that keep their member from being admitted."""
    return {(row.member, row.change) for row in document.owed.values() if not row.attempts and row.reason is None}


def _is_at(key: str, modified: int) -> Json:
    return {"key": b64(key), "target": "MOD", "result": "EQUAL", "mod_revision": str(modified)}


def _exists(key: str) -> Json:
    return {"key": b64(key), "target": "CREATE", "result": "GREATER", "create_revision": "0"}


def _put(key: str, value: bytes, lease: int = 0) -> Json:
    return {"request_put": {"key": b64(key), "value": b64(value), **({"lease": str(lease)} if lease else {})}}
