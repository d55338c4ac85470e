"""One object on one member (engine.replica): every kind goes whole to a second token, and is found again."""

from __future__ import annotations

import datetime
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hagroup.core.attributes import (
    ANSWERED_ONLY,
    CKA,
    CKK,
    CKM,
    CKO,
    TEMPLATES,
    may_set,
    pack_bool,
    pack_template,
    pack_ulong,
    unpack_bool,
)
from hagroup.core.calls import Ckr, Template
from hagroup.core.ckr import CKR
from hagroup.core.records import ObjectRecord
from hagroup.core.templates import scratch_template
from hagroup.engine import replica
from hagroup.engine.domain import IntegrityAlarm, find_domain, reseal
from hagroup.engine.domain_keys import scratch_session
from hagroup.engine.inner_layer import OAEP
from hagroup.engine.proof import Proof, prove
from hagroup.engine.stored_records import stored_records
from tests.integration.replica_support import (
    ED25519,
    P256,
    P384,
    Member,
    T,
    aes,
    connect,
    create,
    data,
    generate,
    generate_pair,
    look,
    members,
    no,
    pair,
    record_of,
    rsa_pair,
    secret_key,
    yes,
)


@pytest.fixture(scope="module")
def both() -> Iterator[list[Member]]:
    with members("first", "second") as made:
        yield made


_UNKNOWN_TO_PYTHON_PKCS11 = (
    CKA.CERTIFICATE_CATEGORY,
    CKA.JAVA_MIDP_SECURITY_DOMAIN,
    CKA.NAME_HASH_ALGORITHM,
    CKA.PUBLIC_KEY_INFO,
)


def put(both: list[Member], *records: ObjectRecord) -> None:
    for member in both:
        for record in records:
            replica.install(member.connection, member.keys, record, timeout=T, with_record=False)


def take(both: list[Member], *records: ObjectRecord) -> None:
    for member in both:
        for record in records:
            replica.remove(
                member.connection, record.uid, [record.locator], record.fingerprint, record.attributes, timeout=T
            )


def found(member: Member, record: ObjectRecord) -> list[int]:
    return replica.locate(member.connection, [record.locator], record.fingerprint, record.attributes, timeout=T)


def step(record: ObjectRecord, do: str, **more: Any) -> dict[str, Any]:
    label = record.attributes[CKA.LABEL].decode()
    return {"label": label, "class": record.object_class, "do": do, **more}


def assert_same(member: Member, record: ObjectRecord) -> None:
    """A plain program sees on that token what the record says."""
    numbers = [
        number
        for number, value in record.attributes.items()
        if number not in ANSWERED_ONLY
        and number not in TEMPLATES
        and number not in (CKA.ALLOWED_MECHANISMS, CKA.CLASS, CKA.KEY_TYPE)
        and number not in _UNKNOWN_TO_PYTHON_PKCS11
    ]
    (seen,) = look(member.token, [step(record, "read", numbers=numbers)])
    expected = {str(number): record.attributes[number].hex() for number in numbers}
    assert seen == expected


def assert_found(both: list[Member], record: ObjectRecord) -> None:
    for member in both:
        (handle,) = found(member, record)
        assert prove(member.connection, handle, record, timeout=T) is not Proof.MISMATCH


# -- secret keys -------------------------------------------------------------------------------------------------------

