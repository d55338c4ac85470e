"""T 3.4.1: a new object is on every member, with the same attributes, and it is the same key."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
from asn1crypto.keys import ECDomainParameters, NamedCurve
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

import hagroup as pkcs11
from hagroup import Attribute, KeyType, Mechanism, ObjectClass
from tests.support import plain
from tests.support.groups import PIN, GroupFixture

SECRET, PRIVATE, PUBLIC = int(ObjectClass.SECRET_KEY), int(ObjectClass.PRIVATE_KEY), int(ObjectClass.PUBLIC_KEY)
COMPARED = [
    Attribute.CLASS,
    Attribute.KEY_TYPE,
    Attribute.ID,
    Attribute.TOKEN,
    Attribute.PRIVATE,
    Attribute.SENSITIVE,
    Attribute.EXTRACTABLE,
    Attribute.MODIFIABLE,
    Attribute.WRAP_WITH_TRUSTED,
    Attribute.ALWAYS_AUTHENTICATE,
    Attribute.ENCRYPT,
    Attribute.DECRYPT,
    Attribute.SIGN,
    Attribute.VERIFY,
    Attribute.WRAP,
    Attribute.UNWRAP,
    Attribute.DERIVE,
]
IV = b"0123456789abcdef"


@pytest.fixture(scope="module")
def group(fast_folder: Any) -> GroupFixture:
    from tests.support.groups import make_group

    return make_group(fast_folder / "distribution", "--min-replicas", "3")


@pytest.fixture(scope="module")
def session(group: GroupFixture) -> Iterator[Any]:
    lib = pkcs11.lib(str(group.toml))
    session = lib.get_token(token_label="payments").open(rw=True, user_pin=PIN)
    yield session
    session.close()
    lib.unload()


def everywhere(group: GroupFixture, label: str) -> list[list[dict[str, Any]]]:
    """The objects with this label, as each member's own token shows them."""
    numbers = [int(number) for number in COMPARED]
    return [
        sorted(
            (item for item in plain.objects(member, *numbers) if item["label"] == label),
            key=lambda item: int(item["class"]),
        )
        for member in group.members.values()
    ]


def check_alike(group: GroupFixture, label: str, count: int, *, extractable: bool = False) -> None:
    found = everywhere(group, label)
    assert [len(items) for items in found] == [count] * len(group.members)
    assert all(items == found[0] for items in found)
    for item in found[0]:
        if item["class"] in (SECRET, PRIVATE):
            assert bool(int(item["attributes"][str(int(Attribute.EXTRACTABLE))], 16)) is extractable


def test_no_ghosts_and_nothing_else(group: GroupFixture, session: Any) -> None:
    session.generate_key(KeyType.AES, 128, store=True, label="only")
    for member in group.members.values():
        assert [item["label"] for item in plain.objects(member) if item["label"] == "only"] == ["only"]
        assert "" not in plain.labels(member)


@pytest.mark.parametrize("bits", [128, 192, 256])
def test_generated_aes(group: GroupFixture, session: Any, bits: int) -> None:
    label = f"generated aes {bits}"
    key = session.generate_key(KeyType.AES, bits, store=True, label=label)
    check_alike(group, label, 1)
    mine = key.encrypt(b"same key?", mechanism_param=IV)
    for member in group.members.values():
        assert plain.use(member, "encrypt", SECRET, label, b"same key?", "AES_CBC_PAD", IV) == mine


def test_created_aes_is_the_value_given(group: GroupFixture, session: Any) -> None:
    value = os.urandom(32)
    session.create_object(
        {
            Attribute.CLASS: ObjectClass.SECRET_KEY,
            Attribute.KEY_TYPE: KeyType.AES,
            Attribute.TOKEN: True,
            Attribute.LABEL: "created aes",
            Attribute.VALUE: value,
            Attribute.ENCRYPT: True,
        }
    )
    check_alike(group, "created aes", 1)
    encryptor = Cipher(algorithms.AES(value), modes.CBC(IV)).encryptor()
    expected = encryptor.update(b"0123456789abcdef") + encryptor.finalize()
    for member in group.members.values():
        assert plain.use(member, "encrypt", SECRET, "created aes", b"0123456789abcdef", "AES_CBC", IV) == expected


