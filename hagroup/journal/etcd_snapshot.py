"""The group as of one revision of etcd."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from msgspec.structs import replace

from hagroup.core.records import GroupRecord, Locator, MemberRecord, Seal
from hagroup.errors import JournalUnavailable
from hagroup.journal import rules
from hagroup.journal.etcd_client import PATIENCE, EtcdClient, Json, Pair, after_all, pair, range_of
from hagroup.journal.etcd_keys import Document, Head, Keys, part

decode = msgspec.msgpack.decode


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
