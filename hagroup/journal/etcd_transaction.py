"""The journal's rows in etcd: what :class:`hagroup.journal.transaction.Transaction` asks of them.

**The change number** is the revision that was read plus one: no counter is shared (133/s against 503/s). Two
transactions may have the same; what must hold is that none commits with a number up to a barrier after that barrier was
taken, and it holds because a barrier writes ``v/group``, which every transaction compares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

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
from hagroup.journal.epoch import new_epoch
from hagroup.journal.etcd_client import after_all, b64, range_of
from hagroup.journal.etcd_keys import (
    ClosedIntent,
    KeptEvent,
    KeptLease,
    KeptLogin,
    KeptPassed,
    encode,
    part,
)
from hagroup.journal.etcd_snapshot import group_record
from hagroup.journal.etcd_swap import Conflict, Swap, is_at
from hagroup.journal.sealed import Sealed
from hagroup.journal.transaction import Trying

decode = msgspec.msgpack.decode
_AT_ONCE = 30
"""Documents that one transaction reads: two operations each, of 128."""


class EtcdTransaction(Swap):
    """See :class:`hagroup.journal.transaction.Transaction`."""

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
        self._compares.append(is_at(key, self._was.modified.get(key, 0)))
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

    def pass_over(self, owner: str, kept: KeptPassed) -> None:
        before = self._get(f"{self._keys.passed}{owner}")
        if before is not None:
            first = decode(before, type=KeptPassed)
            kept = replace(kept, time=first.time, what=first.what)
        self._put(f"{self._keys.passed}{owner}", encode(kept))

    def put_seal(self, seal: Seal) -> None:
        self._compares.append(is_at(self._keys.seal, self._was.seal_modified))
        self._put(self._keys.seal, encode(seal))
