"""Taking objects that are on a member's token, but are not the group's, over into the group.

The group's replica is made beside the original, told apart from it by its CKA_ID on the members (DESIGN.md 4.4), and
the original goes only when the replica is live on enough members: so nothing that ends in the middle can lose a key,
and the same call again completes it. Refused is what a tombstone matches or cannot exclude (DESIGN.md 4.6).
"""

from __future__ import annotations

import os

import msgspec

from hagroup.config.logging import get_logger
from hagroup.core.attributes import CKA, CKO, unpack_bool, unpack_ulong
from hagroup.core.calls import Ckr, DeadlinePassed
from hagroup.core.records import FingerprintKind, ObjectRecord, ObjectState
from hagroup.core.templates import final_attributes
from hagroup.engine import about, proof, replica
from hagroup.engine.domain import seal, seal_private_data
from hagroup.engine.domain_keys import scratch_session
from hagroup.engine.group import GroupEngine
from hagroup.engine.member import Life, Member
from hagroup.engine.one_step import one_step
from hagroup.engine.opening import CONNECTION_LOST
from hagroup.engine.proof import fingerprint
from hagroup.engine.token_contents import InventoryEntry
from hagroup.engine.verify import strangers
from hagroup.errors import HAError

log = get_logger(__name__)

_KEYS = (CKO.SECRET_KEY, CKO.PRIVATE_KEY)
_KINDS = (*_KEYS, CKO.PUBLIC_KEY, CKO.CERTIFICATE, CKO.DATA)


class Refused(Exception):
    """Why an object stays as it is."""


