"""The key pair by which a member's token receives the domain's keys (DESIGN.md 5).

It stays on the token where that enforces CKA_UNWRAP_TEMPLATE: then a member that was away when the keys were changed
takes the new ones by itself when it returns. What it unwraps is SENSITIVE and leaves only under a TRUSTED key (in a
sealed domain: never), so it gives the user alone nothing. Elsewhere the pair lasts for one session.
"""

from __future__ import annotations

import msgspec

from hagroup.core.attributes import CKA, CKK, CKM, CKO, pack_bool, pack_ulong
from hagroup.core.calls import Handle, SessionId, Template
from hagroup.engine.domain_keys import DomainKeys, open_data, seal_data
from hagroup.engine.enforcement import Enforcement
from hagroup.engine.proof import public_digest
from hagroup.engine.token_contents import MEMBER_KEY_LABEL, TRANSPORT_LABEL, find_all
from hagroup.errors import DomainMismatch
from hagroup.members.api import Connection

KEY_ID_LENGTH = 16
_BITS = 3072
_PUBLIC = [int(CKA.MODULUS), int(CKA.PUBLIC_EXPONENT)]
_OWN: Template = [
    (int(CKA.CLASS), pack_ulong(CKO.PRIVATE_KEY)),
    (int(CKA.TOKEN), pack_bool(True)),
    (int(CKA.LABEL), MEMBER_KEY_LABEL),
]


class PublicPart(msgspec.Struct, frozen=True):
    """What others wrap to."""

    modulus: bytes
    exponent: bytes

    @property
    def fingerprint(self) -> bytes:
        return public_digest({CKA.MODULUS: self.modulus, CKA.PUBLIC_EXPONENT: self.exponent}, CKO.PUBLIC_KEY)

    def template(self, *, token: bool, trusted: bool) -> Template:
        return [
            (int(CKA.CLASS), pack_ulong(CKO.PUBLIC_KEY)),
            (int(CKA.KEY_TYPE), pack_ulong(CKK.RSA)),
            (int(CKA.TOKEN), pack_bool(token)),
            (int(CKA.PRIVATE), pack_bool(False)),
            (int(CKA.LABEL), TRANSPORT_LABEL),
            (int(CKA.ID), self.fingerprint[:KEY_ID_LENGTH]),
            (int(CKA.MODULUS), self.modulus),
            (int(CKA.PUBLIC_EXPONENT), self.exponent),
            (int(CKA.WRAP), pack_bool(True)),
            *([(int(CKA.TRUSTED), pack_bool(True))] if trusted else []),
        ]


class Transport(msgspec.Struct, frozen=True):
    """The pair: ``private`` is a handle in session ``sid``."""

    sid: SessionId
    private: Handle
    public: PublicPart


def _private_template(*, token: bool, sealed: bool) -> Template:
    """UNWRAP and nothing else: with DECRYPT the user could read what was sent."""
    template: Template = [
        (int(CKA.TOKEN), pack_bool(token)),
        (int(CKA.PRIVATE), pack_bool(True)),
        (int(CKA.LABEL), MEMBER_KEY_LABEL),
        (int(CKA.SENSITIVE), pack_bool(True)),
        (int(CKA.EXTRACTABLE), pack_bool(False)),
        (int(CKA.UNWRAP), pack_bool(True)),
        *((int(use), pack_bool(False)) for use in (CKA.DECRYPT, CKA.SIGN, CKA.SIGN_RECOVER, CKA.DERIVE)),
    ]
    if token:
        kept: Template = [(int(CKA.SENSITIVE), pack_bool(True))]
        kept.append(
            (int(CKA.EXTRACTABLE), pack_bool(False)) if sealed else (int(CKA.WRAP_WITH_TRUSTED), pack_bool(True))
        )
        template.append((int(CKA.UNWRAP_TEMPLATE), kept))
        template += [(int(CKA.COPYABLE), pack_bool(False)), (int(CKA.MODIFIABLE), pack_bool(False))]
    return template


def read(connection: Connection, key: Handle, *, sid: SessionId = 0, timeout: float) -> PublicPart:
    """The public part, as either key of a pair shows it."""
    values, _ = connection.get(key, _PUBLIC, sid=sid, timeout=timeout)
    return PublicPart(values[CKA.MODULUS], values[CKA.PUBLIC_EXPONENT])


def own(connection: Connection, *, timeout: float) -> list[Handle]:
    """Private keys of such pairs on the token."""
    return find_all(connection, _OWN, timeout=timeout)


def find(connection: Connection, *, timeout: float) -> Transport | None:
    """The pair that is on the token; None: there is none (or, after a restored backup, several)."""
    found = own(connection, timeout=timeout)
    return Transport(0, found[0], read(connection, found[0], timeout=timeout)) if len(found) == 1 else None


def find_or_make(
    connection: Connection, enforcement: Enforcement, *, sid: SessionId, sealed: bool, timeout: float
) -> Transport:
    """The token's pair; made where there is none, for this session only where the token could not guard it."""
    keep = enforcement.wrap_with_trusted and enforcement.unwrap_template and enforcement.fixed
    there = find(connection, timeout=timeout) if keep else None
    if there is not None:
        return there
    for handle in own(connection, timeout=timeout) if keep else ():
        connection.destroy(handle, timeout=timeout)  # of several nobody could tell which one
    public, private = connection.generate_pair(
        (int(CKM.RSA_PKCS_KEY_PAIR_GEN), None),
        [
            (int(CKA.TOKEN), pack_bool(False)),
            (int(CKA.MODULUS_BITS), pack_ulong(_BITS)),
            (int(CKA.PUBLIC_EXPONENT), b"\x01\x00\x01"),
            (int(CKA.WRAP), pack_bool(True)),
        ],
        _private_template(token=keep, sealed=sealed),
        sid=sid,
        timeout=timeout,
    )
    return Transport(sid, private, read(connection, public, sid=sid, timeout=timeout))


def check(connection: Connection, public: Handle, expected: PublicPart, *, sid: SessionId = 0, timeout: float) -> None:
    """OAEP authenticates nobody: the key that is wrapped to is the one that the newcomer made."""
    if read(connection, public, sid=sid, timeout=timeout).fingerprint != expected.fingerprint:
        raise DomainMismatch("the transport key on the existing member is not the one that the new member made")


# -- as the journal keeps it -------------------------------------------------------------------------------------------


def _purpose(serial: str) -> bytes:
    return b"transport:" + serial.encode()


def sealed_public(
    connection: Connection, keys: DomainKeys, serial: str, public: PublicPart | None, *, timeout: float
) -> bytes:
    """Sealed under the partition key, for this token: nobody without it can put a key of his own there."""
    if public is None:
        return b""
    return seal_data(connection, keys, _purpose(serial), msgspec.msgpack.encode(public), timeout=timeout)


def open_public(
    connection: Connection, keys: DomainKeys, serial: str, sealed: bytes, *, timeout: float
) -> PublicPart | None:
    """:raises IntegrityAlarm: it was tampered with."""
    if not sealed:
        return None
    data = open_data(connection, keys, _purpose(serial), sealed, timeout=timeout)
    return msgspec.msgpack.decode(data, type=PublicPart)


def own_public(connection: Connection, keys: DomainKeys, serial: str, *, timeout: float) -> bytes:
    """What the journal keeps for a member that is here."""
    there = find(connection, timeout=timeout)
    return sealed_public(connection, keys, serial, None if there is None else there.public, timeout=timeout)
