"""Making objects (DESIGN.md 4.2): in a scratch session of one member, sealed, and only then on any token.

Until the journal has the record and the envelope, no token holds anything; so a crash, a hang or an unknown outcome
there needs no undo, and the whole step may be repeated on another member.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import msgspec

from hagroup.config.logging import get_logger
from hagroup.core.attributes import CKA, CKO, pack_bool, unpack_bool, unpack_ulong
from hagroup.core.calls import Ckr, DeadlinePassed, Handle, Mechanism, SessionId, Template
from hagroup.core.ckr import CKR
from hagroup.core.records import Locator, ObjectRecord, ObjectState, is_true
from hagroup.core.templates import class_of, final_attributes, scratch_template
from hagroup.engine import replica
from hagroup.engine.domain import reseal, seal, seal_private_data
from hagroup.engine.member import Life, Member, Missing
from hagroup.engine.objects import SessionObject, TokenObject
from hagroup.engine.opening import CONNECTION_LOST
from hagroup.engine.proof import fingerprint
from hagroup.errors import GroupUnavailable, NotReplicable
from hagroup.members.bounded import left, within

if TYPE_CHECKING:
    from hagroup.engine.group import GroupEngine
    from hagroup.engine.session import VirtualSession

log = get_logger(__name__)

T = TypeVar("T")
Made = "list[Handle]"
Build = Callable[[Life, SessionId, "list[Handle]", "list[Template]"], "list[Handle]"]
"""Makes the objects in a session of one member from their templates; may use the handles of other objects."""

_KEYS = (CKO.SECRET_KEY, CKO.PRIVATE_KEY)


class Draft(msgspec.Struct, frozen=True):
    """What the application asked for, for one object."""

    uid: bytes
    template: Template
    object_class: int | None = None
    """What generation makes where the template does not say it."""

    def flag(self, attribute: int) -> bool | None:
        for number, value in self.template:
            if number == attribute and isinstance(value, bytes):
                return unpack_bool(value)
        return None


class Maker:
    """Makes objects for virtual sessions."""

    def __init__(self, group: GroupEngine) -> None:
        self._group = group
        self._timeout = group.config.timeouts.generate
        self._call = group.config.timeouts.call

    # -- the ways to make one ------------------------------------------------------------------------------
    def generate(self, session: VirtualSession, mech: Mechanism, template: Template, *, assign_id: bool) -> bytes:
        def build(life: Life, sid: SessionId, _: list[Handle], templates: list[Template]) -> list[Handle]:
            return [life.connection.generate(mech, templates[0], sid=sid, timeout=self._timeout)]

        return self._make(session, [template], build, [], mech, assign_id=assign_id, classes=[CKO.SECRET_KEY])[0]

    def generate_pair(
        self, session: VirtualSession, mech: Mechanism, public: Template, private: Template, *, assign_id: bool
    ) -> tuple[bytes, bytes]:
        def build(life: Life, sid: SessionId, _: list[Handle], templates: list[Template]) -> list[Handle]:
            return list(life.connection.generate_pair(mech, templates[0], templates[1], sid=sid, timeout=self._timeout))

        classes = [CKO.PUBLIC_KEY, CKO.PRIVATE_KEY]
        first, second = self._make(session, [public, private], build, [], mech, assign_id=assign_id, classes=classes)
        return first, second

    def create(self, session: VirtualSession, template: Template, *, assign_id: bool) -> bytes:
        def build(life: Life, sid: SessionId, _: list[Handle], templates: list[Template]) -> list[Handle]:
            return [life.connection.create(templates[0], sid=sid, timeout=self._timeout)]

        return self._make(session, [template], build, [], None, assign_id=assign_id)[0]

    def unwrap(
        self,
        session: VirtualSession,
        mech: Mechanism,
        key: TokenObject | SessionObject,
        wrapped: bytes,
        template: Template,
        *,
        assign_id: bool,
    ) -> bytes:
        def build(life: Life, sid: SessionId, used: list[Handle], templates: list[Template]) -> list[Handle]:
            return [life.connection.unwrap(mech, used[0], wrapped, templates[0], sid=sid, timeout=self._timeout)]

        return self._make(session, [template], build, [key], mech, assign_id=assign_id)[0]

    def derive(
        self,
        session: VirtualSession,
        mech: Mechanism,
        key: TokenObject | SessionObject,
        template: Template,
        *,
        assign_id: bool,
    ) -> bytes:
        def build(life: Life, sid: SessionId, used: list[Handle], templates: list[Template]) -> list[Handle]:
            return [life.connection.derive(mech, used[0], templates[0], sid=sid, timeout=self._timeout)]

        return self._make(session, [template], build, [key], mech, assign_id=assign_id)[0]

    def encapsulate(
        self,
        session: VirtualSession,
        mech: Mechanism,
        key: TokenObject | SessionObject,
        template: Template,
        *,
        assign_id: bool,
    ) -> tuple[bytes, bytes]:
        ciphertext = b""

        def build(life: Life, sid: SessionId, used: list[Handle], templates: list[Template]) -> list[Handle]:
            nonlocal ciphertext
            ciphertext, handle = life.connection.encapsulate(
                mech, used[0], templates[0], sid=sid, timeout=self._timeout
            )
            return [handle]

        uid = self._make(session, [template], build, [key], mech, assign_id=assign_id)[0]
        return ciphertext, uid

    def decapsulate(
        self,
        session: VirtualSession,
        mech: Mechanism,
        key: TokenObject | SessionObject,
        template: Template,
        ciphertext: bytes,
        *,
        assign_id: bool,
    ) -> bytes:
        def build(life: Life, sid: SessionId, used: list[Handle], templates: list[Template]) -> list[Handle]:
            handle = life.connection.decapsulate(
                mech, used[0], templates[0], ciphertext, sid=sid, timeout=self._timeout
            )
            return [handle]

        return self._make(session, [template], build, [key], mech, assign_id=assign_id)[0]

    def copy(self, session: VirtualSession, item: TokenObject | SessionObject, template: Template) -> bytes:
        """A copy is the same key under a new UID with other attributes: its envelope is sealed anew, never
        C_CopyObject (a copy of a locked key cannot be wrapped, DESIGN.md 8 trap 8)."""
        source = item.record
        attributes = {**source.attributes, **{n: v for n, v in template if isinstance(v, bytes)}}
        if CKA.TOKEN not in dict(template):
            attributes[CKA.TOKEN] = source.attributes.get(CKA.TOKEN, pack_bool(False))
        token = unpack_bool(attributes[CKA.TOKEN])
        self._allowed(session, token, unpack_bool(attributes.get(CKA.PRIVATE, b"\0")))
        uid = os.urandom(16)
        if (
            source.envelope is None
            and isinstance(item, SessionObject)
            and source.object_class in _KEYS[:2]
            and (source.object_class != CKO.PUBLIC_KEY)
        ):
            return self._copy_at_home(session, item, template, uid, attributes, token)

        def draft(life: Life, _: list[Handle]) -> ObjectRecord:
            with within(self._timeout):
                return draft_on(life)

        def draft_on(life: Life) -> ObjectRecord:
            envelope = source.envelope
            if envelope is not None:
                assert life.keys is not None
                envelope = reseal(
                    life.connection,
                    life.keys,
                    envelope,
                    old=source,
                    uid=uid,
                    revision=1,
                    attributes=attributes,
                    timeout=self._timeout,
                )
            record = msgspec.structs.replace(
                source,
                uid=uid,
                revision=1,
                state=ObjectState.CREATING if token else ObjectState.LIVE,
                attributes=attributes,
                envelope=envelope,
                member_id=None,
                intent=None,
            )
            record = self._separate(life, None, record)
            sid = life.connection.open_session(timeout=self._timeout)
            try:
                replica.install_session(life.connection, life.keys, record, sid=sid, timeout=self._timeout)
            finally:
                self._leave(life, sid)
            return record

        record = self._group.caller.run(
            [], draft, logged_in=self._group.access.user, need_keys=source.envelope is not None, making=True
        )
        if token:
            self._replicate([record])
        else:
            self._group.keep_session_object(SessionObject(record, session.id, home=None, timeout=self._call))
        return uid

    def _copy_at_home(
        self,
        session: VirtualSession,
        item: SessionObject,
        template: Template,
        uid: bytes,
        attributes: dict[int, bytes],
        token: bool,
    ) -> bytes:
        if token:
            raise NotReplicable("this key cannot be wrapped, so a copy of it cannot be stored on the group's members")

        def build(life: Life, used: list[Handle]) -> tuple[Life, Handle]:
            return life, life.connection.copy(used[0], template, timeout=self._timeout)

        life, handle = self._group.caller.run([item], build, logged_in=self._group.access.user)
        record = msgspec.structs.replace(item.record, uid=uid, attributes=attributes)
        self._keep_at_home(session, record, life, handle)
        return uid

    # -- the common path -----------------------------------------------------------------------------------
    def _allowed(self, session: VirtualSession, token: bool, private: bool | None) -> None:
        if token and not session.rw:
            raise Ckr(CKR.SESSION_READ_ONLY, "C_CreateObject")
        if private and not self._group.access.user:
            raise Ckr(CKR.USER_NOT_LOGGED_IN, "C_CreateObject")

    def _make(
        self,
        session: VirtualSession,
        templates: Sequence[Template],
        build: Build,
        uses: Sequence[TokenObject | SessionObject],
        mech: Mechanism | None,
        *,
        assign_id: bool,
        classes: Sequence[int | None] = (None,),
    ) -> list[bytes]:
        drafts = [
            Draft(os.urandom(16), list(template), object_class)
            for template, object_class in zip(templates, classes, strict=True)
        ]
        tokens = {bool(draft.flag(CKA.TOKEN)) for draft in drafts}
        for draft in drafts:
            self._allowed(session, bool(draft.flag(CKA.TOKEN)), draft.flag(CKA.PRIVATE))
            if draft.flag(CKA.TRUSTED):
                raise Ckr(CKR.ATTRIBUTE_READ_ONLY, "C_CreateObject")  # the SO of one member cannot speak for all
        if assign_id and True in tokens:
            shared = drafts[0].uid
            drafts = [msgspec.structs.replace(draft, template=_with_id(draft.template, shared)) for draft in drafts]
        if True in tokens:
            self._group.replication.refuse_if_degraded()

        def draft_all(life: Life, used: list[Handle]) -> list[tuple[ObjectRecord, Life | None, Handle | None]]:
            with within(self._timeout):
                return self._draft(session, life, used, drafts, build)

        result = self._group.caller.run(
            uses,
            draft_all,
            logged_in=self._group.access.user,
            mechanism=None if mech is None else mech[0],
            need_keys=True in tokens,
            making=True,
        )
        stored = [record for record, _, _ in result if is_true(record, CKA.TOKEN)]
        if stored:
            self._replicate(stored)
        for record, life, handle in result:
            if is_true(record, CKA.TOKEN):
                continue
            if life is not None and handle is not None and record.envelope is None and record.object_class in _KEYS:
                self._keep_at_home(session, record, life, handle)
                continue
            item = SessionObject(record, session.id, home=None, timeout=self._call)
            member = self._member_of(life)
            if member is not None and life is not None and handle is not None:
                item.placed(member.name, life, handle)
            self._group.keep_session_object(item)
        return [draft.uid for draft in drafts]

    def _member_of(self, life: Life | None) -> Member | None:
        return next((m for m in self._group.roster.members.values() if m.life is life), None)

    def _keep_at_home(self, session: VirtualSession, record: ObjectRecord, life: Life, handle: Handle) -> None:
        member = self._member_of(life)
        if member is None:
            raise GroupUnavailable("the member that made this session object failed before it could be used")
        item = SessionObject(record, session.id, home=member.name, timeout=self._call)
        item.placed(member.name, life, handle)
        self._group.keep_session_object(item)

    # -- in the scratch session ----------------------------------------------------------------------------
    def _draft(
        self, session: VirtualSession, life: Life, used: list[Handle], drafts: list[Draft], build: Build
    ) -> list[tuple[ObjectRecord, Life | None, Handle | None]]:
        """Make, read, seal, and make once more with the final attributes; nothing of it outlives the session."""
        sid = life.connection.open_session(timeout=self._timeout)
        try:
            given = [scratch_template(draft.template, object_class=draft.object_class) for draft in drafts]
            handles = build(life, sid, used, given)
            made = []
            for draft, handle in zip(drafts, handles, strict=True):
                made.append(self._record(session, life, sid, draft, handle))
            result: list[tuple[ObjectRecord, Life | None, Handle | None]] = []
            for record in made:
                if record is None:
                    continue
                token = is_true(record, CKA.TOKEN)
                where = sid if token else 0
                handle = replica.install_session(life.connection, life.keys, record, sid=where, timeout=self._timeout)
                result.append((record, None if token else life, None if token else handle))
        finally:
            self._leave(life, sid)
        if None in made:
            return self._home_made(life, drafts, build, used)
        return result

    def _record(
        self, session: VirtualSession, life: Life, sid: SessionId, draft: Draft, handle: Handle
    ) -> ObjectRecord | None:
        """The record of a scratch object; None: it cannot be sealed, and is a session object."""
        read = replica.read_object(life.connection, sid, handle, draft.template, timeout=self._timeout)
        attributes = final_attributes(draft.template, read, default_extractable=self._default_extractable(life))
        object_class = unpack_ulong(attributes[CKA.CLASS])
        key_type = unpack_ulong(attributes[CKA.KEY_TYPE]) if CKA.KEY_TYPE in attributes else None
        token = unpack_bool(attributes.get(CKA.TOKEN, b"\0"))
        private = unpack_bool(attributes.get(CKA.PRIVATE, b"\0"))
        self._allowed(session, token, private)
        record = ObjectRecord(
            uid=draft.uid,
            object_class=object_class,
            key_type=key_type,
            state=ObjectState.CREATING if token else ObjectState.LIVE,
            revision=1,
            attributes=attributes,
        )
        if object_class in _KEYS:
            why = replica.cannot_replicate(object_class, key_type, life.mechanisms)
            if why is not None or life.keys is None:
                if token:
                    raise NotReplicable(why or "no domain key at hand")
                return None
            try:
                envelope = seal(
                    life.connection,
                    life.keys,
                    sid,
                    handle,
                    uid=draft.uid,
                    revision=1,
                    object_class=object_class,
                    key_type=key_type,
                    attributes=attributes,
                    timeout=self._timeout,
                )
            except Ckr as error:
                if error.rv not in _UNWRAPPABLE:
                    raise
                if token:
                    raise NotReplicable(
                        f"the members cannot wrap a key of this kind ({error}), so it could not be kept on more than "
                        "one of them; nothing was made. Use a session object, or another kind of key"
                    ) from error
                return None
            record = msgspec.structs.replace(record, envelope=envelope)
        elif object_class == CKO.DATA and private and life.keys is not None:
            value = dict(draft.template).get(CKA.VALUE, b"")
            sealed = seal_private_data(
                life.connection,
                life.keys,
                sid,
                value if isinstance(value, bytes) else b"",
                uid=draft.uid,
                revision=1,
                attributes=attributes,
                timeout=self._timeout,
            )
            record = msgspec.structs.replace(record, envelope=sealed)
        print_ = fingerprint(life.connection, handle, attributes, sid=sid, timeout=self._timeout)
        record = msgspec.structs.replace(record, fingerprint=print_)
        return self._separate(life, (sid, handle), record) if token else record

    def _default_extractable(self, life: Life) -> bool:
        member = self._member_of(life)
        if member is None or member.name not in self._group.view.members:
            return False
        return self._group.view.members[member.name].default_extractable

    def _separate(self, life: Life, scratch: tuple[SessionId, Handle] | None, record: ObjectRecord) -> ObjectRecord:
        """Where nothing separates it from another live object, its CKA_ID on the members is its UID (4.4)."""
        locator = record.locator
        twins = [
            other
            for other in self._group.journal.search(
                {CKA.CLASS: record.attributes[CKA.CLASS], CKA.LABEL: locator.label, CKA.ID: locator.id}
            )
            if other.locator == locator and other.uid != record.uid
        ]
        for twin in twins:
            if scratch is None:
                same = twin.fingerprint.value == record.fingerprint.value
            else:
                sid, handle = scratch
                theirs = fingerprint(
                    life.connection,
                    handle,
                    record.attributes,
                    salt=twin.fingerprint.salt,
                    sid=sid,
                    timeout=self._timeout,
                )
                same = theirs.value == twin.fingerprint.value
            if same:
                return msgspec.structs.replace(record, member_id=record.uid)
        return record

    def _home_made(
        self, life: Life, drafts: list[Draft], build: Build, used: list[Handle]
    ) -> list[tuple[ObjectRecord, Life | None, Handle | None]]:
        """Session objects that cannot be sealed: made as they were asked for, and bound to this one member."""
        handles = build(life, 0, used, [draft.template for draft in drafts])
        result: list[tuple[ObjectRecord, Life | None, Handle | None]] = []
        for draft, handle in zip(drafts, handles, strict=True):
            read = replica.read_object(life.connection, 0, handle, draft.template, timeout=self._timeout)
            record = ObjectRecord(
                uid=draft.uid,
                object_class=unpack_ulong(read[CKA.CLASS]),
                key_type=unpack_ulong(read[CKA.KEY_TYPE]) if CKA.KEY_TYPE in read else None,
                state=ObjectState.LIVE,
                revision=1,
                attributes=read,
            )
            result.append((record, life, handle))
        return result

    def _leave(self, life: Life, sid: SessionId) -> None:
        """Close a scratch session: ghosts of what failed in it vanish with it (DESIGN.md 8, trap 4)."""
        if left(self._timeout) <= 0:  # nobody waits for that any more
            self._group.roster.submit(self._close, life, sid)
        else:
            self._close(life, sid)

    def _close(self, life: Life, sid: SessionId) -> None:
        try:
            life.connection.close_session(sid, timeout=self._timeout)
        except (Ckr, DeadlinePassed, *CONNECTION_LOST):
            pass  # gone with the connection

    def _replicate(self, records: Sequence[ObjectRecord]) -> None:
        self._group.replication.replicate(records)


_UNWRAPPABLE = frozenset(
    {
        CKR.KEY_NOT_WRAPPABLE,
        CKR.KEY_UNEXTRACTABLE,
        CKR.KEY_TYPE_INCONSISTENT,
        CKR.KEY_SIZE_RANGE,
        CKR.MECHANISM_INVALID,
        CKR.FUNCTION_FAILED,
        CKR.GENERAL_ERROR,
        CKR.WRAPPING_KEY_TYPE_INCONSISTENT,
    }
)


def _with_id(template: Template, uid: bytes) -> Template:
    if class_of(template) in (CKO.DATA, CKO.DOMAIN_PARAMETERS):
        return template  # they have no CKA_ID
    return [(number, value) for number, value in template if number != CKA.ID] + [(CKA.ID, uid)]


__all__ = ["Locator", "Maker", "Missing"]
