"""One write transaction, whatever the backend: what it reads, what it writes, and the conditions that all share.

What others have to notice goes through here, so that no writer can forget the change number, the list of what moved, or
an index. The methods of a journal (``changing``, ``owing``, ``membership``, ``notes``) are written once, over this; a
backend gives the primitives.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Concatenate, ParamSpec, TypeVar

from msgspec.structs import replace

from hagroup.core.records import (
    Copy,
    GroupRecord,
    Intent,
    Lease,
    Locator,
    LoginRecord,
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
from hagroup.journal import rules
from hagroup.journal.api import LeaseLost, StaleMembership
from hagroup.journal.rules import Asker, Situation
from hagroup.journal.sealed import Sealed

P = ParamSpec("P")
R = TypeVar("R")
W = TypeVar("W", bound="Writer")

Trying = tuple[LoginRecord, LoginRecord | None]
"""A login that is under way, and what was known before it."""


class Transaction(ABC):
    """Reads are of one instant; what is written takes effect whole, or not at all."""

    owner: str
    now: float
    wall: float
    alive: Callable[[str], bool]

    # -- numbers -------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def change(self) -> int:
        """This transaction's change number: above every barrier that was taken before it commits."""

    @property
    @abstractmethod
    def membership_revision(self) -> int: ...
    @abstractmethod
    def touch(self, uid: bytes) -> None:
        """The object's record, copies or owed rows move."""

    @abstractmethod
    def touch_members(self) -> None: ...
    @abstractmethod
    def touch_all(self) -> None:
        """So much moves that it is not listed one by one."""

    @abstractmethod
    def notice(self) -> None:
        """Others look again, although no change number moves."""

    @property
    @abstractmethod
    def sealed(self) -> Sealed | None: ...
    @abstractmethod
    def seal(self, sealed: Sealed | None) -> None:
        """No transaction commits from here on, but those of the one who moves the journal. All look again."""

    @abstractmethod
    def under_way(self) -> bool:
        """Whether an intent is open, or some owner waits for a member's answer."""

    # -- objects, copies -----------------------------------------------------------------------------------------

    @abstractmethod
    def object(self, uid: bytes) -> ObjectRecord | None: ...
    @abstractmethod
    def insert_objects(self, records: Sequence[ObjectRecord]) -> None:
        """New ones, ``creating``."""

    @abstractmethod
    def some_objects(self, limit: int) -> list[bytes]:
        """UIDs of some of the objects that there are."""

    @abstractmethod
    def update_object(self, record: ObjectRecord) -> None: ...
    @abstractmethod
    def set_live(self, uid: bytes) -> None: ...
    @abstractmethod
    def others_in_place(self, record: ObjectRecord) -> Iterable[ObjectRecord]:
        """Other objects with the locator of ``record``."""

    @abstractmethod
    def has_twin(self, record: ObjectRecord) -> bool:
        """Whether an object has the very fingerprint and locator of this new one."""

    @abstractmethod
    def copies(self, uid: bytes) -> dict[str, Copy]: ...
    @abstractmethod
    def put_copy(self, copy: Copy) -> None: ...
    @abstractmethod
    def drop_copy(self, member: str, uid: bytes) -> None: ...
    @abstractmethod
    def tombstone(self, uid: bytes) -> Tombstone | None: ...
    @abstractmethod
    def entomb(self, record: ObjectRecord, stone: Tombstone) -> None:
        """Tombstone in place of the record; copies and owed rows stay as they are."""

    # -- owed rows -----------------------------------------------------------------------------------------------

    @abstractmethod
    def owed_of(self, uid: bytes) -> dict[str, OwedRow]: ...
    @abstractmethod
    def insert_owed(self, new: Sequence[OwedRow]) -> None: ...
    @abstractmethod
    def put_owed(self, before: OwedRow | None, after: OwedRow | None) -> None:
        """Bring a row from what was read to what it becomes."""

    @abstractmethod
    def hinders(self, member: str, barrier: int, limit: int) -> list[OwedRow]:
        """Rows up to the barrier without an outstanding attempt or a reason: they keep the member out."""

    # -- intents, members, group ---------------------------------------------------------------------------------

    @abstractmethod
    def intent(self, id_: str | None) -> tuple[Intent, str | None] | None:
        """The intent and its outcome (None: open)."""

    @abstractmethod
    def add_intent(self, intent: Intent) -> None: ...
    @abstractmethod
    def close_intent(self, intent: Intent, outcome: str) -> None:
        """Its outcome is remembered, for an owner that was stopped in between; its secrets' envelope is not."""

    @abstractmethod
    def adopt(self, intent: Intent) -> None:
        """It is this owner's from now on."""

    @abstractmethod
    def members(self) -> list[MemberRecord]: ...
    @abstractmethod
    def insert_member(self, member: MemberRecord) -> None:
        """At the end of the list."""

    @abstractmethod
    def put_member(self, member: MemberRecord) -> None: ...
    @abstractmethod
    def drop_member(self, name: str) -> None:
        """With all that is kept of it."""

    @abstractmethod
    def owe_everything(self, member: str) -> None:
        """A new member owes an ``install`` for every object."""

    @abstractmethod
    def announce(self, names: Iterable[str]) -> None:
        """Their manifests may show this transaction's change from now on."""

    @abstractmethod
    def move_membership(self) -> int:
        """The new membership revision."""

    @abstractmethod
    def group(self) -> GroupRecord: ...
    @abstractmethod
    def update_identity(self, **values: str | bytes | Rotation) -> None:
        """Fields of the group record by name."""

    @abstractmethod
    def begin_epoch(self) -> str:
        """A new epoch, greater than all before it."""

    # -- leases, observations, logins, events --------------------------------------------------------------------

    @abstractmethod
    def lease(self, name: str) -> tuple[str | None, int, float] | None:
        """Its owner (None: given back), token, and the boot time at which it ends."""

    @abstractmethod
    def put_lease(self, lease: Lease) -> None: ...
    @abstractmethod
    def free_lease(self, name: str) -> None: ...
    @abstractmethod
    def observation(self, member: str, observer: str) -> Observation | None: ...
    @abstractmethod
    def put_observation(self, seen: Observation) -> None: ...
    @abstractmethod
    def logins(self) -> list[Trying]:
        """All, each with what was known before it where it is under way."""

    @abstractmethod
    def put_login(self, record: LoginRecord, before: LoginRecord | None = None) -> None: ...
    @abstractmethod
    def drop_login(self, member: str, source: str) -> None: ...
    @abstractmethod
    def add_event(self, kind: str, text: str, member: str | None, data: dict[str, str]) -> None: ...
    @abstractmethod
    def put_seal(self, seal: Seal) -> None:
        """In place of the one before; :meth:`group` has it."""

    # -- conditions ----------------------------------------------------------------------------------------------

    def expect_membership(self, revision: int) -> None:
        if revision != self.membership_revision:
            raise StaleMembership(f"membership revision {revision}, now {self.membership_revision}")

    def expect_lease(self, lease: Lease | None) -> None:
        if lease is None:
            return
        found = self.lease(lease.name)
        if found is None or found[:2] != (lease.owner, lease.token) or lease.owner != self.owner:
            raise LeaseLost(f"lease {lease.name} is held by another")
        if found[2] <= self.now:
            raise LeaseLost(f"lease {lease.name} ran out")

    def member(self, name: str) -> MemberRecord | None:
        return next((member for member in self.members() if member.name == name), None)

    # -- what all share ------------------------------------------------------------------------------------------

    def copy(self, member: str, uid: bytes) -> Copy | None:
        return self.copies(uid).get(member)

    def owed(self, member: str, uid: bytes) -> OwedRow | None:
        return self.owed_of(uid).get(member)

    def asker(self, worker: str | None) -> Asker:
        return Asker(self.owner, worker, self.change, self.now)

    def situation(self, uid: bytes) -> Situation:
        """What there is of the object, for a rule."""
        record = self.object(uid)
        if record is None or record.intent is None or record.state is not ObjectState.LIVE:
            return Situation(record)
        return Situation(record, record.revision + 1)

    def apply(self, member: str, uid: bytes, before: OwedRow | None, outcome: rules.Outcome) -> bool:
        """Write down what a rule decided."""
        after = outcome.row
        if before is None and after is not None and after.kind is OwedKind.DESTROY:
            stone = self.tombstone(uid)
            if stone is not None:
                after = replace(after, locators=rules.merged(after.locators, stone.locators))
        self.put_owed(before, after)
        if outcome.copy is not None:
            self.put_copy(outcome.copy)
        if outcome.forget_copy:
            self.drop_copy(member, uid)
        return outcome.accepted

    def bury(
        self, record: ObjectRecord, extra: Iterable[Locator], *, given_up: bool = False
    ) -> tuple[Tombstone, dict[str, OwedRow]]:
        """Tombstone in place of the record; every copy and owed row becomes ``destroy``.

        :param given_up: see :class:`Tombstone`.
        """
        uid = record.uid
        copies, owed = self.copies(uid), self.owed_of(uid)
        everywhere = rules.merged(
            (record.locator,),
            extra,
            *((copy.locator,) for copy in copies.values()),
            *(row.locators for row in owed.values()),
        )
        stone = Tombstone(
            uid=uid,
            change=self.change,
            time=self.wall,
            locators=everywhere,
            fingerprint=record.fingerprint,
            given_up=given_up,
        )
        self.entomb(record, stone)
        condemned = {}
        for member in dict.fromkeys([*owed, *copies]):
            before = owed.get(member)
            known = rules.merged((record.locator,), extra, (copies[member].locator,) if member in copies else ())
            row = before or rules.new_row(member, uid, OwedKind.DESTROY, self.change)
            condemned[member] = rules.condemned(row, known, self.change, self.alive, there=member in copies)
            self.put_owed(before, condemned[member])
        self.announce(condemned)
        return stone, condemned


class Writer(ABC):
    """What the writing parts of a journal need of their backend."""

    owner: str
    former_owners: frozenset[str] = frozenset()

    @abstractmethod
    def _write(self) -> AbstractContextManager[Transaction]:
        """One transaction: durable, and the view number moved, when the block was left."""

    @abstractmethod
    def _carry_out(self, attempt: Callable[[], R]) -> R:
        """Run it; again from its beginning where the backend found that what it had read changed meanwhile."""


def one_transaction(method: Callable[Concatenate[W, P], R]) -> Callable[Concatenate[W, P], R]:
    """For a method that is one ``with self._write()`` and has no other effect: it may be run more than once."""

    @functools.wraps(method)
    def run(self: W, /, *values: P.args, **named: P.kwargs) -> R:
        return self._carry_out(lambda: method(self, *values, **named))

    return run
