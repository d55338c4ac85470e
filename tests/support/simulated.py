"""A simulated member: a token that outlives its connections, and connections as ``hagroup.members.api`` has them.

The cryptography is fake but keeps what matters: values are random, only the right key opens what it sealed, a signature
tells which key made it, and the public part follows from the private one. RSA is real arithmetic with small numbers,
since the engine checks RSA keys by use. The rules are SoftHSM's where the engine relies on them (DESIGN.md 8).

What happens to a call is decided by ``SimMember.script`` at the moment of the call; see :class:`Fate`.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import hmac
import os
import random
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any, TypeVar

import msgspec

from hagroup.core.attributes import (
    CKA,
    CKK,
    CKM,
    CKO,
    TEMPLATES,
    attributes_of,
    pack_bool,
    pack_template,
    pack_ulong,
    unpack_bool,
    unpack_template,
    unpack_ulong,
)
from hagroup.core.calls import Ckr, DeadlinePassed, Handle, Mechanism, MemberGone, SessionId, Template
from hagroup.core.ckr import CKR
from hagroup.members.api import MechanismInfo, ModuleInfo, TokenInfo
from hagroup.members.lock import WorkerLock

T = TypeVar("T")

CKU_SO, CKU_USER = 0, 1
CKM_EC_KEY_PAIR_GEN, CKM_ECDSA, CKM_AES_CMAC, CKM_AES_ECB_ENCRYPT_DATA = 0x1040, 0x1041, 0x108A, 0x1104
MECHANISMS = {
    int(number): MechanismInfo(0, 4096, 0xFFFFF)
    for number in (
        CKM.RSA_PKCS_KEY_PAIR_GEN,
        CKM.RSA_PKCS_OAEP,
        CKM.SHA256_RSA_PKCS,
        CKM.SHA256,
        CKM.AES_KEY_GEN,
        CKM.AES_GCM,
        CKM.AES_KEY_WRAP_PAD,
        CKM_EC_KEY_PAIR_GEN,
        CKM_ECDSA,
        CKM_AES_CMAC,
        CKM_AES_ECB_ENCRYPT_DATA,
    )
}
_FALSE = frozenset({CKA.DERIVE, CKA.LOCAL, CKA.TRUSTED, CKA.WRAP_WITH_TRUSTED, CKA.ALWAYS_AUTHENTICATE, CKA.TOKEN})
_FALSE_TOO = frozenset({CKA.EXTRACTABLE, CKA.ALWAYS_SENSITIVE, CKA.NEVER_EXTRACTABLE})
_TRUE = frozenset(
    {
        *(CKA.PRIVATE, CKA.MODIFIABLE, CKA.COPYABLE, CKA.DESTROYABLE, CKA.SENSITIVE, CKA.ENCRYPT, CKA.DECRYPT),
        *(CKA.SIGN, CKA.SIGN_RECOVER, CKA.VERIFY, CKA.VERIFY_RECOVER, CKA.WRAP, CKA.UNWRAP),
    }
)
_NUMBERS = {CKA.VALUE_LEN: 0, CKA.KEY_GEN_MECHANISM: (1 << 64) - 1}
_NO_DEFAULT = frozenset(
    {CKA.MODULUS, CKA.PUBLIC_EXPONENT, CKA.MODULUS_BITS, CKA.EC_PARAMS, CKA.EC_POINT, CKA.CLASS, CKA.KEY_TYPE}
)
_DIGEST_INFO = bytes.fromhex("3031300d060960864801650304020105000420")
_PRIME_BITS = 264  # a modulus of 66 bytes takes a SHA-256 DigestInfo with PKCS#1 padding


class Fate(StrEnum):
    """What becomes of one call."""

    FINE = "fine"
    REFUSED = "refused"  # DEVICE_ERROR, and nothing was done
    GENERAL_ERROR = "general error"  # nothing was done
    FAILED_AFTER = "failed after"  # DEVICE_ERROR although it was done
    UNSENT = "unsent"  # the connection ended before the request was sent
    LOST_BEFORE = "lost before"  # the connection ended; the member never saw the request
    LOST_AFTER = "lost after"  # the connection ended; it was done
    TORN = "torn"  # the connection ended in the middle of a write to the token
    HANGS = "hangs"  # the deadline passes; it is never done
    HANGS_AFTER = "hangs after"  # the deadline passes; it was done
    LATE = "late"  # the deadline passes; it is done whenever the test says so


class SimObject:
    """One object; a token's or a session's."""

    def __init__(self, number: int, attributes: dict[int, bytes], secret: bytes | None, session: object) -> None:
        self.number = number
        self.attributes = attributes
        self.secret = secret
        """The key's value; None for a half-made key."""
        self.session = session
        """(connection, session) it ends with; None: on the token."""

    def flag(self, attribute: int) -> bool:
        return unpack_bool(self.attributes.get(attribute, b""))

    @property
    def label(self) -> bytes:
        return self.attributes.get(CKA.LABEL, b"")

    @property
    def object_class(self) -> int | None:
        packed = self.attributes.get(CKA.CLASS)
        return None if packed is None else unpack_ulong(packed)


