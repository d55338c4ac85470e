"""One object on one member: read, made, found, changed, removed. No journal here: who calls decides, and writes down.

An object is found again by its locator and its fingerprint, never by a handle of another life (DESIGN.md 4.4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from hagroup.core.attributes import (
    ANSWERED_ONLY,
    CKA,
    CKK,
    CKO,
    attributes_of,
    is_secret_component,
    pack_bool,
    pack_template,
    pack_ulong,
    unpack_bool,
    unpack_ulong,
)
from hagroup.core.calls import Ckr, DeadlinePassed, Handle, MemberGone, SessionId, Template, WorkerFault
from hagroup.core.ckr import CKR
from hagroup.core.numbers import CKA_VENDOR_DEFINED
from hagroup.core.records import Fingerprint, Locator, ObjectRecord
from hagroup.core.templates import changed_on_member, install_template
from hagroup.engine.domain import DomainKeys, IntegrityAlarm, open_envelope, open_private_data
from hagroup.engine.proof import Proof, matches, prove
from hagroup.engine.stored_records import drop_records, store_record
from hagroup.engine.token_contents import InventoryEntry, find_all, inventory
from hagroup.errors import NotReplicable
from hagroup.members.api import Connection

__all__ = [
    "InventoryEntry",
    "agrees",
    "apply_set",
    "cannot_replicate",
    "discard",
    "has_fingerprint",
    "install",
    "install_session",
    "inventory",
    "is_this",
    "locate",
    "read_object",
    "remove",
]

_UNDISCLOSED = (CKO.PRIVATE_KEY, CKO.SECRET_KEY)
_STATEFUL = {CKK.HSS: "HSS", CKK.XMSS: "XMSS", CKK.XMSSMT: "XMSSMT"}
_DATES = (CKA.START_DATE, CKA.END_DATE)
_CHANGEABLE = (
    CKA.ENCRYPT,
    CKA.DECRYPT,
    CKA.SIGN,
    CKA.SIGN_RECOVER,
    CKA.VERIFY,
    CKA.VERIFY_RECOVER,
    CKA.WRAP,
    CKA.UNWRAP,
    CKA.DERIVE,
    CKA.SENSITIVE,
    CKA.EXTRACTABLE,
    CKA.WRAP_WITH_TRUSTED,
    CKA.SUBJECT,
)
"""What C_SetAttributeValue may change, beside the locator's label and id."""


def cannot_replicate(
    object_class: int, key_type: int | None, mechanisms: Iterable[int], *, wrap_mechanism: int | None = None
) -> str | None:
    """Why a key of this kind can never be on several members; None: sealing it will tell."""
    if object_class == CKO.PRIVATE_KEY and key_type in _STATEFUL:
        return (
            f"{_STATEFUL[CKK(key_type)]} private keys count their signatures: on two members one count would be used "
            "twice, which breaks the key. Keep it on one HSM, outside the group"
        )
    if object_class in _UNDISCLOSED and wrap_mechanism is not None and wrap_mechanism not in set(mechanisms):
        return (
            f"the member does not have the mechanism 0x{wrap_mechanism:04x} for RFC 5649, by which keys are replicated"
        )
    return None


# -- reading -----------------------------------------------------------------------------------------------------------


def read_object(
    connection: Connection, sid: SessionId, handle: Handle, template: Template, *, timeout: float
) -> dict[int, bytes]:
    """What may be recorded of an object: its attributes without any secret component.

    :param template: what the application gave. Its dates are taken from it, since reading them from a private object
        fails on SoftHSM; and so are vendors' own attributes.
    """
    kind, _ = connection.get(handle, [int(CKA.CLASS), int(CKA.KEY_TYPE), int(CKA.PRIVATE)], sid=sid, timeout=timeout)
    if CKA.CLASS not in kind:
        raise Ckr(CKR.OBJECT_HANDLE_INVALID, "C_GetAttributeValue")
    object_class = unpack_ulong(kind[CKA.CLASS])
    key_type = unpack_ulong(kind[CKA.KEY_TYPE]) if CKA.KEY_TYPE in kind else None
    private = unpack_bool(kind.get(CKA.PRIVATE, b"\x01"))
    given = {int(n): v if isinstance(v, bytes) else pack_template(v) for n, v in template}
    known = attributes_of(object_class, key_type)
    wanted = {int(number) for number in known if number not in _DATES}
    wanted |= {number for number in given if number >= CKA_VENDOR_DEFINED}
    wanted = {n for n in wanted if not is_secret_component(object_class, key_type, n, private=private)}
    values, _ = connection.get(handle, sorted(wanted), sid=sid, timeout=timeout)
    attributes = {int(number): value for number, value in values.items()}
    attributes |= {int(number): given.get(number, b"") for number in _DATES if number in known}
    return attributes


