"""Journals for tests: a factory for each backend, an injected clock, and records to put in."""

from __future__ import annotations

import hashlib
import itertools
import os
from pathlib import Path
from typing import Protocol

from hagroup.core.records import (
    Copy,
    Fingerprint,
    FingerprintKind,
    MemberRecord,
    Membership,
    ObjectRecord,
    ObjectState,
    OwedKind,
    Role,
)
from hagroup.journal import SqliteJournal
from hagroup.journal.api import Asking, Confirmation, Journal

CLASS, LABEL, KEY_TYPE, ID = 0x000, 0x003, 0x100, 0x102
SECRET_KEY, AES = 4, 0x1F


class FakeClock:
    """Time moves when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.boot_name = "boot-1"
        self.wall_offset = 1_700_000_000.0

    def boot(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.wall_offset + self.now

    def boot_id(self) -> str:
        return self.boot_name

    def reboot(self) -> None:
        self.wall_offset += self.now - 5.0
        self.now, self.boot_name = 5.0, self.boot_name + "+"


class Backend(Protocol):
    """One group's journal, opened by as many owners as a test wants. Closing one is its death."""

    clock: FakeClock

    def open(self) -> Journal: ...
    def close(self) -> None: ...


class SqliteBackend:
    def __init__(self, folder: Path, members: list[MemberRecord]) -> None:
        self.clock = FakeClock()
        self.path = folder / "journal.db"
        self._opened: list[SqliteJournal] = []
        SqliteJournal.create(
            self.path,
            label="payments",
            serial="74007601",
            members=members,
            domain_key_id=b"domain",
            partition_key_id=b"partition",
            reference=b"reference",
            clock=self.clock,
        )

    def open(self) -> SqliteJournal:
        journal = SqliteJournal.open(self.path, clock=self.clock, busy_timeout=1.0)
        self._opened.append(journal)
        return journal

    def close(self) -> None:
        for journal in self._opened:
            journal.close()


def member(name: str, membership: Membership = Membership.ADMITTED, role: Role = Role.ACTIVE) -> MemberRecord:
    return MemberRecord(name=name, serial=f"serial-{name}", role=role, membership=membership)


_numbers = itertools.count(1)


def new_uid() -> bytes:
    return hashlib.sha256(b"%d %d" % (os.getpid(), next(_numbers))).digest()[:16]


def new_object(label: bytes = b"key", *, id_: bytes | None = None, uid: bytes | None = None) -> ObjectRecord:
    uid = uid or new_uid()
    return ObjectRecord(
        uid=uid,
        object_class=SECRET_KEY,
        key_type=AES,
        state=ObjectState.CREATING,
        revision=1,
        attributes={
            CLASS: SECRET_KEY.to_bytes(8, "little"),
            KEY_TYPE: AES.to_bytes(8, "little"),
            LABEL: label,
            ID: uid if id_ is None else id_,
        },
        answered_only=frozenset({0x163}),
        envelope=b"envelope",
        fingerprint=Fingerprint(FingerprintKind.DIGEST, b"salt", hashlib.sha256(uid).digest()),
    )


def ask(*names: str) -> list[Asking]:
    return [Asking(member=name, worker=f"worker-{name}") for name in names]


def installed(name: str, record: ObjectRecord, kind: OwedKind = OwedKind.INSTALL) -> Confirmation:
    return Confirmation(member=name, uid=record.uid, kind=kind, revision=record.revision, locator=record.locator)


def destroyed(name: str, uid: bytes) -> Confirmation:
    return Confirmation(member=name, uid=uid, kind=OwedKind.DESTROY)


def revision_of(journal: Journal) -> int:
    return journal.group().membership_revision


def confirm(journal: Journal, *confirmations: Confirmation) -> list[bool]:
    return journal.confirm(confirmations, membership_revision=revision_of(journal))


def claim(journal: Journal, name: str, uid: bytes) -> bool:
    """Whether the one row could be claimed."""
    return bool(journal.claim([(name, uid)], worker="later", membership_revision=revision_of(journal)))


def make_live(journal: Journal, *names: str, record: ObjectRecord | None = None) -> ObjectRecord:
    """A live object that these members have; all others still owe it."""
    made = record or new_object()
    intent = journal.begin_create([made], asking=ask(*names), membership_revision=revision_of(journal))
    assert confirm(journal, *(installed(name, made) for name in names)) == [True] * len(names)
    assert journal.go_live(intent.id, needed=len(names), serving=names)
    found = journal.object(made.uid)
    assert found is not None
    return found


def copy_of(journal: Journal, name: str, uid: bytes) -> Copy | None:
    return journal.placement(uid)[0].get(name)
