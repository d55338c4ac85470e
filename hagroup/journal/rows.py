"""Records to table rows and back. No decisions, no transactions."""

from __future__ import annotations

import hashlib
import sqlite3
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import msgspec

from hagroup.core.records import (
    Attempt,
    Copy,
    Event,
    Fingerprint,
    Intent,
    Locator,
    LoginRecord,
    LoginState,
    MemberRecord,
    ObjectRecord,
    ObjectState,
    Observation,
    OwedKind,
    OwedRow,
    Rotation,
    Seal,
    Tombstone,
)

Row: TypeAlias = "tuple[Any, ...]"

encode = msgspec.msgpack.Encoder().encode
_attributes = msgspec.msgpack.Decoder(dict[int, bytes]).decode
_numbers = msgspec.msgpack.Decoder(frozenset[int]).decode
_fingerprint = msgspec.msgpack.Decoder(Fingerprint).decode
_locator = msgspec.msgpack.Decoder(Locator).decode
_locators = msgspec.msgpack.Decoder(tuple[Locator, ...]).decode
_attempts = msgspec.msgpack.Decoder(tuple[Attempt, ...]).decode
_member = msgspec.msgpack.Decoder(MemberRecord).decode
_intent = msgspec.msgpack.Decoder(Intent).decode
to_seal = msgspec.msgpack.Decoder(Seal).decode
to_rotation = msgspec.msgpack.Decoder(Rotation).decode
_data = msgspec.msgpack.Decoder(dict[str, str]).decode
to_login_before = msgspec.msgpack.Decoder(LoginRecord | None).decode

CLASS, LABEL, KEY_TYPE, ID = 0x000, 0x003, 0x100, 0x102
DOMAIN_PARAMETERS = 0x06


def signed(number: int) -> int:
    """CK_ULONG as SQLite's integer: 64 bits, but signed."""
    return number - (1 << 64) if number >= 1 << 63 else number


def unsigned(number: int) -> int:
    return number + (1 << 64) if number < 0 else number


def twin_digest(fingerprint: Fingerprint, locator: Locator) -> bytes:
    return hashlib.blake2b(encode((fingerprint, locator)), digest_size=16).digest()


def same_place(one: ObjectRecord, other: ObjectRecord) -> bool:
    """Nothing separates the two on a member."""
    return (one.fingerprint, one.locator) == (other.fingerprint, other.locator)


def matches(record: ObjectRecord, wanted: Mapping[int, bytes]) -> bool:
    """Whether it is live and has all these attribute values."""
    return record.state is ObjectState.LIVE and all(_value(record, type_) == value for type_, value in wanted.items())


def _value(record: ObjectRecord, type_: int) -> bytes | None:
    value = record.attributes.get(type_)
    if value is None and type_ == CLASS:
        return record.object_class.to_bytes(8, sys.byteorder)
    if value is None and type_ == KEY_TYPE and record.key_type is not None:
        return record.key_type.to_bytes(8, sys.byteorder)
    return value


# -- objects -----------------------------------------------------------------------------------------------------

OBJECT = (
    "uid, class, key_type, member_id, state, revision, change, intent, fingerprint, answered_only, attributes, envelope"
)
"""Columns in the order that :func:`to_object` takes them."""
OBJECT_WRITTEN = f"{OBJECT}, label, cka_id, twin"


def from_object(record: ObjectRecord) -> Row:
    """Values for ``OBJECT_WRITTEN``."""
    return (
        record.uid,
        signed(record.object_class),
        None if record.key_type is None else signed(record.key_type),
        record.member_id,
        record.state.value,
        record.revision,
        record.change,
        record.intent,
        encode(record.fingerprint),
        encode(sorted(record.answered_only)),
        encode(record.attributes),
        record.envelope,
        record.attributes.get(LABEL),
        record.attributes.get(ID),
        twin_digest(record.fingerprint, record.locator),
    )


def to_object(row: Row) -> ObjectRecord:
    return ObjectRecord(
        uid=row[0],
        object_class=unsigned(row[1]),
        key_type=None if row[2] is None else unsigned(row[2]),
        member_id=row[3],
        state=ObjectState(row[4]),
        revision=row[5],
        change=row[6],
        intent=row[7],
        fingerprint=_fingerprint(row[8]),
        answered_only=_numbers(row[9]),
        attributes=_attributes(row[10]),
        envelope=row[11],
    )


# -- copies, owed rows -------------------------------------------------------------------------------------------

