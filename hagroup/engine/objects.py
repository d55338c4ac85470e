"""Objects as operations use them: token objects of the journal, and session objects of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

import msgspec

from hagroup.core.attributes import CKA
from hagroup.core.calls import Ckr, DeadlinePassed, Handle
from hagroup.core.ckr import CKR
from hagroup.core.records import ObjectRecord, is_true
from hagroup.engine import replica
from hagroup.engine.holding import opens
from hagroup.engine.member import Life, Member, Missing
from hagroup.engine.view import ObjectView


class Repairs(msgspec.Struct, frozen=True):
    """Where an operation reports what it found wrong with a replica; both return at once."""

    missing: Callable[[Member, bytes], None]
    prove: Callable[[Member, bytes], None]
    again: Callable[[bytes], ObjectView | None]
    """The object as of now."""


class TokenObject:
    """A live token object, as of one reading of the view."""

    __slots__ = ("_repairs", "_timeout", "_view", "uid")

    def __init__(self, view: ObjectView, repairs: Repairs, timeout: float) -> None:
        self._view = view  # as a whole: one is made for each call
        self.uid = view.record.uid
        self._repairs = repairs
        self._timeout = timeout

    @property
    def record(self) -> ObjectRecord:
        return self._view.record

    @property
    def changing(self) -> bool:
        return self._view.changing

    @property
    def always_authenticate(self) -> bool:
        return self._view.always_authenticate

    def on(self, member: Member) -> bool:
        view = self._view
        if member.name not in view.members:
            return False
        return not view.private or (member.life is not None and member.life.logged_in)

    def handle(self, member: Member, life: Life) -> Handle:
        handle = life.handles.get(self.uid)
        if handle is not None:
            return handle
        return life.handles.find(self.uid, lambda: self._locate(life), timeout=self._timeout)

    def _locate(self, life: Life) -> Handle:
        found = replica.locate(
            life.connection,
            [self.record.locator],
            self.record.fingerprint,
            self.record.attributes,
            timeout=self._timeout,
        )
        if len(found) != 1:  # never the first of several (DESIGN.md 4.4)
            raise Missing(None if found else self.uid)
        return found[0]

    def forget(self, member: Member, life: Life) -> None:
        life.handles.pop(self.uid, None)

    def missing(self, member: Member) -> None:
        self._repairs.missing(member, self.uid)

    def suspect_replica(self, member: Member) -> None:
        self._repairs.prove(member, self.uid)

    def renew(self) -> bool:
        view = self._repairs.again(self.uid)
        if view is None:
            raise Ckr(CKR.KEY_HANDLE_INVALID, "C_FindObjects")
        before, self._view = self._view, view
        return view.members != before.members or (view.record is not before.record and view.record != before.record)


class SessionObject:
    """A session object: made on one member, sealed into memory, unwrapped on others when first needed there."""

    def __init__(self, record: ObjectRecord, owner: int, *, home: str | None, timeout: float) -> None:
        self.uid = record.uid
        self.record = record
        self.owner = owner
        """Id of the virtual session that it dies with."""
        self._home = home
        """The one member that can have it (it could not be sealed); None: any."""
        self._timeout = timeout
        self._places: dict[str, tuple[Life, Handle]] = {}
        self._making: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self.always_authenticate = is_true(record, CKA.ALWAYS_AUTHENTICATE)

    @property
    def private(self) -> bool:
        return is_true(self.record, CKA.PRIVATE)

    def placed(self, member: str, life: Life, handle: Handle) -> None:
        self._places[member] = (life, handle)

    def places(self) -> list[tuple[str, Life, Handle]]:
        """Where it is now, as far as this process knows."""
        with self._lock:
            return [(name, life, handle) for name, (life, handle) in self._places.items()]

    def _placed_in(self, member: Member, life: Life | None) -> bool:
        place = self._places.get(member.name)
        return place is not None and place[0] is life

    def on(self, member: Member) -> bool:
        life = member.life
        if life is None:
            return False
        if self._home is not None:
            return member.name == self._home and self._placed_in(member, life)
        envelope = self.record.envelope
        return self._placed_in(member, life) or envelope is None or opens(life.keys, envelope)

    def handle(self, member: Member, life: Life) -> Handle:
        place = self._places.get(member.name)
        if place is not None and place[0] is life:
            return place[1]
        if self._home is not None:
            raise Missing
        with self._lock:
            making = self._making.setdefault(member.name, threading.Lock())
        # One lock for each member: a member that hangs in it must not hold up a call that goes to another one.
        if not making.acquire(timeout=self._timeout):
            raise DeadlinePassed(f"member {member.name}: another call's making of a session object there hangs")
        try:
            while True:
                place = self._places.get(member.name)
                if place is not None and place[0] is life:
                    return place[1]
                record = self.record
                handle = replica.install_session(life.connection, life.keys, record, sid=0, timeout=self._timeout)
                with self._lock:
                    if record is self.record:  # else it was changed meanwhile: made again with the new attributes
                        self._places[member.name] = (life, handle)
        finally:
            making.release()

    def changed(self, record: ObjectRecord, members: Collection[str]) -> None:
        """Its attributes are others now, on these members; where else it was it is made anew when it is needed."""
        with self._lock:
            self.record = record
            if self._home is None:
                self._places = {name: place for name, place in self._places.items() if name in members}

    def sealed_anew(self, before: ObjectRecord, envelope: bytes) -> None:
        """The domain's keys were changed."""
        with self._lock:
            if self.record is before:
                self.record = msgspec.structs.replace(before, envelope=envelope)

    def forget(self, member: Member, life: Life) -> None:
        with self._lock:
            place = self._places.get(member.name)
            if place is not None and place[0] is life and self._home is None:
                del self._places[member.name]

    def missing(self, member: Member) -> None:
        """It ended with its connection; the next use makes it anew."""

    def suspect_replica(self, member: Member) -> None:
        """Nothing to repair: it is in memory."""

    def renew(self) -> bool:
        return False

    @property
    def changing(self) -> bool:
        return False

    def renew_after_fork(self) -> None:
        self._lock = threading.Lock()
        self._making.clear()
        self._places.clear()

    def end(self) -> None:
        """Destroy it wherever it is; a member that does not answer has lost it with its session anyway."""
        for _, life, handle in self.places():
            if not life.connection.alive:
                continue
            try:
                life.connection.destroy(handle, timeout=self._timeout)
            except Ckr as error:
                if error.rv not in (CKR.OBJECT_HANDLE_INVALID, CKR.SESSION_HANDLE_INVALID, CKR.SESSION_CLOSED):
                    raise
        with self._lock:
            self._places.clear()
