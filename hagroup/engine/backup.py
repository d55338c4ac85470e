"""The group's objects in one file: records with their envelopes, and tombstones, sealed under the partition key.

Keys are in it as they travel: wrapped under the domain key. So it opens only inside a member that has both secrets.
Restoring never resurrects what was destroyed, unless the destroyed object is named; and it leaves alone what is there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator

import msgspec

from hagroup.config.logging import get_logger
from hagroup.core.attributes import CKA, pack_ulong
from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.core.records import Locator, ObjectRecord, ObjectState, Tombstone
from hagroup.engine import about, replica
from hagroup.engine.about import label_of
from hagroup.engine.domain import open_data, reseal, seal_data
from hagroup.engine.group import GroupEngine
from hagroup.engine.member import Life
from hagroup.engine.membership import sponsor
from hagroup.engine.one_step import one_step
from hagroup.engine.token_contents import InventoryEntry
from hagroup.engine.verify import strangers
from hagroup.errors import ConfigurationError, DomainMismatch, HAError

log = get_logger(__name__)

MAGIC = b"hagroup backup 1\n"


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What the file tells without a member; it is authenticated with the rest."""

    group: str
    label: str
    epoch: str
    domain_key_id: bytes
    partition_key_id: bytes
    created: float
    """Wall clock, for people."""
    objects: int
    tombstones: int
    selection: list[str]
    """Labels; empty: all objects."""