COPY = "member, uid, revision, locator"


def from_copy(copy: Copy) -> Row:
    return (copy.member, copy.uid, copy.revision, encode(copy.locator))


def to_copy(row: Row) -> Copy:
    return Copy(member=row[0], uid=row[1], revision=row[2], locator=_locator(row[3]))


OWED_WRITTEN = "uid, member, kind, revision, owner, change, settled, asked_before, reason, attempts, locators"
OWED = (
    "w.uid, w.member, w.kind, w.revision, w.owner, w.change, w.settled, w.asked_before, w.reason, w.attempts, "
    "w.locators, o.class, o.key_type, o.member_id, o.cka_id, o.label"
)
OWED_FROM = "owed AS w LEFT JOIN objects AS o ON o.uid = w.uid"


def from_owed(row: OwedRow) -> Row:
    """Values for ``OWED_WRITTEN``. The record's own locator is written too: after a change it is an old one."""
    return (
        row.uid,
        row.member,
        row.kind.value,
        row.revision,
        row.owner,
        row.change,
        row.settled,
        row.asked_before,
        row.reason,
        encode(row.attempts) if row.attempts else None,
        encode(row.locators) if row.locators else None,
    )


def to_owed(row: Row) -> OwedRow:
    """From ``OWED``: where the object has a record, its present locator is one of the row's."""
    locators: tuple[Locator, ...] = () if row[10] is None else _locators(row[10])
    if row[11] is not None:
        id_ = row[14] if row[13] is None else row[13]
        key_type = None if row[12] is None else unsigned(row[12])
        present = Locator(unsigned(row[11]), key_type, id_ or b"", row[15] or b"")
        if present not in locators:
            locators = (*locators, present)
    return OwedRow(
        uid=row[0],
        member=row[1],
        kind=OwedKind(row[2]),
        revision=row[3],
        owner=row[4],
        change=row[5],
        settled=bool(row[6]),
        asked_before=bool(row[7]),
        reason=row[8],
        attempts=() if row[9] is None else _attempts(row[9]),
        locators=locators,
    )


def attempts_of(blob: bytes) -> tuple[Attempt, ...]:
    return _attempts(blob)


# -- the rest ----------------------------------------------------------------------------------------------------


def to_tombstone(row: Row) -> Tombstone:
    """From (uid, change, time, locators, fingerprint, given up): the last one is lacking in what was made earlier."""
    return Tombstone(
        uid=row[0],
        change=row[1],
        time=row[2],
        locators=_locators(row[3]),
        fingerprint=_fingerprint(row[4]),
        given_up=bool(row[5:] and row[5]),
    )


INSERT_TOMBSTONE = "INSERT INTO tombstones VALUES (?, ?, ?, ?, ?, ?)"


def from_tombstone(tombstone: Tombstone) -> Row:
    return (
        tombstone.uid,
        tombstone.change,
        tombstone.time,
        encode(tombstone.locators),
        encode(tombstone.fingerprint),
        int(tombstone.given_up),
    )


MEMBER = "record, low, announced, confirmed"


def to_member(row: Row) -> MemberRecord:
    return msgspec.structs.replace(_member(row[0]), low=row[1], announced=row[2], confirmed=row[3])


def from_member(member: MemberRecord) -> Row:
    return (encode(member), member.low, member.announced, member.confirmed)


def to_intent(row: Row) -> Intent:
    """From (record, owner): the owner moves by adoption."""
    return msgspec.structs.replace(_intent(row[0]), owner=row[1])


OBSERVATION = "member, observer, site, ok, kind, boot_time"


def to_observation(row: Row) -> Observation:
    return Observation(member=row[0], observer=row[1], site=row[2], ok=bool(row[3]), kind=row[4], boot_time=row[5])


LOGIN = "member, source, stamp, state, owner, boot_time"


def to_login(row: Row) -> LoginRecord:
    return LoginRecord(
        member=row[0], source=row[1], stamp=row[2], state=LoginState(row[3]), owner=row[4], boot_time=row[5]
    )


def to_event(row: Row) -> Event:
    return Event(number=row[0], time=row[1], kind=row[2], member=row[3], text=row[4], data=_data(row[5]))


def load_owed(connection: sqlite3.Connection, where: str, values: Iterable[Any]) -> list[OwedRow]:
    rows = connection.execute(f"SELECT {OWED} FROM {OWED_FROM} WHERE {where}", tuple(values))
    return [to_owed(row) for row in rows]
