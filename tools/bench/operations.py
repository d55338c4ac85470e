"""The operations that are measured: the same code for plain python-pkcs11 and for a group."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass
from pkcs11.util.ec import encode_named_curve_parameters

PIN = "1234"
IV = b"0123456789abcdef"
Operation = Callable[[], object]


def make_keys(session: Any) -> None:
    """Once per token or group: the keys that the operations use."""
    session.generate_keypair(KeyType.RSA, 2048, store=True, label="bench rsa")
    parameters = session.create_domain_parameters(
        KeyType.EC, {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}, local=True
    )
    parameters.generate_keypair(store=True, label="bench ec")
    session.generate_key(KeyType.AES, 256, store=True, label="bench aes")
    session.generate_key(KeyType.AES, 256, store=True, label="bench loose", template={Attribute.EXTRACTABLE: True})


def operations(session: Any) -> dict[str, Operation]:
    """Name to a function that does it once; keys are found here, once."""
    rsa = session.get_key(object_class=ObjectClass.PRIVATE_KEY, label="bench rsa")
    rsa_public = session.get_key(object_class=ObjectClass.PUBLIC_KEY, label="bench rsa")
    ec = session.get_key(object_class=ObjectClass.PRIVATE_KEY, label="bench ec")
    aes = session.get_key(object_class=ObjectClass.SECRET_KEY, label="bench aes")
    loose = session.get_key(object_class=ObjectClass.SECRET_KEY, label="bench loose")
    signature = rsa.sign(b"data", mechanism=Mechanism.SHA256_RSA_PKCS)
    digest = os.urandom(32)
    blocks = {size: os.urandom(size) for size in (16, 4096, 1 << 20)}

    def encrypt(size: int) -> Operation:
        return lambda: aes.encrypt(blocks[size], mechanism=Mechanism.AES_CBC, mechanism_param=IV)

    return {
        "sign RSA-2048": lambda: rsa.sign(b"data", mechanism=Mechanism.SHA256_RSA_PKCS),
        "sign EC P-256": lambda: ec.sign(digest, mechanism=Mechanism.ECDSA),
        "verify RSA-2048": lambda: rsa_public.verify(b"data", signature, mechanism=Mechanism.SHA256_RSA_PKCS),
        "AES-CBC 16 B": encrypt(16),
        "AES-CBC 4 KiB": encrypt(4096),
        "AES-CBC 1 MiB": encrypt(1 << 20),
        "digest 4 KiB": lambda: session.digest(blocks[4096], mechanism=Mechanism.SHA256),
        "random 16 B": lambda: session.generate_random(128),
        "find key": lambda: session.get_key(object_class=ObjectClass.SECRET_KEY, label="bench aes"),
        "wrap AES-256": lambda: aes.wrap_key(loose),
        "generate AES-256": lambda: session.generate_key(KeyType.AES, 256),
        "generate RSA-2048": lambda: session.generate_keypair(KeyType.RSA, 2048),
    }
