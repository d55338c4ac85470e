"""Virtual sessions: what an application holds. Rules that PKCS#11 puts on sessions are applied here, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hagroup.core.attributes import CKA, is_secret_component, may_copy, may_destroy, may_set, unpack_bool
from hagroup.core.calls import Ckr, Handle, Mechanism, Template
from hagroup.core.ckr import CKR
from hagroup.core.numbers import CKA_VENDOR_DEFINED
from hagroup.core.records import is_true
from hagroup.engine.login import CKU_SO, CKU_USER
from hagroup.engine.member import Life
from hagroup.engine.objects import SessionObject, TokenObject
from hagroup.engine.stream import GroupStream
from hagroup.errors import NotOnGroup

if TYPE_CHECKING:
    from hagroup.engine.group import GroupEngine


class VirtualSession:
    """Implements :class:`hagroup.engine.api.Session`."""

    def __init__(self, group: GroupEngine, number: int, *, rw: bool) -> None:
        self._group = group
        self.id = number
        self.rw = rw
        self._open = True
        self._call = group.config.timeouts.call

    # -- life and login ------------------------------------------------------------------------------------
    def _use(self) -> GroupEngine:
        if not self._open:
            raise Ckr(CKR.SESSION_HANDLE_INVALID, "C_GetSessionInfo")
        self._group.follow()
        return self._group

    def close(self) -> None:
        if self._open:
            self._open = False
            self._group.session_closed(self)

    def login(self, user_type: int, pin: bytes) -> None:
        group = self._use()
        if user_type == CKU_USER:
            group.access.login(pin)
        elif user_type == CKU_SO:
            if any(not session.rw for session in group.sessions()):
                raise Ckr(CKR.SESSION_READ_ONLY_EXISTS, "C_Login")
            group.access.login_so(pin)
        else:
            raise Ckr(CKR.USER_TYPE_INVALID, "C_Login")

    def logout(self) -> None:
        self._use().access.logout()

    @property
    def logouts(self) -> int:
        return self._group.access.logouts

    def set_pin(self, old: bytes, new: bytes) -> None:
        if not self.rw:
            raise Ckr(CKR.SESSION_READ_ONLY, "C_SetPIN")
        self._use().access.set_pin(old, new)

    def init_pin(self, pin: bytes) -> None:
        self._use().access.init_pin(pin)

    # -- finding and reading -------------------------------------------------------------------------------
    def _visible(self, obj: TokenObject | SessionObject) -> bool:
        return self._group.access.user or not is_true(obj.record, CKA.PRIVATE)

    def object(self, uid: bytes) -> TokenObject | SessionObject:
        """The object, or OBJECT_HANDLE_INVALID: destroyed, ended with its session, or private without login."""
        found = self._use().object(uid)
        if found is None or not self._visible(found):
            raise Ckr(CKR.OBJECT_HANDLE_INVALID, "C_GetAttributeValue")
        return found

    def key(self, uid: bytes) -> TokenObject | SessionObject:
        """The same for a key of an operation."""
        group = self._use()
        found = group.object(uid)
        if found is None or not (group.access.user or self._visible(found)):
            raise Ckr(CKR.KEY_HANDLE_INVALID, "C_SignInit")
        return found

    def find(self, attributes: Mapping[int, bytes]) -> list[bytes]:
        group = self._use()
        recorded = {
            number: value for number, value in attributes.items() if not is_secret_component(None, None, number)
        }
        found: list[TokenObject | SessionObject] = []
        if attributes.get(CKA.TOKEN, b"\1") != b"\0":
            for record in group.journal.search(recorded):
                item = group.object(record.uid)
                if item is not None:
                    found.append(item)
        found += [
            item
            for item in group.session_objects()
            if all(item.record.attributes.get(number) == value for number, value in recorded.items())
        ]
        visible = [item for item in found if self._visible(item)]
        if len(recorded) < len(attributes):
            rest = {number: value for number, value in attributes.items() if number not in recorded}
            visible = [item for item in visible if self._member_agrees(item, rest)]
        return [item.uid for item in visible]

    def _member_agrees(self, item: TokenObject | SessionObject, values: Mapping[int, bytes]) -> bool:
        """A search by a value that is not recorded is decided by a member that has the object."""
        found, _ = self.get(item.uid, list(values))
        return all(found.get(number) == value for number, value in values.items())

    def get(self, uid: bytes, types: Sequence[int]) -> tuple[dict[int, bytes], dict[int, int]]:
        item = self.object(uid)
        record = item.record
        values = {number: record.attributes[number] for number in types if number in record.attributes}
        # what an object of this kind has is recorded, but for what is secret: nobody need be asked for the others
        errors = {
            number: int(CKR.ATTRIBUTE_TYPE_INVALID)
            for number in types
            if number not in values and number < CKA_VENDOR_DEFINED and not is_secret_component(None, None, number)
        }
        rest = [number for number in types if number not in values and number not in errors]
        if not rest:
            return values, errors

        def ask(life: Life, handles: list[Handle]) -> tuple[dict[int, bytes], dict[int, int]]:
            return life.connection.get(handles[0], rest, timeout=self._call)

        more, refused = self._group.caller.run([item], ask, logged_in=self._group.access.user)
        return {**values, **more}, {**errors, **refused}

    # -- changing ------------------------------------------------------------------------------------------
    def set(self, uid: bytes, template: Template) -> None:
        item = self.object(uid)
        record = item.record
        if isinstance(item, TokenObject) and not self.rw:
            raise Ckr(CKR.SESSION_READ_ONLY, "C_SetAttributeValue")
        new: dict[int, bytes] = {}
        for number, value in template:
            if not isinstance(value, bytes):
                raise Ckr(CKR.ATTRIBUTE_READ_ONLY, "C_SetAttributeValue")
            refusal = may_set(record.attributes, number, value)
            if refusal is not None:
                raise Ckr(refusal, "C_SetAttributeValue")
            new[number] = value
        if isinstance(item, TokenObject):
            self._group.changer.set(item, new, logged_in=self._group.access.user)
        else:
            self._group.changer.set_session_object(item, new, logged_in=self._group.access.user)

    def destroy(self, uid: bytes) -> None:
        item = self.object(uid)
        refusal = may_destroy(item.record.attributes)
        if refusal is not None:
            raise Ckr(refusal, "C_DestroyObject")
        if isinstance(item, TokenObject):
            if not self.rw:
                raise Ckr(CKR.SESSION_READ_ONLY, "C_DestroyObject")
            self._group.changer.destroy(item)
        else:
            self._group.end_session_object(item)

    def create(self, template: Template, *, assign_id: bool) -> bytes:
        return self._use().maker.create(self, template, assign_id=assign_id)

    def copy(self, uid: bytes, template: Template) -> bytes:
        item = self.object(uid)
        refusal = may_copy(item.record.attributes)
        if refusal is not None:
            raise Ckr(refusal, "C_CopyObject")
        for number, value in template:
            refusal = may_copy(item.record.attributes, number, value if isinstance(value, bytes) else b"")
            if refusal is not None:
                raise Ckr(refusal, "C_CopyObject")
        return self._use().maker.copy(self, item, template)

    def generate(self, mech: Mechanism, template: Template, *, assign_id: bool) -> bytes:
        return self._use().maker.generate(self, mech, template, assign_id=assign_id)

    def generate_pair(
        self, mech: Mechanism, public: Template, private: Template, *, assign_id: bool
    ) -> tuple[bytes, bytes]:
        return self._use().maker.generate_pair(self, mech, public, private, assign_id=assign_id)

    def unwrap(
        self, mech: Mechanism, unwrapping_key: bytes, wrapped: bytes, template: Template, *, assign_id: bool
    ) -> bytes:
        key = self.key(unwrapping_key)
        return self._group.maker.unwrap(self, mech, key, wrapped, template, assign_id=assign_id)

    def derive(self, mech: Mechanism, base_key: bytes, template: Template, *, assign_id: bool) -> bytes:
        return self._group.maker.derive(self, mech, self.key(base_key), template, assign_id=assign_id)

    def encapsulate(
        self, mech: Mechanism, public_key: bytes, template: Template, *, assign_id: bool
    ) -> tuple[bytes, bytes]:
        return self._group.maker.encapsulate(self, mech, self.key(public_key), template, assign_id=assign_id)

    def decapsulate(
        self, mech: Mechanism, private_key: bytes, template: Template, ciphertext: bytes, *, assign_id: bool
    ) -> bytes:
        key = self.key(private_key)
        return self._group.maker.decapsulate(self, mech, key, template, ciphertext, assign_id=assign_id)

    # -- operations ----------------------------------------------------------------------------------------
    def wrap(self, mech: Mechanism, wrapping_key: bytes, key: bytes) -> bytes:
        objects = [self.key(wrapping_key), self.key(key)]
        call = self._call
        return self._group.caller.run(
            objects,
            lambda life, handles: life.connection.wrap(mech, handles[0], handles[1], timeout=call),
            logged_in=self._group.access.user,
            mechanism=mech[0],
        )

    def sign(self, mech: Mechanism, key: bytes, data: bytes, *, pin: bytes | None = None) -> bytes:
        call = self._call
        return self._group.caller.run(
            [self.key(key)],
            lambda life, handles: life.connection.sign(mech, handles[0], data, pin=pin, timeout=call),
            logged_in=self._group.access.user,
            mechanism=mech[0],
        )

    def verify(self, mech: Mechanism, key: bytes, data: bytes, signature: bytes) -> None:
        call = self._call
        self._group.caller.run(
            [self.key(key)],
            lambda life, handles: life.connection.verify(mech, handles[0], data, signature, timeout=call),
            logged_in=self._group.access.user,
            mechanism=mech[0],
        )

    def encrypt(self, mech: Mechanism, key: bytes, data: bytes) -> bytes:
        call = self._call
        return self._group.caller.run(
            [self.key(key)],
            lambda life, handles: life.connection.encrypt(mech, handles[0], data, timeout=call),
            logged_in=self._group.access.user,
            mechanism=mech[0],
        )

    def decrypt(self, mech: Mechanism, key: bytes, data: bytes, *, pin: bytes | None = None) -> bytes:
        call = self._call
        return self._group.caller.run(
            [self.key(key)],
            lambda life, handles: life.connection.decrypt(mech, handles[0], data, pin=pin, timeout=call),
            logged_in=self._group.access.user,
            mechanism=mech[0],
        )

    def digest(self, mech: Mechanism, data: bytes) -> bytes:
        call = self._call
        return self._use().caller.run(
            [],
            lambda life, _: life.connection.digest(mech, [data], timeout=call),
            logged_in=self._group.access.user,
            mechanism=mech[0],
        )

    def random(self, length: int) -> bytes:
        call = self._call
        return self._use().caller.run(
            [], lambda life, _: life.connection.random(length, timeout=call), logged_in=self._group.access.user
        )

    def seed(self, data: bytes) -> None:
        call = self._call
        self._use().caller.run(
            [], lambda life, _: life.connection.seed(data, timeout=call), logged_in=self._group.access.user
        )

    def stream(self, kind: str, mech: Mechanism, key: bytes | None, *, pin: bytes | None = None) -> GroupStream:
        if kind not in ("sign", "verify", "encrypt", "decrypt", "digest"):
            raise NotOnGroup(f"there is no multi-part operation {kind!r}")
        group = self._use()
        return GroupStream(
            group.caller,
            group.roster,
            kind,
            mech,
            None if key is None else self.key(key),
            pin=pin,
            logged_in=group.access.user,
            keys_of=self.key,
        )


def is_token(template: Template) -> bool:
    """Whether a template asks for a token object."""
    return any(number == CKA.TOKEN and isinstance(value, bytes) and unpack_bool(value) for number, value in template)