_IV = bytes(16).hex()
_SECRET: dict[str, tuple[int, Template, dict[str, Any]]] = {
    "aes128": (CKM.AES_KEY_GEN, aes(b"aes128", length=16), {"mechanism": "AES_CBC_PAD", "param": _IV}),
    "aes192": (CKM.AES_KEY_GEN, aes(b"aes192", length=24), {"mechanism": "AES_CBC_PAD", "param": _IV}),
    "aes256": (CKM.AES_KEY_GEN, aes(b"aes256"), {"mechanism": "AES_CBC_PAD", "param": _IV}),
    "des3": (0x131, secret_key(b"des3"), {"mechanism": "DES3_CBC_PAD", "param": bytes(8).hex()}),
    "locked": (
        CKM.AES_KEY_GEN,
        aes(
            b"locked",
            *no(CKA.MODIFIABLE, CKA.EXTRACTABLE, CKA.COPYABLE, CKA.DESTROYABLE, CKA.SIGN),
            *yes(CKA.DERIVE),
            (CKA.START_DATE, b"20200101"),
        ),
        {"mechanism": "AES_CBC_PAD", "param": _IV},
    ),
    "trusted only": (
        CKM.AES_KEY_GEN,
        aes(b"trusted only", *yes(CKA.WRAP_WITH_TRUSTED, CKA.EXTRACTABLE)),
        {"mechanism": "AES_CBC_PAD", "param": _IV},
    ),
    "public": (CKM.AES_KEY_GEN, aes(b"public")[:2] + no(CKA.PRIVATE) + aes(b"public")[3:], {"mechanism": "AES_ECB"}),
}


@pytest.mark.parametrize("name", _SECRET)
def test_a_secret_key_is_the_same_on_the_second_member(both: list[Member], name: str) -> None:
    mechanism, template, use = _SECRET[name]
    record = generate(both[0], mechanism, template)
    put(both, record)
    try:
        assert_same(both[1], record)
        assert_found(both, record)
        text = b"sixteen bytes ok" * 2
        sealed = look(both[0].token, [step(record, "encrypt", data=text.hex(), **use)])
        opened = look(both[1].token, [step(record, "decrypt", data=sealed[0], **use)])
        assert opened == [text.hex()]
        assert record.attributes[CKA.NEVER_EXTRACTABLE] == pack_bool(False)
        assert record.attributes[CKA.ALWAYS_SENSITIVE] == pack_bool(True)
        assert record.attributes[CKA.LOCAL] == pack_bool(True)
        assert CKA.VALUE not in record.attributes
    finally:
        take(both, record)
    assert not found(both[0], record)


@pytest.mark.parametrize("length", [1, 20, 64, 214, 1000])
def test_generic_secrets(both: list[Member], length: int) -> None:
    label = f"generic{length}".encode()
    record = generate(both[0], 0x350, secret_key(label, (CKA.VALUE_LEN, pack_ulong(length))))
    put(both, record)
    try:
        assert_same(both[1], record)
        assert_found(both, record)
    finally:
        take(both, record)


def test_a_generic_secret_that_would_come_out_as_another_is_refused(both: list[Member]) -> None:
    """SoftHSM leaves the padding on it, and it is too long for the carrier that keeps the length."""
    with pytest.raises(Ckr) as refused:
        generate(both[0], 0x350, secret_key(b"odd", (CKA.VALUE_LEN, pack_ulong(1001))))
    assert refused.value.rv == CKR.KEY_NOT_WRAPPABLE


@pytest.mark.parametrize("length", [20, 24])
def test_a_secret_of_unknown_length(both: list[Member], length: int) -> None:
    """What SoftHSM unwrapped has VALUE_LEN 0; a readable one is compared whole."""
    template: Template = [
        (int(CKA.CLASS), pack_ulong(CKO.SECRET_KEY)),
        (int(CKA.KEY_TYPE), pack_ulong(CKK.GENERIC_SECRET)),
        (int(CKA.TOKEN), pack_bool(True)),
        (int(CKA.LABEL), b"unwrapped"),
        *no(CKA.SENSITIVE),
        *yes(CKA.EXTRACTABLE),
    ]
    with scratch_session(both[0].connection, timeout=T) as sid:
        public, private = both[0].connection.generate_pair(
            (int(CKM.RSA_PKCS_KEY_PAIR_GEN), None),
            [(int(CKA.MODULUS_BITS), pack_ulong(1024)), *no(CKA.TOKEN), *yes(CKA.WRAP)],
            [*no(CKA.TOKEN), *yes(CKA.UNWRAP)],
            sid=sid,
            timeout=T,
        )
        made = both[0].connection.create(
            [(n, v) for n, v in template if n != CKA.TOKEN] + [(int(CKA.VALUE), b"v" * length)], sid=sid, timeout=T
        )
        wrapped = both[0].connection.wrap(OAEP, public, made, sid=sid, timeout=T)
        handle = both[0].connection.unwrap(OAEP, private, wrapped, scratch_template(template), sid=sid, timeout=T)
        record = record_of(both[0], sid, handle, template)
    assert record.attributes[CKA.VALUE_LEN] == pack_ulong(0)
    put(both, record)
    try:
        (seen,) = look(both[1].token, [step(record, "read", numbers=[int(CKA.VALUE)])])
        assert seen == {str(int(CKA.VALUE)): (b"v" * length).hex()}
    finally:
        take(both, record)


