"""What the journal records (DESIGN.md 4), as values. No behaviour beyond what follows from the value itself.

Identifiers: a *UID* is 16 random bytes that name one object for the whole group and for ever; an *owner* names one
process's registration (alive while its lock is held); a *change number* orders all changes within an epoch.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class ObjectState(StrEnum):
    """Life of a group object. ``deleted`` has no record: what is left of it is its tombstone."""

    CREATING = "creating"
    LIVE = "live"


class OwedKind(StrEnum):
    """What a member still has to be brought to do for one object."""

    INSTALL = "install"  # make it there in its current revision (first time, or anew)
    SET = "set"  # it is there in an older revision: set the attributes that differ
    DESTROY = "destroy"  # it must not be there


class Locator(msgspec.Struct, frozen=True, array_like=True):
    """How an object may be found on a member: never a handle (DESIGN.md 4.4)."""

    object_class: int
    key_type: int | None
    id: bytes
    label: bytes


class FingerprintKind(StrEnum):
    """How to tell that an object on a member is this one."""

    PUBLIC = "public"  # SHA-256 over the public attributes, in the order of their numbers
    DIGEST = "digest"  # SHA-256 by C_DigestKey over salt || key
    NONE = "none"  # the class has nothing to compare but its attributes (data objects: VALUE is compared whole)


class Fingerprint(msgspec.Struct, frozen=True, array_like=True):
    kind: FingerprintKind
    salt: bytes
    value: bytes


class ObjectRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One group object as the virtual slot shows it."""

    uid: bytes
    object_class: int
    key_type: int | None
    state: ObjectState
    revision: int
    """1 when made; each attribute change adds 1."""
    attributes: dict[int, bytes]
    """All attributes that the virtual slot answers, packed; never VALUE or a private component of a key."""
    answered_only: frozenset[int] = frozenset()
    """Attributes that are answered from here and never set on a member (LOCAL, DESTROYABLE = false, ...)."""
    member_id: bytes | None = None
    """CKA_ID on the members where it is not ``attributes[CKA_ID]`` (DESIGN.md 4.4, nothing else separates two)."""
    envelope: bytes | None = None
    """Sealed key, or private data object; None for what travels by its attributes."""
    fingerprint: Fingerprint = Fingerprint(FingerprintKind.NONE, b"", b"")
    intent: str | None = None
    """The open intent that created it (state ``creating``) or is changing it."""
    change: int = 0
    """Change number of the last change of the record itself."""

    @property
    def locator(self) -> Locator:
        """Where a member that is up to date has it."""
        number = 0x012 if self.object_class == 0 else 0x102  # data objects have OBJECT_ID, the others CKA_ID
        id_ = self.attributes.get(number, b"") if self.member_id is None else self.member_id
        return Locator(self.object_class, self.key_type, id_, self.attributes.get(0x003, b""))


class Copy(msgspec.Struct, frozen=True, kw_only=True):
    """What one member has of one object, as last confirmed."""

    member: str
    uid: bytes
    revision: int
    locator: Locator


class Attempt(msgspec.Struct, frozen=True, array_like=True):
    """One time that a member was, or may have been, asked, and no answer has been recorded (DESIGN.md 4.1).

    An HSM cannot be fenced: until it is answered, or can no longer execute (its worker is proved dead and the module
    is local, or the late window has passed), it may still change the token.
    """

    number: int
    """Names the attempt within its row; a later attempt has a higher one."""
    owner: str
    worker: str | None
    """Lock name of the worker that was asked (to prove it dead)."""
    kind: OwedKind
    """What was asked for. ``destroy`` in a row that is owed something else: its owner is undoing a refused change."""
    revision: int
    asked: float
    """Boot time at which it was written down, before the member was asked; 0.0 if that was before this boot."""
    doubt_since: float | None = None
    """Boot time at which its owner gave up waiting, or was found dead; None: the owner still waits for the reply."""
    spoiled: bool = False
    """Another attempt ended since that changed the object there, in whichever order: a reply shows nothing any more."""

    @property
    def since(self) -> float:
        """From when the late window counts."""
        return self.asked if self.doubt_since is None else self.doubt_since


