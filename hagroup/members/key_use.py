"""Operations that use keys: in one call, or as a stream of parts on a session of its own; digests and random."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from hagroup.core.calls import Ckr, Handle, SessionId
from hagroup.core.ckr import CKR
from hagroup.members import bulk, packing
from hagroup.members.bulk import Bulk, Result
from hagroup.members.cryptoki import CKU_CONTEXT_SPECIFIC, Function
from hagroup.members.module import Module
from hagroup.members.operation import Operations, output
from hagroup.members.sessions import BUFFER_SIZE, Session

_ENDED = frozenset({CKR.SIGNATURE_INVALID, CKR.SIGNATURE_LEN_RANGE})


class KeyUse(Operations):
    """``session.operation`` is set from Init until it is certain that the module ended the operation."""

    def __init__(self, module: Module, generation: int) -> None:
        super().__init__(module, generation)
        c = module.cryptoki
        self._init = {
            "sign": c.C_SignInit,
            "verify": c.C_VerifyInit,
            "encrypt": c.C_EncryptInit,
            "decrypt": c.C_DecryptInit,
        }
        self._one_shot = {"sign": c.C_Sign, "encrypt": c.C_Encrypt, "decrypt": c.C_Decrypt}
        self._update = {
            "sign": c.C_SignUpdate,
            "verify": c.C_VerifyUpdate,
            "digest": c.C_DigestUpdate,
            "encrypt": c.C_EncryptUpdate,
            "decrypt": c.C_DecryptUpdate,
        }
        self._final = {
            "sign": c.C_SignFinal,
            "digest": c.C_DigestFinal,
            "encrypt": c.C_EncryptFinal,
            "decrypt": c.C_DecryptFinal,
        }

    # -- one-shot operations

    def _begin(self, session: Session, kind: str, pointer: Any, key: Handle, pin: bytes | None) -> None:
        if kind == "digest":
            self._cryptoki.C_DigestInit(session.handle, pointer)
        else:
            self._init[kind](session.handle, pointer, key)
        session.operation = kind
        if pin is not None:
            self._cryptoki.C_Login(session.handle, CKU_CONTEXT_SPECIFIC, pin, len(pin))

    def _transform(
        self, session: Session, kind: str, pointer: Any, key: Handle, pin: bytes | None, data: Bulk
    ) -> Result:
        self._begin(session, kind, pointer, key, pin)
        length = len(data)
        if length >= bulk.LONG and kind != "sign":
            result = bulk.transform(session, self._one_shot[kind], data)
        else:
            result = output(session, self._one_shot[kind], session.handle, data, length)
        session.operation = None
        return result

    def sign(
        self,
        generation: int,
        sid: SessionId,
        mech: Sequence[Any],
        key: Handle,
        pin: bytes | None,
        data: Bulk,
    ) -> bytes:
        pointer = packing.mechanism(mech)
        result: bytes = self._life.run(generation, sid, self._transform, "sign", pointer, key, pin, data)
        return result

    def encrypt(self, generation: int, sid: SessionId, mech: Sequence[Any], key: Handle, data: Bulk) -> Result:
        pointer = packing.mechanism(mech)
        result: Result = self._life.run(generation, sid, self._transform, "encrypt", pointer, key, None, data)
        return result

    def decrypt(
        self,
        generation: int,
        sid: SessionId,
        mech: Sequence[Any],
        key: Handle,
        pin: bytes | None,
        data: Bulk,
    ) -> Result:
        pointer = packing.mechanism(mech)
        result: Result = self._life.run(generation, sid, self._transform, "decrypt", pointer, key, pin, data)
        return result

    def verify(
        self,
        generation: int,
        sid: SessionId,
        mech: Sequence[Any],
        key: Handle,
        signature: bytes,
        data: Bulk,
    ) -> None:
        pointer = packing.mechanism(mech)

        def action(session: Session) -> None:
            self._begin(session, "verify", pointer, key, None)
            verify = self._cryptoki.C_Verify
            self._verified(session, verify, session.handle, data, len(data), signature, len(signature))

        self._life.run(generation, sid, action)

    def _verified(self, session: Session, function: Function, *arguments: Any) -> None:
        """The last call of a verification: a refused signature ends the operation as an accepted one does."""
        try:
            function(*arguments)
        except Ckr as error:
            if error.rv in _ENDED:
                session.operation = None
            raise
        session.operation = None

    def digest(self, generation: int, sid: SessionId, mech: Sequence[Any], data: Bulk) -> bytes:
        pointer = packing.mechanism(mech)

        def action(session: Session) -> bytes:
            self._begin(session, "digest", pointer, 0, None)
            result = output(session, self._cryptoki.C_Digest, session.handle, data, len(data))
            session.operation = None
            return result

        result: bytes = self._life.run(generation, sid, action)
        return result

    def digest_parts(
        self, generation: int, sid: SessionId, mech: Sequence[Any], parts: Sequence[bytes | Handle]
    ) -> bytes:
        pointer = packing.mechanism(mech)

        def action(session: Session) -> bytes:
            self._begin(session, "digest", pointer, 0, None)
            for part in parts:
                self._digest_part(session, part)
            result = output(session, self._cryptoki.C_DigestFinal, session.handle)
            session.operation = None
            return result

        result: bytes = self._life.run(generation, sid, action)
        return result

    def _digest_part(self, session: Session, part: bytes | Handle) -> None:
        if isinstance(part, int):
            self._cryptoki.C_DigestKey(session.handle, part)
        else:
            self._cryptoki.C_DigestUpdate(session.handle, part, len(part))

    def random(self, generation: int, sid: SessionId, length: int) -> bytes:
        def action(session: Session) -> bytes:
            target: Any = session.buffer
            if length > BUFFER_SIZE:
                target = ctypes.c_char.from_buffer(bytearray(length))
            pointer: Any = ctypes.byref(target)
            self._cryptoki.C_GenerateRandom(session.handle, pointer, length)
            return ctypes.string_at(pointer, length)

        result: bytes = self._life.run(generation, sid, action)
        return result

    def seed(self, generation: int, sid: SessionId, data: Bulk) -> None:
        def action(session: Session) -> None:
            self._cryptoki.C_SeedRandom(session.handle, data, len(data))

        self._life.run(generation, sid, action)

    # -- streams

    def stream_open(self, generation: int, kind: str, mech: Sequence[Any], key: Handle, pin: bytes | None) -> SessionId:
        pointer = packing.mechanism(mech)

        def begin(session: Session) -> None:
            self._begin(session, kind, pointer, key, pin)
            session.slow = 0

        return self._life.open_stream(generation, kind, begin)

    def stream_update(self, generation: int, stream: SessionId, data: Bulk | Handle) -> Result:
        def action(session: Session) -> Result:
            kind = session.kind
            if isinstance(data, int):
                self._cryptoki.C_DigestKey(session.handle, data)
                return b""
            if kind is None:
                raise Ckr(CKR.OPERATION_NOT_INITIALIZED, "not a stream")
            update, length = self._update[kind], len(data)
            if kind in ("encrypt", "decrypt"):
                if length >= bulk.LONG:
                    return bulk.update(session, update, data)
                return output(session, update, session.handle, data, length)
            if length >= bulk.LONG:
                bulk.ingest(session, update, data)
            else:
                update(session.handle, data, length)
            return b""

        result: Result = self._life.run_stream(generation, stream, action, last=False)
        return result

    def stream_final(self, generation: int, stream: SessionId, signature: bytes) -> bytes:
        def action(session: Session) -> bytes:
            if session.kind is None:
                raise Ckr(CKR.OPERATION_NOT_INITIALIZED, "not a stream")
            if session.kind == "verify":
                final = self._cryptoki.C_VerifyFinal
                self._verified(session, final, session.handle, signature, len(signature))
                return b""
            result = output(session, self._final[session.kind], session.handle)
            session.operation = None
            return result

        result: bytes = self._life.run_stream(generation, stream, action, last=True)
        return result

    def stream_cancel(self, _: int, stream: SessionId) -> None:
        self._life.close_named(stream)