def test_unwrapped_and_derived(group: GroupFixture, session: Any) -> None:
    wrapping = session.generate_key(KeyType.AES, 256, store=True, label="wrapping")
    loose = session.generate_key(KeyType.AES, 128, template={Attribute.EXTRACTABLE: True, Attribute.SENSITIVE: False})
    blob = wrapping.wrap_key(loose)
    wrapping.unwrap_key(ObjectClass.SECRET_KEY, KeyType.AES, blob, store=True, label="unwrapped")
    check_alike(group, "unwrapped", 1)
    expected = loose.encrypt(b"data", mechanism_param=IV)
    for member in group.members.values():
        assert plain.use(member, "encrypt", SECRET, "unwrapped", b"data", "AES_CBC_PAD", IV) == expected
    parameters = session.create_domain_parameters(
        KeyType.EC,
        {Attribute.EC_PARAMS: ECDomainParameters("named", NamedCurve("secp256r1")).dump()},
        local=True,
    )
    _, ours = parameters.generate_keypair()
    theirs, _ = parameters.generate_keypair()
    point = theirs[Attribute.EC_POINT][2:]
    ours.derive_key(KeyType.AES, 128, store=True, label="derived", mechanism_param=(pkcs11.KDF.NULL, None, point))
    check_alike(group, "derived", 1)
    outputs = {
        plain.use(member, "encrypt", SECRET, "derived", b"data", "AES_CBC_PAD", IV) for member in group.members.values()
    }
    assert len(outputs) == 1


def test_generic_secret(group: GroupFixture, session: Any) -> None:
    session.create_object(
        {
            Attribute.CLASS: ObjectClass.SECRET_KEY,
            Attribute.KEY_TYPE: KeyType.GENERIC_SECRET,
            Attribute.TOKEN: True,
            Attribute.LABEL: "mac",
            Attribute.VALUE: os.urandom(20),
            Attribute.SIGN: True,
        }
    )
    check_alike(group, "mac", 1)
    macs = {plain.use(member, "sign", SECRET, "mac", b"data", "SHA_1_HMAC") for member in group.members.values()}
    assert len(macs) == 1


@pytest.mark.parametrize("bits", [2048, 3072])
def test_rsa(group: GroupFixture, session: Any, bits: int) -> None:
    label = f"rsa {bits}"
    public, _ = session.generate_keypair(KeyType.RSA, bits, store=True, label=label)
    check_alike(group, label, 2)
    number = rsa.RSAPublicNumbers(
        int.from_bytes(public[Attribute.PUBLIC_EXPONENT], "big"), int.from_bytes(public[Attribute.MODULUS], "big")
    ).public_key()
    for member in group.members.values():
        signature = plain.use(member, "sign", PRIVATE, label, b"data", "SHA256_RSA_PKCS")
        number.verify(signature, b"data", padding.PKCS1v15(), hashes.SHA256())


