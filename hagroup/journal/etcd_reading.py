"""Reading an etcd journal: linearizable where the answer has to be the newest, else from the mirror.

Searches are answered from the mirror, which is at most as old as news takes (well under a second) and never older than
what this process itself wrote. Where no quorum answers, single objects are too: they go on serving (DESIGN.md 4.5).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from hagroup.core.records import (
    Changes,
    Client,
    Copy,
    Event,
    GroupRecord,
    Intent,
    LoginRecord,
    MemberRecord,
    ObjectRecord,
    ObjectState,
    Observation,
    OwedRow,
    PassedOver,
    Tombstone,
)
from hagroup.journal import rows
from hagroup.journal.etcd_client import PATIENCE, Pair, Unanswered, after_all, b64, pair, range_of
from hagroup.journal.etcd_keys import Document, KeptEvent, KeptLease, KeptLogin, KeptOwner, KeptPassed
from hagroup.journal.etcd_opened import EtcdOpened
from hagroup.journal.etcd_snapshot import group_record, only_listed, read_all, snapshot
from hagroup.journal.sealed import Sealed, Why

_decode = msgspec.msgpack.decode
_BATCH = 100
_BRIEFLY = 0.9
"""Seconds after which an object, or the view, is answered from the mirror: operations wait for that. Less than one
endpoint may take, so that only one is asked where all is swallowed."""


class EtcdReading(EtcdOpened):
    """The readers' part of :class:`EtcdJournal`."""

    def _catch_up(self) -> None:
        """What was committed before this call is in the mirror when it returns."""
        self._check_usable()
        answer = self._client.call("/kv/put", {"key": b64(self._keys.sync), "value": ""})
        revision = int(answer["header"]["revision"])
        if not self._mirror.wait_for(revision, patience=5.0):
            raise self._client.unavailable("its watch brings no news")

    def changes(self, since: int, epoch: str) -> Changes:
        self._check_usable()
        sealed = self._mirror.head.sealed
        if sealed is not None and sealed.why is Why.MOVED and not self._for_moving:
            raise sealed.refusal(self._client.url)
        return self._mirror.changes(since, epoch)

    def sealed(self) -> Sealed | None:
        return self._mirror.head.sealed

    # -- group ---------------------------------------------------------------------------------------------------

    def view(self) -> tuple[GroupRecord, list[MemberRecord]]:
        return self._shown(_BRIEFLY)

    def _shown(self, patience: float) -> tuple[GroupRecord, list[MemberRecord]]:
        self._check_usable()
        shown = self._mirror.revision  # before it is read: what comes after is told by ``changes``, twice if need be
        try:
            found = snapshot(self._client, self._keys, self.owner, patience=patience)
        except Unanswered:
            return group_record(self._mirror.head, shown, self._mirror.seal), self._mirror.members()
        return group_record(found.head, shown, found.seal), list(found.members)

    def group(self) -> GroupRecord:
        return self._shown(PATIENCE)[0]

    def members(self) -> list[MemberRecord]:
        return self._shown(PATIENCE)[1]

    def counts(self) -> dict[str, int]:
        self._catch_up()
        records = [one.record for one in self._mirror.documents() if one.record is not None]
        live = sum(record.state is ObjectState.LIVE for record in records)
        return {
            "live": live,
            "creating": len(records) - live,
            "tombstones": self._client.count(self._keys.stones),
            "intents": self._client.count(self._keys.intents),
            "owed": len(list(self._rows())),
        }

    # -- objects -------------------------------------------------------------------------------------------------

    def _document(self, uid: bytes) -> Document:
        self._check_usable()
        asked = range_of(self._keys.object(uid))
        try:
            found = self._client.call("/kv/range", asked, patience=_BRIEFLY).get("kvs", [])
        except Unanswered:
            return self._mirror.document(uid)
        if not found:
            return Document(uid=uid)
        document = _decode(pair(found[0]).value, type=Document)
        return only_listed(self._seen_here(document), self._mirror.head.members)

    def object(self, uid: bytes) -> ObjectRecord | None:
        return self._document(uid).record

    def placement(self, uid: bytes) -> tuple[dict[str, Copy], dict[str, OwedRow]]:
        found = self._document(uid)
        return found.copies, found.owed

    def object_with_placement(self, uid: bytes) -> tuple[ObjectRecord | None, dict[str, Copy], dict[str, OwedRow]]:
        found = self._document(uid)
        return found.record, found.copies, found.owed

    def search(self, attributes: Mapping[int, bytes]) -> list[ObjectRecord]:
        self._check_usable()
        records = (one.record for one in self._mirror.documents())
        return [record for record in records if record is not None and rows.matches(record, attributes)]

    def objects(self) -> Iterator[ObjectRecord]:
        self._catch_up()
        yield from [one.record for one in self._mirror.documents() if one.record is not None]

    def copies(self, member: str) -> Iterator[Copy]:
        self._catch_up()
        if member in self._mirror.head.members:
            yield from [one.copies[member] for one in self._mirror.documents() if member in one.copies]

    # -- what is owed, what is gone, what is under way -------------------------------------------------------------

    def _rows(self) -> Iterable[OwedRow]:
        listed = self._mirror.head.members
        for kept in self._mirror.documents():
            if kept.owed:
                yield from only_listed(self._seen_here(kept), listed).owed.values()

    def owed(
        self, member: str | None = None, *, doubtful: bool | None = None, limit: int | None = None
    ) -> list[OwedRow]:
        self._catch_up()
        found = [
            row
            for row in self._rows()
            if (member is None or row.member == member) and (doubtful is None or row.sent is doubtful)
        ]
        return sorted(found, key=lambda row: row.change)[:limit]

    def tombstone(self, uid: bytes) -> Tombstone | None:
        self._check_usable()
        found = self._client.get(self._keys.stone(uid))
        return None if found is None else _decode(found.value, type=Tombstone)

    def tombstones(self, *, since: int = 0) -> Iterator[Tombstone]:
        self._check_usable()
        start, end = f"{self._keys.gone}{since + 1:016x}/", after_all(self._keys.gone)
        while True:
            asked = range_of(start, end, limit=_BATCH, keys_only=True)
            listed = [pair(one).key for one in self._client.call("/kv/range", asked).get("kvs", [])]
            wanted = [range_of(self._keys.stone(bytes.fromhex(key.rpartition("/")[2]))) for key in listed]
            for found in read_all(self._client, wanted)[1] if wanted else []:
                yield _decode(found[0].value, type=Tombstone)
            if len(listed) < _BATCH:
                return
            start = listed[-1] + "\0"

    def intents(self) -> list[Intent]:
        self._check_usable()
        found = [_decode(one.value, type=Intent) for one in self._client.prefix(self._keys.intents)]
        return sorted(found, key=lambda intent: (intent.change, intent.id))

    # -- what was seen, tried and done -----------------------------------------------------------------------------

    def passed_over(self) -> list[PassedOver]:
        self._check_usable()
        found = {one.key.rpartition("/")[2]: one for one in self._client.prefix(self._keys.passed)}
        if not found:
            return []
        over = self._heard_of_again()
        kept = {owner: _decode(one.value, type=KeptPassed) for owner, one in found.items()}
        return [
            PassedOver(owner=owner, host=one.owner.host, process=one.owner.process, time=one.time, what=one.what)
            for owner, one in sorted(kept.items(), key=lambda item: item[1].time)
            if over.get(owner, 0) < one.revision and not self._has_ended(owner, one.owner)
        ]

    def _heard_of_again(self) -> dict[str, int]:
        """What each living client acknowledged, by every name that it had."""
        told = {one.key.rpartition("/")[2]: int(one.value) for one in self._client.prefix(self._keys.acks)}
        for one in self._client.prefix(self._keys.owners):
            owner = one.key.rpartition("/")[2]
            told |= dict.fromkeys(_decode(one.value, type=KeptOwner).former, told.get(owner, 0))
        return told

    def clients(self) -> list[Client]:
        self._check_usable()
        found = [
            Client(
                owner=one.key.rpartition("/")[2],
                host=kept.host,
                process=kept.process,
                since=kept.since,
                here=kept.boot == self._clock.boot_id(),
            )
            for one in self._client.prefix(self._keys.owners)
            for kept in [_decode(one.value, type=KeptOwner)]
        ]
        return sorted(found, key=lambda client: client.since)

    def observations(self, member: str | None = None) -> list[Observation]:
        self._check_usable()
        prefix = self._keys.seen if member is None else self._keys.observation(member, "")
        found = [_decode(one.value, type=Observation) for one in self._client.prefix(prefix)]
        return sorted(found, key=lambda seen: seen.boot_time)

    def lease_held(self, name: str) -> bool:
        self._check_usable()
        found = self._client.get(f"{self._keys.leases}{name}")
        if found is None:
            return False
        kept = _decode(found.value, type=KeptLease)
        here = kept.boot == self._clock.boot_id()
        return (not here or kept.expires > self._clock.boot()) and self.owner_alive(kept.owner)

    def logins(self) -> list[LoginRecord]:
        self._check_usable()
        found = [_decode(one.value, type=KeptLogin).record for one in self._client.prefix(self._keys.logins)]
        return sorted(found, key=lambda login: (login.member, login.source))

    def events(self, *, limit: int = 100, since: int = 0) -> list[Event]:
        self._check_usable()
        last = self._client.get(self._keys.last_event)
        first = max(since, (0 if last is None else int(last.value)) - limit) + 1
        events = []
        while last is not None:
            asked = range_of(self._keys.event(first), after_all(self._keys.events), limit=_BATCH)
            found = [pair(one) for one in self._client.call("/kv/range", asked).get("kvs", [])]
            events += [_event(one) for one in found]
            if len(found) < _BATCH:
                break
            first = events[-1].number + 1
        return events[-limit:]


def _event(found: Pair) -> Event:
    kept = _decode(found.value, type=KeptEvent)
    return Event(
        number=int(found.key.rpartition("/")[2], 16),
        time=kept.time,
        kind=kept.kind,
        member=kept.member,
        text=kept.text,
        data=kept.data,
    )
