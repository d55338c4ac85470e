"""The operations that are measured: the same code for plain python-pkcs11 and for a group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass
from pkcs11.util.ec import encode_named_curve_parameters

PIN = "1234"
IV = b"0123456789abcdef"
MIB = 1 << 20
Operation = Callable[[], object]


def _curve(session: Any) -> Any:
    parameters = {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
    return session.create_domain_parameters(KeyType.EC, parameters, local=True)


def make_keys(session: Any) -> None:
    """Once per token or group: the keys that the operations use."""
    session.generate_keypair(KeyType.RSA, 2048, store=True, label="bench rsa")
    _curve(session).generate_keypair(store=True, label="bench ec")
    session.generate_key(KeyType.AES, 256, store=True, label="bench aes")
    session.generate_key(KeyType.AES, 256, store=True, label="bench loose", template={Attribute.EXTRACTABLE: True})


def _private(session: Any, label: str) -> Any:
    return session.get_key(object_class=ObjectClass.PRIVATE_KEY, label=label)


def _aes(session: Any, label: str = "bench aes") -> Any:
    return session.get_key(object_class=ObjectClass.SECRET_KEY, label=label)


def _sign_rsa(session: Any) -> Operation:
    key = _private(session, "bench rsa")
    return lambda: key.sign(b"data", mechanism=Mechanism.SHA256_RSA_PKCS)


def _sign_ec(session: Any) -> Operation:
    key, digest = _private(session, "bench ec"), os.urandom(32)
    return lambda: key.sign(digest, mechanism=Mechanism.ECDSA)


def _verify_rsa(session: Any) -> Operation:
    signature = _sign_rsa(session)()
    key = session.get_key(object_class=ObjectClass.PUBLIC_KEY, label="bench rsa")
    return lambda: key.verify(b"data", signature, mechanism=Mechanism.SHA256_RSA_PKCS)


def _encrypt(size: int) -> Callable[[Any], Operation]:
    block = os.urandom(size)

    def prepare(session: Any) -> Operation:
        key = _aes(session)
        return lambda: key.encrypt(block, mechanism=Mechanism.AES_CBC, mechanism_param=IV)

    return prepare


def _encrypt_stream(session: Any) -> Operation:
    key, block = _aes(session), os.urandom(MIB)

    def parts() -> Iterator[bytes]:
        for _ in range(64):
            yield block

    def encrypt() -> None:
        for _ in key.encrypt(parts(), mechanism=Mechanism.AES_CBC, mechanism_param=IV):
            pass

    return encrypt


def _digest(session: Any) -> Operation:
    block = os.urandom(4096)
    return lambda: session.digest(block, mechanism=Mechanism.SHA256)


def _wrap(session: Any) -> Operation:
    key, loose = _aes(session), _aes(session, "bench loose")
    return lambda: key.wrap_key(loose)


def _generate_ec(store: bool) -> Callable[[Any], Operation]:
    def prepare(session: Any) -> Operation:
        curve = _curve(session)
        return lambda: curve.generate_keypair(store=store)

    return prepare


PREPARE: dict[str, Callable[[Any], Operation]] = {
    "sign RSA-2048": _sign_rsa,
    "sign EC P-256": _sign_ec,
    "verify RSA-2048": _verify_rsa,
    "AES-CBC 16 B": _encrypt(16),
    "AES-CBC 4 KiB": _encrypt(4096),
    "AES-CBC 1 MiB": _encrypt(MIB),
    "AES-CBC 64 MiB streamed": _encrypt_stream,
    "digest 4 KiB": _digest,
    "random 16 B": lambda session: lambda: session.generate_random(128),
    "find key": lambda session: lambda: _aes(session),
    "wrap AES-256": _wrap,
    "generate AES-256": lambda session: lambda: session.generate_key(KeyType.AES, 256),
    "generate RSA-2048": lambda session: lambda: session.generate_keypair(KeyType.RSA, 2048),
    "generate EC P-256": _generate_ec(store=False),
    "create AES-256": lambda session: lambda: session.generate_key(KeyType.AES, 256, store=True),
    "create RSA-2048": lambda session: lambda: session.generate_keypair(KeyType.RSA, 2048, store=True),
    "create EC P-256": _generate_ec(store=True),
}
"""Name to a function that finds the keys in a session, once, and returns what does it once. ``generate`` makes session
objects, ``create`` token objects, which on a group are on ``min_replicas`` members when the call returns."""

FIRST_USE = "first key use"
"""Not in the table: a fresh process opens the token, finds a key and signs; its imports are not counted."""
