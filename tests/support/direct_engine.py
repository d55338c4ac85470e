"""A test double: the engine's interface over one member, without journal, failover or replication.

With it the facade can be tried against a real token before, and apart from, everything that makes a group.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hagroup.core.calls import Ckr, Handle, Mechanism, SessionId, Template
from hagroup.core.ckr import CKR
from hagroup.engine.api import MemberSlot, VirtualToken
from hagroup.members.api import Connection, MechanismInfo

_TOKEN = 1
_ID = 0x102
_TIMEOUT = 60.0


class DirectStream:
    def __init__(self, group: DirectGroup, stream: SessionId) -> None:
        self._group = group
        self._stream = stream
        self._over = False

    def _step(self, call: Callable[[], bytes]) -> bytes:
        try:
            return call()
        except Ckr:
            self.cancel()  # an error ends a multi-part operation
            raise

    def update(self, data: bytes) -> bytes:
        return self._step(lambda: self._group.connection.stream_update(self._stream, data, timeout=_TIMEOUT))

    def update_key(self, uid: bytes) -> None:
        handle = self._group.handle(uid)
        self._step(lambda: self._group.connection.stream_update(self._stream, handle, timeout=_TIMEOUT))

    def final(self, signature: bytes = b"") -> bytes:
        self._over = True
        return self._group.connection.stream_final(self._stream, signature, timeout=_TIMEOUT)

    def cancel(self) -> None:
        if not self._over:
            self._over = True
            self._group.connection.stream_cancel(self._stream, timeout=_TIMEOUT)


class DirectSession:
    """One virtual session. ``id``s are not used twice."""

    def __init__(self, group: DirectGroup, number: int, *, rw: bool) -> None:
        self._group = group
        self.id = number
        self.rw = rw
        self._made: list[bytes] = []
        self._open = True

    def _use(self) -> Connection:
        if not self._open:
            raise Ckr(CKR.SESSION_HANDLE_INVALID, "C_GetSessionInfo")
        return self._group.connection

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self._destroy_session_objects()

    def _destroy_session_objects(self) -> None:
        for uid in self._made:
            try:
                self._group.connection.destroy(self._group.handle(uid), timeout=_TIMEOUT)
            except Ckr:
                pass  # destroyed already, or ended with a logout
            self._group.forget(uid)
        self._made.clear()

    # -- login
    def login(self, user_type: int, pin: bytes) -> None:
        self._use().login(user_type, pin, timeout=_TIMEOUT)
        self._group.state = user_type

    def logout(self) -> None:
        connection = self._use()
        self._destroy_session_objects()  # the public ones too: the generation moves, and their handles with it
        connection.logout(timeout=_TIMEOUT)
        self._group.logouts += 1
        self._group.state = None
        self._group.forget_all()

    @property
    def logouts(self) -> int:
        return self._group.logouts

    def set_pin(self, old: bytes, new: bytes) -> None:
        self._use().set_pin(old, new, timeout=_TIMEOUT)

    def init_pin(self, pin: bytes) -> None:
        self._use().init_pin(pin, timeout=_TIMEOUT)

    # -- objects
    def find(self, attributes: Mapping[int, bytes]) -> list[bytes]:
        template: Template = list(attributes.items())
        return [self._group.uid(handle) for handle in self._use().find(template, timeout=_TIMEOUT)]

    def get(self, uid: bytes, types: Sequence[int]) -> tuple[dict[int, bytes], dict[int, int]]:
        return self._use().get(self._group.handle(uid), [int(number) for number in types], timeout=_TIMEOUT)

    def _may_write(self, uid: bytes) -> None:
        if not self.rw and self.get(uid, [_TOKEN])[0].get(_TOKEN) == b"\1":
            raise Ckr(CKR.SESSION_READ_ONLY, "C_SetAttributeValue")

    def set(self, uid: bytes, template: Template) -> None:
        self._may_write(uid)
        self._use().set(self._group.handle(uid), template, timeout=_TIMEOUT)

    def destroy(self, uid: bytes) -> None:
        self._may_write(uid)
        self._use().destroy(self._group.handle(uid), timeout=_TIMEOUT)
        self._group.forget(uid)

    def _template(self, template: Template, *, assign_id: bool, shared: bytes) -> Template:
        stored = any(number == _TOKEN and value == b"\1" for number, value in template)
        if stored and not self.rw:
            raise Ckr(CKR.SESSION_READ_ONLY, "C_CreateObject")
        self._group.assigned.append(assign_id)
        if stored and assign_id:
            return [*((n, v) for n, v in template if n != _ID), (_ID, shared)]
        return template

    def _keep(self, handle: Handle) -> bytes:
        uid = self._group.uid(handle)
        values, _ = self._group.connection.get(handle, [_TOKEN], timeout=_TIMEOUT)
        if values.get(_TOKEN) != b"\1":
            self._made.append(uid)
        return uid

    def create(self, template: Template, *, assign_id: bool) -> bytes:
        template = self._template(template, assign_id=assign_id, shared=os.urandom(16))
        return self._keep(self._use().create(template, timeout=_TIMEOUT))

    def copy(self, uid: bytes, template: Template) -> bytes:
        template = self._template(template, assign_id=False, shared=b"")
        return self._keep(self._use().copy(self._group.handle(uid), template, timeout=_TIMEOUT))

    def generate(self, mech: Mechanism, template: Template, *, assign_id: bool) -> bytes:
        template = self._template(template, assign_id=assign_id, shared=os.urandom(16))
        return self._keep(self._use().generate(mech, template, timeout=_TIMEOUT))

    def generate_pair(
        self, mech: Mechanism, public: Template, private: Template, *, assign_id: bool
    ) -> tuple[bytes, bytes]:
        shared = os.urandom(16)
        public = self._template(public, assign_id=assign_id, shared=shared)
        private = self._template(private, assign_id=assign_id, shared=shared)
        first, second = self._use().generate_pair(mech, public, private, timeout=_TIMEOUT)
        return self._keep(first), self._keep(second)

    def wrap(self, mech: Mechanism, wrapping_key: bytes, key: bytes) -> bytes:
        handle = self._group.handle
        return self._use().wrap(mech, handle(wrapping_key), handle(key), timeout=_TIMEOUT)

    def unwrap(
        self, mech: Mechanism, unwrapping_key: bytes, wrapped: bytes, template: Template, *, assign_id: bool
    ) -> bytes:
        template = self._template(template, assign_id=assign_id, shared=os.urandom(16))
        handle = self._group.handle(unwrapping_key)
        return self._keep(self._use().unwrap(mech, handle, wrapped, template, timeout=_TIMEOUT))

    def derive(self, mech: Mechanism, base_key: bytes, template: Template, *, assign_id: bool) -> bytes:
        template = self._template(template, assign_id=assign_id, shared=os.urandom(16))
        return self._keep(self._use().derive(mech, self._group.handle(base_key), template, timeout=_TIMEOUT))

    def encapsulate(
        self, mech: Mechanism, public_key: bytes, template: Template, *, assign_id: bool
    ) -> tuple[bytes, bytes]:
        template = self._template(template, assign_id=assign_id, shared=os.urandom(16))
        text, key = self._use().encapsulate(mech, self._group.handle(public_key), template, timeout=_TIMEOUT)
        return text, self._keep(key)

    def decapsulate(
        self, mech: Mechanism, private_key: bytes, template: Template, ciphertext: bytes, *, assign_id: bool
    ) -> bytes:
        template = self._template(template, assign_id=assign_id, shared=os.urandom(16))
        handle = self._group.handle(private_key)
        return self._keep(self._use().decapsulate(mech, handle, template, ciphertext, timeout=_TIMEOUT))

    # -- operations
    def sign(self, mech: Mechanism, key: bytes, data: bytes, *, pin: bytes | None = None) -> bytes:
        return self._use().sign(mech, self._group.handle(key), data, pin=pin, timeout=_TIMEOUT)

    def verify(self, mech: Mechanism, key: bytes, data: bytes, signature: bytes) -> None:
        self._use().verify(mech, self._group.handle(key), data, signature, timeout=_TIMEOUT)

    def encrypt(self, mech: Mechanism, key: bytes, data: bytes) -> bytes:
        return self._use().encrypt(mech, self._group.handle(key), data, timeout=_TIMEOUT)

    def decrypt(self, mech: Mechanism, key: bytes, data: bytes, *, pin: bytes | None = None) -> bytes:
        return self._use().decrypt(mech, self._group.handle(key), data, pin=pin, timeout=_TIMEOUT)

    def digest(self, mech: Mechanism, data: bytes) -> bytes:
        return self._use().digest(mech, [data], timeout=_TIMEOUT)

    def random(self, length: int) -> bytes:
        return self._use().random(length, timeout=_TIMEOUT)

    def seed(self, data: bytes) -> None:
        self._use().seed(data, timeout=_TIMEOUT)

    def stream(self, kind: str, mech: Mechanism, key: bytes | None, *, pin: bytes | None = None) -> DirectStream:
        handle = 0 if key is None else self._group.handle(key)
        return DirectStream(self._group, self._use().stream_open(kind, mech, handle, pin=pin, timeout=_TIMEOUT))


class DirectGroup:
    """A group of one member, without anything that makes it safe."""

    def __init__(self, connection: Connection, *, members: Sequence[MemberSlot] = ()) -> None:
        self.connection = connection
        self.state: int | None = None
        self.logouts = 0
        self.assigned: list[bool] = []
        """``assign_id`` of each object that was made."""
        self._members = members
        self._numbers = itertools.count(1)
        self._handles: dict[bytes, Handle] = {}
        self._uids: dict[Handle, bytes] = {}
        self._lock = threading.Lock()

    # -- names of objects
    def uid(self, handle: Handle) -> bytes:
        with self._lock:
            uid = self._uids.get(handle)
            if uid is None:
                uid = os.urandom(16)
                self._uids[handle], self._handles[uid] = uid, handle
            return uid

    def handle(self, uid: bytes) -> Handle:
        with self._lock:
            try:
                return self._handles[uid]
            except KeyError:
                raise Ckr(CKR.OBJECT_HANDLE_INVALID, "C_GetAttributeValue") from None

    def forget(self, uid: bytes) -> None:
        with self._lock:
            handle = self._handles.pop(uid, None)
            if handle is not None:
                del self._uids[handle]

    def forget_all(self) -> None:
        with self._lock:
            self._handles.clear()
            self._uids.clear()

    # -- the group
    @property
    def label(self) -> str:
        return self.token().label

    @property
    def serial(self) -> str:
        return self.token().serial

    def token(self) -> VirtualToken:
        info = self.connection.token_info(timeout=_TIMEOUT)
        return VirtualToken(
            label=info.label,
            serial=info.serial,
            manufacturer=info.manufacturer,
            model=info.model,
            flags=info.flags,
            hardware_version=info.hardware_version,
            firmware_version=info.firmware_version,
        )

    def mechanisms(self) -> Mapping[int, MechanismInfo]:
        return self.connection.mechanisms(timeout=_TIMEOUT)

    def member_slots(self) -> Sequence[MemberSlot]:
        return self._members

    def open_session(self, *, rw: bool) -> DirectSession:
        return DirectSession(self, next(self._numbers), rw=rw)

    def login_state(self) -> int | None:
        return self.state

    def close(self) -> None:
        self.connection.close()


def direct_group(settings: Any, *, generation: int = 1) -> DirectGroup:
    """``settings``: :class:`hagroup.members.module.ConnectionSettings`."""
    from hagroup.members.open import open_connection

    return DirectGroup(open_connection(settings, generation=generation, isolation="process", timeout=30.0))
