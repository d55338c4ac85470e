"""What both kinds of connection share: the methods of :class:`hagroup.members.api.Connection` as messages.

The handles given out carry their generation: ``generation << 64 | the module's handle``. A handle of an earlier
generation, of an earlier connection too, is refused here, and by the executor for what happens in between; it can
never name another key by its number (DESIGN.md 8, trap 10).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import msgspec

from hagroup.core.calls import Handle, Mechanism, SessionId, StaleGeneration, Template
from hagroup.members.api import TokenInfo

_TAG = 64
_RAW = (1 << _TAG) - 1

# How much of the caller's time the member may spend on waiting for other calls to end (logout, login after a loss),
# so that it answers why it gave up before the caller does.
_WAIT = 0.8


def _token_info(result: Any) -> TokenInfo:
    return result if isinstance(result, TokenInfo) else msgspec.convert(result, TokenInfo)


class MessageConnection(ABC):
    """All methods that are one message; a subclass delivers them."""

    @property
    @abstractmethod
    def generation(self) -> int: ...

    @abstractmethod
    def _call(self, operation: str, generation: int, arguments: list[Any], timeout: float) -> Any: ...

    # -- handles

    def _own(self, handle: Handle) -> int:
        """The generation of a handle, which must be this connection's present one."""
        generation = handle >> _TAG
        if generation != self.generation:
            raise StaleGeneration(f"handle of generation {generation}, now is {self.generation}")
        return generation

    @staticmethod
    def _tagged(generation: int, handles: Iterable[int]) -> list[Handle]:
        tag = generation << _TAG
        return [tag | handle for handle in handles]

    def _making(self, operation: str, generation: int, arguments: list[Any], timeout: float) -> Handle:
        handle: int = self._call(operation, generation, arguments, timeout)
        return generation << _TAG | handle

    # -- token

    def token_info(self, *, timeout: float) -> TokenInfo:
        return _token_info(self._call("token_info", 0, [], timeout))

    def probe(self, *, timeout: float) -> TokenInfo:
        return _token_info(self._call("probe", 0, [], timeout))

    # -- login

    def login(self, user_type: int, pin: bytes, *, timeout: float) -> None:
        self._call("login", 0, [user_type, timeout * _WAIT, pin], timeout)

    def logout(self, *, timeout: float) -> None:
        self._call("logout", 0, [timeout * _WAIT], timeout)

    def set_pin(self, old: bytes, new: bytes, *, timeout: float) -> None:
        self._call("set_pin", self.generation, [old, new], timeout)

    def init_pin(self, pin: bytes, *, timeout: float) -> None:
        self._call("init_pin", self.generation, [pin], timeout)

    # -- sessions

    def open_session(self, *, rw: bool = True, timeout: float) -> SessionId:
        sid: SessionId = self._call("open_session", self.generation, [rw], timeout)
        return sid

    def close_session(self, sid: SessionId, *, timeout: float) -> None:
        self._call("close_session", 0, [sid], timeout)

    # -- objects

    def find(self, template: Template, *, limit: int = 0, sid: SessionId = 0, timeout: float) -> list[Handle]:
        generation = self.generation
        found: list[int] = self._call("find", generation, [sid, limit, template], timeout)
        return self._tagged(generation, found)

    def get(
        self, handle: Handle, types: list[int], *, sid: SessionId = 0, timeout: float
    ) -> tuple[dict[int, bytes], dict[int, int]]:
        generation = self._own(handle)
        values, failures = self._call("get", generation, [sid, handle & _RAW, types], timeout)
        return values, failures

    def set(self, handle: Handle, template: Template, *, sid: SessionId = 0, timeout: float) -> None:
        self._call("set", self._own(handle), [sid, handle & _RAW, template], timeout)

    def create(self, template: Template, *, sid: SessionId = 0, timeout: float) -> Handle:
        return self._making("create", self.generation, [sid, template], timeout)

    def copy(self, handle: Handle, template: Template, *, sid: SessionId = 0, timeout: float) -> Handle:
        return self._making("copy", self._own(handle), [sid, handle & _RAW, template], timeout)

    def destroy(self, handle: Handle, *, sid: SessionId = 0, timeout: float) -> None:
        self._call("destroy", self._own(handle), [sid, handle & _RAW], timeout)

    def generate(self, mech: Mechanism, template: Template, *, sid: SessionId = 0, timeout: float) -> Handle:
        return self._making("generate", self.generation, [sid, mech, template], timeout)

    def generate_pair(
        self, mech: Mechanism, public: Template, private: Template, *, sid: SessionId = 0, timeout: float
    ) -> tuple[Handle, Handle]:
        generation = self.generation
        pair = self._call("generate_pair", generation, [sid, mech, public, private], timeout)
        public_key, private_key = self._tagged(generation, pair)
        return public_key, private_key

    def wrap(self, mech: Mechanism, wrapping_key: Handle, key: Handle, *, sid: SessionId = 0, timeout: float) -> bytes:
        self._own(key)
        arguments = [sid, mech, wrapping_key & _RAW, key & _RAW]
        wrapped: bytes = self._call("wrap", self._own(wrapping_key), arguments, timeout)
        return wrapped

    def unwrap(
        self,
        mech: Mechanism,
        unwrapping_key: Handle,
        wrapped: bytes,
        template: Template,
        *,
        sid: SessionId = 0,
        timeout: float,
    ) -> Handle:
        arguments = [sid, mech, unwrapping_key & _RAW, template, wrapped]
        return self._making("unwrap", self._own(unwrapping_key), arguments, timeout)

    def derive(
        self, mech: Mechanism, base_key: Handle, template: Template, *, sid: SessionId = 0, timeout: float
    ) -> Handle:
        arguments = [sid, mech, base_key & _RAW, template]
        return self._making("derive", self._own(base_key), arguments, timeout)

    def encapsulate(
        self, mech: Mechanism, public_key: Handle, template: Template, *, sid: SessionId = 0, timeout: float
    ) -> tuple[bytes, Handle]:
        generation = self._own(public_key)
        arguments = [sid, mech, public_key & _RAW, template]
        ciphertext, handle = self._call("encapsulate", generation, arguments, timeout)
        return ciphertext, generation << _TAG | handle

    def decapsulate(
        self,
        mech: Mechanism,
        private_key: Handle,
        template: Template,
        ciphertext: bytes,
        *,
        sid: SessionId = 0,
        timeout: float,
    ) -> Handle:
        arguments = [sid, mech, private_key & _RAW, template, ciphertext]
        return self._making("decapsulate", self._own(private_key), arguments, timeout)

    # -- one-shot operations

    def sign(
        self,
        mech: Mechanism,
        key: Handle,
        data: bytes,
        *,
        pin: bytes | None = None,
        sid: SessionId = 0,
        timeout: float,
    ) -> bytes:
        signature: bytes = self._call("sign", self._own(key), [sid, mech, key & _RAW, pin, data], timeout)
        return signature

    def verify(
        self, mech: Mechanism, key: Handle, data: bytes, signature: bytes, *, sid: SessionId = 0, timeout: float
    ) -> None:
        self._call("verify", self._own(key), [sid, mech, key & _RAW, signature, data], timeout)

    def encrypt(self, mech: Mechanism, key: Handle, data: bytes, *, sid: SessionId = 0, timeout: float) -> bytes:
        encrypted: bytes = self._call("encrypt", self._own(key), [sid, mech, key & _RAW, data], timeout)
        return encrypted

    def decrypt(
        self,
        mech: Mechanism,
        key: Handle,
        data: bytes,
        *,
        pin: bytes | None = None,
        sid: SessionId = 0,
        timeout: float,
    ) -> bytes:
        plain: bytes = self._call("decrypt", self._own(key), [sid, mech, key & _RAW, pin, data], timeout)
        return plain

    def digest(self, mech: Mechanism, parts: list[bytes | Handle], *, sid: SessionId = 0, timeout: float) -> bytes:
        digest: bytes
        if len(parts) == 1 and isinstance(parts[0], bytes):
            digest = self._call("digest", self.generation, [sid, mech, parts[0]], timeout)
            return digest
        generation = self.generation
        raw = [self._raw_part(part) for part in parts]
        digest = self._call("digest_parts", generation, [sid, mech, raw], timeout)
        return digest

    def _raw_part(self, part: bytes | Handle) -> bytes | int:
        if isinstance(part, int):
            self._own(part)
            return part & _RAW
        return part

    def random(self, length: int, *, sid: SessionId = 0, timeout: float) -> bytes:
        data: bytes = self._call("random", self.generation, [sid, length], timeout)
        return data

    def seed(self, data: bytes, *, sid: SessionId = 0, timeout: float) -> None:
        self._call("seed", self.generation, [sid, data], timeout)

    # -- multi-part operations

    def stream_open(
        self, kind: str, mech: Mechanism, key: Handle, *, pin: bytes | None = None, timeout: float
    ) -> SessionId:
        # A digest has no key: whatever is given for it is not looked at.
        generation = self.generation if kind == "digest" else self._own(key)
        sid: SessionId = self._call("stream_open", generation, [kind, mech, key & _RAW, pin], timeout)
        return sid

    def stream_update(self, stream: SessionId, data: bytes | Handle, *, timeout: float) -> bytes:
        generation = self.generation
        out: bytes = self._call("stream_update", generation, [stream, self._raw_part(data)], timeout)
        return out

    def stream_final(self, stream: SessionId, signature: bytes = b"", *, timeout: float) -> bytes:
        out: bytes = self._call("stream_final", self.generation, [stream, signature], timeout)
        return out

    def stream_cancel(self, stream: SessionId, *, timeout: float) -> None:
        self._call("stream_cancel", 0, [stream], timeout)