# -- making ------------------------------------------------------------------------------------------------------------


def _make(
    connection: Connection,
    keys: DomainKeys | None,
    record: ObjectRecord,
    *,
    token: bool,
    sid: SessionId,
    timeout: float,
) -> Handle:
    template = install_template(record, token=token)
    if record.object_class in _UNDISCLOSED:
        if record.envelope is None or keys is None:
            raise NotReplicable(
                f"object {record.uid.hex()} has no envelope: it is on the member that made it, and only there"
            )
        return open_envelope(connection, keys, sid, record, template, timeout=timeout)
    if record.envelope is not None:
        if keys is None:
            raise NotReplicable(f"object {record.uid.hex()} is sealed, and the member's domain keys are not at hand")
        value = open_private_data(connection, keys, record, timeout=timeout)
        last = [template.pop()] if template[-1][0] == CKA.MODIFIABLE else []
        template += [(int(CKA.VALUE), value), *last]
    return connection.create(template, sid=sid, timeout=timeout)


def install_session(
    connection: Connection, keys: DomainKeys | None, record: ObjectRecord, *, sid: SessionId, timeout: float
) -> Handle:
    """The object as a session object: for session objects on another member, and to try a template at its source."""
    return _make(connection, keys, record, token=False, sid=sid, timeout=timeout)


def install(
    connection: Connection,
    keys: DomainKeys,
    record: ObjectRecord,
    *,
    timeout: float,
    with_record: bool,
    refuses: Callable[[Ckr], bool] = lambda error: True,
) -> None:
    """Make the token object with its final attributes and prove it; nothing of it stays where that fails.

    :param refuses: whether an error of the member says that nothing was made. Where it may have been made all the same,
        its record stays for whoever looks (no object is without).
    :param with_record: keep the sealed record beside it (the second place of G1). It is there before the object, and
        goes before it (:func:`remove`): so a search for the object alone tells whether a token that was put back to an
        earlier state lacks anything, or has too much.
    """
    handle: Handle | None = None
    try:
        if with_record:
            store_record(connection, keys, record, timeout=timeout)
        handle = _make(connection, keys, record, token=True, sid=0, timeout=timeout)
        if prove(connection, handle, record, timeout=timeout) is Proof.MISMATCH:
            raise IntegrityAlarm(f"what was made of the envelope of object {record.uid.hex()} is not that object")
    except (MemberGone, WorkerFault, DeadlinePassed):
        raise  # nobody is there to undo it; the owed row stays in doubt
    except Exception as error:
        if handle is not None:
            _destroy(connection, handle, timeout=timeout)
        if with_record and (handle is not None or not isinstance(error, Ckr) or refuses(error)):
            drop_records(connection, record.uid, timeout=timeout)
        raise


# -- finding -----------------------------------------------------------------------------------------------------------


def _search_template(locator: Locator, attributes: Mapping[int, bytes]) -> Template:
    template: Template = [
        (int(CKA.CLASS), pack_ulong(locator.object_class)),
        (int(CKA.TOKEN), pack_bool(True)),
        (int(CKA.LABEL), locator.label),
    ]
    if locator.key_type is not None:
        template.append((int(CKA.KEY_TYPE), pack_ulong(locator.key_type)))
    if locator.object_class == CKO.DATA:
        # A data object has no CKA_ID; what separates two of them is CKA_OBJECT_ID.
        if locator.id or attributes:
            template.append((int(CKA.OBJECT_ID), locator.id or attributes.get(CKA.OBJECT_ID, b"")))
    elif locator.object_class != CKO.DOMAIN_PARAMETERS:
        template.append((int(CKA.ID), locator.id))
    return template


def _is_it(
    connection: Connection, handle: Handle, object_class: int, fingerprint: Fingerprint, *, timeout: float
) -> bool | None:
    try:
        return matches(connection, handle, object_class, fingerprint, timeout=timeout)
    except Ckr as error:
        if error.rv in (CKR.OBJECT_HANDLE_INVALID, CKR.KEY_HANDLE_INVALID):
            return False  # gone since it was found, or unreadable
        raise


def is_this(connection: Connection, handle: Handle, record: ObjectRecord, *, timeout: float) -> bool:
    """Whether an object found by its locator is this one: nothing contradicts it."""
    return _is_it(connection, handle, record.object_class, record.fingerprint, timeout=timeout) is not False


def has_fingerprint(connection: Connection, entry: InventoryEntry, fingerprint: Fingerprint, *, timeout: float) -> bool:
    """Whether something found on a token has this very value; what cannot be compared has not."""
    object_class = entry.locator.object_class
    return _is_it(connection, entry.handle, object_class, fingerprint, timeout=timeout) is True