def test_a_key_that_is_not_sensitive_stays_so(both: list[Member]) -> None:
    """What the domain key unwraps is SENSITIVE for ever, so this one goes under a carrier."""
    template = [(n, v) for n, v in aes(b"open", *yes(CKA.EXTRACTABLE)) if n != CKA.SENSITIVE] + no(CKA.SENSITIVE)
    record = generate(both[0], CKM.AES_KEY_GEN, template)
    assert CKA.VALUE not in record.attributes
    put(both, record)
    try:
        assert_same(both[1], record)
        values = [look(member.token, [step(record, "read", numbers=[int(CKA.VALUE)])])[0] for member in both]
        assert values[0] == values[1]
        assert len(values[0][str(int(CKA.VALUE))]) == 64
    finally:
        take(both, record)


def test_templates_and_allowed_mechanisms_go_along(both: list[Member]) -> None:
    nested = [(int(CKA.SENSITIVE), pack_bool(True))]
    template = aes(b"nested", (CKA.UNWRAP_TEMPLATE, nested), (CKA.ALLOWED_MECHANISMS, pack_ulong(0x1085)))
    record = generate(both[0], CKM.AES_KEY_GEN, template)
    assert record.attributes[CKA.UNWRAP_TEMPLATE] == pack_template(nested)
    put(both, record)
    try:
        (handle,) = found(both[1], record)
        read, _ = both[1].connection.get(handle, [CKA.UNWRAP_TEMPLATE, CKA.ALLOWED_MECHANISMS], timeout=T)
        assert read == {n: record.attributes[n] for n in (CKA.UNWRAP_TEMPLATE, CKA.ALLOWED_MECHANISMS)}
    finally:
        take(both, record)


# -- key pairs ---------------------------------------------------------------------------------------------------------


def _group(member: Member, mechanism: int, bits: int, numbers: list[CKA]) -> Template:
    with scratch_session(member.connection, timeout=T) as sid:
        template = [*no(CKA.TOKEN), (int(CKA.PRIME_BITS), pack_ulong(bits))]
        handle = member.connection.generate((mechanism, None), template, sid=sid, timeout=60)
        values, _ = member.connection.get(handle, [int(number) for number in numbers], sid=sid, timeout=T)
        return list(values.items())


_TEXT = (b"x" * 32).hex()
_PAIRS = ["rsa", "p256", "p384", "dsa", "dh", "always", "fixed"]


def make_pair(member: Member, name: str) -> tuple[ObjectRecord, ObjectRecord]:
    label = name.encode()
    if name == "dsa":
        group = _group(member, 0x2000, 1024, [CKA.PRIME, CKA.SUBPRIME, CKA.BASE])
        return generate_pair(member, 0x10, *pair(label, group, []))
    if name == "dh":
        group = _group(member, 0x2001, 512, [CKA.PRIME, CKA.BASE])
        return generate_pair(member, 0x20, *pair(label, group, yes(CKA.DERIVE)))
    if name in ("p256", "p384"):
        curve: Template = [(int(CKA.EC_PARAMS), P256 if name == "p256" else P384)]
        return generate_pair(member, 0x1040, *pair(label, curve, yes(CKA.DERIVE)))
    more = {
        "rsa": [(int(CKA.SUBJECT), b"0\0"), (int(CKA.END_DATE), b"20991231")],
        "always": yes(CKA.ALWAYS_AUTHENTICATE),
        "fixed": [*no(CKA.MODIFIABLE, CKA.DECRYPT), *yes(CKA.WRAP_WITH_TRUSTED, CKA.EXTRACTABLE)],
    }
    return generate_pair(member, CKM.RSA_PKCS_KEY_PAIR_GEN, *rsa_pair(label, *more[name]))


