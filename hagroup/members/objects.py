"""Operations that find, read, make and destroy objects."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from hagroup.core.calls import Handle, SessionId
from hagroup.members import packing, reading
from hagroup.members.cryptoki import CKA_TOKEN, Function
from hagroup.members.operation import Operations, output
from hagroup.members.sessions import Session

_FIND_AT_ONCE = 512


def _on_token(*templates: Sequence[Any]) -> bool:
    """Whether all of these make token objects (CKA_TOKEN not given means false)."""
    return all(any(kind == CKA_TOKEN and value == b"\x01" for kind, value in template) for template in templates)


class ObjectOperations(Operations):
    """``sid`` 0 is any session; session objects made with it live as long as the generation."""

    def find(self, generation: int, sid: SessionId, limit: int, template: Sequence[Any]) -> list[Handle]:
        array, count = packing.template(template)

        def action(session: Session) -> list[Handle]:
            c, handle = self._cryptoki, session.handle
            found: list[Handle] = []
            c.C_FindObjectsInit(handle, array, count)
            session.operation = "find"
            handles = (ctypes.c_ulong * _FIND_AT_ONCE)()
            while not limit or len(found) < limit:
                at_once = min(limit - len(found), _FIND_AT_ONCE) if limit else _FIND_AT_ONCE
                c.C_FindObjects(handle, handles, at_once, session.length_pointer)
                found += handles[: session.length.value]
                if not session.length.value:
                    break
            c.C_FindObjectsFinal(handle)
            session.operation = None
            return found

        result: list[Handle] = self._life.run(generation, sid, action)
        return result

    def get(
        self, generation: int, sid: SessionId, key: Handle, types: Sequence[int]
    ) -> tuple[dict[int, bytes], dict[int, int]]:
        def action(session: Session) -> tuple[dict[int, bytes], dict[int, int]]:
            return reading.attributes(self._cryptoki.C_GetAttributeValue, session.handle, key, types)

        result: tuple[dict[int, bytes], dict[int, int]] = self._life.run(generation, sid, action)
        return result

    def set(self, generation: int, sid: SessionId, key: Handle, template: Sequence[Any]) -> None:
        array, count = packing.template(template)

        def action(session: Session) -> None:
            self._cryptoki.C_SetAttributeValue(session.handle, key, array, count)

        self._life.run(generation, sid, action)

    def destroy(self, generation: int, sid: SessionId, key: Handle) -> None:
        def action(session: Session) -> None:
            self._cryptoki.C_DestroyObject(session.handle, key)

        self._life.run(generation, sid, action)

    def _make(
        self,
        generation: int,
        sid: SessionId,
        template: Sequence[Any],
        function: Function,
        *arguments: Any,
    ) -> Handle:
        """A function that takes a template last and gives back one handle."""
        array, count = packing.template(template)

        def action(session: Session) -> Handle:
            handle = ctypes.c_ulong()
            function(session.handle, *arguments, array, count, ctypes.byref(handle))
            return handle.value

        result: Handle = self._life.run_creating(generation, sid, _on_token(template), action)
        return result

    def create(self, generation: int, sid: SessionId, template: Sequence[Any]) -> Handle:
        return self._make(generation, sid, template, self._cryptoki.C_CreateObject)

    def copy(self, generation: int, sid: SessionId, key: Handle, template: Sequence[Any]) -> Handle:
        return self._make(generation, sid, template, self._cryptoki.C_CopyObject, key)

    def generate(self, generation: int, sid: SessionId, mech: Sequence[Any], template: Sequence[Any]) -> Handle:
        pointer = packing.mechanism(mech)
        return self._make(generation, sid, template, self._cryptoki.C_GenerateKey, pointer)

    def generate_pair(
        self,
        generation: int,
        sid: SessionId,
        mech: Sequence[Any],
        public: Sequence[Any],
        private: Sequence[Any],
    ) -> tuple[Handle, Handle]:
        pointer = packing.mechanism(mech)
        public_array, public_count = packing.template(public)
        private_array, private_count = packing.template(private)

        def action(session: Session) -> tuple[Handle, Handle]:
            handles = (ctypes.c_ulong * 2)()
            self._cryptoki.C_GenerateKeyPair(
                session.handle,
                pointer,
                public_array,
                public_count,
                private_array,
                private_count,
                ctypes.byref(handles),
                ctypes.byref(handles, ctypes.sizeof(ctypes.c_ulong)),
            )
            return handles[0], handles[1]

        result: tuple[Handle, Handle] = self._life.run_creating(generation, sid, _on_token(public, private), action)
        return result

    def wrap(self, generation: int, sid: SessionId, mech: Sequence[Any], wrapping_key: Handle, key: Handle) -> bytes:
        pointer = packing.mechanism(mech)

        def action(session: Session) -> bytes:
            return output(session, self._cryptoki.C_WrapKey, session.handle, pointer, wrapping_key, key)

        result: bytes = self._life.run(generation, sid, action)
        return result

    def unwrap(
        self,
        generation: int,
        sid: SessionId,
        mech: Sequence[Any],
        unwrapping_key: Handle,
        template: Sequence[Any],
        wrapped: bytes,
    ) -> Handle:
        pointer = packing.mechanism(mech)
        function = self._cryptoki.C_UnwrapKey
        return self._make(generation, sid, template, function, pointer, unwrapping_key, wrapped, len(wrapped))

    def derive(
        self,
        generation: int,
        sid: SessionId,
        mech: Sequence[Any],
        base_key: Handle,
        template: Sequence[Any],
    ) -> Handle:
        pointer = packing.mechanism(mech)
        return self._make(generation, sid, template, self._cryptoki.C_DeriveKey, pointer, base_key)

    def encapsulate(
        self,
        generation: int,
        sid: SessionId,
        mech: Sequence[Any],
        public_key: Handle,
        template: Sequence[Any],
    ) -> tuple[bytes, Handle]:
        pointer = packing.mechanism(mech)
        array, count = packing.template(template)

        def action(session: Session) -> tuple[bytes, Handle]:
            handle = ctypes.c_ulong()

            def encapsulate(*arguments: Any) -> int:
                return self._cryptoki.C_EncapsulateKey(*arguments, ctypes.byref(handle))

            ciphertext = output(session, encapsulate, session.handle, pointer, public_key, array, count)
            return ciphertext, handle.value

        result: tuple[bytes, Handle] = self._life.run_creating(generation, sid, _on_token(template), action)
        return result

    def decapsulate(
        self,
        generation: int,
        sid: SessionId,
        mech: Sequence[Any],
        private_key: Handle,
        template: Sequence[Any],
        ciphertext: bytes,
    ) -> Handle:
        pointer = packing.mechanism(mech)
        array, count = packing.template(template)

        def action(session: Session) -> Handle:
            handle = ctypes.c_ulong()
            self._cryptoki.C_DecapsulateKey(
                session.handle,
                pointer,
                private_key,
                array,
                count,
                ciphertext,
                len(ciphertext),
                ctypes.byref(handle),
            )
            return handle.value

        result: Handle = self._life.run_creating(generation, sid, _on_token(template), action)
        return result
