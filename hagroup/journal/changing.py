"""Create, set attributes, destroy: the same for every backend."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence

from msgspec.structs import replace

from hagroup.core.records import (
    FingerprintKind,
    Intent,
    IntentKind,
    Locator,
    ObjectRecord,
    ObjectState,
    OwedKind,
    OwedRow,
    Tombstone,
)
from hagroup.journal import rows, rules
from hagroup.journal.api import Asking, Busy, NoLongerLive
from hagroup.journal.transaction import Transaction, Writer, one_transaction

LIVE, DELETED, COMMITTED, ROLLED_BACK = "live", "deleted", "committed", "rolled back"
"""Outcomes of closed intents."""


class Changing(Writer):
    """The part of a journal that orders changes of objects."""

    # -- create --------------------------------------------------------------------------------------------------

    @one_transaction
    def begin_create(
        self, objects: Sequence[ObjectRecord], *, asking: Sequence[Asking], membership_revision: int, mark: str = ""
    ) -> Intent:
        with self._write() as t:
            t.expect_membership(membership_revision)
            names = [member.name for member in t.members()]
            asked = _asked(asking, names)
            uids = tuple(record.uid for record in objects)
            intent = _new_intent(t, IntentKind.CREATE, uids, asked=tuple(asked), mark=mark)
            t.add_intent(intent)
            owed: list[OwedRow] = []
            new: list[ObjectRecord] = []
            for record in objects:
                if t.tombstone(record.uid) is not None or t.object(record.uid) is not None:
                    raise ValueError(f"the UID {record.uid.hex()} names another object, for ever")
                made = replace(record, state=ObjectState.CREATING, intent=intent.id, change=t.change)
                twin = any(rows.same_place(made, earlier) for earlier in new) or t.has_twin(made)
                if twin and made.object_class != rows.DOMAIN_PARAMETERS:  # these have no CKA_ID
                    made = replace(made, member_id=made.uid)  # nothing else would separate them on a member
                new.append(made)
                for name in names:
                    row = rules.new_row(
                        name,
                        record.uid,
                        OwedKind.INSTALL,
                        t.change,
                        revision=record.revision,
                        locators=(made.locator,),
                    )
                    owed.append(rules.asked(row, t.asker(asked[name])) if name in asked else row)
            t.insert_objects(new)
            t.insert_owed(owed)
        return intent

    @one_transaction
    def go_live(self, intent: str, *, needed: int, serving: Collection[str]) -> bool:
        with self._write() as t:
            found = t.intent(intent)
            if found is None or found[1] == DELETED:
                raise NoLongerLive("the objects were given up by another process")
            opened, outcome = found
            if outcome == LIVE:
                return True
            for uid in opened.uids:
                owed = t.owed_of(uid)
                held = [name for name in t.copies(uid) if name in serving]
                if sum(1 for name in held if name not in owed or owed[name].settled) < needed:
                    return False
            for uid in opened.uids:
                t.set_live(uid)
            t.close_intent(opened, LIVE)
        return True

    @one_transaction
    def abandon_create(self, intent: str) -> bool:
        with self._write() as t:
            found = t.intent(intent)
            if found is None or found[1] == DELETED:
                return True
            if found[1] is not None:
                return False
            abandon(t, found[0])
        return True

    # -- set attributes ------------------------------------------------------------------------------------------

    @one_transaction
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
        with self._write() as t:
            t.expect_membership(membership_revision)
            record = _expect_live(t, uid)
            if record.revision != revision:
                raise NoLongerLive(f"the object is in revision {record.revision}, not {revision}")
            asked = _asked(asking, [member.name for member in t.members()])
            after = replace(record, attributes={**record.attributes, **new_attributes})
            if after.locator != record.locator and _looks_like_another(t, after):
                after = replace(after, member_id=uid)
            locators = rules.merged((record.locator,), (after.locator,))
            copies, owed = t.copies(uid), t.owed_of(uid)
            may_ask = []
            for name in dict.fromkeys([*copies, *owed]):
                before = owed.get(name)
                row = before or rules.new_row(name, uid, OwedKind.SET, t.change)
                known = rules.merged(locators, (copies[name].locator,) if name in copies else ())
                row = rules.to_be_set(row, revision + 1, known, t.change)
                if name in asked and row.kind is OwedKind.SET and not rules.waits(row, t.owner):
                    row = rules.asked(row, t.asker(asked[name]))
                    may_ask.append(name)
                t.put_owed(before, row)
            t.announce([*copies, *owed])
            intent = _new_intent(
                t,
                IntentKind.SET,
                (uid,),
                asked=tuple(may_ask),
                mark=mark,
                new_attributes=dict(new_attributes),
                new_envelope=new_envelope,
                new_member_id=after.member_id,
            )
            t.add_intent(intent)
            t.update_object(replace(record, intent=intent.id))
        return intent

    @one_transaction
    def commit_set(self, intent: str) -> ObjectRecord:
        with self._write() as t:
            opened, record = _set_intent(t, intent)
            if opened is None:
                return record
            after = replace(opened.outcome(record), intent=None, change=t.change)
            t.update_object(after)
            for row in t.owed_of(record.uid).values():
                if row.kind is OwedKind.INSTALL:
                    locators = rules.merged(row.locators, (record.locator, after.locator))
                    t.put_owed(row, replace(row, revision=after.revision, locators=locators))
            t.close_intent(opened, COMMITTED)
        return after

    @one_transaction
    def rollback_set(self, intent: str) -> None:
        with self._write() as t:
            found = t.intent(intent)
            if found is None or found[1] is not None:
                return
            uid = found[0].uids[0]
            record = t.object(uid)
            assert record is not None  # a destroy closes the intent
            record = replace(record, intent=None)
            copies = t.copies(uid)
            for name, row in t.owed_of(uid).items():
                t.put_owed(row, rules.rolled_back(row, record, copies.get(name)))
            t.update_object(record)
            t.close_intent(found[0], ROLLED_BACK)

    # -- destroy -------------------------------------------------------------------------------------------------

    @one_transaction
    def destroy(
        self, uid: bytes, *, asking: Sequence[Asking], membership_revision: int
    ) -> tuple[Tombstone, list[OwedRow]]:
        with self._write() as t:
            t.expect_membership(membership_revision)
            record = t.object(uid)
            if record is None:
                raise NoLongerLive("the object was destroyed already")
            asked = _asked(asking, [member.name for member in t.members()])
            extra: tuple[Locator, ...] = ()
            opened = t.intent(record.intent)
            if opened is not None and opened[1] is None and opened[0].kind is IntentKind.CREATE:
                abandon(t, opened[0])  # a pair is one
                stone = t.tombstone(uid)
                assert stone is not None
                condemned = t.owed_of(uid)
            else:
                if opened is not None and opened[1] is None:
                    extra = (opened[0].outcome(record).locator,)
                    t.close_intent(opened[0], DELETED)
                stone, condemned = t.bury(record, extra)
            result = []
            for name, row in condemned.items():
                final = rules.asked(row, t.asker(asked[name])) if name in asked else row
                t.put_owed(row, final)
                result.append(final)
        return stone, result


def _asked(asking: Sequence[Asking], names: Collection[str]) -> dict[str, str | None]:
    asked = {one.member: one.worker for one in asking}
    unknown = asked.keys() - set(names)
    if unknown:
        raise ValueError(f"not a member of the group: {', '.join(sorted(unknown))}")
    return asked


def _new_intent(
    t: Transaction,
    kind: IntentKind,
    uids: tuple[bytes, ...],
    *,
    asked: tuple[str, ...],
    mark: str,
    new_attributes: dict[int, bytes] | None = None,
    new_envelope: bytes | None = None,
    new_member_id: bytes | None = None,
) -> Intent:
    return Intent(
        id=f"{t.change:016x}.{secrets.token_hex(4)}{mark}",
        kind=kind,
        owner=t.owner,
        uids=uids,
        change=t.change,
        new_attributes=new_attributes,
        new_envelope=new_envelope,
        new_member_id=new_member_id,
        asked=asked,
    )


def _looks_like_another(t: Transaction, record: ObjectRecord) -> bool:
    """Whether another object has (or may have: two salted fingerprints cannot be compared here) the same value, and is
    in the same place. Then nothing separates the two on a member (DESIGN.md 4.4)."""
    if record.object_class == rows.DOMAIN_PARAMETERS:
        return False  # they have no CKA_ID that could
    return any(
        other.fingerprint == record.fingerprint or other.fingerprint.kind is not FingerprintKind.PUBLIC
        for other in t.others_in_place(record)
    )


def abandon(t: Transaction, intent: Intent) -> None:
    """``creating -> deleted`` for all objects of an open intent."""
    for uid in intent.uids:
        record = t.object(uid)
        if record is not None:
            t.bury(record, (), given_up=True)
    t.close_intent(intent, DELETED)


def _expect_live(t: Transaction, uid: bytes) -> ObjectRecord:
    """The record of a live object without an open intent."""
    record = t.object(uid)
    if record is None:
        raise NoLongerLive("the object was destroyed")
    opened = t.intent(record.intent)
    if opened is not None and opened[1] is None:
        raise Busy(opened[0])
    return record


def _set_intent(t: Transaction, id_: str) -> tuple[Intent | None, ObjectRecord]:
    """The open intent, or None if it was committed before, and the record."""
    found = t.intent(id_)
    if found is None or found[1] not in (None, COMMITTED):
        raise NoLongerLive("the object was destroyed, or the change was taken back by another process")
    record = t.object(found[0].uids[0])
    if record is None:
        raise NoLongerLive("the object was destroyed")
    return (found[0] if found[1] is None else None), record