class OwedRow(msgspec.Struct, frozen=True, kw_only=True):
    """A change that one member still owes (DESIGN.md 4.1).

    The row ends only when what is owed was confirmed *and* no other attempt is outstanding. Brought to its end while
    an older attempt may still execute, it stays as ``settled``: nothing routes to it, it is searched again, and
    ``clear_doubt`` or ``resolve_attempts`` ends it.
    """

    member: str
    uid: bytes
    kind: OwedKind
    revision: int
    """Revision the member has to reach (of no meaning for ``destroy``)."""
    owner: str | None
    """Who claimed it; None: free to be claimed."""
    locators: tuple[Locator, ...]
    """Every locator under which the object may now be found there."""
    reason: str | None
    """Why the member refused, where it did (token full, mechanism missing): shown to people."""
    change: int
    """Change number of the change that is owed; rows from before a barrier keep a member out."""
    attempts: tuple[Attempt, ...] = ()
    """Outstanding ones, oldest first."""
    settled: bool = False
    """What is owed was confirmed; only older attempts keep the row (in doubt)."""
    asked_before: bool = False
    """It may be there, whole or in half, from before the newest attempt: look before making it. (To be destroyed:
    another worker may have put it there, so that the one who is asked may not see it yet.)"""

    @property
    def sent(self) -> bool:
        """A member was, or may have been, asked, and has not answered."""
        return bool(self.attempts)

    @property
    def worker(self) -> str | None:
        """Lock name of the worker that was asked last."""
        return self.attempts[-1].worker if self.attempts else None

    @property
    def doubt_since(self) -> float | None:
        """Boot time at which the last owner gave up waiting for a sent call; None: no doubt yet."""
        return max((a.doubt_since for a in self.attempts if a.doubt_since is not None), default=None)

    @property
    def unanswered(self) -> tuple[Attempt, ...]:
        """Outstanding attempts other than those that the row's present owner is waiting for."""
        return tuple(a for a in self.attempts if a.doubt_since is not None or a.owner != self.owner)


class IntentKind(StrEnum):
    CREATE = "create"
    SET = "set"


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """A change that is under way."""

    id: str
    kind: IntentKind
    owner: str
    uids: tuple[bytes, ...]
    change: int
    new_attributes: dict[int, bytes] | None = None
    """For ``set``: only the attributes that change."""
    new_envelope: bytes | None = None
    """For ``set``: the envelope re-sealed for the next revision (None where the object has none)."""
    new_member_id: bytes | None = None
    """For ``set``: ``member_id`` from then on, where nothing else would separate the object from another one."""
    asked: tuple[str, ...] = ()
    """Members whose rows were claimed and marked sent for it: only these may be asked without a further ``claim``."""

    def outcome(self, record: ObjectRecord) -> ObjectRecord:
        """For ``set``: what the object becomes by it."""
        return msgspec.structs.replace(
            record,
            revision=record.revision + 1,
            attributes={**record.attributes, **(self.new_attributes or {})},
            envelope=self.new_envelope,
            member_id=record.member_id if self.new_member_id is None else self.new_member_id,
        )


class Tombstone(msgspec.Struct, frozen=True, kw_only=True):
    """A destroyed object; kept for good."""

    uid: bytes
    change: int
    time: float
    """Wall clock, for people."""
    locators: tuple[Locator, ...]
    fingerprint: Fingerprint
    given_up: bool = False
    """Making it was cut off, so nobody ever had it: the same value may be brought in again."""


class Role(StrEnum):
    ACTIVE = "active"
    STANDBY = "standby"
    BACKUP = "backup"


class Membership(StrEnum):
    """The group's own knowledge of a member. Whether it answers just now is each process's own knowledge."""

    JOINING = "joining"  # listed: a target of all new writes; not yet admitted
    ADMITTED = "admitted"  # may serve (each process after its own successful connect and check)
    OUT_OF_SYNC = "out-of-sync"  # was admitted; must be resynced before it serves again
    QUARANTINED = "quarantined"  # a person acts


class MemberRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One member as the group knows it."""

    name: str
    serial: str
    role: Role
    membership: Membership
    draining: bool = False
    reason: str | None = None
    """Why it is quarantined or out of sync, for people."""
    since: float = 0.0
    """Wall clock of the last change of ``membership``, or of ``draining`` where it is admitted; for people."""
    low: int = 0
    """Every change up to here is finished on this member."""
    announced: int = 0
    """Newest tombstone or attribute change that this member's manifest may show (DESIGN.md 4.6)."""
    confirmed: int = 0
    """Newest one that its manifest was seen to show."""
    default_extractable: bool = False
    """EXTRACTABLE of a key made without it on this member, learnt at join."""
    transport: bytes = b""
    """Public part of its token's own transport key, sealed under the partition key; empty: it has none."""


