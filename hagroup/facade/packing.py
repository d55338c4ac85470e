"""Attributes between Python and Cryptoki's bytes, with the session's mapper, before anything is sent.

python-pkcs11 packs while it fills C memory and crashes on a value of the wrong type (DESIGN.md 8, trap 5). Here the
mapper's own exception (AttributeError, TypeError, NotImplementedError, ...) leaves before the group was asked anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pkcs11.attributes import AttributeMapper
from pkcs11.constants import DEFAULT, Attribute
from pkcs11.defaults import DEFAULT_KEY_CAPABILITIES
from pkcs11.exceptions import ArgumentsBad
from pkcs11.mechanisms import KeyType

from hagroup.core.calls import Template
from hagroup.errors import NotOnGroup

_ULONG_MAX = 2**64 - 1
_NESTED = frozenset(
    (
        Attribute.WRAP_TEMPLATE,
        Attribute.UNWRAP_TEMPLATE,
        Attribute.DERIVE_TEMPLATE,
        Attribute.ENCAPSULATE_TEMPLATE,
        Attribute.DECAPSULATE_TEMPLATE,
    )
)


def pack_attribute(mapper: AttributeMapper, key: Any, value: Any) -> tuple[int, bytes]:
    """One attribute as number and bytes."""
    packed = mapper.pack_attribute(key, value)
    if not isinstance(packed, (bytes, bytearray)):
        raise ArgumentsBad(f"The attribute mapper must pack {key!r} into bytes.")
    try:
        number = int(key)
    except (TypeError, ValueError):
        raise ArgumentsBad(f"{key!r} is not an attribute.") from None
    if not 0 <= number <= _ULONG_MAX:
        raise ArgumentsBad(f"{key!r} is not an attribute.")
    if packed and number in _NESTED:
        raise NotOnGroup(
            f"{key!r}: a template inside a template holds addresses of this process's memory, which mean nothing to "
            "the members of a group"
        )
    return number, bytes(packed)


def pack(mapper: AttributeMapper, template: Mapping[Any, Any]) -> Template:
    """A whole template, in its order."""
    return [pack_attribute(mapper, key, value) for key, value in dict(template).items()]


def merge_templates(default: dict[Attribute, Any], given: Mapping[Any, Any] | None) -> dict[Any, Any]:
    """The application's attributes over the default ones; ``DEFAULT`` takes one out."""
    merged: dict[Any, Any] = dict(default)
    if given is not None:
        merged.update(given)
    return {key: value for key, value in merged.items() if value is not DEFAULT}


def leaves_id_open(id_: Any, *templates: Mapping[Any, Any] | None) -> bool:
    """Whether the application gave no CKA_ID: the mapper's own empty one does not count, a given empty one does."""
    return id_ is None and not any(template is not None and Attribute.ID in template for template in templates)


def check_key_type(key_type: Any) -> None:
    if not isinstance(key_type, KeyType):
        raise ArgumentsBad("`key_type` must be KeyType.")


def check_bit_length(value: Any, name: str, *, required: bool = False) -> None:
    if value is None and not required:
        return
    if not isinstance(value, int):
        raise ArgumentsBad(f"`{name}` is the length in bits.")


def resolve_capabilities(key_type: KeyType, capabilities: Any) -> Any:
    if capabilities is not None:
        return capabilities
    try:
        return DEFAULT_KEY_CAPABILITIES[key_type]
    except KeyError:
        raise ArgumentsBad("No default capabilities for this key type. Please specify `capabilities`.") from None


def as_bytes(value: Any) -> bytes:
    """Data for a member: what C takes as a byte pointer, and nothing else."""
    if type(value) is bytes:
        return value
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    raise TypeError(f"expected bytes, {type(value).__name__} found")


def as_pin(pin: Any) -> bytes:
    """PINs are text, as in python-pkcs11: anything else has no ``encode`` and raises AttributeError."""
    encoded = pin.encode("utf-8")
    if not isinstance(encoded, bytes):
        raise TypeError("a PIN is text")
    return encoded
