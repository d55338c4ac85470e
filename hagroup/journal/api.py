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
    Client,
    Copy,
    Event,
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
    PassedOver,
    Role,
    Rotation,
    Seal,
    Tombstone,
)


class StaleMembership(Exception):
    """The membership revision that the writer went by is not the current one. Nothing was written: look again.

    From ``admit`` also: the member was quarantined or removed meanwhile.
    """


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


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """What a journal begins with that takes the place of another, lost or moved."""

    epoch_before: str
    """The newest that is known of; the journal's own is later."""
    change: int
    """Not lower than any change number that is known of."""
    records: list[ObjectRecord]
    copies: list[Copy]
    """Objects that these members are known to hold."""
    tombstones: list[Tombstone]
    events: list[Event] = []
    """Numbered anew, but for those that have a number."""
    epoch: str | None = None
    """Its own; None: the one after ``epoch_before``."""
    owed: list[OwedRow] | None = None
    """None: members owe what they are not known to hold as ``install``, to be looked for first."""
    intents: list[Intent] = []
    logins: list[LoginRecord] = []
    seal: Seal | None = None
    rotation: Rotation | None = None
    cleared: str = ""


class Guarantees(msgspec.Struct, frozen=True):
    """What a backend is good for; callers demand what they need."""

    durable: bool
    shared_by_processes: bool
    shared_by_hosts: bool


