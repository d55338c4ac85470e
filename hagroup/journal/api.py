"""The journal's interface: the one place that orders changes (DESIGN.md 4). Two backends, one contract suite.

Every method that changes something is one transaction: durable, and the view number moved, when it returns; or
nothing happened and it raised. All raise :class:`hagroup.errors.JournalUnavailable` where the journal cannot be
reached or written. No transaction stays open between calls. Times in rows are boot time (CLOCK_BOOTTIME) from the
injected clock; wall clock appears only where people read it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

import msgspec

from hagroup.core.records import (
    Changes,
    Copy,
    Event,
    Fingerprint,
    GroupRecord,
    Intent,
    Lease,
    Locator,
    LoginRecord,
    LoginState,
    MemberRecord,
    Membership,
    ObjectRecord,
    Observation,
    OwedKind,
    OwedRow,
    Role,
    Tombstone,
)


class StaleMembership(Exception):
    """The membership revision that the writer went by is not the current one. Nothing was written: look again."""


class Busy(Exception):
    """The object has an open intent of another owner: wait for it, or recover it if that owner is dead."""

    def __init__(self, intent: Intent) -> None:
        super().__init__(f"object is being changed by {intent.owner}")
        self.intent = intent


class NoLongerLive(Exception):
    """The object was destroyed, or its record moved to another revision: nothing was written."""


class LeaseLost(Exception):
    """The lease under which the writer acts is held by somebody else now, or ran out. Nothing was written."""


class Confirmation(msgspec.Struct, frozen=True, kw_only=True):
    """A member replied to what it owed."""

    member: str
    uid: bytes
    kind: OwedKind
    revision: int = 0
    locator: Locator | None = None
    """Where it is there now (install, set)."""


class Asking(msgspec.Struct, frozen=True, kw_only=True):
    """A member that the writer is about to ask, and the lock name of the worker it will use."""

    member: str
    worker: str | None


class Guarantees(msgspec.Struct, frozen=True):
    """What a backend is good for; callers demand what they need."""

    durable: bool
    shared_by_processes: bool
    shared_by_hosts: bool


class Journal(Protocol):
    guarantees: Guarantees
    owner: str
    """This process's registration; registered at open, alive while the process lives (flock or lease)."""

    # -- cheap, before every operation -------------------------------------------------------------------
    def view_number(self) -> int:
        """Differs from the last one seen whenever anything was committed since. No I/O on SQLite (mmap)."""
        ...

    def changes(self, since: int, epoch: str) -> Changes: ...

    # -- reading -----------------------------------------------------------------------------------------
    def group(self) -> GroupRecord: ...
    def members(self) -> list[MemberRecord]: ...
    def object(self, uid: bytes) -> ObjectRecord | None: ...
    def search(self, attributes: Mapping[int, bytes]) -> list[ObjectRecord]:
        """Live objects that have all these attribute values, oldest first. CLASS, KEY_TYPE, ID, LABEL use indexes."""
        ...

    def objects(self) -> Iterator[ObjectRecord]:
        """All records, ``creating`` ones too, in batches (no long transaction)."""
        ...

    def placement(self, uid: bytes) -> tuple[dict[str, Copy], dict[str, OwedRow]]:
        """Copies and owed rows of one object, by member."""
        ...

    def copies(self, member: str) -> Iterator[Copy]: ...
    def owed(self, member: str | None = None, *, doubtful: bool | None = None) -> list[OwedRow]:
        """Owed rows by change number; of one member; only those in doubt (sent, unanswered) or only the others."""
        ...

    def tombstone(self, uid: bytes) -> Tombstone | None: ...
    def tombstones(self, *, since: int = 0) -> Iterator[Tombstone]: ...
    def intents(self) -> list[Intent]: ...
    def counts(self) -> dict[str, int]:
        """``live``, ``creating``, ``tombstones``, ``intents``, ``owed``: for status."""
        ...

    # -- create ------------------------------------------------------------------------------------------
    def begin_create(
        self,
        objects: Sequence[ObjectRecord],
        *,
        asking: Sequence[Asking],
        membership_revision: int,
    ) -> Intent:
        """Record ``creating`` objects (a pair is one intent) and an owed ``install`` row for **every** listed member
        (joining and out-of-sync too; not quarantined? those too: they stay owed); rows of ``asking`` members are
        claimed by this owner and marked sent. Raises :class:`StaleMembership`."""
        ...

    def go_live(self, intent: str, *, needed: int, serving: Collection[str]) -> bool:
        """``creating -> live`` for all objects of the intent if each has at least ``needed`` confirmed copies on
        members of ``serving``; closes the intent. True also when they are live already. False: not enough yet.
        Raises :class:`NoLongerLive` when they were given up (deleted)."""
        ...

    def abandon_create(self, intent: str) -> bool:
        """``creating -> deleted``: tombstones, and every copy and owed row becomes ``owed: destroy``, claimed rows keep
        their owner, unclaimed free. False when the objects are live already (somebody finished it)."""
        ...

    # -- set attributes ----------------------------------------------------------------------------------
    def begin_set(
        self,
        uid: bytes,
        *,
        revision: int,
        new_attributes: Mapping[int, bytes],
        new_envelope: bytes | None,
        asking: Sequence[Asking],
        membership_revision: int,
    ) -> Intent:
        """Open an intent to bring a live object from ``revision`` to the next one. Every member with a copy gets an
        owed ``set`` row (those of ``asking`` claimed and sent); members that owe an ``install`` go on owing it, for the
        new revision once committed. Old and new locators are kept in the rows. ``announced`` of the members moves to
        the intent's change number. Raises :class:`Busy`, :class:`NoLongerLive`, :class:`StaleMembership`."""
        ...

    def commit_set(self, intent: str) -> ObjectRecord:
        """Some member accepted: the record becomes the new revision for good; closes the intent. Idempotent.
        Raises :class:`NoLongerLive` when the object was destroyed meanwhile."""
        ...

    def rollback_set(self, intent: str) -> None:
        """All that were asked refused: rows of the intent become ``install`` of the old revision where in doubt, else
        vanish; closes the intent."""
        ...

    # -- destroy -----------------------------------------------------------------------------------------
    def destroy(
        self, uid: bytes, *, asking: Sequence[Asking], membership_revision: int
    ) -> tuple[Tombstone, list[OwedRow]]:
        """Write the tombstone; close any open intent of the object; every copy and owed row becomes
        ``owed: destroy`` with all its locators (claimed and sent for ``asking``); ``announced`` moves. Returns the
        tombstone and all rows. Raises :class:`NoLongerLive` if it is gone already."""
        ...

    # -- owed rows ---------------------------------------------------------------------------------------
    def claim(
        self,
        rows: Sequence[tuple[str, bytes]],
        *,
        worker: str | None,
        membership_revision: int,
        lease: Lease | None = None,
        locators: Sequence[Locator] = (),
    ) -> list[OwedRow]:
        """Claim (member, UID) rows for this owner and mark them sent; only rows that are unclaimed, or own, or whose
        owner is dead. ``locators`` are added to each. Returns the rows claimed. Raises :class:`LeaseLost`,
        :class:`StaleMembership`."""
        ...

    def confirm(
        self, confirmations: Sequence[Confirmation], *, membership_revision: int, lease: Lease | None = None
    ) -> list[bool]:
        """Members replied. Each: True, row cleared and copy recorded (or removed, for ``destroy``); False, refused:
        the object was destroyed meanwhile, the row is another owner's or asks for something else now; the caller
        must undo what it did on that member (and what is owed stays owed). A ``set``/``install`` confirmed at an
        older revision than the record's leaves the row as ``set`` of the newest. Rows in doubt are cleared too: only
        confirm those after the doubt was resolved."""
        ...

    def give_up(
        self,
        rows: Sequence[tuple[str, bytes]],
        *,
        doubt: bool,
        reason: str | None = None,
    ) -> None:
        """The owner stops trying: ``doubt`` (no reply came: stays ``sent``, ``doubt_since`` set if not yet) or a known
        refusal (``sent`` false, ``reason`` kept). The claim is released."""
        ...

    def owe(self, rows: Sequence[tuple[str, bytes, OwedKind]], *, reason: str | None = None) -> None:
        """A member was found to lack (``install``), to be behind in (``set``), or to hold what it must not
        (``destroy``): write free owed rows. An ``install``/``set`` for what is not live is ignored; copies stay."""
        ...

    def clear_doubt(self, member: str, uid: bytes) -> None:
        """The late window is over (or the worker is proved dead) and the row was already brought to its end: forget
        that something may come."""
        ...

    # -- members -----------------------------------------------------------------------------------------
    def add_member(self, member: MemberRecord) -> int:
        """List a member (``joining``): revision moves, and an owed ``install`` row is written for every live and creating
        object. Returns the new membership revision."""
        ...

    def remove_member(self, name: str) -> int: ...
    def update_member(
        self,
        name: str,
        *,
        membership: Membership | None = None,
        role: Role | None = None,
        draining: bool | None = None,
        reason: str | None = None,
        serial: str | None = None,
    ) -> int:
        """Change what is given (``reason`` is stored whenever ``membership`` is given). Moves the membership revision."""
        ...

    def barrier(self) -> int:
        """The newest change number, as a barrier for :meth:`admit`."""
        ...

    def admit(self, name: str, *, barrier: int, low: int, lease: Lease | None) -> list[OwedRow]:
        """One transaction: if the member owes nothing from up to ``barrier`` (rows in doubt, and rows with a reason,
        aside) it becomes ``admitted`` and ``[]`` is returned; else the rows that keep it out are returned and nothing
        changes. ``low`` is stored as finished. Raises :class:`LeaseLost`."""
        ...

    def manifest_confirmed(self, name: str, *, high: int, low: int | None = None) -> None:
        """The member's manifest was seen to show ``high``."""
        ...

    # -- leases, owners ----------------------------------------------------------------------------------
    def acquire_lease(self, name: str, *, ttl: float) -> Lease | None:
        """None while somebody else's has not run out (and its owner is alive). The token grows with each holder."""
        ...

    def renew_lease(self, lease: Lease, *, ttl: float) -> Lease:
        """Raises :class:`LeaseLost`."""
        ...

    def release_lease(self, lease: Lease) -> None: ...
    def owner_alive(self, owner: str) -> bool: ...
    def worker_lock(self, member: str) -> tuple[str, str]:
        """A fresh worker lock: (its name for owed rows, the file's path that the worker locks)."""
        ...

    def worker_dead(self, worker: str) -> bool:
        """Proved dead: its lock is free. False where it cannot be proved."""
        ...

    def adopt_intent(self, intent: str) -> Intent | None:
        """Take over an intent whose owner is dead, by compare-and-set; with it the claims of that owner on its rows.
        None: somebody else did, or it is closed."""
        ...

    # -- observations, logins ----------------------------------------------------------------------------
    def observe(self, observations: Sequence[Observation]) -> None:
        """Keeps the newest of each (member, observer). Does not move the change number; the view number moves when
        ``ok`` differs from what was kept."""
        ...

    def observations(self, member: str | None = None) -> list[Observation]: ...
    def begin_login(self, member: str, source: str, stamp: str, *, clear: bool) -> LoginRecord | None:
        """Serialise logins on one member: None, go on (``trying`` is durable); a record: why not (``refused`` with the
        same source and stamp; or ``trying`` of a living owner: wait; or of a dead owner, unless ``clear`` says that
        the token's USER_PIN_COUNT_LOW is off: counts as refused)."""
        ...

    def end_login(self, member: str, state: LoginState | None) -> None:
        """``accepted`` or ``refused``; None: no attempt was made or its outcome did not count (withdraw ``trying``)."""
        ...

    def logins(self) -> list[LoginRecord]: ...
    def forget_login(self, member: str) -> None:
        """A person says that the PIN source is right now."""
        ...

    # -- events ------------------------------------------------------------------------------------------
    def event(
        self, kind: str, text: str, *, member: str | None = None, data: Mapping[str, str] = {}
    ) -> None: ...
    def events(self, *, limit: int = 100, since: int = 0) -> list[Event]: ...

    # -- group -------------------------------------------------------------------------------------------
    def fingerprint_twins(self, fingerprint: Fingerprint, locator: Locator) -> list[ObjectRecord]:
        """Live and creating objects with this very fingerprint and locator: nothing separates them on a member."""
        ...

    def close(self) -> None: ...
