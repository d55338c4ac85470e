"""The envelope: how a sealed object is written down (DESIGN.md 5). Only its form; members do the cryptography.

The *header* is readable: which keys of which domain, which object, which revision, which kind. It is authenticated,
together with a digest over the object's attributes, as the associated data of the outer layer. The *content*, sealed by
the outer layer, is the key as wrapped under the domain key; or, for what must not be unwrapped by the domain key itself
(it makes everything SENSITIVE), a *carrier* key wrapped under the domain key and what the carrier protects.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeVar, cast

import msgspec
from asn1crypto import core

VERSION = 1
NONCE_LENGTH = 12
AES_256_WRAP_PAD = "2.16.840.1.101.3.4.1.48"
"""id-aes256-wrap-pad: the format is RFC 5649, whatever number a module gives to the mechanism."""


class EnvelopeError(ValueError):
    """This is no envelope of ours, or it is damaged: the text says what is wrong. Nothing was opened."""


class _Header(core.Sequence):  # type: ignore[misc]
    _fields = [  # noqa: RUF012
        ("version", core.Integer),
        ("domain_key", core.OctetString),
        ("partition_key", core.OctetString),
        ("uid", core.OctetString),
        ("revision", core.Integer),
        ("object_class", core.Integer),
        ("key_type", core.Integer, {"explicit": 0, "optional": True}),
        ("wrap_format", core.ObjectIdentifier),
    ]


class _Envelope(core.Sequence):  # type: ignore[misc]
    _fields = [  # noqa: RUF012
        ("header", _Header),
        ("nonce", core.OctetString),
        ("sealed", core.OctetString),
    ]


class _Content(core.Sequence):  # type: ignore[misc]
    _fields = [  # noqa: RUF012
        ("wrapped", core.OctetString),
        ("aes", core.OctetString, {"explicit": 0, "optional": True}),
        ("rsa", core.OctetString, {"explicit": 1, "optional": True}),
    ]


class _AssociatedData(core.Sequence):  # type: ignore[misc]
    _fields = [("header", _Header), ("attributes", core.OctetString)]  # noqa: RUF012


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What can be read without any key, and is authenticated with both."""

    domain_key_id: bytes
    partition_key_id: bytes
    uid: bytes
    revision: int
    object_class: int
    key_type: int | None

    def to_asn1(self) -> _Header:
        fields: dict[str, Any] = {
            "version": VERSION,
            "domain_key": self.domain_key_id,
            "partition_key": self.partition_key_id,
            "uid": self.uid,
            "revision": self.revision,
            "object_class": self.object_class,
            "wrap_format": AES_256_WRAP_PAD,
        }
        if self.key_type is not None:
            fields["key_type"] = self.key_type
        return _Header(fields)

    def associated_data(self, attributes: Mapping[int, bytes]) -> bytes:
        """What the outer layer authenticates beside its content."""
        data: bytes = _AssociatedData({"header": self.to_asn1(), "attributes": attributes_digest(attributes)}).dump()
        return data


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    header: Header
    nonce: bytes
    sealed: bytes

    def encode(self) -> bytes:
        encoded: bytes = _Envelope({"header": self.header.to_asn1(), "nonce": self.nonce, "sealed": self.sealed}).dump()
        return encoded


class Carrier(StrEnum):
    """What a carrier key is."""

    AES = "aes"
    RSA = "rsa"


class Content(msgspec.Struct, frozen=True, kw_only=True):
    """What the outer layer protects."""

    wrapped: bytes
    """RFC 5649 under the domain key: the key itself, or the carrier."""
    carrier: Carrier | None = None
    carried: bytes = b""
    """What the carrier protects: a wrapped key, or an encrypted VALUE."""

    def encode(self) -> bytes:
        fields = {"wrapped": self.wrapped}
        if self.carrier is not None:
            fields[self.carrier.value] = self.carried
        encoded: bytes = _Content(fields).dump()
        return encoded


_FIELD = struct.Struct(">QQ")


def attributes_digest(attributes: Mapping[int, bytes]) -> bytes:
    """SHA-256 over number, length and value of each attribute, in the order of their numbers."""
    digest = hashlib.sha256()
    for number, value in sorted(attributes.items()):
        digest.update(_FIELD.pack(number, len(value)))
        digest.update(value)
    return digest.digest()


_Sequence = TypeVar("_Sequence", bound="core.Sequence")


def _load(kind: type[_Sequence], data: bytes, what: str) -> _Sequence:
    try:
        loaded = kind.load(data, strict=True)
        loaded.native  # noqa: B018  asn1crypto reads lazily: this looks at every field
        if loaded.dump(force=True) != data:
            raise ValueError("more than one way to write it")
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError):
        # Nothing of the data may come into a text.
        raise EnvelopeError(f"this is not {what} of hagroup, or it is damaged") from None
    return cast("_Sequence", loaded)


def decode(data: bytes) -> Envelope:
    """:raises EnvelopeError: foreign, damaged, or of a later version."""
    loaded = _load(_Envelope, data, "an envelope")
    fields = loaded["header"].native
    if fields["version"] != VERSION:
        raise EnvelopeError(f"the envelope is of version {fields['version']}; this hagroup reads version {VERSION}")
    if fields["wrap_format"] not in (AES_256_WRAP_PAD, "aes256_wrap_pad"):
        raise EnvelopeError("the envelope's key is wrapped in a format that this hagroup does not read")
    if fields["revision"] < 0 or fields["object_class"] < 0 or (fields["key_type"] or 0) < 0:
        raise EnvelopeError("the envelope names a revision, class or key type below zero")
    nonce, sealed = loaded["nonce"].native, loaded["sealed"].native
    if len(nonce) != NONCE_LENGTH:
        raise EnvelopeError(f"the envelope's nonce has {len(nonce)} bytes instead of {NONCE_LENGTH}")
    header = Header(
        domain_key_id=fields["domain_key"],
        partition_key_id=fields["partition_key"],
        uid=fields["uid"],
        revision=fields["revision"],
        object_class=fields["object_class"],
        key_type=fields["key_type"],
    )
    return Envelope(header=header, nonce=nonce, sealed=sealed)


def generation(data: bytes) -> tuple[bytes, bytes]:
    """Names of the domain and partition key that an envelope is under.

    :raises EnvelopeError: as :func:`decode`.
    """
    header = decode(data).header
    return header.domain_key_id, header.partition_key_id


def decode_content(data: bytes) -> Content:
    """:raises EnvelopeError: what was sealed is no content of ours."""
    fields = _load(_Content, data, "the content of an envelope").native
    carriers = [carrier for carrier in Carrier if fields[carrier.value] is not None]
    if len(carriers) > 1:
        raise EnvelopeError("the content of an envelope names two carriers")
    if not carriers:
        return Content(wrapped=fields["wrapped"])
    return Content(wrapped=fields["wrapped"], carrier=carriers[0], carried=fields[carriers[0].value])