class SimToken:
    """What is stored: survives connections, and can be put back to an earlier state."""

    def __init__(self, serial: str, pin: bytes) -> None:
        self.serial = serial
        self.pin = pin
        self.so_pin = b"12345678"
        self.objects: dict[int, SimObject] = {}
        self.refused: list[bytes] = []
        """PINs that it refused, in order."""
        self.count_low = False
        self.full = False
        self.logins = 0

    def snapshot(self) -> dict[int, SimObject]:
        return {number: copy.copy(item) for number, item in self.objects.items()} | {}

    def restore(self, objects: dict[int, SimObject]) -> None:
        self.objects = {}
        for number, item in objects.items():
            again = copy.copy(item)
            again.attributes = dict(item.attributes)
            self.objects[number] = again


class LateCall(msgspec.Struct):
    """A call that everybody gave up, and that the member may still execute."""

    name: str
    since: float
    connection: Any
    action: Callable[[], object]


class SimMember:
    """One member: its token, whether it answers, and the calls that it has not executed yet."""

    def __init__(self, name: str, serial: str, pin: bytes, *, local: bool, now: Callable[[], float]) -> None:
        self.name = name
        self.token = SimToken(serial, pin)
        self.right_token = self.token
        """Another one may be behind its address."""
        self.local = local
        """A call ends with its worker, as in a module that works in the worker's own process."""
        self.now = now
        self.down = False
        self.hung = False
        self.late: list[LateCall] = []
        self.connections: list[SimConnection] = []
        self.script: Callable[[SimConnection, str, bool], Fate] = lambda connection, name, changes: Fate.FINE
        self.after: Callable[[SimConnection, str, bool], None] = lambda connection, name, changes: None
        self._numbers = 0

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def connect(self, generation: int, lock_file: str | None, owner: str) -> SimConnection:
        connection = SimConnection(self, generation, lock_file, owner)
        self.connections.append(connection)
        return connection

    def power_cycle(self) -> None:
        """Every connection ends; what was pending in a worker of this host ends too."""
        for connection in list(self.connections):
            connection.kill()
        if self.local:
            self.late.clear()

    def run_late(self, index: int) -> LateCall | None:
        """One of the pending calls is executed now, whatever has happened since; what it answers reaches nobody."""
        if not self.late:
            return None
        call = self.late.pop(index % len(self.late))
        try:
            call.action()
        except Ckr:
            pass
        call.connection.came_back()
        return call


# -- fake cryptography -------------------------------------------------------------------------------------------------


def _stream(key: bytes, tag: bytes, length: int) -> bytes:
    return hashlib.shake_128(key + tag).digest(length)


def seal(key: bytes, plain: bytes, associated: bytes) -> bytes:
    tag = hmac.digest(key, associated + len(associated).to_bytes(8, "big") + plain, "sha256")[:16]
    return tag + bytes(a ^ b for a, b in zip(plain, _stream(key, tag, len(plain)), strict=True))


def unseal(key: bytes, sealed: bytes, associated: bytes) -> bytes:
    tag, body = sealed[:16], sealed[16:]
    plain = bytes(a ^ b for a, b in zip(body, _stream(key, tag, len(body)), strict=True))
    if seal(key, plain, associated) != sealed:
        raise Ckr(CKR.GENERAL_ERROR, "C_Decrypt")
    return plain