class Journal(Protocol):
    @property
    def guarantees(self) -> Guarantees: ...
    @property
    def owner(self) -> str:
        """This process's registration; registered at open, alive while the process lives (flock or lease)."""
        ...

    @property
    def former_owners(self) -> frozenset[str]:
        """What ``owner`` was before, each time that this process's lease ran out while it lived: to others that owner
        is dead, and what it had begun is theirs to finish."""
        ...

    # -- cheap, before every operation -------------------------------------------------------------------
    def view_number(self) -> int:
        """Differs from the last one seen whenever anything was committed since. No I/O on SQLite (mmap)."""
        ...

    def changes(self, since: int, epoch: str) -> Changes:
        """UIDs whose record, copies or owed rows moved after change number ``since``; destroyed ones are among them.

        Call it after having read the view number, never before. ``everything`` where the epoch is another one, or so
        much moved (a member was listed or removed, ``since`` is long ago) that it is not listed.
        """
        ...

    # -- reading -----------------------------------------------------------------------------------------
    def group(self) -> GroupRecord: ...
    def members(self) -> list[MemberRecord]: ...
    def view(self) -> tuple[GroupRecord, list[MemberRecord]]:
        """:meth:`group` and :meth:`members` as of one instant."""
        ...

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

    def object_with_placement(self, uid: bytes) -> tuple[ObjectRecord | None, dict[str, Copy], dict[str, OwedRow]]:
        """:meth:`object` and :meth:`placement` as of one instant."""
        ...

    def copies(self, member: str) -> Iterator[Copy]: ...
    def owed(
        self, member: str | None = None, *, doubtful: bool | None = None, limit: int | None = None
    ) -> list[OwedRow]:
        """Owed rows by change number; of one member; only those in doubt (sent, unanswered) or only the others; the
        oldest ``limit`` (a new member owes a row for every object)."""
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
        mark: str = "",
    ) -> Intent:
        """Record ``creating`` objects (a pair is one intent) and an owed ``install`` row for **every** listed member
        (joining, out-of-sync and quarantined ones too: they stay owed); rows of ``asking`` members are claimed by this
        owner and marked sent. Where a live or creating object has the very fingerprint and locator of one, its
        ``member_id`` is its UID from then on: read the records again before asking members. The intent's id ends with
        ``mark``: a caller who never gets the answer knows it by that.
        Raises :class:`StaleMembership`; ValueError for a UID that was ever used."""
        ...

    def go_live(self, intent: str, *, needed: int, serving: Collection[str]) -> bool:
        """``creating -> live`` for all objects of the intent if each has at least ``needed`` confirmed copies on
        members of ``serving``; closes the intent. True also when they are live already. False: not enough yet.
        Raises :class:`NoLongerLive` when they were given up (deleted). Any process may: owner and recoverer compete,
        and exactly one of go_live and abandon_create ever takes effect."""
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
        mark: str = "",
    ) -> Intent:
        """Open an intent to bring a live object from ``revision`` to the next one. Every member with a copy gets an
        owed ``set`` row (those of ``asking`` claimed and sent); members that owe an ``install`` go on owing it, for the
        new revision once committed, and are not asked, nor are those for whose answer this owner still waits: **only
        the intent's ``asked`` may be**. A claim of another owner on such a row is taken over, and what that owner then
        confirms is refused; so better do not ask members that owe something for the object. Old and new locators are
        kept in the rows. ``announced`` of the members moves to the intent's change number. Where another object may
        have the same value in the place that it comes to, the intent has a ``new_member_id``: what members are asked
        for is ``Intent.outcome``.
        Raises :class:`Busy` (for a second change by this owner too), :class:`NoLongerLive`,
        :class:`StaleMembership`."""
        ...

    def commit_set(self, intent: str) -> ObjectRecord:
        """Some member accepted: the record becomes the new revision for good; closes the intent. Idempotent. Comes
        before any ``confirm`` of the new revision (which is refused until then).
        Raises :class:`NoLongerLive` when the object was destroyed, or the change rolled back, meanwhile."""
        ...

    def rollback_set(self, intent: str) -> None:
        """All that were asked refused (``give_up`` each first): rows of the intent become ``install`` of the old
        revision where in doubt, else vanish, or go back to what the member owed before; closes the intent. Nothing
        happens where it is closed already."""
        ...

    # -- destroy -----------------------------------------------------------------------------------------
    def destroy(
        self, uid: bytes, *, asking: Sequence[Asking], membership_revision: int
    ) -> tuple[Tombstone, list[OwedRow]]:
        """Write the tombstone; close any open intent of the object (a create is given up whole: a pair is one); every
        copy and owed row becomes ``owed: destroy`` with all its locators (claimed and sent for ``asking``);
        outstanding attempts are kept, and elsewhere the claim of a living owner who waits for a reply; ``announced``
        moves. Returns the tombstone and all rows. Raises :class:`NoLongerLive` if it is gone already,
        :class:`StaleMembership`."""
        ...

    # -- owed rows ---------------------------------------------------------------------------------------
    # The heart, because an HSM cannot be fenced: each time a member was asked is an *attempt* in the row
    # (:class:`hagroup.core.records.Attempt`), outstanding until it is answered or can no longer execute. A row with an
    # outstanding attempt is never deleted, and nothing routes an operation to a member that has a row for the object.
    # The rules, with the histories that they prevent: hagroup/journal/rules.py.
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
        owner is dead. Each adds an attempt of this owner; those of dead owners are in doubt from now on.
        ``locators`` are added to each. Returns the rows claimed, as they are now: ``asked_before`` says whether to look
        before making anything, ``unanswered`` which older attempts may still execute. Raises :class:`LeaseLost`,
        :class:`StaleMembership`."""
        ...

    def confirm(
        self, confirmations: Sequence[Confirmation], *, membership_revision: int, lease: Lease | None = None
    ) -> list[bool]:
        """Members replied. Each answers the newest attempt of this owner that it did not give up.

        True: the attempt is over, the copy recorded (or removed, for ``destroy``). The row is cleared if no other
        attempt is outstanding; else it is ``settled``: in doubt, free, and to be ended by ``clear_doubt`` or
        ``resolve_attempts``. A ``set``/``install`` confirmed at an older revision than the record's leaves the row as
        ``set`` of the newest.

        False, refused: the object was destroyed meanwhile, the row is another owner's or asks for something else now,
        there is no own attempt, or another attempt changed the object there since it was asked for. For an ``install``
        or ``set`` the caller must now undo what it did on that member, and then say so (``undone``, or ``confirm``
        with ``destroy``): its attempt stands as a ``destroy`` until then. What is owed stays owed.

        Raises :class:`StaleMembership`, :class:`LeaseLost` (then nothing was written: undo, and say ``undone``)."""
        ...

    def undone(self, member: str, uid: bytes) -> None:
        """After a refused confirmation: what this owner did there was removed again. If the object should be there, it
        is owed as ``install`` anew, whatever others confirmed meanwhile (it may have been theirs that was removed)."""
        ...

    def give_up(
        self,
        rows: Sequence[tuple[str, bytes]],
        *,
        doubt: bool,
        reason: str | None = None,
        kind: OwedKind | None = None,
    ) -> None:
        """The owner stops trying: ``doubt`` (no reply came: the attempt stays, ``doubt_since`` set) or a known refusal
        (the attempt is over; ``reason`` kept). The claim is released. ``kind``: of the attempt that ended (None: the
        newest of this owner's); give it where several threads of one process may ask for one object."""
        ...

    def owe(self, rows: Sequence[tuple[str, bytes, OwedKind]], *, reason: str | None = None) -> None:
        """A member was found to lack (``install``), to be behind in (``set``), or to hold what it must not
        (``destroy``): write owed rows, free ones where there is none yet; attempts and claims of a row that is there
        stay. An ``install``/``set`` for what has no record, and a ``destroy`` for what has one, are ignored (whether
        an object is to be is decided for all members at once); copies stay."""
        ...

    def clear_doubt(self, member: str, uid: bytes) -> None:
        """The late window is over, and the member was searched after it: attempts that were given up, and those of dead
        owners, are over. A settled row with no attempt left is deleted; one that is not settled is owed as before.

        *All* of them, also one given up a moment ago: who looked at certain attempts (``unanswered`` of the row that
        it claimed) names those, with ``resolve_attempts``."""
        ...

    def resolve_attempts(self, member: str, uid: bytes, numbers: Collection[int]) -> None:
        """These attempts (by number) can no longer execute: the worker is proved dead and the module is local. As
        ``clear_doubt`` otherwise."""
        ...

    # -- members -----------------------------------------------------------------------------------------
    def add_member(self, member: MemberRecord) -> int:
        """List a member (as ``joining``): revision moves, and an owed ``install`` row is written for every live and
        creating object. Returns the new membership revision. ValueError: there is one of that name."""
        ...

    def remove_member(self, name: str) -> int:
        """With its copies, owed rows, logins and observations. ValueError: there is none of that name."""
        ...

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
        """Change what is given (``reason`` is stored whenever ``membership`` is). Moves the membership revision."""
        ...

    def set_member_facts(
        self,
        name: str,
        *,
        default_extractable: bool | None = None,
        low: int | None = None,
        transport: bytes | None = None,
    ) -> None:
        """What was learnt about a member, and moves no membership revision."""
        ...

    def barrier(self) -> int:
        """The newest change number, as a barrier for :meth:`admit`."""
        ...

    def admit(
        self, name: str, *, barrier: int, low: int, lease: Lease | None, membership_revision: int
    ) -> list[OwedRow]:
        """One transaction: if the member owes nothing from up to ``barrier`` (rows with an outstanding attempt, and
        rows with a reason, aside: they keep that object out, not the member) it becomes ``admitted`` and ``[]`` is
        returned; else the rows that keep it out are returned and nothing changes
        (the oldest thousand, where there are more). ``low`` is stored as finished.
        Raises :class:`LeaseLost`; :class:`StaleMembership`, for a member that is quarantined or not listed too."""
        ...

    def manifest_confirmed(self, name: str, *, high: int, low: int | None = None) -> None:
        """The member's manifest was seen to show ``high``."""
        ...

    # -- leases, owners ----------------------------------------------------------------------------------
    def acquire_lease(self, name: str, *, ttl: float) -> Lease | None:
        """None while somebody else's has not run out (and its owner is alive). The token grows each time, for this
        owner too: an older lease of its own is lost then."""
        ...

    def renew_lease(self, lease: Lease, *, ttl: float) -> Lease:
        """Raises :class:`LeaseLost`."""
        ...

    def release_lease(self, lease: Lease) -> None: ...
    def lease_held(self, name: str) -> bool:
        """Whether somebody alive holds it, and it has not run out."""
        ...

    def owner_alive(self, owner: str) -> bool: ...
    def clients(self) -> list[Client]:
        """Every owner that is alive, of all hosts that share the journal."""
        ...

    def passed_over(self) -> list[PassedOver]:
        """Clients that a change did not wait for any longer, and that were not heard of since, nor are known to have
        ended. (Where one host has the journal nobody is passed over.)"""
        ...

    def forget_passed_over(self, owners: Collection[str]) -> None:
        """A person says that these are over."""
        ...

    def worker_lock(self, member: str) -> tuple[str, str]:
        """A fresh worker lock: (its name for owed rows, the file's path that the worker locks)."""
        ...

    def worker_dead(self, worker: str) -> bool:
        """Proved dead: its lock is free. False where it cannot be proved."""
        ...

    def being_changed(self, member: str) -> bool:
        """Whether some worker of this host is inside a call that changes the member's token."""
        ...

    def cut_off(self, member: str) -> list[str]:
        """Workers of this host that died inside of such a call (a crash of the host itself may hide some)."""
        ...

    def forget_cut_off(self, workers: Collection[str]) -> None:
        """What these may have left on their token was looked for."""
        ...

    def adopt_intent(self, intent: str) -> Intent | None:
        """Take over an intent whose owner is dead, by compare-and-set; with it the claims of that owner on its rows
        (its attempts stay its own, in doubt). None: its owner lives (or is this one), or it is closed."""
        ...

    # -- observations, logins ----------------------------------------------------------------------------
    def observe(self, observations: Sequence[Observation]) -> None:
        """Keeps the newest of each (member, observer). Does not move the change number; the view number moves when
        ``ok`` differs from what was kept."""
        ...

    def observations(self, member: str | None = None) -> list[Observation]: ...
    def begin_login(self, member: str, source: str, stamp: str, *, clear: bool) -> LoginRecord | None:
        """Serialise logins on one member: None, go on (``trying`` is durable); a record: why not (``refused`` with the
        same source and stamp; or ``trying`` of a living owner, another thread of this one too: wait; or of a dead
        owner, unless ``clear`` says that the token's USER_PIN_COUNT_LOW is off: counts as refused). Refusals are kept
        for each source: another source's success does not clear them. A source and stamp that no member accepted yet
        is tried on one member at a time, over all members, and after a refusal on none: the record may be another
        member's (:func:`hagroup.journal.rules.login_refused`)."""
        ...

    def end_login(self, member: str, state: LoginState | None) -> None:
        """``accepted`` or ``refused``; None: no attempt was made or its outcome did not count (``trying`` is withdrawn,
        and what was known before it stands again)."""
        ...

    def logins(self) -> list[LoginRecord]: ...
    def forget_login(self, member: str) -> None:
        """A person says that the PIN source is right now."""
        ...

    # -- events ------------------------------------------------------------------------------------------
    def event(
        self, kind: str, text: str, *, member: str | None = None, data: Mapping[str, str] | None = None
    ) -> None: ...
    def events(self, *, limit: int = 100, since: int = 0) -> list[Event]:
        """The newest ``limit`` events with a number above ``since``, oldest first."""
        ...

    def put_seal(self, seal: Seal, *, lease: Lease) -> None:
        """In place of the one before (:meth:`group` has it). Raises :class:`LeaseLost`; ValueError for one that covers
        less than the one before."""
        ...

    # -- group -------------------------------------------------------------------------------------------
    def update_group(self, *, label: str) -> None:
        """Another label."""
        ...

    def begin_clear(self) -> str:
        """A new epoch, recorded as ``cleared``; every admitted member is out of sync from now on, and is emptied before
        it serves again. Returns the epoch. The objects themselves go by :meth:`clear_some`."""
        ...

    def clear_some(self, limit: int = 200) -> list[bytes]:
        """Tombstones for up to ``limit`` of the objects that there are, as by :meth:`destroy` without asking a member;
        creations under way are given up. Returns their UIDs; call it until there are none."""
        ...

    def begin_rotation(
        self, *, domain_key_id: bytes, partition_key_id: bytes, reference: bytes, rotation: Rotation
    ) -> None:
        """Everything new is sealed under these keys from now on. The membership revision moves: what was sealed before
        cannot be begun any more (who compares it seals anew). ``rotation`` names the keys that are replaced.
        Raises ValueError where these are not the present ones, or another rotation is not finished."""
        ...

    def rewrap(self, envelopes: Sequence[tuple[bytes, int, bytes, bytes]]) -> list[bool]:
        """(UID, revision, envelope, the same sealed under the new keys): put in place where the record still is the
        one that was sealed anew. No revision moves, and no member is asked."""
        ...

    def finish_rotation(self) -> None:
        """No envelope is under the replaced keys any more (that is the caller's to know). Idempotent."""
        ...

    # -- this process ------------------------------------------------------------------------------------
    def reopen_after_fork(self) -> None:
        """In a forked child, before anything else: a new owner. All methods but ``view_number`` raise until then."""
        ...

    def close(self) -> None:
        """Ends this owner. Idempotent."""
        ...
