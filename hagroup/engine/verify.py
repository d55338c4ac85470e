"""Comparing every object on every member with the group's record of it; nothing is changed.

Replicas are the same key where their fingerprint (made inside the member, over all of the key) is the recorded one, or
where using the key shows it. Where neither can be had, that is said: *unproven* is not *the same*.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum

import msgspec

from hagroup.config.model import GroupConfig, MemberConfig
from hagroup.config.pins import Pin
from hagroup.core.attributes import CKA
from hagroup.core.calls import Ckr, DeadlinePassed
from hagroup.core.ckr import CKR
from hagroup.core.records import Event, Locator, MemberRecord, ObjectRecord, ObjectState, OwedKind, Tombstone
from hagroup.core.templates import install_template
from hagroup.engine import holding, proof, replica
from hagroup.engine.group import GroupEngine
from hagroup.engine.login import APPLICATION, PIN_ERRORS, log_in
from hagroup.engine.member import Life, Member
from hagroup.engine.opening import CONNECTION_LOST, open_life
from hagroup.engine.proof import Proof
from hagroup.engine.token_contents import InventoryEntry, inventory
from hagroup.errors import HAError
from hagroup.journal.api import Journal
from hagroup.members import ModuleProblem

UNMANAGED_COUNTED = "unmanaged counted"
"""Event by which ``status`` knows how many objects on a member are not the group's."""


class Difference(StrEnum):
    MISSING = "missing"
    SEVERAL = "several"
    OTHER_KEY = "another key"
    ATTRIBUTES = "attributes differ"
    OWED = "owed"
    REAPPEARED = "destroyed, but there"
    UNREACHABLE = "member not reachable"


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not as it should be on one member."""

    member: str
    difference: Difference
    uid: str | None
    label: str
    text: str


class Stranger(msgspec.Struct, frozen=True, kw_only=True):
    """An object on a member's token that is not the group's: no difference, and never served."""

    member: str
    object_class: int
    key_type: int | None
    label: str
    id: str


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What ``ha-admin verify --json`` prints; fields are added, never renamed."""

    objects: int
    """Live objects of the group."""
    members: list[str]
    """Members that were compared."""
    proved: int
    """Replicas shown to be the same key or object."""
    unproven: list[Found]
    """Replicas that nothing contradicts, and whose use does not permit to show more."""
    differences: list[Found]
    unmanaged: list[Stranger]


