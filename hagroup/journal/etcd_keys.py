"""What is where in etcd, below ``/hagroup/NAME/``.

``v/`` is the view: every process watches it. ``x/`` is the rest: read when needed.

| key | holds |
|---|---|
| ``v/group`` | :class:`Head`; each transaction compares it, so that writing it anew is a barrier |
| ``v/member/NAME``, ``v/announced/NAME`` | the member's record; its revision is ``announced`` |
| ``v/object/UID`` | :class:`Document`: record, copies and owed rows of one object, compared and written whole |
| ``v/seal`` | the event log's seal, read with the group; who writes it compares it |
| ``v/sync`` | nothing: who wants to know whether he has all news writes it, and waits for it |
| ``v/all``, ``v/notice`` | written when so much moves that it is not listed; when others look again |
| ``x/owner/ID`` | a living process, under its lease |
| ``x/tx/ID`` | a transaction that was committed, or aborted before it could be |
| ``x/owed/MEMBER/CHANGE/UID`` | a row that keeps a member from being admitted: the range is compared as empty |
| ``x/place/DIGEST/UID`` | who is in one place on the members (DESIGN.md 4.4) |
| ``x/stone/UID``, ``x/gone/CHANGE/UID`` | tombstone; their order |
| ``x/intent/ID``, ``x/closed/ID`` | open intents; outcomes, for a day |
| ``x/lease/NAME`` | leases, under one of etcd's |
| ``x/login/…``, ``x/seen/…``, ``x/event/…``, ``x/ack/ID`` | logins, observations, events, acknowledged views |
| ``x/passed/ID`` | a client that a change was not acknowledged by, until it is over |
| ``x/last-event`` | the number of the newest event |
"""

from __future__ import annotations

import hashlib
from urllib.parse import quote

import msgspec

from hagroup.core.records import Copy, Intent, Locator, LoginRecord, ObjectRecord, OwedRow, Rotation
from hagroup.journal.sealed import Sealed

VERSION = 1

encode = msgspec.msgpack.Encoder().encode


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The group as a whole."""

    label: str
    serial: str
    epoch: str
    membership_revision: int
    domain_key_id: bytes
    partition_key_id: bytes
    reference: bytes
    members: tuple[str, ...]
    filling: tuple[str, ...] = ()
    """New members whose rows are not all written yet: not admitted before."""
    cleared: str = ""
    rotation: Rotation | None = None
    sealed: Sealed | None = None
    version: int = VERSION


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """One object: what may be compared and written only together."""

    uid: bytes
    record: ObjectRecord | None = None
    created: tuple[int, int] = (0, 0)
    """Order of creation."""
    copies: dict[str, Copy] = {}
    owed: dict[str, OwedRow] = {}
    boot: str = ""
    """Boot of the host that wrote it: times of attempts are boot times of that host."""

    @property
    def empty(self) -> bool:
        return self.record is None and not self.copies and not self.owed


class KeptLease(msgspec.Struct, frozen=True):
    owner: str
    token: int
    expires: float
    boot: str


class KeptLogin(msgspec.Struct, frozen=True):
    record: LoginRecord
    before: LoginRecord | None


class ClosedIntent(msgspec.Struct, frozen=True):
    intent: Intent
    outcome: str


class KeptOwner(msgspec.Struct, frozen=True):
    host: str
    process: int
    since: float
    boot: str = ""
    """Of its host; empty: written by an earlier hagroup."""
    former: tuple[str, ...] = ()
    """What it was before, each time that its registration ran out."""


class KeptPassed(msgspec.Struct, frozen=True):
    """A client that was passed over."""

    owner: KeptOwner
    revision: int
    """That it did not acknowledge."""
    time: float
    what: str


class KeptEvent(msgspec.Struct, frozen=True):
    time: float
    kind: str
    member: str | None
    text: str
    data: dict[str, str]


class Keys:
    """Names of keys of one group."""

    def __init__(self, name: str) -> None:
        self.root = f"/hagroup/{name}/"
        self.view = f"{self.root}v/"
        self.group = f"{self.view}group"
        self.members = f"{self.view}member/"
        self.announced = f"{self.view}announced/"
        self.objects = f"{self.view}object/"
        self.seal = f"{self.view}seal"
        self.all = f"{self.view}all"
        self.notice = f"{self.view}notice"
        self.sync = f"{self.view}sync"
        rest = f"{self.root}x/"
        self.owners, self.acks, self.tx = f"{rest}owner/", f"{rest}ack/", f"{rest}tx/"
        self.stones, self.gone = f"{rest}stone/", f"{rest}gone/"
        self.intents, self.closed = f"{rest}intent/", f"{rest}closed/"
        self.leases, self.logins = f"{rest}lease/", f"{rest}login/"
        self.seen, self.events = f"{rest}seen/", f"{rest}event/"
        self.passed = f"{rest}passed/"
        self.last_event = f"{rest}last-event"
        self._owed, self.places = f"{rest}owed/", f"{rest}place/"

    def event(self, number: int) -> str:
        return f"{self.events}{number:016x}"

    def object(self, uid: bytes) -> str:
        return f"{self.objects}{uid.hex()}"

    def stone(self, uid: bytes) -> str:
        return f"{self.stones}{uid.hex()}"

    def owed(self, member: str, change: int, uid: bytes | None = None) -> str:
        key = f"{self._owed}{part(member)}/{change:016x}/"
        return key if uid is None else key + uid.hex()

    def place(self, locator: Locator) -> str:
        digest = hashlib.blake2b(encode(locator), digest_size=16).hexdigest()
        return f"{self.places}{digest}/"

    def login(self, member: str, source: str) -> str:
        return f"{self.logins}{part(member)}/{part(source)}"

    def observation(self, member: str, observer: str) -> str:
        return f"{self.seen}{part(member)}/{part(observer)}"


def part(text: str) -> str:
    """As one part of a key."""
    return quote(text, safe=" ")