class Rotation(msgspec.Struct, frozen=True, kw_only=True):
    """The newest change of the domain's two keys: from these here to those that the group record names."""

    domain_key_id: bytes
    """Of the key that was replaced; so the other two."""
    partition_key_id: bytes
    reference: bytes
    sealed: bool
    """The new keys cannot leave a member."""
    wrapped: dict[str, tuple[bytes, bytes]]
    """The new keys by serial number of a token, each for that token's own transport key: who was away takes them from
    here on return."""
    former: tuple[tuple[bytes, bytes], ...] = ()
    """Names of all pairs that were ever replaced, these here too: a token that was away may still have some."""
    finished: bool = False
    """No envelope of the journal is under the replaced keys any more: each member may drop them."""


class Seal(msgspec.Struct, frozen=True, kw_only=True):
    """How far the event log is sealed, in order, from its first event on."""

    number: int
    """Of the last event that it covers."""
    head: bytes
    """Of the hash chain over all events up to there."""
    mac: bytes
    """Both, sealed under the partition key: made inside a member, and opens in none for anything else."""


class GroupRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The group as a whole."""

    label: str
    serial: str
    epoch: str
    """Later epochs compare greater."""
    membership_revision: int
    change: int
    """The newest change number."""
    domain_key_id: bytes
    partition_key_id: bytes
    reference: bytes
    """Reference envelope: opens only with both keys of the domain (G9, where no member serves)."""
    cleared: str = ""
    """Epoch that began when the group was emptied last: what a token of an older one holds of the group goes."""
    rotation: Rotation | None = None
    """Everything new is sealed under ``domain_key_id`` and ``partition_key_id`` from the moment it is recorded."""
    seal: Seal | None = None
    """The newest one of the event log."""


OBJECT_MISSING = "object missing"
OBJECT_REAPPEARED = "object reappeared"
EVENT_LOG_BROKEN = "event log broken"
EVENT_LOG_WHOLE = "event log whole again"
"""Kinds of journal events: a member lost an object; a member shows one again that was destroyed; the events are not
what was sealed; they are again, as a member and all manifests say."""

WATCHDOG = "heartbeat"
"""``Observation.kind`` of what the active watchdog sees."""


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """What one process saw of one member (DESIGN.md 4.5): never a verdict."""

    member: str
    observer: str
    site: str | None
    ok: bool
    kind: str
    boot_time: float


class Client(msgspec.Struct, frozen=True, kw_only=True):
    """A living process that has the journal open."""

    owner: str
    host: str
    process: int
    since: float
    """Wall clock of its registration, for people."""
    here: bool
    """It runs on this machine, so that its boot times mean something here."""


class PassedOver(msgspec.Struct, frozen=True, kw_only=True):
    """A client that did not acknowledge a change before its registration ran out (DESIGN.md 4.5): cut off, or frozen,
    it may go on with what it knew before, until it is heard of again or has ended."""

    owner: str
    host: str
    process: int
    time: float
    """Wall clock, when it was passed over first."""
    what: str
    """The change."""


class LoginState(StrEnum):
    TRYING = "trying"
    REFUSED = "refused"
    ACCEPTED = "accepted"


class LoginRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The last login by a ``pin`` source or application PIN on one member (DESIGN.md 4.7). No PIN, no hash."""

    member: str
    source: str
    """``file:/path``, ``env:NAME``, ``command:...`` or ``application``."""
    stamp: str
    """What tells that the source changed since."""
    state: LoginState
    owner: str
    boot_time: float


class Lease(msgspec.Struct, frozen=True):
    """A right that ends by itself; ``token`` grows with each holder and fences late writers."""

    name: str
    owner: str
    token: int
    expires: float
    """Boot time in seconds."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the event log."""

    number: int
    time: float
    kind: str
    member: str | None
    text: str
    data: dict[str, str]


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """What moved since a change number."""

    change: int
    """The number that this answer is up to."""
    uids: frozenset[bytes]
    members: bool
    """Member records or the group record moved too."""
    everything: bool = False
    """The epoch is another one, or so much moved that it is not listed: forget all."""


def is_true(record: ObjectRecord, attribute: int) -> bool:
    """A boolean attribute of the record; absent counts as false."""
    return record.attributes.get(attribute, b"\0") not in (b"\0", b"")