class _Run:
    """One comparison of one member."""

    def __init__(self, journal: Journal, name: str, life: Life, *, timeout: float) -> None:
        self._journal = journal
        self._name = name
        self._life = life
        self._timeout = timeout
        self._taken: set[int] = set()
        self.proved = 0
        self.unproven: list[Found] = []
        self.differences: list[Found] = []
        self.strangers: list[Stranger] = []
        self.entries: list[InventoryEntry] = []
        """Of the strangers, and of what was destroyed and is there again."""

    def compare(self) -> None:
        connection = self._life.connection
        entries = [entry for entry in inventory(connection, timeout=self._timeout) if not entry.own and not entry.ghost]
        places: dict[Locator, list[InventoryEntry]] = {}
        for entry in entries:
            places.setdefault(entry.locator, []).append(entry)
        for record in self._journal.objects():
            if record.state is ObjectState.LIVE:
                self._object(record, places)
            else:
                self._taken.update(entry.handle for entry in places.get(record.locator, []))
        tombstones: dict[Locator, list[Tombstone]] = {}
        for tombstone in self._journal.tombstones():
            for locator in tombstone.locators:
                tombstones.setdefault(locator, []).append(tombstone)
        for entry in entries:
            if entry.handle not in self._taken and self._is_there(entry):
                self.entries.append(entry)
                self._stranger(entry, tombstones.get(entry.locator, []))

    def _is_there(self, entry: InventoryEntry) -> bool:
        """It may have been destroyed since the token was read."""
        try:
            self._life.connection.get(entry.handle, [int(CKA.CLASS)], timeout=self._timeout)
        except Ckr as error:
            if error.rv not in _GONE:
                raise
            return False
        return True

    def _found(self, difference: Difference, record: ObjectRecord, text: str) -> Found:
        label = record.attributes.get(CKA.LABEL, b"").decode(errors="replace")
        return Found(member=self._name, difference=difference, uid=record.uid.hex(), label=label, text=text)

    def _object(self, record: ObjectRecord, places: dict[Locator, list[InventoryEntry]]) -> None:
        connection = self._life.connection
        matching = [
            entry.handle
            for entry in places.get(record.locator, [])
            if replica.is_this(connection, entry.handle, record, timeout=self._timeout)
        ]
        others = [entry.handle for entry in places.get(record.locator, []) if entry.handle not in matching]
        if not matching and self._still(record):  # it may have come, or been renamed, since the token was read
            matching = replica.locate(
                connection, [record.locator], record.fingerprint, record.attributes, timeout=self._timeout
            )
        self._taken.update(matching)
        _, owed = self._journal.placement(record.uid)
        row = owed.get(self._name)
        if row is not None and not row.settled:
            self.differences.append(
                self._found(Difference.OWED, record, f"{row.kind.value}: {row.reason or 'not yet'}")
            )
            return
        if len(matching) == 1:
            self._replica(matching[0], record)
        elif self._still(record):
            if matching:
                text = f"{len(matching)} objects there are this one by all that can be compared"
                self.differences.append(self._found(Difference.SEVERAL, record, text))
            elif others:
                text = "what is there by this name is another key or object"
                self.differences.append(self._found(Difference.OTHER_KEY, record, text))
            else:
                self.differences.append(self._found(Difference.MISSING, record, "not on the token"))

    def _still(self, record: ObjectRecord) -> bool:
        """An application may have changed or destroyed it while we looked."""
        now = self._journal.object(record.uid)
        return now is not None and now.revision == record.revision

    def _replica(self, handle: int, record: ObjectRecord) -> None:
        connection = self._life.connection
        try:
            result = proof.prove(connection, handle, record, timeout=self._timeout)
        except Ckr as error:
            if error.rv not in _GONE:
                raise
            if self._still(record):
                self.differences.append(self._found(Difference.MISSING, record, "it vanished while it was compared"))
            return
        if result is Proof.MISMATCH:
            if self._still(record):
                text = "its use shows another key, or one without its value"
                self.differences.append(self._found(Difference.OTHER_KEY, record, text))
            return
        differ = self._attributes(handle, record)
        if differ and self._still(record):
            self.differences.append(self._found(Difference.ATTRIBUTES, record, ", ".join(differ)))
        if result is Proof.MATCH:
            self.proved += 1
        else:
            text = "UNPROVEN: no permitted use of it shows that it is the same key"
            self.unproven.append(self._found(Difference.OTHER_KEY, record, text))

    def _attributes(self, handle: int, record: ObjectRecord) -> list[str]:
        """Names of attributes that are otherwise there. What the member does not let read is passed over."""
        expected = {
            int(number): value
            for number, value in install_template(record, token=True)
            if isinstance(value, bytes) and number not in _NOT_COMPARED
        }
        values, _ = self._life.connection.get(handle, sorted(expected), timeout=self._timeout)
        return [
            _attribute(number)
            for number, value in expected.items()
            if number in values and not _same(number, values[number], value)
        ]

    def _stranger(self, entry: InventoryEntry, tombstones: list[Tombstone]) -> None:
        for tombstone in tombstones:
            kind = entry.locator.object_class
            try:
                same = proof.matches(
                    self._life.connection, entry.handle, kind, tombstone.fingerprint, timeout=self._timeout
                )
            except Ckr as error:
                if error.rv in _GONE:
                    return  # destroyed while we looked
                raise
            if same is not False:
                self.differences.append(self._reappeared(entry, tombstone))
                return
        self.strangers.append(
            Stranger(
                member=self._name,
                object_class=entry.locator.object_class,
                key_type=entry.key_type,
                label=entry.label.decode(errors="replace"),
                id=entry.id.hex(),
            )
        )

    def _reappeared(self, entry: InventoryEntry, tombstone: Tombstone) -> Found:
        _, owed = self._journal.placement(tombstone.uid)
        pending = self._name in owed
        return Found(
            member=self._name,
            difference=Difference.OWED if pending else Difference.REAPPEARED,
            uid=tombstone.uid.hex(),
            label=entry.label.decode(errors="replace"),
            text="destroy: not yet" if pending else "the group destroyed it; the member has it again",
        )


_GONE = (CKR.OBJECT_HANDLE_INVALID, CKR.KEY_HANDLE_INVALID)
_NOT_COMPARED = (CKA.START_DATE, CKA.END_DATE)
"""Reading them from a private object fails for all of it on SoftHSM (DESIGN.md 8, trap 7)."""
_NUMBERS = (CKA.MODULUS, CKA.PUBLIC_EXPONENT, CKA.PRIME, CKA.SUBPRIME, CKA.BASE)


def _same(number: int, one: bytes, other: bytes) -> bool:
    return one.lstrip(b"\0") == other.lstrip(b"\0") if number in _NUMBERS else one == other


def _attribute(number: int) -> str:
    try:
        return f"CKA_{CKA(number).name}"
    except ValueError:
        return f"0x{number:x}"