def ec_point(secret: bytes) -> bytes:
    return b"\x04\x41\x04" + hashlib.sha512(b"point" + secret).digest()


@functools.cache
def _primes() -> list[int]:
    """A pool of primes; two of them make a key. Always the same ones."""
    numbers = random.Random(5649)
    found: list[int] = []
    while len(found) < 40:
        candidate = numbers.getrandbits(_PRIME_BITS) | (3 << (_PRIME_BITS - 2)) | 1
        if candidate % 65537 != 1 and all(pow(base, candidate - 1, candidate) == 1 for base in (2, 3, 5, 7)):
            found.append(candidate)
    return found


def _new_rsa() -> tuple[int, int, int]:
    primes = _primes()
    choice = int.from_bytes(os.urandom(8), "big")
    p = primes[choice % len(primes)]
    q = primes[(choice // len(primes)) % (len(primes) - 1)]
    q = primes[-1] if q == p else q
    return p * q, 65537, pow(65537, -1, (p - 1) * (q - 1))


def _bytes(number: int) -> bytes:
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def signature(item: SimObject, mechanism: int, data: bytes) -> bytes:
    """What this key signs; ``CKR_MECHANISM_INVALID`` for a key without value, as SoftHSM says."""
    if item.secret is None:
        raise Ckr(CKR.MECHANISM_INVALID, "C_SignInit")
    if mechanism == CKM.SHA256_RSA_PKCS:
        n, _, d = (int.from_bytes(part, "big") for part in msgspec.msgpack.decode(item.secret, type=list[bytes]))
        length = (n.bit_length() + 7) // 8
        text = _DIGEST_INFO + hashlib.sha256(data).digest()
        block = b"\0\x01" + b"\xff" * (length - len(text) - 3) + b"\0" + text
        return pow(int.from_bytes(block, "big"), d, n).to_bytes(length, "big")
    return hmac.digest(item.secret, mechanism.to_bytes(8, "big") + data, "sha256")


# -- connections -------------------------------------------------------------------------------------------------------


class SimConnection:
    """One life of the member's module in one client. Handles start anew in each, so a stale one names another key."""

    def __init__(self, member: SimMember, generation: int, lock_file: str | None, owner: str) -> None:
        self.member = member
        self.owner = owner
        self._generation = generation
        self._ended = False
        self._logged_in: int | None = None
        self._numbers = 0
        self._handles: dict[Handle, SimObject] = {}
        self._known: dict[int, Handle] = {}
        self._sessions: set[SessionId] = set()
        self._session_objects: list[SimObject] = []
        self._streams: dict[SessionId, tuple[str, Mechanism, Handle, list[bytes | Handle]]] = {}
        self._lock = None if lock_file is None else WorkerLock(lock_file)

    # -- how calls go ------------------------------------------------------------------------------------------
    def _do(self, name: str, action: Callable[[], T], *, changes: bool = False, torn: Any = None) -> T:
        member = self.member
        fate = member.script(self, name, changes)
        if self._ended:
            raise MemberGone(f"{member.name}: the connection is closed", sent=False)
        if member.down:
            raise Ckr(CKR.DEVICE_REMOVED, name)
        if member.hung and fate is Fate.FINE:
            fate = Fate.LATE
        result: Any = None
        if fate in (Fate.FINE, Fate.FAILED_AFTER, Fate.LOST_AFTER, Fate.HANGS_AFTER):
            result = action()
        match fate:
            case Fate.FINE:
                member.after(self, name, changes)
                return result  # type: ignore[no-any-return]
            case Fate.REFUSED | Fate.FAILED_AFTER:
                raise Ckr(CKR.DEVICE_ERROR, name)
            case Fate.GENERAL_ERROR:
                raise Ckr(CKR.GENERAL_ERROR, name)
            case Fate.TORN if torn is not None and changes:
                self._inside()
                torn()
            case Fate.LATE if changes:
                self._inside()
                member.late.append(LateCall(name, member.now(), self, action))
        if fate in (Fate.HANGS, Fate.HANGS_AFTER, Fate.LATE):
            raise DeadlinePassed(f"{member.name}: {name} was not answered")
        self.kill()
        raise MemberGone(f"{member.name}: the connection ended in {name}", sent=fate is not Fate.UNSENT)

    def _inside(self) -> None:
        """A call that changes the token does not come back."""
        if self._lock is not None:
            self._lock.__enter__()

    def came_back(self) -> None:
        if self._lock is not None:
            self._lock.__exit__()

    def _object(self, handle: Handle, error: CKR = CKR.OBJECT_HANDLE_INVALID) -> SimObject:
        item = self._handles.get(handle)
        if item is not None and item.session is None:
            item = self.member.token.objects.get(item.number)
        if item is None or not self._shows(item):
            raise Ckr(error, "handle")
        return item

    def _key(self, handle: Handle, usage: CKA) -> SimObject:
        item = self._object(handle, CKR.KEY_HANDLE_INVALID)
        if not item.flag(usage):
            raise Ckr(CKR.KEY_FUNCTION_NOT_PERMITTED, "key")
        return item

    def _handle(self, item: SimObject) -> Handle:
        handle = self._known.get(item.number)
        if handle is None:
            self._numbers += 1
            handle = self._known[item.number] = self._numbers
        self._handles[handle] = item
        return handle

    def _visible(self) -> Iterator[SimObject]:
        for item in (*self.member.token.objects.values(), *self._session_objects):
            if self._shows(item):
                yield item

    def _shows(self, item: SimObject) -> bool:
        return self._logged_in == CKU_USER or not item.flag(CKA.PRIVATE)

    # -- what it is --------------------------------------------------------------------------------------------
    @property
    def generation(self) -> int:
        return self._generation

    @property
    def alive(self) -> bool:
        return not self._ended

    @property
    def module_info(self) -> ModuleInfo:
        return ModuleInfo(
            manufacturer="hagroup tests",
            description="simulated",
            library_version=(1, 0),
            cryptoki_version=(2, 40),
            slot_id=1,
            slot_description=self.member.name,
            slot_manufacturer="hagroup tests",
            slot_flags=1,
            has_v30=False,
            has_v32=False,
        )

    def _token_info(self) -> TokenInfo:
        token = self.member.token
        return TokenInfo(
            label=self.member.name,
            manufacturer="hagroup tests",
            model="simulated",
            serial=token.serial,
            flags=0x40D | (0x10000 if token.count_low else 0),
            hardware_version=(1, 0),
            firmware_version=(1, 0),
            min_pin_len=4,
            max_pin_len=64,
            free_private_memory=None,
        )

    def token_info(self, *, timeout: float) -> TokenInfo:
        return self._do("C_GetTokenInfo", self._token_info)

    def mechanisms(self, *, timeout: float) -> dict[int, MechanismInfo]:
        return self._do("C_GetMechanismList", lambda: dict(MECHANISMS))

    def probe(self, *, timeout: float) -> TokenInfo:
        return self._do("C_GenerateRandom", self._token_info)

    # -- login, sessions ---------------------------------------------------------------------------------------
    def login(self, user_type: int, pin: bytes, *, timeout: float) -> None:
        def action() -> None:
            token = self.member.token
            if self._logged_in is not None:
                raise Ckr(CKR.USER_ALREADY_LOGGED_IN, "C_Login")
            if pin != (token.so_pin if user_type == CKU_SO else token.pin):
                token.refused.append(pin)
                token.count_low = True
                raise Ckr(CKR.PIN_INCORRECT, "C_Login")
            token.count_low = False
            token.logins += 1
            self._logged_in = user_type

        self._do("C_Login", action)

    def logout(self, *, timeout: float) -> None:
        def action() -> None:
            self._logged_in = None
            self._generation += 1
            self._handles.clear()
            self._known.clear()
            self._session_objects.clear()

        self._do("C_Logout", action)

    def set_pin(self, old: bytes, new: bytes, *, timeout: float) -> None:
        def action() -> None:
            if old != self.member.token.pin:
                self.member.token.refused.append(old)
                raise Ckr(CKR.PIN_INCORRECT, "C_SetPIN")
            self.member.token.pin = new

        self._do("C_SetPIN", action, changes=True)

    def init_pin(self, pin: bytes, *, timeout: float) -> None:
        self._do("C_InitPIN", lambda: setattr(self.member.token, "pin", pin), changes=True)

    def _open(self) -> SessionId:
        self._numbers += 1
        self._sessions.add(self._numbers)
        return self._numbers

    def open_session(self, *, rw: bool = True, timeout: float) -> SessionId:
        return self._do("C_OpenSession", self._open)

    def _close_session(self, sid: SessionId) -> None:
        if sid not in self._sessions:
            raise Ckr(CKR.SESSION_HANDLE_INVALID, "C_CloseSession")
        self._sessions.discard(sid)
        self._session_objects = [item for item in self._session_objects if item.session != sid]

    def close_session(self, sid: SessionId, *, timeout: float) -> None:
        self._do("C_CloseSession", lambda: self._close_session(sid))

    # -- objects -----------------------------------------------------------------------------------------------
    def find(self, template: Template, *, limit: int = 0, sid: SessionId = 0, timeout: float) -> list[Handle]:
        def action() -> list[Handle]:
            wanted = [(number, value) for number, value in template if isinstance(value, bytes)]
            found = [
                self._handle(item)
                for item in self._visible()
                if all(item.attributes.get(number) == value for number, value in wanted)
            ]
            return found[:limit] if limit else found

        return self._do("C_FindObjects", action)

    def get(
        self, handle: Handle, types: list[int], *, sid: SessionId = 0, timeout: float
    ) -> tuple[dict[int, bytes], dict[int, int]]:
        def action() -> tuple[dict[int, bytes], dict[int, int]]:
            item = self._object(handle)
            values: dict[int, bytes] = {}
            errors: dict[int, int] = {}
            for number in types:
                if number == CKA.VALUE and item.object_class in (CKO.SECRET_KEY, CKO.PRIVATE_KEY):
                    if item.flag(CKA.SENSITIVE) or not item.flag(CKA.EXTRACTABLE):
                        errors[number] = CKR.ATTRIBUTE_SENSITIVE
                    else:
                        values[number] = item.secret or b""
                elif number in item.attributes:
                    values[number] = item.attributes[number]
                else:
                    errors[number] = CKR.ATTRIBUTE_TYPE_INVALID
            return values, errors

        return self._do("C_GetAttributeValue", action)

    def set(self, handle: Handle, template: Template, *, sid: SessionId = 0, timeout: float) -> None:
        def action() -> None:
            item = self._object(handle)
            if not item.flag(CKA.MODIFIABLE):
                raise Ckr(CKR.ACTION_PROHIBITED, "C_SetAttributeValue")
            item.attributes.update(_packed(template))

        def torn() -> None:  # SoftHSM truncates the object's file, then writes it: the key is gone, a ghost stays
            item = self._object(handle)
            if item.session is None:
                item.attributes, item.secret = {}, None

        self._do("C_SetAttributeValue", action, changes=self._stored(handle), torn=torn)

    def _stored(self, handle: Handle) -> bool:
        item = self._handles.get(handle)
        return item is not None and item.session is None

    def destroy(self, handle: Handle, *, sid: SessionId = 0, timeout: float) -> None:
        def action() -> None:
            item = self._object(handle)
            if not item.flag(CKA.DESTROYABLE) and item.attributes:
                raise Ckr(CKR.ACTION_PROHIBITED, "C_DestroyObject")
            if item.session is None:
                del self.member.token.objects[item.number]
            else:
                self._session_objects.remove(item)

        self._do("C_DestroyObject", action, changes=self._stored(handle))

    def _new(self, attributes: dict[int, bytes], secret: bytes | None, sid: SessionId) -> SimObject:
        """:raises Ckr: the token is full, or only the security officer may."""
        stored = unpack_bool(attributes.get(CKA.TOKEN, b""))
        if unpack_bool(attributes.get(CKA.TRUSTED, b"")) and self._logged_in != CKU_SO:
            raise Ckr(CKR.ATTRIBUTE_READ_ONLY, "C_CreateObject")
        if stored and self.member.token.full:
            raise Ckr(CKR.DEVICE_MEMORY, "C_CreateObject")
        kind = unpack_ulong(attributes[CKA.CLASS])
        key_type = unpack_ulong(attributes[CKA.KEY_TYPE]) if CKA.KEY_TYPE in attributes else None
        filled = {int(n): _default(n) for n in attributes_of(kind, key_type) if n not in _NO_DEFAULT} | attributes
        item = SimObject(self.member.next_number(), filled, secret, None if stored else sid)
        if stored:
            self.member.token.objects[item.number] = item
        else:
            self._session_objects.append(item)
        return item

    def _half(self, template: Template) -> None:
        """A worker killed while it wrote: a key without value under the right label, or a file without anything."""
        attributes = _packed(template)
        item = self._new(attributes, None, 0)
        if item.object_class == CKO.DATA or len(self.member.late) % 2 or item.number % 2:
            item.attributes = {}

    def create(self, template: Template, *, sid: SessionId = 0, timeout: float) -> Handle:
        def action() -> Handle:
            attributes = _packed(template)
            if CKA.CLASS not in attributes:
                raise Ckr(CKR.TEMPLATE_INCOMPLETE, "C_CreateObject")
            secret = None
            if unpack_ulong(attributes[CKA.CLASS]) in (CKO.SECRET_KEY, CKO.PRIVATE_KEY):
                secret = attributes.pop(CKA.VALUE, None)
                if secret is None:
                    raise Ckr(CKR.TEMPLATE_INCOMPLETE, "C_CreateObject")
                attributes[int(CKA.VALUE_LEN)] = pack_ulong(len(secret))
            return self._handle(self._new(attributes, secret, sid))

        return self._do("C_CreateObject", action, changes=_token(template), torn=lambda: self._half(template))

    def copy(self, handle: Handle, template: Template, *, sid: SessionId = 0, timeout: float) -> Handle:
        def action() -> Handle:
            item = self._object(handle)
            return self._handle(self._new({**item.attributes, **_packed(template)}, item.secret, sid))

        return self._do("C_CopyObject", action, changes=_token(template))

    def generate(self, mech: Mechanism, template: Template, *, sid: SessionId = 0, timeout: float) -> Handle:
        def action() -> Handle:
            attributes = _packed(template)
            length = unpack_ulong(attributes.get(CKA.VALUE_LEN, pack_ulong(32)))
            made = {int(CKA.CLASS): pack_ulong(CKO.SECRET_KEY), int(CKA.KEY_TYPE): pack_ulong(CKK.AES), **attributes}
            made |= {int(CKA.LOCAL): pack_bool(True), int(CKA.KEY_GEN_MECHANISM): pack_ulong(mech[0])}
            return self._handle(self._new(made, os.urandom(length), sid))

        return self._do("C_GenerateKey", action, changes=_token(template))

    def generate_pair(
        self, mech: Mechanism, public: Template, private: Template, *, sid: SessionId = 0, timeout: float
    ) -> tuple[Handle, Handle]:
        def action() -> tuple[Handle, Handle]:
            outer, inner = _packed(public), _packed(private)
            if mech[0] == CKM.RSA_PKCS_KEY_PAIR_GEN:
                kind = CKK.RSA
                secret = msgspec.msgpack.encode([_bytes(part) for part in _new_rsa()])
            else:
                kind = CKK.EC
                secret = msgspec.msgpack.encode([outer.get(CKA.EC_PARAMS, b""), os.urandom(32)])
            for attributes, object_class in ((outer, CKO.PUBLIC_KEY), (inner, CKO.PRIVATE_KEY)):
                attributes[int(CKA.CLASS)], attributes[int(CKA.KEY_TYPE)] = pack_ulong(object_class), pack_ulong(kind)
                attributes.update(_components(object_class, kind, secret))
            return self._handle(self._new(outer, secret, sid)), self._handle(self._new(inner, secret, sid))

        return self._do("C_GenerateKeyPair", action, changes=_token(public) or _token(private))

    # -- use of keys -------------------------------------------------------------------------------------------
    def _wrapping(self, mech: Mechanism, item: SimObject) -> bytes:
        """The secret that the wrapping rests on: for RSA the modulus, which both halves know."""
        if item.secret is None and mech[0] != CKM.RSA_PKCS_OAEP:
            raise Ckr(CKR.GENERAL_ERROR, "C_WrapKey")
        return item.attributes[CKA.MODULUS] if mech[0] == CKM.RSA_PKCS_OAEP else bytes(item.secret or b"")

    def wrap(self, mech: Mechanism, wrapping_key: Handle, key: Handle, *, sid: SessionId = 0, timeout: float) -> bytes:
        def action() -> bytes:
            outer, inner = self._key(wrapping_key, CKA.WRAP), self._object(key, CKR.KEY_HANDLE_INVALID)
            if not inner.flag(CKA.EXTRACTABLE):
                raise Ckr(CKR.KEY_UNEXTRACTABLE, "C_WrapKey")
            if inner.flag(CKA.WRAP_WITH_TRUSTED) and not outer.flag(CKA.TRUSTED):
                raise Ckr(CKR.KEY_NOT_WRAPPABLE, "C_WrapKey")
            if inner.secret is None:
                raise Ckr(CKR.GENERAL_ERROR, "C_WrapKey")
            return seal(self._wrapping(mech, outer), inner.secret, b"wrap")

        return self._do("C_WrapKey", action)

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
        def action() -> Handle:
            outer = self._key(unwrapping_key, CKA.UNWRAP)
            attributes = _packed(template)
            for number, value in unpack_template(outer.attributes.get(CKA.UNWRAP_TEMPLATE, b"")):
                if attributes.setdefault(number, value) != value:
                    raise Ckr(CKR.TEMPLATE_INCONSISTENT, "C_UnwrapKey")
            secret = unseal(self._wrapping(mech, outer), wrapped, b"wrap")
            kind = unpack_ulong(attributes[CKA.KEY_TYPE])
            attributes.update(_components(unpack_ulong(attributes[CKA.CLASS]), kind, secret))
            return self._handle(self._new(attributes, secret, sid))

        return self._do("C_UnwrapKey", action, changes=_token(template), torn=lambda: self._half(template))

    def derive(
        self, mech: Mechanism, base_key: Handle, template: Template, *, sid: SessionId = 0, timeout: float
    ) -> Handle:
        def action() -> Handle:
            base, attributes = self._key(base_key, CKA.DERIVE), _packed(template)
            if base.secret is None or mech[0] != CKM_AES_ECB_ENCRYPT_DATA:
                raise Ckr(CKR.MECHANISM_INVALID, "C_DeriveKey")
            length = unpack_ulong(attributes.get(CKA.VALUE_LEN, pack_ulong(32)))
            secret = _stream(base.secret, repr(mech[1]).encode(), length)
            return self._handle(self._new(attributes, secret, sid))

        return self._do("C_DeriveKey", action, changes=_token(template))

    def encapsulate(
        self, mech: Mechanism, public_key: Handle, template: Template, *, sid: SessionId = 0, timeout: float
    ) -> tuple[bytes, Handle]:
        raise Ckr(CKR.FUNCTION_NOT_SUPPORTED, "C_EncapsulateKey")

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
        raise Ckr(CKR.FUNCTION_NOT_SUPPORTED, "C_DecapsulateKey")

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
        return self._do("C_Sign", lambda: signature(self._key(key, CKA.SIGN), mech[0], data))

    def verify(
        self, mech: Mechanism, key: Handle, data: bytes, signature_: bytes, *, sid: SessionId = 0, timeout: float
    ) -> None:
        def action() -> None:
            if signature(self._key(key, CKA.VERIFY), mech[0], data) != signature_:
                raise Ckr(CKR.SIGNATURE_INVALID, "C_Verify")

        self._do("C_Verify", action)

    def _gcm(self, mech: Mechanism, key: Handle, usage: CKA) -> tuple[bytes, bytes]:
        item = self._key(key, usage)
        if item.secret is None:
            raise Ckr(CKR.GENERAL_ERROR, "C_Encrypt")
        fields = mech[1] if isinstance(mech[1], list) else ["", b"", b"", 0]
        return item.secret, bytes(fields[1]) + bytes(fields[2] or b"")

    def encrypt(self, mech: Mechanism, key: Handle, data: bytes, *, sid: SessionId = 0, timeout: float) -> bytes:
        def action() -> bytes:
            secret, associated = self._gcm(mech, key, CKA.ENCRYPT)
            return seal(secret, data, associated)

        return self._do("C_Encrypt", action)

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
        def action() -> bytes:
            secret, associated = self._gcm(mech, key, CKA.DECRYPT)
            return unseal(secret, data, associated)

        return self._do("C_Decrypt", action)

    def digest(self, mech: Mechanism, parts: list[bytes | Handle], *, sid: SessionId = 0, timeout: float) -> bytes:
        def action() -> bytes:
            digest = hashlib.sha256()
            for part in parts:
                if isinstance(part, bytes):
                    digest.update(part)
                    continue
                digest.update(self._object(part, CKR.KEY_HANDLE_INVALID).secret or b"")
            return digest.digest()

        return self._do("C_Digest", action)

    def random(self, length: int, *, sid: SessionId = 0, timeout: float) -> bytes:
        return self._do("C_GenerateRandom", lambda: os.urandom(length))

    def seed(self, data: bytes, *, sid: SessionId = 0, timeout: float) -> None:
        self._do("C_SeedRandom", lambda: None)

    # -- multi-part: kept, and done at the end -----------------------------------------------------------------
    def stream_open(
        self, kind: str, mech: Mechanism, key: Handle, *, pin: bytes | None = None, timeout: float
    ) -> SessionId:
        def action() -> SessionId:
            sid = self._open()
            self._streams[sid] = (kind, mech, key, [])
            return sid

        return self._do("C_SignInit", action)

    def stream_update(self, stream: SessionId, data: bytes | Handle, *, timeout: float) -> bytes:
        self._do("C_SignUpdate", lambda: self._streams[stream][3].append(data))
        return b""

    def stream_final(self, stream: SessionId, signature: bytes = b"", *, timeout: float) -> bytes:
        kind, mech, key, parts = self._streams.pop(stream)
        data = b"".join(part for part in parts if isinstance(part, bytes))
        if kind == "digest":
            return self.digest(mech, parts, timeout=timeout)
        if kind == "verify":
            self.verify(mech, key, data, signature, timeout=timeout)
            return b""
        one_shot: dict[str, Callable[..., bytes]] = {
            "sign": self.sign,
            "encrypt": self.encrypt,
            "decrypt": self.decrypt,
        }
        return one_shot[kind](mech, key, data, timeout=timeout)

    def stream_cancel(self, stream: SessionId, *, timeout: float) -> None:
        self._streams.pop(stream, None)
        self._do("C_CloseSession", lambda: self._close_session(stream))

    # -- the connection itself ---------------------------------------------------------------------------------
    def close(self) -> None:
        self.kill()

    def take_no_more(self) -> None:
        pass

    def let_go(self) -> None:
        self.kill()

    def outstanding(self) -> list[float]:
        return []

    def abandon_after_fork(self) -> None:
        self.kill()

    def kill(self) -> None:
        if self._ended:
            return
        self._ended = True
        self._session_objects.clear()
        self.member.connections.remove(self)
        if self.member.local:
            self.member.late = [call for call in self.member.late if call.connection is not self]
        if self._lock is not None:
            self._lock.release()


# -- templates ---------------------------------------------------------------------------------------------------------


def _packed(template: Template) -> dict[int, bytes]:
    return {int(n): value if isinstance(value, bytes) else pack_template(value) for n, value in template}


def _token(template: Template) -> bool:
    return unpack_bool(_packed(template).get(CKA.TOKEN, b""))


def _default(number: CKA) -> bytes:
    if number in _NUMBERS:
        return pack_ulong(_NUMBERS[number])
    if number in _TRUE or number in _FALSE or number in _FALSE_TOO:
        return pack_bool(number in _TRUE)
    return pack_template([]) if number in TEMPLATES else b""


def _components(object_class: int, key_type: int, secret: bytes) -> dict[int, bytes]:
    """Public parts, as they follow from the value."""
    if object_class == CKO.SECRET_KEY or key_type not in (CKK.RSA, CKK.EC):
        return {}
    parts = msgspec.msgpack.decode(secret, type=list[bytes])
    if key_type == CKK.RSA:
        made = {int(CKA.MODULUS): parts[0], int(CKA.PUBLIC_EXPONENT): parts[1]}
        if object_class == CKO.PUBLIC_KEY:
            made[int(CKA.MODULUS_BITS)] = pack_ulong(len(parts[0]) * 8)
        return made
    made = {int(CKA.EC_PARAMS): parts[0]}
    if object_class == CKO.PUBLIC_KEY:
        made[int(CKA.EC_POINT)] = ec_point(parts[1])
    return made