def agrees(connection: Connection, handle: Handle, record: ObjectRecord, *, timeout: float) -> bool:
    """Whether the object shows what can be changed of it as the record has it: a restored token has older values."""
    numbers = [int(number) for number in _CHANGEABLE if number in record.attributes]
    numbers = [number for number in numbers if number not in ANSWERED_ONLY and number not in record.answered_only]
    values, _ = connection.get(handle, numbers, timeout=timeout)
    return all(record.attributes[number] == value for number, value in values.items())


def locate(
    connection: Connection,
    locators: Sequence[Locator],
    fingerprint: Fingerprint,
    attributes: Mapping[int, bytes],
    *,
    timeout: float,
    claimed: Callable[[Locator], bool] | None = None,
    everywhere: bool = False,
) -> list[Handle]:
    """All matches after locator *and* fingerprint.

    :param attributes: the record's; empty where only the tombstone is left.
    :param claimed: whether another live object is at this locator. Given it, where nothing was found the search is
        repeated without label and id, since somebody may have changed these behind the group's back. Without it that
        would be dangerous: a copy under another label has the same fingerprint.
    :param everywhere: repeat it in any case: what was made late, and found, may stand beside an older one.
    """
    found: dict[Handle, None] = {}
    for locator in dict.fromkeys(locators):
        for handle in find_all(connection, _search_template(locator, attributes), timeout=timeout):
            if handle not in found and (
                _is_it(connection, handle, locator.object_class, fingerprint, timeout=timeout) is not False
            ):
                found[handle] = None
    if claimed is not None and (everywhere or not found):
        found |= dict.fromkeys(_anywhere(connection, locators, fingerprint, claimed, timeout=timeout))
    return list(found)


def _anywhere(
    connection: Connection,
    locators: Sequence[Locator],
    fingerprint: Fingerprint,
    claimed: Callable[[Locator], bool],
    *,
    timeout: float,
) -> list[Handle]:
    kinds = {(locator.object_class, locator.key_type) for locator in locators}
    return [
        entry.handle
        for entry in inventory(connection, timeout=timeout, kinds=kinds)
        if entry.token
        and not entry.own
        and not claimed(entry.locator)
        and _is_it(connection, entry.handle, entry.locator.object_class, fingerprint, timeout=timeout)
    ]


# -- removing, changing ------------------------------------------------------------------------------------------------


def _destroy(connection: Connection, handle: Handle, *, timeout: float) -> None:
    try:
        connection.destroy(handle, timeout=timeout)
    except Ckr as error:
        if error.rv != CKR.OBJECT_HANDLE_INVALID:  # somebody was faster
            raise


def remove(
    connection: Connection,
    uid: bytes,
    locators: Sequence[Locator],
    fingerprint: Fingerprint,
    attributes: Mapping[int, bytes],
    *,
    timeout: float,
    claimed: Callable[[Locator], bool] | None = None,
    choose: Callable[[list[Handle]], list[Handle]] | None = None,
) -> bool:
    """Destroy the object wherever it may be on this member, and its records there. False: there was none.

    :param choose: which of those found may go, where other objects of the group may have the same value in that place.
    """
    found = locate(connection, locators, fingerprint, attributes, timeout=timeout, claimed=claimed)
    chosen = found if choose is None else choose(found)
    drop_records(connection, uid, timeout=timeout)
    for handle in chosen:
        _destroy(connection, handle, timeout=timeout)
    return bool(found)


def discard(connection: Connection, record: ObjectRecord, old: Sequence[Handle], *, timeout: float) -> None:
    """After the object was made anew: what it replaces goes, and the records of other revisions."""
    drop_records(connection, record.uid, timeout=timeout, but=record.revision)
    for handle in old:
        _destroy(connection, handle, timeout=timeout)


def apply_set(
    connection: Connection,
    keys: DomainKeys,
    handle: Handle,
    old: ObjectRecord,
    new: ObjectRecord,
    *,
    timeout: float,
    with_record: bool,
) -> None:
    """Bring the object from the old record to the new one; then the new record takes the old one's place."""
    changed = {n: value for n, value in new.attributes.items() if old.attributes.get(n) != value}
    template = changed_on_member(new, changed)
    if new.member_id is not None and new.member_id != old.member_id:
        template.append((int(CKA.OBJECT_ID if new.object_class == CKO.DATA else CKA.ID), new.member_id))
    if template:
        connection.set(handle, template, timeout=timeout)
    if with_record:
        store_record(connection, keys, new, timeout=timeout)
        drop_records(connection, new.uid, timeout=timeout, but=new.revision)