class Adopted(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one object; fields are added, never renamed."""

    member: str
    label: str
    id: str
    uid: str | None
    """As the group's object; None: refused."""
    refused: str | None


def adopt(group: GroupEngine, *, only: str | None = None) -> list[Adopted]:
    """Take over every object that can be, from the members that are connected.

    :param only: objects with this label alone.
    """
    done: list[Adopted] = []
    for member in list(group.roster.members.values()):
        life = member.life
        if life is None or life.keys is None:
            continue
        for entry in strangers(group, member.name, life):
            label = entry.label.decode(errors="replace")
            if only is not None and label != only:
                continue
            uid, refused = None, None
            try:
                made = _take_over(group, member, life, entry)
                uid, data = made.hex(), about.objects({made: label})
                group.journal.event("object adopted", "it was not the group's", member=member.name, data=data)
            except (Refused, HAError, Ckr) as error:
                refused = str(error)
            done.append(Adopted(member=member.name, label=label, id=entry.id.hex(), uid=uid, refused=refused))
    return done


def _take_over(group: GroupEngine, member: Member, life: Life, entry: InventoryEntry) -> bytes:
    timeout = group.config.timeouts.generate
    already = _already(group, life, entry)
    if already is None:
        record = _draft(group, member, life, entry)
        with one_step():  # cut off in the middle it would have to be made once more
            group.replication.replicate([record])
        already = record.uid
    try:
        life.connection.destroy(entry.handle, timeout=timeout)
    except (DeadlinePassed, *CONNECTION_LOST) as error:
        raise Refused(f"it is the group's now, but the original is still there: {error}; run this again") from error
    return already


def _already(group: GroupEngine, life: Life, entry: InventoryEntry) -> bytes | None:
    """The UID under which it was adopted before, from another member or by a call that was interrupted."""
    timeout = group.config.timeouts.generate
    kind = entry.locator.object_class
    for record in group.journal.objects():
        if (
            record.state is ObjectState.LIVE
            and record.member_id == record.uid
            and record.object_class == kind
            and record.attributes.get(CKA.LABEL, b"") == entry.label
            and record.attributes.get(CKA.OBJECT_ID if kind == CKO.DATA else CKA.ID, b"") == entry.id
            and proof.matches(life.connection, entry.handle, kind, record.fingerprint, timeout=timeout)
        ):
            return record.uid
    return None


def _refuse_destroyed(group: GroupEngine, life: Life, entry: InventoryEntry) -> None:
    kind = (entry.locator.object_class, entry.locator.key_type)
    for tombstone in group.journal.tombstones():
        if tombstone.given_up or kind not in {
            (locator.object_class, locator.key_type) for locator in tombstone.locators
        }:
            continue
        timeout = group.config.timeouts.generate
        same = proof.matches(life.connection, entry.handle, kind[0], tombstone.fingerprint, timeout=timeout)
        if same is not False:
            how = "is" if same else "may be"
            raise Refused(
                f"it {how} an object that the group destroyed (UID {tombstone.uid.hex()}); "
                "`ha-admin backup restore --resurrect` brings such a one back"
            )


def _draft(group: GroupEngine, member: Member, life: Life, entry: InventoryEntry) -> ObjectRecord:
    """The record with its envelope, tried once as a session object; nothing is changed on the token."""
    timeout = group.config.timeouts.generate
    kind = entry.locator.object_class
    if kind not in _KINDS:
        raise Refused("objects of this class are not taken over")
    _refuse_destroyed(group, life, entry)
    read = replica.read_object(life.connection, 0, entry.handle, [], timeout=timeout)
    key_type = unpack_ulong(read[CKA.KEY_TYPE]) if CKA.KEY_TYPE in read else None
    if not unpack_bool(read.get(CKA.DESTROYABLE, b"\x01")):
        raise Refused("it is not DESTROYABLE, so the original could not be replaced")
    if kind in _KEYS and not unpack_bool(read.get(CKA.EXTRACTABLE, b"\0")):
        raise Refused("it is not EXTRACTABLE, so it cannot be brought to other members")
    if unpack_bool(read.get(CKA.WRAP_WITH_TRUSTED, b"\0")):
        raise Refused("it can be wrapped by a TRUSTED key only")
    default = group.view.members[member.name].default_extractable
    attributes = final_attributes(list(read.items()), read, default_extractable=default)
    uid = os.urandom(16)
    record = ObjectRecord(
        uid=uid,
        object_class=kind,
        key_type=key_type,
        state=ObjectState.CREATING,
        revision=1,
        attributes=attributes,
        member_id=uid,
    )
    with scratch_session(life.connection, timeout=timeout) as sid:
        envelope = _sealed(life, sid, entry, record, timeout=timeout)
        print_ = fingerprint(life.connection, entry.handle, attributes, sid=sid, timeout=timeout)
        if print_.kind is FingerprintKind.NONE:
            raise Refused("nothing tells it from others of its kind, so it could not be found again")
        record = msgspec.structs.replace(record, envelope=envelope, fingerprint=print_)
        replica.install_session(life.connection, life.keys, record, sid=sid, timeout=timeout)
    return record


def _sealed(life: Life, sid: int, entry: InventoryEntry, record: ObjectRecord, *, timeout: float) -> bytes | None:
    assert life.keys is not None
    if record.object_class in _KEYS:
        why = replica.cannot_replicate(
            record.object_class, record.key_type, life.mechanisms, wrap_mechanism=life.keys.wrap_mechanism
        )
        if why is not None:
            raise Refused(why)
        return seal(
            life.connection,
            life.keys,
            sid,
            entry.handle,
            uid=record.uid,
            revision=record.revision,
            object_class=record.object_class,
            key_type=record.key_type,
            attributes=record.attributes,
            timeout=timeout,
        )
    if record.object_class == CKO.DATA and entry.private:
        values, _ = life.connection.get(entry.handle, [CKA.VALUE], timeout=timeout)
        return seal_private_data(
            life.connection,
            life.keys,
            sid,
            values.get(CKA.VALUE, b""),
            uid=record.uid,
            revision=record.revision,
            attributes=record.attributes,
            timeout=timeout,
        )
    return None