@pytest.mark.parametrize("name", _PAIRS)
def test_a_key_pair_is_the_same_on_the_second_member(both: list[Member], name: str) -> None:
    public, private = make_pair(both[0], name)
    put(both, public, private)
    try:
        for record in (public, private):
            assert_same(both[1], record)
            assert_found(both, record)
        if name == "dh":
            peer = public.attributes[CKA.VALUE].hex()
            secrets = [
                look(m.token, [step(private, "derive", data=peer, bits=512, mechanism="DH_PKCS_DERIVE")]) for m in both
            ]
            assert secrets[0] == secrets[1]
            assert len(secrets[0][0]) == 128
            return
        mechanism = {"p256": "ECDSA", "p384": "ECDSA", "dsa": "DSA_SHA1"}.get(name, "SHA256_RSA_PKCS")
        signed = look(both[1].token, [step(private, "sign", data=_TEXT, mechanism=mechanism)])
        if name == "always":
            assert signed == ["!UserNotLoggedIn"]
            return
        more = {"data": _TEXT, "signature": signed[0], "mechanism": mechanism}
        assert look(both[0].token, [step(public, "verify", **more)]) == [True]
    finally:
        take(both, public, private)


def test_an_edwards_key_cannot_be_sealed_on_softhsm(both: list[Member]) -> None:
    with pytest.raises(Ckr) as refused:
        generate_pair(both[0], 0x1055, *pair(b"ed", [(int(CKA.EC_PARAMS), ED25519)], []))
    assert refused.value.rv == CKR.KEY_NOT_WRAPPABLE


def test_stateful_private_keys_are_refused() -> None:
    assert "HSS" in (replica.cannot_replicate(CKO.PRIVATE_KEY, CKK.HSS, []) or "")
    assert replica.cannot_replicate(CKO.PUBLIC_KEY, CKK.HSS, []) is None
    assert replica.cannot_replicate(CKO.PRIVATE_KEY, CKK.RSA, [0x210A], wrap_mechanism=0x210A) is None
    assert "0x210a" in (replica.cannot_replicate(CKO.SECRET_KEY, CKK.AES, [], wrap_mechanism=0x210A) or "")


# -- what travels by its attributes ------------------------------------------------------------------------------------


def certificate() -> Template:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "replica")])
    start = datetime.datetime(2020, 1, 1)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(5)
        .not_valid_before(start)
        .not_valid_after(start.replace(year=2040))
        .sign(key, hashes.SHA256())
    )
    return [
        (int(CKA.CLASS), pack_ulong(CKO.CERTIFICATE)),
        (int(CKA.CERTIFICATE_TYPE), pack_ulong(0)),
        (int(CKA.TOKEN), pack_bool(True)),
        (int(CKA.LABEL), b"certificate"),
        (int(CKA.ID), b"c"),
        (int(CKA.SUBJECT), name.public_bytes()),
        (int(CKA.VALUE), made.public_bytes(serialization.Encoding.DER)),
        *no(CKA.MODIFIABLE),
    ]