def verify(config: GroupConfig, journal: Journal, pins: Mapping[str, tuple[Pin, str, str]]) -> Verified:
    """Compare all members that can be reached; what differs because it is on its way is told as owed.

    No engine runs here: it would repair what it comes across, and so change what is to be looked at.

    :param pins: user PIN of each member, its source and stamp.
    """
    found = Verified(objects=0, members=[], proved=0, unproven=[], differences=[], unmanaged=[])
    proved = 0
    refused = False
    configured = {member.name: member for member in config.members}
    for record in journal.members():
        try:
            if record.name not in configured:
                raise _Away("not in hagroup.toml of this host")
            if refused and pins[record.name][1] == APPLICATION:
                raise _Away("not tried: another member refused this PIN")
            with _looking(config, configured[record.name], journal, record, pins[record.name]) as life:
                run = _Run(journal, record.name, life, timeout=config.timeouts.generate)
                run.compare()
        except (Ckr, DeadlinePassed, ModuleProblem, HAError, _Away, *CONNECTION_LOST) as error:
            refused = refused or (isinstance(error, Ckr) and error.rv in PIN_ERRORS)
            found.differences.append(
                Found(member=record.name, difference=Difference.UNREACHABLE, uid=None, label="", text=str(error))
            )
            continue
        found.members.append(record.name)
        found.unproven.extend(run.unproven)
        found.differences.extend(run.differences)
        found.unmanaged.extend(run.strangers)
        proved += run.proved
        _remember(journal, record.name, len(run.strangers))
    return msgspec.structs.replace(found, objects=journal.counts()["live"], proved=proved)


RECENT = 500
"""Events among which it is looked for."""


def unmanaged_counted(events: Sequence[Event], name: str) -> int | None:
    """As it was counted last, if that is among the newest events."""
    for event in reversed(events):
        if event.kind == UNMANAGED_COUNTED and event.member == name:
            return int(event.data.get("unmanaged", "0"))
    return None


def _remember(journal: Journal, name: str, count: int) -> None:
    if count != unmanaged_counted(journal.events(limit=RECENT), name):
        text = f"{count} objects on its token are not the group's"
        journal.event(UNMANAGED_COUNTED, text, member=name, data={"unmanaged": str(count)})


_REPAIRS = {
    Difference.MISSING: OwedKind.INSTALL,
    Difference.SEVERAL: OwedKind.INSTALL,
    Difference.OTHER_KEY: OwedKind.INSTALL,
    Difference.ATTRIBUTES: OwedKind.INSTALL,
    Difference.REAPPEARED: OwedKind.DESTROY,
}


def repairable(found: Verified) -> dict[str, dict[bytes, OwedKind]]:
    """By member's name and UID: what makes the differences go away that are not on their way already."""
    wrong: dict[str, dict[bytes, OwedKind]] = {}
    for one in found.differences:
        if one.difference in _REPAIRS and one.uid is not None:
            wrong.setdefault(one.member, {})[bytes.fromhex(one.uid)] = _REPAIRS[one.difference]
    return wrong


@contextmanager
def _looking(
    config: GroupConfig, member: MemberConfig, journal: Journal, record: MemberRecord, pin: tuple[Pin, str, str]
) -> Iterator[Life]:
    """The member, logged in, with both secrets proved."""
    timeout = config.timeouts.generate
    life = open_life(member, journal, generation=1, timeout=timeout, serial=record.serial)
    try:
        if life.token.serial != record.serial:
            raise _Away(f"another token is in its place: {life.token.serial}, not {record.serial}")
        known = Member(member, rank=(0, 0), standby=False)
        log_in(journal, known, life, *pin, automatic=pin[1] != APPLICATION, timeout=timeout)
        group = journal.group()
        life.keys = holding.learn(journal, group, record, member.wrap_mechanism, life.connection, timeout=timeout)
        yield life
    finally:
        life.connection.close()


def strangers(group: GroupEngine, name: str, life: Life) -> list[InventoryEntry]:
    """Objects on a member's token that are not the group's; what the group destroyed, and is there, among them, but not
    what it was making and gave up: that goes."""
    given_up = {locator for stone in group.journal.tombstones() if stone.given_up for locator in stone.locators}
    run = _Run(group.journal, name, life, timeout=group.config.timeouts.generate)
    run.compare()
    rows = [row for row in group.journal.owed(name) if row.kind is OwedKind.DESTROY]
    going = given_up & {locator for row in rows for locator in row.locators}
    return [entry for entry in run.entries if entry.locator not in going]


class _Away(Exception):
    """The member cannot be looked at."""
