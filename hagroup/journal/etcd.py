"""The journal of several hosts: an etcd cluster that many processes share."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from hagroup.config.model import JournalSection
from hagroup.core.clock import Clock
from hagroup.core.passed_over import PASSED_OVER, passed_over_data
from hagroup.core.records import (
    Lease,
    Locator,
    MemberRecord,
    ObjectRecord,
    OwedKind,
    OwedRow,
    Tombstone,
)
from hagroup.errors import JournalUnavailable
from hagroup.journal import rules
from hagroup.journal.api import Asking, Confirmation, Contents, Guarantees
from hagroup.journal.changing import Changing
from hagroup.journal.clearing import Clearing
from hagroup.journal.clock import SystemClock
from hagroup.journal.epoch import new_epoch
from hagroup.journal.etcd_client import EtcdClient, after_all, b64
from hagroup.journal.etcd_filling import Filler
from hagroup.journal.etcd_keys import Head, KeptOwner, KeptPassed, Keys, encode, part
from hagroup.journal.etcd_reading import EtcdReading
from hagroup.journal.membership import Members
from hagroup.journal.moving import Moving
from hagroup.journal.notes import Notes
from hagroup.journal.owing import Owing
from hagroup.journal.rotating import Rotating
from hagroup.journal.sealed import Sealed, Why
from hagroup.journal.transaction import one_transaction

T = TypeVar("T")

_OBJECTS = 12
"""Objects in one transaction: etcd takes 128 operations, and an object is up to five with three members."""


class EtcdJournal(Changing, Owing, Members, Notes, Clearing, Rotating, Moving, EtcdReading):
    """See :class:`hagroup.journal.api.Journal`. Any thread may use it.

    Where the contract says "one transaction" for many rows at once, rows of different objects may here be written by
    several, one after the other: each object's by one. What is raised in between leaves the earlier ones written, as if
    they had been asked for alone.
    """

    guarantees = Guarantees(durable=True, shared_by_processes=True, shared_by_hosts=True)

    @classmethod
    def create(
        cls,
        section: JournalSection,
        *,
        label: str,
        serial: str,
        members: Sequence[MemberRecord],
        domain_key_id: bytes,
        partition_key_id: bytes,
        reference: bytes,
        contents: Contents | None = None,
        command: str = "",
        clock: Clock | None = None,
    ) -> None:
        """Make the journal of a new group. It appears whole or not at all.

        :param contents: what it begins with where it takes the place of another. Then it is left sealed
            (:meth:`open_up`), and what an earlier attempt with the same ``contents.epoch`` left is done again.
        :param command: completes it, where this is interrupted.
        :raises JournalUnavailable: there is a journal of this name already, or etcd cannot be reached.
        """
        head = Head(
            label=label,
            serial=serial,
            epoch=new_epoch(None) if contents is None else contents.epoch or new_epoch(contents.epoch_before),
            membership_revision=1,
            domain_key_id=domain_key_id,
            partition_key_id=partition_key_id,
            reference=reference,
            members=tuple(member.name for member in members),
        )
        client = EtcdClient(section)
        keys = Keys(client.url.name)
        try:
            if contents is None:
                puts = {keys.group: encode(head)}
                for member in members:
                    puts[f"{keys.members}{part(member.name)}"] = encode(member)
                    puts[f"{keys.announced}{part(member.name)}"] = b""
                cls._begin(client, keys, puts)
                return
            sealed = Sealed(Why.MAKING, command, head.epoch)
            head = replace(head, sealed=sealed, cleared=contents.cleared, rotation=contents.rotation)
            there = client.get(keys.group)
            if there is None or msgspec.msgpack.decode(there.value, type=Head).sealed != sealed:
                cls._begin(client, keys, {keys.group: encode(head)})
            else:
                client.call("/kv/put", {"key": b64(keys.group), "value": b64(encode(head))})
            Filler(client, keys).fill(members, contents, boot=(clock or SystemClock()).boot_id())
        finally:
            client.close()

    @classmethod
    def exists(cls, section: JournalSection) -> bool:
        """Whether there is anything below its name.

        :raises JournalUnavailable: etcd cannot be reached.
        """
        client = EtcdClient(section)
        try:
            return client.count(Keys(client.url.name).root) > 0
        finally:
            client.close()

    @staticmethod
    def _begin(client: EtcdClient, keys: Keys, puts: dict[str, bytes]) -> None:
        """Where there is nothing yet."""
        mark = secrets.token_hex(8)
        puts[f"{keys.root}x/made"] = mark.encode()
        nothing = {"key": b64(keys.root), "range_end": b64(after_all(keys.root)), "target": "CREATE"}
        answer = client.call(
            "/kv/txn",
            {
                "compare": [{**nothing, "result": "EQUAL", "create_revision": "0"}],
                "success": [{"request_put": {"key": b64(key), "value": b64(value)}} for key, value in puts.items()],
            },
        )
        if answer.get("succeeded"):
            return
        made = client.get(f"{keys.root}x/made")  # the first answer may have been lost
        if made is None or made.value != mark.encode():
            raise JournalUnavailable(
                f"there is a journal {client.url} already: it was left as it is; choose another name in [journal] url"
            )

    @classmethod
    def set_aside(cls, section: JournalSection, command: str, epoch: str) -> tuple[str, str] | None:
        """Make way for another: a copy is kept under another name, and what is there is sealed until ``create`` with
        the epoch that is returned has put the other in its place. May be done twice.

        :return: where the copy is, and the epoch; None: there is nothing.
        """
        client = EtcdClient(section)
        keys = Keys(client.url.name)
        try:
            there = client.get(keys.group)
            if there is None:
                return None
            head = msgspec.msgpack.decode(there.value, type=Head)
            if head.sealed is None or head.sealed.why is not Why.MAKING:
                head = replace(head, sealed=Sealed(Why.MAKING, command, epoch))
                client.call("/kv/put", {"key": b64(keys.group), "value": b64(encode(head))})
            assert head.sealed is not None
            aside = replace(client.url, name=f"{client.url.name}.replaced-{head.sealed.epoch}")
            others = Keys(aside.name)
            if client.get(f"{others.root}x/aside") is None:
                kept = ((others.root + one.key.removeprefix(keys.root), one.value) for one in client.pages(keys.root))
                Filler(client, keys).put(kept)
                client.call("/kv/put", {"key": b64(f"{others.root}x/aside"), "value": ""})
            return str(aside), head.sealed.epoch
        finally:
            client.close()

    @classmethod
    def open_former(cls, section: JournalSection, *, clock: Clock | None = None) -> EtcdJournal:
        """What is there, for reading; or what was, where it was set aside and the other is not in its place yet."""
        journal = cls.open(section, clock=clock, read_only=True, for_moving=True)
        sealed = journal._mirror.head.sealed
        if sealed is None or sealed.why is not Why.MAKING:
            return journal
        aside = replace(journal._client.url, name=f"{journal._client.url.name}.replaced-{sealed.epoch}")
        if journal._client.get(f"{Keys(aside.name).root}x/aside") is None:
            return journal
        journal.close()
        return cls.open(replace(section, url=aside), clock=clock, read_only=True, for_moving=True)

    @classmethod
    def open(
        cls, section: JournalSection, *, clock: Clock | None = None, read_only: bool = False, for_moving: bool = False
    ) -> EtcdJournal:
        """Open it, and register this process as an owner.

        :param read_only: for looking only: no registration, every change is refused.
        :param for_moving: by the one who moves it: although it is sealed.
        :raises JournalUnavailable: there is none, or no quorum answers; or it is being moved, or is not complete.
        :raises JournalMismatch: it was moved elsewhere.
        """
        journal = cls(section, clock or SystemClock(), read_only=read_only, for_moving=for_moving)
        journal._start()
        return journal

    @classmethod
    def delete(cls, section: JournalSection) -> None:
        """Everything below its name, for good."""
        client = EtcdClient(section)
        try:
            root = Keys(client.url.name).root
            client.call("/kv/deleterange", {"key": b64(root), "range_end": b64(after_all(root))})
        finally:
            client.close()

    # -- what all who serve have to have seen ----------------------------------------------------------------------

    def destroy(
        self, uid: bytes, *, asking: Sequence[Asking], membership_revision: int
    ) -> tuple[Tombstone, list[OwedRow]]:
        done = super().destroy(uid, asking=asking, membership_revision=membership_revision)
        self._wait_for_all(f"the destruction of {uid.hex()}")
        return done

    def commit_set(self, intent: str) -> ObjectRecord:
        done = super().commit_set(intent)
        self._wait_for_all(f"the change of {done.uid.hex()}")
        return done

    def _wait_for_all(self, what: str) -> None:
        revision = self._local.revision
        clients = self._everybody_saw(revision) if revision else {}
        if clients:
            with contextlib.suppress(JournalUnavailable):  # what was asked for is done: it must not look refused
                self._note_passed_over(clients, what, revision)
                self._forget_who_is_back()

    @one_transaction
    def _note_passed_over(self, clients: Mapping[str, KeptOwner], what: str, revision: int) -> None:
        named = ", ".join(f"process {one.process} of host {one.host}" for one in clients.values())
        text = f"{named} did not acknowledge {what}: cut off, or frozen"
        with self._write() as t:
            t.add_event(PASSED_OVER, text, None, passed_over_data({name: one.host for name, one in clients.items()}))
            for name, one in clients.items():
                t.pass_over(name, KeptPassed(one, revision, t.wall, what))

    def _forget_who_is_back(self) -> None:
        """Whoever came back before it was noted did not find what it would have taken out."""
        listed = {one.owner for one in self.passed_over()}
        noted = {one.key.rpartition("/")[2] for one in self._client.prefix(self._keys.passed)}
        self.forget_passed_over(noted - listed)

    def forget_passed_over(self, owners: Collection[str]) -> None:
        for owner in owners:
            self._client.call("/kv/deleterange", {"key": b64(f"{self._keys.passed}{owner}")})

    def begin_move(self, to: str, *, at_once: bool = False) -> Sealed | None:
        if not at_once and any(one.doubt_since is None for row in self.owed() for one in row.attempts):
            return None
        return super().begin_move(to, at_once=at_once)

    # -- many rows -----------------------------------------------------------------------------------------------

    def claim(
        self,
        rows: Sequence[tuple[str, bytes]],
        *,
        worker: str | None,
        membership_revision: int,
        lease: Lease | None = None,
        locators: Sequence[Locator] = (),
    ) -> list[OwedRow]:
        claimed: list[OwedRow] = []
        for some in _some(rows, [uid for _, uid in rows]):
            claimed += super().claim(
                some, worker=worker, membership_revision=membership_revision, lease=lease, locators=locators
            )
        return claimed

    def confirm(
        self, confirmations: Sequence[Confirmation], *, membership_revision: int, lease: Lease | None = None
    ) -> list[bool]:
        answers: list[bool] = []
        for some in _some(confirmations, [said.uid for said in confirmations]):
            answers += super().confirm(some, membership_revision=membership_revision, lease=lease)
        return answers

    def give_up(
        self,
        rows: Sequence[tuple[str, bytes]],
        *,
        doubt: bool,
        reason: str | None = None,
        kind: OwedKind | None = None,
    ) -> None:
        for some in _some(rows, [uid for _, uid in rows]):
            super().give_up(some, doubt=doubt, reason=reason, kind=kind)

    def owe(self, rows: Sequence[tuple[str, bytes, OwedKind]], *, reason: str | None = None) -> None:
        for some in _some(rows, [uid for _, uid, _ in rows]):
            super().owe(some, reason=reason)

    def clear_some(self, limit: int = _OBJECTS) -> list[bytes]:
        return super().clear_some(min(limit, _OBJECTS))

    def rewrap(self, envelopes: Sequence[tuple[bytes, int, bytes, bytes]]) -> list[bool]:
        done: list[bool] = []
        for some in _some(envelopes, [one[0] for one in envelopes]):
            done += super().rewrap(some)
        return done

    # -- members -------------------------------------------------------------------------------------------------

    @one_transaction
    def barrier(self) -> int:
        """Every transaction that has a change number up to it was committed before, or never will be."""
        with self._write() as t:
            t.write_group()
        return int(self._local.revision)

    def admit(
        self, name: str, *, barrier: int, low: int, lease: Lease | None, membership_revision: int
    ) -> list[OwedRow]:
        if name in self._mirror.head.filling:
            self._fill(name)
        return super().admit(name, barrier=barrier, low=low, lease=lease, membership_revision=membership_revision)

    def add_member(self, member: MemberRecord) -> int:
        self._purge(member.name)
        revision = super().add_member(member)
        self._fill(member.name)
        return revision

    def remove_member(self, name: str) -> int:
        revision = super().remove_member(name)
        self._purge(name)
        return revision

    def _fill(self, name: str) -> None:
        """An owed ``install`` for every object that was there before the member was listed. May be done twice."""
        self._catch_up()
        lacking = [
            one.uid
            for one in self._mirror.documents()
            if one.record is not None and name not in one.owed and name not in one.copies
        ]
        for some in _some(lacking, lacking):
            self._fill_some(name, some)
        self._filled(name)

    @one_transaction
    def _fill_some(self, name: str, uids: Sequence[bytes]) -> None:
        with self._write() as t:
            if t.member(name) is None:
                return
            t.prefetch(uids)
            for uid in uids:
                record = t.object(uid)
                if record is None or t.owed(name, uid) is not None or t.copy(name, uid) is not None:
                    continue
                locators = (record.locator,)
                row = rules.new_row(name, uid, OwedKind.INSTALL, t.change, revision=record.revision, locators=locators)
                t.put_owed(None, row)

    @one_transaction
    def _filled(self, name: str) -> None:
        with self._write() as t:
            t.filled(name)

    def _purge(self, name: str) -> None:
        """What is left in documents of a member that was removed: nobody sees it, until one of its name comes."""
        self._catch_up()
        if name in self._mirror.head.members:
            return
        left = [one.uid for one in self._mirror.documents() if name in one.owed or name in one.copies]
        for some in _some(left, left):
            self._purge_some(name, some)

    @one_transaction
    def _purge_some(self, name: str, uids: Sequence[bytes]) -> None:
        with self._write() as t:
            t.prefetch(uids)
            for uid in uids:
                t.purge(name, uid)


def _some(items: Sequence[T], uids: Collection[bytes]) -> Iterator[list[T]]:
    """In order, each with at most so many objects."""
    batch: list[T] = []
    seen: set[bytes] = set()
    for item, uid in zip(items, uids, strict=True):
        if uid not in seen and len(seen) == _OBJECTS:
            yield batch
            batch, seen = [], set()
        batch.append(item)
        seen.add(uid)
    if batch:
        yield batch