def test_a_certificate(both: list[Member]) -> None:
    record = create(both[0], certificate())
    assert record.envelope is None
    put(both, record)
    try:
        assert_same(both[1], record)
        assert_found(both, record)
    finally:
        take(both, record)


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("value", [b"", b"value of the object", b"x" * 100_000])
def test_data_objects(both: list[Member], private: bool, value: bytes) -> None:
    record = create(both[0], data(b"data", value, private=private))
    assert (record.envelope is not None) is private
    assert (CKA.VALUE in record.attributes) is not private
    if private and value:
        assert value not in msgspec.msgpack.encode(record)
    put(both, record)
    try:
        assert_same(both[1], record)
        assert_found(both, record)
        (seen,) = look(both[1].token, [step(record, "read", numbers=[int(CKA.VALUE)])])
        assert seen == {str(int(CKA.VALUE)): value.hex()}
    finally:
        take(both, record)


def test_two_data_objects_that_nothing_separates(both: list[Member]) -> None:
    template = data(b"twin", b"same", private=True, more=[(int(CKA.OBJECT_ID), b"\x06\x01\x01")])
    one, other = create(both[0], template), create(both[0], template)
    other = msgspec.structs.replace(other, member_id=other.uid)
    put(both, one, other)
    try:
        for record in (one, other):
            assert len(found(both[1], record)) == 1
        assert found(both[1], one) != found(both[1], other)
    finally:
        take(both, one)
        assert not found(both[1], one)
        assert len(found(both[1], other)) == 1
        take(both, other)


@pytest.mark.parametrize("name", ["dsa", "dh"])
def test_domain_parameters_as_session_objects(both: list[Member], name: str) -> None:
    mechanism, numbers = {
        "dsa": (0x2000, [CKA.PRIME, CKA.SUBPRIME, CKA.BASE]),
        "dh": (0x2001, [CKA.PRIME, CKA.BASE]),
    }[name]
    bits = 1024 if name == "dsa" else 512
    kind = [(int(CKA.CLASS), pack_ulong(CKO.DOMAIN_PARAMETERS)), (int(CKA.PRIME_BITS), pack_ulong(bits))]
    record = generate(both[0], mechanism, kind)
    with scratch_session(both[1].connection, timeout=T) as sid:
        handle = replica.install_session(both[1].connection, None, record, sid=sid, timeout=T)
        read, _ = both[1].connection.get(handle, [int(n) for n in numbers], sid=sid, timeout=T)
        assert read == {int(n): record.attributes[n] for n in numbers}


# -- session objects ---------------------------------------------------------------------------------------------------


def test_a_session_object_is_made_on_another_member(both: list[Member]) -> None:
    template = [(n, v) for n, v in aes(b"session") if n != CKA.TOKEN] + no(CKA.TOKEN)
    record = generate(both[0], CKM.AES_KEY_GEN, template)
    before = both[1].objects()
    with scratch_session(both[1].connection, timeout=T) as sid:
        handle = replica.install_session(both[1].connection, both[1].keys, record, sid=sid, timeout=T)
        read, _ = both[1].connection.get(handle, [CKA.TOKEN, CKA.LABEL], sid=sid, timeout=T)
        assert read == {CKA.TOKEN: pack_bool(False), CKA.LABEL: b"session"}
        assert prove(both[1].connection, handle, record, sid=sid, timeout=T) is Proof.MATCH
    assert both[1].objects() == before


# -- failing -----------------------------------------------------------------------------------------------------------


def test_an_envelope_of_another_object_makes_nothing(both: list[Member]) -> None:
    one, other = (generate(both[0], CKM.AES_KEY_GEN, aes(label)) for label in (b"one", b"other"))
    before = both[1].objects()
    for wrong in (
        msgspec.structs.replace(one, envelope=other.envelope),
        msgspec.structs.replace(one, envelope=b"nonsense"),
        msgspec.structs.replace(one, revision=2),
        msgspec.structs.replace(one, attributes={**one.attributes, CKA.EXTRACTABLE: pack_bool(True)}),
    ):
        with pytest.raises(IntegrityAlarm):
            replica.install(both[1].connection, both[1].keys, wrong, timeout=T, with_record=True)
    assert both[1].objects() == before


