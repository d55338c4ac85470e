"""Comparing every object on every member with the group's record of it; nothing is changed.

Replicas are the same key where their fingerprint (made inside the member, over all of the key) is the recorded one, or
where using the key shows it. Where neither can be had, that is said: *unproven* is not *the same*.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from hagroup.core.attributes import CKA
from hagroup.core.calls import Ckr, DeadlinePassed
from hagroup.core.records import Locator, ObjectRecord, ObjectState, Tombstone
from hagroup.core.templates import install_template
from hagroup.engine import proof, replica
from hagroup.engine.group import GroupEngine
from hagroup.engine.member import Life
from hagroup.engine.proof import Proof
from hagroup.engine.roster import CONNECTION_LOST
from hagroup.engine.token_contents import InventoryEntry, inventory

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

    def __init__(self, group: GroupEngine, name: str, life: Life) -> None:
        self._group = group
        self._name = name
        self._life = life
        self._timeout = group.config.timeouts.generate
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
        for record in self._group.journal.objects():
            if record.state is ObjectState.LIVE:
                self._object(record, places)
            else:
                self._taken.update(entry.handle for entry in places.get(record.locator, []))
        tombstones: dict[Locator, list[Tombstone]] = {}
        for tombstone in self._group.journal.tombstones():
            for locator in tombstone.locators:
                tombstones.setdefault(locator, []).append(tombstone)
        for entry in entries:
            if entry.handle not in self._taken:
                self.entries.append(entry)
                self._stranger(entry, tombstones.get(entry.locator, []))

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
        self._taken.update(matching)
        _, owed = self._group.journal.placement(record.uid)
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
        now = self._group.journal.object(record.uid)
        return now is not None and now.revision == record.revision

    def _replica(self, handle: int, record: ObjectRecord) -> None:
        connection = self._life.connection
        result = proof.prove(connection, handle, record, timeout=self._timeout)
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
            same = proof.matches(
                self._life.connection, entry.handle, kind, tombstone.fingerprint, timeout=self._timeout
            )
            if same is not False:
                self.differences.append(
                    Found(
                        member=self._name,
                        difference=Difference.REAPPEARED,
                        uid=tombstone.uid.hex(),
                        label=entry.label.decode(errors="replace"),
                        text="the group destroyed it; the member has it again",
                    )
                )
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


def verify(group: GroupEngine) -> Verified:
    """Compare all reachable members; what differs because it is on its way is told as owed."""
    found = Verified(objects=0, members=[], proved=0, unproven=[], differences=[], unmanaged=[])
    proved = 0
    for name, record in group.view.members.items():
        member = group.roster.members.get(name)
        life = None if member is None else member.life
        try:
            if life is None or life.keys is None:
                why = (member.reason if member is not None else "not configured here") or record.membership.value
                raise _Away(why)
            run = _Run(group, name, life)
            run.compare()
        except (Ckr, DeadlinePassed, _Away, *CONNECTION_LOST) as error:
            found.differences.append(
                Found(member=name, difference=Difference.UNREACHABLE, uid=None, label="", text=str(error))
            )
            continue
        found.members.append(name)
        found.unproven.extend(run.unproven)
        found.differences.extend(run.differences)
        found.unmanaged.extend(run.strangers)
        proved += run.proved
        data = {"unmanaged": str(len(run.strangers))}
        group.journal.event(UNMANAGED_COUNTED, "by a comparison with the group's objects", member=name, data=data)
    return msgspec.structs.replace(found, objects=group.journal.counts()["live"], proved=proved)


def strangers(group: GroupEngine, name: str, life: Life) -> list[InventoryEntry]:
    """Objects on a member's token that are not the group's; what the group destroyed, and is there, among them."""
    run = _Run(group, name, life)
    run.compare()
    return run.entries


class _Away(Exception):
    """The member is not connected."""