class _Content(msgspec.Struct, frozen=True, array_like=True):
    records: list[ObjectRecord]
    tombstones: list[Tombstone]


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one object of the file; fields are added, never renamed."""

    uid: str
    """In the file."""
    label: str
    outcome: str
    """``restored``, ``resurrected``, ``there already``, ``destroyed`` (and so left out) or ``refused``."""
    text: str


# -- creating ----------------------------------------------------------------------------------------------------------


def create(group: GroupEngine, labels: Collection[str]) -> tuple[Header, bytes]:
    """The file's content.

    :param labels: of the objects that go into it; none: all.
    :raises ConfigurationError: a label is no object's.
    """
    records = [
        record
        for record in group.journal.objects()
        if record.state is ObjectState.LIVE and (not labels or label_of(record) in labels)
    ]
    unknown = sorted(set(labels) - {label_of(record) for record in records})
    if unknown:
        raise ConfigurationError(f"the group has no object labelled {unknown[0]!r}; no file was written")
    tombstones = list(group.journal.tombstones())
    _, life, keys = sponsor(group)
    header = Header(
        group=group.serial,
        label=group.label,
        epoch=group.view.group.epoch,
        domain_key_id=keys.domain_key_id,
        partition_key_id=keys.partition_key_id,
        created=group.clock.wall(),
        objects=len(records),
        tombstones=len(tombstones),
        selection=sorted(labels),
    )
    head = msgspec.msgpack.encode(header)
    content = msgspec.msgpack.encode(_Content(records, tombstones))
    sealed = seal_data(life.connection, keys, _purpose(head), content, timeout=group.config.timeouts.generate)
    group.journal.event("backup created", f"{len(records)} objects, {len(tombstones)} tombstones")
    return header, MAGIC + msgspec.msgpack.encode([head, sealed])


def _purpose(head: bytes) -> bytes:
    return b"backup:" + hashlib.sha256(head).digest()


# -- restoring ---------------------------------------------------------------------------------------------------------


def read_header(data: bytes) -> tuple[Header, bytes, bytes]:
    """The header, its bytes and what is sealed; nothing of it is proved yet.

    :raises ConfigurationError: this is no backup.
    """
    try:
        if not data.startswith(MAGIC):
            raise msgspec.DecodeError
        head, sealed = msgspec.msgpack.decode(data[len(MAGIC) :], type=tuple[bytes, bytes])
        return msgspec.msgpack.decode(head, type=Header), head, sealed
    except msgspec.DecodeError:
        raise ConfigurationError("this file is no backup by hagroup, or it is damaged") from None


def open_backup(group: GroupEngine, data: bytes) -> tuple[Header, list[ObjectRecord], list[Tombstone]]:
    """:raises DomainMismatch: made under other keys. :raises IntegrityAlarm: somebody changed it."""
    header, head, sealed = read_header(data)
    _, life, keys = sponsor(group)
    for what, theirs, ours in (
        ("partition secret", header.partition_key_id, keys.partition_key_id),
        ("domain key", header.domain_key_id, keys.domain_key_id),
    ):
        if theirs != ours:
            raise DomainMismatch(
                f"the backup of group {header.label} ({header.group}) was made under another {what}; nothing was "
                "restored"
            )
    content = open_data(life.connection, keys, _purpose(head), sealed, timeout=group.config.timeouts.generate)
    found = msgspec.msgpack.decode(content, type=_Content)
    return header, found.records, found.tombstones


def restore(
    group: GroupEngine,
    data: bytes,
    *,
    labels: Collection[str],
    resurrect: Collection[bytes],
    dry_run: bool,
    told: Callable[[Restored], None],
) -> None:
    """Bring back what is not there. Interrupted, the same call completes it.

    :param resurrect: UIDs of destroyed objects that are to come back, as new objects.
    :raises ConfigurationError: a UID or label that is not in the file.
    """
    _, records, _ = open_backup(group, data)
    unknown = set(resurrect) - {record.uid for record in records}
    if unknown:
        raise ConfigurationError(f"the backup has no object with UID {min(unknown).hex()}; nothing was restored")
    missing = sorted(set(labels) - {label_of(record) for record in records})
    if missing:
        raise ConfigurationError(f"the backup has no object labelled {missing[0]!r}; nothing was restored")
    chosen = [record for record in records if not labels or label_of(record) in labels]
    run = _Restore(group, set(resurrect), dry_run=dry_run)
    for record in chosen:
        told(run.one(record))
    if not dry_run:
        text = f"{run.made} of {len(chosen)} objects were not there"
        group.journal.event("backup restored", text, data=about.objects(run.labels))


class _Restore:
    def __init__(self, group: GroupEngine, resurrect: set[bytes], *, dry_run: bool) -> None:
        self._group = group
        self._resurrect = resurrect
        self._dry_run = dry_run
        self._timeout = group.config.timeouts.generate
        self.made = 0
        self.labels: dict[bytes, str] = {}
        """Of what was made; of what was resurrected, under its former UID too."""
        self._strangers: dict[str, dict[Locator, list[InventoryEntry]]] | None = None

    def one(self, record: ObjectRecord) -> Restored:
        outcome, text = self._decide(record)
        if not self._dry_run and outcome in ("restored", "resurrected"):
            try:
                with one_step():  # cut off in the middle it would have to be made once more, with another UID
                    made = self._make(record, anew=self._group.journal.tombstone(record.uid) is not None)
                self.made += 1
                self.labels |= dict.fromkeys((made.uid, record.uid), label_of(record))
            except (HAError, Ckr) as error:
                outcome, text = "refused", str(error)
        return Restored(uid=record.uid.hex(), label=label_of(record), outcome=outcome, text=text)

    def _decide(self, record: ObjectRecord) -> tuple[str, str]:
        journal = self._group.journal
        there = journal.object(record.uid)
        if there is not None:
            newer = f", changed since (revision {there.revision})" if there.revision > record.revision else ""
            return "there already", f"left as it is{newer}"
        stone = journal.tombstone(record.uid)
        if stone is None:
            return "restored", f"revision {record.revision}"
        if stone.given_up and not self._destroyed(record):
            copy = self._resurrected(record)
            if copy is not None:
                return "there already", f"restored before, as {copy.uid.hex()}"
            return "restored", "as a new object with a new UID: an earlier attempt was cut off in it"
        if record.uid not in self._resurrect:
            return "destroyed", "not brought back: name it with --resurrect if it is to be"
        copy = self._resurrected(record)
        if copy is not None:
            return "there already", f"resurrected before, as {copy.uid.hex()}"
        return "resurrected", "as a new object with a new UID"

    def _destroyed(self, record: ObjectRecord) -> bool:
        """Under whichever UID it had."""
        return any(
            stone.fingerprint == record.fingerprint and not stone.given_up for stone in self._group.journal.tombstones()
        )

    def _resurrected(self, record: ObjectRecord) -> ObjectRecord | None:
        search: dict[int, bytes] = {
            CKA.CLASS: pack_ulong(record.object_class),
            CKA.LABEL: record.attributes.get(CKA.LABEL, b""),
        }
        for other in self._group.journal.search(search):
            if other.member_id == other.uid and other.fingerprint == record.fingerprint:
                return other
        return None

    def _make(self, record: ObjectRecord, *, anew: bool) -> ObjectRecord:
        made = msgspec.structs.replace(record, state=ObjectState.CREATING, intent=None, change=0)
        if anew:
            made = self._under_new_uid(made)
        elif self._taken(made.locator):
            made = msgspec.structs.replace(made, member_id=made.uid)
        before = list(self._there(record))
        self._group.replication.replicate([made])
        for life, entry in before:  # a replica of its own from the time before the journal was lost
            try:
                life.connection.destroy(entry.handle, timeout=self._timeout)
            except Ckr as error:
                if error.rv != CKR.OBJECT_HANDLE_INVALID:
                    raise
        return made

    def _under_new_uid(self, record: ObjectRecord) -> ObjectRecord:
        """CKA_ID on the members is the new UID: so what still has to be destroyed of the old one cannot be this."""
        uid = os.urandom(16)
        envelope = record.envelope
        if envelope is not None:
            _, life, keys = sponsor(self._group)
            envelope = reseal(
                life.connection,
                keys,
                envelope,
                old=record,
                uid=uid,
                revision=1,
                attributes=record.attributes,
                timeout=self._timeout,
            )
        return msgspec.structs.replace(record, uid=uid, revision=1, envelope=envelope, member_id=uid)

    def _taken(self, locator: Locator) -> bool:
        search: dict[int, bytes] = {CKA.CLASS: pack_ulong(locator.object_class), CKA.LABEL: locator.label}
        return any(other.locator == locator for other in self._group.journal.search(search))

    def _there(self, record: ObjectRecord) -> Iterator[tuple[Life, InventoryEntry]]:
        """What members hold of it although the journal does not know it."""
        if self._strangers is None:
            self._strangers = {}
            for name, member in self._group.roster.members.items():
                if member.life is not None and member.life.keys is not None:
                    places = self._strangers.setdefault(name, {})
                    for entry in strangers(self._group, name, member.life):
                        places.setdefault(entry.locator, []).append(entry)
        for name, places in self._strangers.items():
            life = self._group.roster.members[name].life
            for entry in places.get(record.locator, []):
                if life is not None and replica.is_this(life.connection, entry.handle, record, timeout=self._timeout):
                    yield life, entry