def test_what_is_not_the_recorded_object_is_destroyed_again(both: list[Member]) -> None:
    one, other = (generate(both[0], CKM.AES_KEY_GEN, aes(label)) for label in (b"one", b"other"))
    before = both[1].objects()
    wrong = msgspec.structs.replace(one, fingerprint=other.fingerprint)
    with pytest.raises(IntegrityAlarm):
        replica.install(both[1].connection, both[1].keys, wrong, timeout=T, with_record=True)
    assert both[1].objects() == before


def half_made(member: Member, missing: set[CKA]) -> None:
    """Takes attributes out of the newest file, as SoftHSM leaves it when its process is killed in between.

    A file is a generation number, then (type, kind, value) of each attribute.
    """
    path = max(member.token.token_dir.rglob("*.object"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    content = path.read_bytes()
    kept, at = content[:8], 8
    while at < len(content):
        number, kind = struct.unpack_from(">QQ", content, at)
        length = {1: 1, 2: 8}.get(kind) or 8 + struct.unpack_from(">Q", content, at + 16)[0]
        if number not in missing:
            kept += content[at : at + 16 + length]
        at += 16 + length
    assert len(kept) < len(content)
    path.write_bytes(kept)


_RSA_SECRETS = {CKA.PRIVATE_EXPONENT, CKA.PRIME_1, CKA.PRIME_2, CKA.EXPONENT_1, CKA.EXPONENT_2, CKA.COEFFICIENT}


@contextmanager
def scratch_member(member: Member) -> Iterator[Member]:
    """The same token in a fresh process."""
    connection = connect(member.token, isolation="process")
    try:
        ids = (member.keys.domain_key_id, member.keys.partition_key_id)
        yield Member(member.token, connection, find_domain(connection, *ids, timeout=T))
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("name", "missing"),
    [("aes", {CKA.VALUE}), ("p256", {CKA.VALUE}), ("rsa", {CKA.MODULUS}), ("rsa", _RSA_SECRETS)],
)
def test_a_replica_without_its_key_is_told_and_removed(name: str, missing: set[CKA]) -> None:
    """A worker killed inside a write leaves the right class, id and label, and no key (DESIGN.md 8, trap 3)."""
    with members("whole", "half") as both:
        record = generate(both[0], CKM.AES_KEY_GEN, aes(b"half")) if name == "aes" else make_pair(both[0], name)[1]
        half = both[1]
        # Made by a process of its own, so that this one does not know the object from before.
        with scratch_member(half) as maker:
            replica.install(maker.connection, maker.keys, record, timeout=T, with_record=False)
        half_made(half, missing)
        with scratch_member(half) as member:
            keys = found(member, record)  # so that it is removed before it is made again
            assert len(keys) == 1
            assert prove(member.connection, keys[0], record, timeout=T) is Proof.MISMATCH
            take([member], record)
            replica.install(member.connection, member.keys, record, timeout=T, with_record=False)
            (again,) = found(member, record)
            assert prove(member.connection, again, record, timeout=T) is Proof.MATCH


def test_an_rsa_key_is_proved_by_every_permitted_use(both: list[Member]) -> None:
    flags = (CKA.SIGN, CKA.DECRYPT, CKA.UNWRAP, CKA.SIGN_RECOVER)
    connection = both[0].connection
    other = generate_pair(both[0], CKM.RSA_PKCS_KEY_PAIR_GEN, *rsa_pair(b"other"))[1]
    for allowed in flags:
        template = rsa_pair(b"use", *no(*(flag for flag in flags if flag != allowed)), *yes(allowed))
        record = generate_pair(both[0], CKM.RSA_PKCS_KEY_PAIR_GEN, *template)[1]
        with scratch_session(connection, timeout=T) as sid:
            handle = replica.install_session(connection, both[0].keys, record, sid=sid, timeout=T)
            expected = Proof.UNPROVEN if allowed == CKA.SIGN_RECOVER else Proof.MATCH
            assert prove(connection, handle, record, sid=sid, timeout=T) is expected
            attributes = {**record.attributes, CKA.MODULUS: other.attributes[CKA.MODULUS]}
            wrong = msgspec.structs.replace(record, attributes=attributes)
            expected = Proof.UNPROVEN if allowed == CKA.SIGN_RECOVER else Proof.MISMATCH
            assert prove(connection, handle, wrong, sid=sid, timeout=T) is expected


@pytest.mark.parametrize("mechanism", [CKM.SHA512_RSA_PKCS, CKM.RSA_PKCS, CKM.RSA_X_509])
def test_proof_keeps_to_the_allowed_mechanisms(both: list[Member], mechanism: CKM) -> None:
    connection = both[0].connection
    template = rsa_pair(b"allowed", (int(CKA.ALLOWED_MECHANISMS), pack_ulong(mechanism)))
    record = generate_pair(both[0], CKM.RSA_PKCS_KEY_PAIR_GEN, *template)[1]
    with scratch_session(connection, timeout=T) as sid:
        handle = replica.install_session(connection, both[0].keys, record, sid=sid, timeout=T)
        assert prove(connection, handle, record, sid=sid, timeout=T) is Proof.MATCH


# -- finding, changing, removing ---------------------------------------------------------------------------------------


def test_a_copy_under_another_label_is_never_taken_for_it(both: list[Member]) -> None:
    connection = both[0].connection
    one = generate(both[0], CKM.AES_KEY_GEN, aes(b"original"))
    attributes = {**one.attributes, CKA.LABEL: b"copy"}
    uid = b"c" * 16
    envelope = reseal(
        connection, both[0].keys, one.envelope or b"", old=one, uid=uid, revision=1, attributes=attributes, timeout=T
    )
    copy = msgspec.structs.replace(one, uid=uid, attributes=attributes, envelope=envelope)
    put(both, copy)
    try:
        assert found(both[0], one) == []
        arguments = ([one.locator], one.fingerprint, one.attributes)
        claimed = replica.locate(connection, *arguments, timeout=T, claimed=lambda where: where == copy.locator)
        assert claimed == []
        take(both, one)
        assert len(found(both[0], copy)) == 1
        # Somebody changed its label behind the group's back: found without label and id.
        moved = replica.locate(connection, *arguments, timeout=T, claimed=lambda _: False)
        assert moved == found(both[0], copy)
    finally:
        take(both, copy)


def test_an_unrelated_key_at_the_same_place_is_not_a_match(both: list[Member]) -> None:
    one, other = (generate(both[0], CKM.AES_KEY_GEN, aes(b"same place")) for _ in range(2))
    put(both, one, other)
    try:
        assert len(found(both[0], one)) == 1
        assert found(both[0], one) != found(both[0], other)
        take(both, one)
        assert len(found(both[0], other)) == 1
    finally:
        take(both, one, other)


def test_an_attribute_change_and_the_stored_record(both: list[Member]) -> None:
    member = both[1]
    old = generate(both[0], CKM.AES_KEY_GEN, aes(b"before", *yes(CKA.EXTRACTABLE)))
    replica.install(member.connection, member.keys, old, timeout=T, with_record=True)
    attributes = {
        **old.attributes,
        CKA.LABEL: b"after",
        CKA.ENCRYPT: pack_bool(False),
        CKA.EXTRACTABLE: pack_bool(False),
        CKA.START_DATE: b"20240101",
    }
    envelope = reseal(
        both[0].connection,
        both[0].keys,
        old.envelope or b"",
        old=old,
        uid=old.uid,
        revision=2,
        attributes=attributes,
        timeout=T,
    )
    new = msgspec.structs.replace(old, revision=2, attributes=attributes, envelope=envelope)
    try:
        stored = list(stored_records(member.connection, member.keys, timeout=T))
        assert stored == [old]
        (handle,) = found(member, old)
        replica.apply_set(member.connection, member.keys, handle, old, new, timeout=T, with_record=True)
        assert found(member, old) == []
        assert_same(member, new)
        assert list(stored_records(member.connection, member.keys, timeout=T)) == [new]
        replica.install(both[0].connection, both[0].keys, new, timeout=T, with_record=False)
        assert_same(both[0], new)
    finally:
        take(both, new)
    assert list(stored_records(member.connection, member.keys, timeout=T)) == []


def test_inventory_shows_everything_and_knows_the_groups_own(both: list[Member]) -> None:
    member = both[1]
    record = generate(both[0], CKM.AES_KEY_GEN, aes(b"listed"))
    replica.install(member.connection, member.keys, record, timeout=T, with_record=True)
    ghost: Template = [*aes(b"ghost"), (int(CKA.MODULUS), b"x")]
    with pytest.raises(Ckr):  # leaves a ghost (DESIGN.md 8, trap 4)
        member.connection.generate((CKM.AES_KEY_GEN, None), ghost, timeout=T)
    try:
        entries = replica.inventory(member.connection, timeout=T)
        assert [e.label for e in entries if not e.own and not e.ghost] == [b"listed"]
        own = sorted(e.label for e in entries if e.own)
        assert own[:3] == [b"hagroup domain key", b"hagroup member key", b"hagroup partition key"]
        assert len(own) == 4
        assert [e.locator for e in entries if e.label == b"listed"] == [record.locator]
        ghosts = [e for e in entries if e.ghost]
        assert len(ghosts) == 1
        member.connection.destroy(ghosts[0].handle, timeout=T)
    finally:
        take(both, record)
    assert member.objects() == 3


def test_a_record_made_on_one_key_type_is_not_unwrapped_as_another(both: list[Member]) -> None:
    record = generate(both[0], CKM.AES_KEY_GEN, aes(b"kind"))
    wrong = msgspec.structs.replace(record, key_type=int(CKK.DES3))
    with pytest.raises(IntegrityAlarm):
        replica.install(both[1].connection, both[1].keys, wrong, timeout=T, with_record=False)


def test_reading_takes_dates_from_the_template(both: list[Member]) -> None:
    template = rsa_pair(b"dates", (int(CKA.START_DATE), b"20200101"))
    with scratch_session(both[0].connection, timeout=T) as sid:
        _, private = both[0].connection.generate_pair(
            (int(CKM.RSA_PKCS_KEY_PAIR_GEN), None),
            [(n, v) for n, v in template[0] if n != CKA.TOKEN],
            [(n, v) for n, v in template[1] if n != CKA.TOKEN] + yes(CKA.EXTRACTABLE),
            sid=sid,
            timeout=T,
        )
        record = record_of(both[0], sid, private, template[1])
    assert record.attributes[CKA.START_DATE] == b"20200101"
    assert record.attributes[CKA.END_DATE] == b""
    assert not unpack_bool(record.attributes[CKA.EXTRACTABLE])


# -- what is refused before a member is asked --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["aes", "p256", "certificate", "data"])
def test_what_we_refuse_softhsm_refuses_too(both: list[Member], name: str) -> None:
    """And what we let pass it takes, but for what PKCS#11 allows and SoftHSM does not."""
    connection = both[0].connection
    if name == "p256":
        record = make_pair(both[0], name)[1]
    elif name == "aes":
        record = generate(both[0], CKM.AES_KEY_GEN, aes(b"aes", *yes(CKA.EXTRACTABLE)))
    else:
        given = certificate()[:-1] if name == "certificate" else data(b"d", b"value", private=False)
        record = create(both[0], given)
    softhsm_only = {CKA.WRAP_WITH_TRUSTED, CKA.COPYABLE}
    with scratch_session(connection, timeout=T) as sid:
        handle = replica.install_session(connection, both[0].keys, record, sid=sid, timeout=T)
        for number, value in record.attributes.items():
            if number in TEMPLATES or number in (CKA.CHECK_VALUE, CKA.DESTROYABLE):
                continue
            try:
                connection.set(handle, [(number, value)], sid=sid, timeout=T)
                answer = None
            except Ckr as error:
                answer = error.rv
            if number not in softhsm_only:
                assert may_set(record.attributes, number, value) == answer, CKA(number)