@pytest.mark.parametrize(("curve", "known"), [("secp256r1", ec.SECP256R1()), ("secp384r1", ec.SECP384R1())])
def test_ec(group: GroupFixture, session: Any, curve: str, known: ec.EllipticCurve) -> None:
    parameters = session.create_domain_parameters(
        KeyType.EC, {Attribute.EC_PARAMS: ECDomainParameters("named", NamedCurve(curve)).dump()}, local=True
    )
    public, _ = parameters.generate_keypair(store=True, label=curve)
    check_alike(group, curve, 2)
    key = ec.EllipticCurvePublicKey.from_encoded_point(known, bytes(public[Attribute.EC_POINT][2:]))
    import hashlib

    digest = hashlib.sha256(b"data").digest()
    from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

    for member in group.members.values():
        raw = plain.use(member, "sign", PRIVATE, curve, digest, "ECDSA")
        half = len(raw) // 2
        der = encode_dss_signature(int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big"))
        key.verify(der, digest, ec.ECDSA(Prehashed(hashes.SHA256())))


@pytest.mark.parametrize(
    ("modifiable", "trusted", "destroyable"), list(product([True, False], [True, False], [True, False]))
)
def test_attributes_in_both_settings(
    group: GroupFixture, session: Any, modifiable: bool, trusted: bool, destroyable: bool
) -> None:
    label = f"settings {modifiable} {trusted} {destroyable}"
    key = session.generate_key(
        KeyType.AES,
        128,
        store=True,
        label=label,
        template={
            Attribute.MODIFIABLE: modifiable,
            Attribute.WRAP_WITH_TRUSTED: trusted,
            Attribute.DESTROYABLE: destroyable,
        },
    )
    check_alike(group, label, 1)
    assert key[Attribute.MODIFIABLE] is modifiable
    assert key[Attribute.WRAP_WITH_TRUSTED] is trusted
    assert key[Attribute.DESTROYABLE] is destroyable
    if not modifiable:
        with pytest.raises(pkcs11.PKCS11Error):
            key[Attribute.LABEL] = "other"
    if destroyable:
        key.destroy()
        assert all(label not in plain.labels(member) for member in group.members.values())
    else:
        with pytest.raises(pkcs11.PKCS11Error):
            key.destroy()
        assert all(label in plain.labels(member) for member in group.members.values())


@pytest.mark.parametrize("always", [True, False])
def test_always_authenticate(group: GroupFixture, session: Any, always: bool) -> None:
    label = f"always {always}"
    session.generate_keypair(
        KeyType.RSA, 2048, store=True, label=label, private_template={Attribute.ALWAYS_AUTHENTICATE: always}
    )
    check_alike(group, label, 2)
    for items in everywhere(group, label):
        private = next(item for item in items if item["class"] == PRIVATE)
        assert bool(int(private["attributes"][str(int(Attribute.ALWAYS_AUTHENTICATE))], 16)) is always


def test_extractable_when_asked_for(group: GroupFixture, session: Any) -> None:
    session.generate_key(KeyType.AES, 128, store=True, label="loose", template={Attribute.EXTRACTABLE: True})
    check_alike(group, "loose", 1, extractable=True)


def test_what_cannot_be_wrapped_is_refused_before_it_is_made(group: GroupFixture, session: Any) -> None:
    before = [plain.labels(member) for member in group.members.values()]
    parameters = session.create_domain_parameters(
        KeyType.EC_EDWARDS,
        {Attribute.EC_PARAMS: pkcs11.util.ec.encode_edwards_curve_parameters("edwards25519")}
        if hasattr(pkcs11.util.ec, "encode_edwards_curve_parameters")
        else {Attribute.EC_PARAMS: bytes.fromhex("130c656477617264733235353139")},
        local=True,
    )
    with pytest.raises(pkcs11.PKCS11Error):
        parameters.generate_keypair(mechanism=Mechanism.EC_EDWARDS_KEY_PAIR_GEN, store=True, label="cannot be wrapped")
    assert [plain.labels(member) for member in group.members.values()] == before
    assert list(session.get_objects({Attribute.LABEL: "cannot be wrapped"})) == []


def test_certificates_data_and_public_keys(group: GroupFixture, session: Any) -> None:
    session.create_object(
        {
            Attribute.CLASS: ObjectClass.DATA,
            Attribute.TOKEN: True,
            Attribute.PRIVATE: False,
            Attribute.LABEL: "public data",
            Attribute.VALUE: b"everybody may read this",
        }
    )
    session.create_object(
        {
            Attribute.CLASS: ObjectClass.DATA,
            Attribute.TOKEN: True,
            Attribute.PRIVATE: True,
            Attribute.LABEL: "private data",
            Attribute.VALUE: b"only the user may read this",
        }
    )
    for label, value in (("public data", b"everybody may read this"), ("private data", b"only the user may read this")):
        for member in group.members.values():
            items = [item for item in plain.objects(member, int(Attribute.VALUE)) if item["label"] == label]
            assert [bytes.fromhex(item["attributes"][str(int(Attribute.VALUE))]) for item in items] == [value]
    (item,) = session.get_objects({Attribute.LABEL: "private data"})
    assert item[Attribute.VALUE] == b"only the user may read this"


_: Callable[..., object] = test_no_ghosts_and_nothing_else
