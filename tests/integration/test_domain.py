"""The cloning domain between real tokens (engine.joining, challenge, domain): T 3.4.12, T 3.4.13, G8, G9."""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec
import pytest

from hagroup.core.attributes import CKA, CKK, CKM, CKO, pack_bool, pack_ulong
from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.core.records import ObjectRecord, ObjectState
from hagroup.engine import joining, manifest
from hagroup.engine.challenge import DomainMember, challenge, open_reference, reference_envelope
from hagroup.engine.domain import (
    IntegrityAlarm,
    find_domain,
    open_data,
    open_envelope,
    open_private_data,
    reseal,
    seal,
    seal_data,
    seal_private_data,
)
from hagroup.engine.domain_keys import encrypt, scratch_session, throw_away_key
from hagroup.engine.enforcement import Enforcement, probe_enforcement
from hagroup.engine.joining import generate_domain, import_domain, join_domain
from hagroup.engine.manifest import Manifest
from hagroup.engine.stored_records import store_record
from hagroup.errors import DomainMismatch
from hagroup.members.api import Connection
from tests.integration.replica_support import Member, T, connect, members, tokens

ATTRIBUTES = {int(CKA.LABEL): b"label", int(CKA.SENSITIVE): b"\x01"}


@pytest.fixture(scope="module")
def both() -> Iterator[list[Member]]:
    with members("first", "second") as made:
        yield made


@pytest.fixture(scope="module")
def stranger() -> Iterator[Member]:
    """A member of another domain."""
    with members("stranger") as made:
        yield made[0]


def record(envelope: bytes, **changes: object) -> ObjectRecord:
    made = ObjectRecord(
        uid=b"u" * 16,
        object_class=CKO.SECRET_KEY,
        key_type=CKK.AES,
        state=ObjectState.LIVE,
        revision=1,
        attributes=dict(ATTRIBUTES),
        envelope=envelope,
    )
    return msgspec.structs.replace(made, **changes)


def sealed_key(member: Member) -> tuple[bytes, bytes, bytes]:
    """An envelope, and what a digest over salt and key must be."""
    salt = os.urandom(16)
    with scratch_session(member.connection, timeout=T) as sid:
        key = throw_away_key(member.connection, sid=sid, timeout=T)
        envelope = seal(
            member.connection,
            member.keys,
            sid,
            key,
            uid=b"u" * 16,
            revision=1,
            object_class=CKO.SECRET_KEY,
            key_type=CKK.AES,
            attributes=ATTRIBUTES,
            timeout=T,
        )
        return envelope, salt, member.connection.digest((0x250, None), [salt, key], sid=sid, timeout=T)


TEMPLATE: list[tuple[int, bytes]] = [
    (int(CKA.CLASS), pack_ulong(CKO.SECRET_KEY)),
    (int(CKA.KEY_TYPE), pack_ulong(CKK.AES)),
    (int(CKA.TOKEN), pack_bool(False)),
    (int(CKA.SENSITIVE), pack_bool(True)),
]


def opened(member: Member, what: ObjectRecord, salt: bytes) -> bytes:
    with scratch_session(member.connection, timeout=T) as sid:
        key = open_envelope(member.connection, member.keys, sid, what, list(TEMPLATE), timeout=T)
        return member.connection.digest((0x250, None), [salt, key], sid=sid, timeout=T)


# -- the keys ----------------------------------------------------------------------------------------------------------


def test_softhsm_enforces_what_the_domain_rests_on(both: list[Member]) -> None:
    found = probe_enforcement(both[0].connection, 0x210A, timeout=T)
    assert found == Enforcement(wrap_with_trusted=True, unwrap_template=True, fixed=True)


def test_the_keys_are_found_and_protected(both: list[Member]) -> None:
    for member in both:
        connection, keys = member.connection, member.keys
        found = find_domain(connection, keys.domain_key_id, keys.partition_key_id, timeout=T)
        assert found == keys
        with scratch_session(connection, timeout=T) as sid:
            own = throw_away_key(connection, sid=sid, timeout=T)
            for key in (keys.domain, keys.partition):
                with pytest.raises(Ckr) as refused:
                    connection.wrap((0x210A, None), own, key, sid=sid, timeout=T)
                assert refused.value.rv == CKR.KEY_NOT_WRAPPABLE
                for attempt in (CKA.DECRYPT, CKA.LABEL):
                    with pytest.raises(Ckr):
                        connection.set(key, [(int(attempt), b"\x01")], timeout=T)
                with pytest.raises(Ckr):
                    connection.copy(key, [(int(CKA.MODIFIABLE), b"\x01")], sid=sid, timeout=T)
            with pytest.raises(Ckr):
                connection.encrypt((0x1082, bytes(16)), keys.domain, bytes(16), sid=sid, timeout=T)
            with pytest.raises(Ckr):
                connection.sign((0x251, None), keys.partition, b"x", sid=sid, timeout=T)


def test_what_the_domain_key_unwraps_is_sensitive(both: list[Member]) -> None:
    """With the PIN and the journal alone nobody reads a key."""
    envelope, _, _ = sealed_key(both[0])
    clear = [(number, value) for number, value in TEMPLATE if number != CKA.SENSITIVE]
    with scratch_session(both[0].connection, timeout=T) as sid, pytest.raises(Ckr) as refused:
        open_envelope(
            both[0].connection,
            both[0].keys,
            sid,
            record(envelope),
            [*clear, (int(CKA.SENSITIVE), pack_bool(False))],
            timeout=T,
        )
    assert refused.value.rv == CKR.TEMPLATE_INCONSISTENT


def test_missing_keys_are_named(both: list[Member]) -> None:
    keys = both[0].keys
    with pytest.raises(DomainMismatch, match="domain key"):
        find_domain(both[0].connection, b"another", keys.partition_key_id, timeout=T)
    with pytest.raises(DomainMismatch, match="partition key"):
        find_domain(both[0].connection, keys.domain_key_id, b"another", timeout=T)


# -- joining -----------------------------------------------------------------------------------------------------------


def test_two_people_bring_the_keys_to_a_third_member_and_on_to_a_fourth(both: list[Member]) -> None:
    with tokens("third", "fourth") as (third, fourth):
        source, before = both[1], both[1].objects()
        officer = connect(source.token, officer=True, isolation="process")
        newcomer, last = connect(third), connect(fourth)
        try:
            side = DomainMember(connection=newcomer, name="third")
            keys = join_domain(source.side, source.keys, officer, side, timeout=T)
            assert source.objects() == before  # the transport key is gone
            assert len(newcomer.find([], timeout=T)) == 3  # with the pair by which it got them
            challenge(both[0].side, both[0].keys, side, keys, timeout=T)
            second_officer = connect(third, officer=True, isolation="process")
            other = DomainMember(connection=last, name="fourth")
            again = join_domain(side, keys, second_officer, other, timeout=T)
            second_officer.close()
            challenge(both[0].side, both[0].keys, other, again, timeout=T)
        finally:
            for connection in (officer, newcomer, last):
                connection.close()


def test_a_transport_key_that_the_user_made_is_not_enough(both: list[Member]) -> None:
    """The user alone cannot hand the keys on: it takes the security officer too."""
    with tokens("third") as (third,):
        newcomer = connect(third)
        before = both[0].objects()
        try:
            side = DomainMember(connection=newcomer, name="third")
            with pytest.raises(Ckr) as refused:
                join_domain(both[0].side, both[0].keys, both[0].connection, side, timeout=T)
            assert refused.value.rv == CKR.ATTRIBUTE_READ_ONLY
            assert newcomer.find([], timeout=T) == []
        finally:
            newcomer.close()
        for entry in both[0].connection.find([(int(CKA.LABEL), b"")], timeout=T):
            both[0].connection.destroy(entry, timeout=T)  # SoftHSM's ghost of the refused creation
        assert both[0].objects() == before


def test_nothing_stays_on_the_newcomer_when_joining_fails(both: list[Member], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise DomainMismatch("as if the keys differed")

    monkeypatch.setattr(joining, "challenge", fails)
    with tokens("third") as (third,):
        officer = connect(both[0].token, officer=True, isolation="process")
        newcomer = connect(third)
        before = both[0].objects()
        try:
            side = DomainMember(connection=newcomer, name="third")
            with pytest.raises(DomainMismatch):
                join_domain(both[0].side, both[0].keys, officer, side, timeout=T)
            assert newcomer.find([], timeout=T) == []
            assert both[0].objects() == before
        finally:
            officer.close()
            newcomer.close()


def test_a_sealed_domain_begins_on_several_members_and_is_joined_by_its_shares_only() -> None:
    with tokens("one", "two", "three") as made:
        connections = [connect(token) for token in made]
        sides = [DomainMember(connection=c, name=t.label) for c, t in zip(connections, made, strict=True)]
        try:
            keys = generate_domain(sides[:2], sealed=True, timeout=T)
            challenge(sides[0], keys[0], sides[1], keys[1], timeout=T)
            officer = connect(made[0], officer=True, isolation="process")
            with pytest.raises(DomainMismatch, match=r"sealed.*shares"):
                join_domain(sides[0], keys[0], officer, sides[2], timeout=T)
            officer.close()
            assert connections[2].find([], timeout=T) == []
            secrets, ids = (os.urandom(32), os.urandom(32)), (os.urandom(16), os.urandom(16))
            imported = [import_domain(side, *secrets, ids, sealed=True, timeout=T) for side in sides]
            challenge(sides[0], imported[0], sides[2], imported[2], timeout=T)
            # Once more: the same keys again, not twice.
            import_domain(sides[2], *secrets, ids, sealed=True, timeout=T)
            find_domain(connections[2], *ids, timeout=T)
        finally:
            for connection in connections:
                connection.close()


# -- proving -----------------------------------------------------------------------------------------------------------


def test_a_stranger_is_refused_by_name(both: list[Member], stranger: Member) -> None:
    with pytest.raises(DomainMismatch, match=r'"stranger".*partition'):
        challenge(both[0].side, both[0].keys, stranger.side, stranger.keys, timeout=T)


def test_one_differing_secret_is_named() -> None:
    """T 3.4.12: the domain key differs. T 3.4.13: the domain key is shared, the partition's own secret is not."""
    domain, partition, ids = os.urandom(32), os.urandom(32), (os.urandom(16), os.urandom(16))
    with tokens("one", "two", "three") as made:
        connections = [connect(token) for token in made]
        sides = [DomainMember(connection=c, name=t.label) for c, t in zip(connections, made, strict=True)]
        try:
            good = import_domain(sides[0], domain, partition, ids, sealed=True, timeout=T)
            no_domain = import_domain(sides[1], os.urandom(32), partition, ids, sealed=True, timeout=T)
            no_partition = import_domain(sides[2], domain, os.urandom(32), ids, sealed=True, timeout=T)
            with pytest.raises(DomainMismatch, match=r'"two".*domain key'):
                challenge(sides[0], good, sides[1], no_domain, timeout=T)
            with pytest.raises(DomainMismatch, match=r'"three".*partition secret'):
                challenge(sides[0], good, sides[2], no_partition, timeout=T)
            reference = reference_envelope(connections[0], good, timeout=T)
            open_reference(connections[0], good, reference, timeout=T)
            with pytest.raises(DomainMismatch, match="domain key"):
                open_reference(connections[1], no_domain, reference, timeout=T)
            with pytest.raises(DomainMismatch, match="partition secret"):
                open_reference(connections[2], no_partition, reference, timeout=T)
            assert [len(c.find([], timeout=T)) for c in connections] == [2, 2, 2]
        finally:
            for connection in connections:
                connection.close()


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "digest"])
def test_a_reference_tells_when_another_key_comes_out(both: list[Member], sealed: bool) -> None:
    """As from a module whose mechanism for RFC 5649 is another one. The digest: by an earlier hagroup, still opened."""
    connection, keys, salt = both[0].connection, both[0].keys, os.urandom(16)

    def made(sid: int, right: bool) -> bytes:
        put_in = throw_away_key(connection, sid=sid, timeout=T)
        told_of = put_in if right else throw_away_key(connection, sid=sid, timeout=T)
        if sealed:
            check = b"".join(encrypt(connection, told_of, salt, b"", sid=sid, timeout=T))
        else:
            check = connection.digest((int(CKM.SHA256), None), [salt, told_of], sid=sid, timeout=T)
        attributes = {int(CKA.LABEL): salt, int(CKA.CHECK_VALUE): check}
        envelope = seal(
            connection, keys, sid, put_in, uid=b"hagroup trial".ljust(16, b"\0"), revision=0,
            object_class=CKO.SECRET_KEY, key_type=CKK.AES, attributes=attributes, timeout=T,
        )  # fmt: skip
        return msgspec.msgpack.encode([salt, check, envelope, True] if sealed else [salt, check, envelope])

    with scratch_session(connection, timeout=T) as sid:
        open_reference(connection, keys, made(sid, right=True), timeout=T)
        with pytest.raises(DomainMismatch, match="domain key"):
            open_reference(connection, keys, made(sid, right=False), timeout=T)


def test_a_damaged_reference_is_an_alarm(both: list[Member]) -> None:
    with pytest.raises(IntegrityAlarm):
        open_reference(both[0].connection, both[0].keys, b"nonsense", timeout=T)


# -- sealing -----------------------------------------------------------------------------------------------------------


def test_an_envelope_opens_on_the_other_member(both: list[Member]) -> None:
    envelope, salt, digest = sealed_key(both[0])
    assert opened(both[1], record(envelope), salt) == digest


def test_every_change_of_an_envelope_or_its_record_is_an_alarm(both: list[Member]) -> None:
    envelope, salt, _ = sealed_key(both[0])
    for position in range(0, len(envelope), 7):
        damaged = bytearray(envelope)
        damaged[position] ^= 0x10
        with pytest.raises((IntegrityAlarm, DomainMismatch)):
            opened(both[1], record(bytes(damaged)), salt)
    for change in (
        {"uid": b"v" * 16},
        {"revision": 2},
        {"key_type": int(CKK.GENERIC_SECRET)},
        {"key_type": None},
        {"object_class": int(CKO.PRIVATE_KEY)},
        {"attributes": {**ATTRIBUTES, int(CKA.LABEL): b"another"}},
        {"attributes": {**ATTRIBUTES, int(CKA.ID): b""}},
    ):
        with pytest.raises(IntegrityAlarm):
            opened(both[1], record(envelope, **change), salt)


def test_resealing_keeps_the_key_and_ends_the_old_revision(both: list[Member]) -> None:
    envelope, salt, digest = sealed_key(both[0])
    attributes = {**ATTRIBUTES, int(CKA.LABEL): b"new"}
    again = reseal(
        both[1].connection,
        both[1].keys,
        envelope,
        old=record(envelope),
        uid=b"u" * 16,
        revision=2,
        attributes=attributes,
        timeout=T,
    )
    assert opened(both[0], record(again, revision=2, attributes=attributes), salt) == digest
    with pytest.raises(IntegrityAlarm):
        opened(both[0], record(again), salt)


def test_a_member_in_trouble_is_not_called_a_stranger(both: list[Member]) -> None:
    """GENERAL_ERROR is what SoftHSM says to an envelope that does not open; and what a sick device says to anything."""

    class Sick:
        def __init__(self, connection: Connection) -> None:
            self._connection = connection

        def __getattr__(self, name: str) -> object:
            return getattr(self._connection, name)

        def decrypt(self, *_: object, **__: object) -> bytes:
            raise Ckr(CKR.GENERAL_ERROR, "C_Decrypt")

    envelope, salt, _ = sealed_key(both[0])
    sick = Member(both[1].token, Sick(both[1].connection), both[1].keys)  # type: ignore[arg-type]
    with pytest.raises(Ckr):
        opened(sick, record(envelope), salt)


@pytest.mark.parametrize("size", [0, 1, 1000, 1 << 20])
def test_data_is_sealed_for_one_purpose(both: list[Member], size: int) -> None:
    data = os.urandom(size)
    sealed = seal_data(both[0].connection, both[0].keys, b"manifest", data, timeout=T)
    assert open_data(both[1].connection, both[1].keys, b"manifest", sealed, timeout=T) == data
    if size > 8:
        assert data not in sealed
    with pytest.raises(IntegrityAlarm):
        open_data(both[1].connection, both[1].keys, b"object", sealed, timeout=T)
    with pytest.raises(IntegrityAlarm):
        open_data(both[1].connection, both[1].keys, b"manifest", sealed[:-1], timeout=T)
    flipped = sealed[:-1] + bytes([sealed[-1] ^ 1])
    with pytest.raises(IntegrityAlarm):
        open_data(both[1].connection, both[1].keys, b"manifest", flipped, timeout=T)


def test_a_manifest_costs_the_same_whatever_else_is_on_the_token(
    both: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each connection reads it and each change writes it: reading the records of all objects there made both linear."""
    connection, keys = both[0].connection, both[0].keys
    calls: list[str] = []
    call = connection._call  # type: ignore[attr-defined]
    monkeypatch.setattr(connection, "_call", lambda name, *others: calls.append(name) or call(name, *others))

    def write_and_read(high: int) -> int:
        calls.clear()
        shown = Manifest(group="1", label="g", epoch="e", members={}, low=0, high=high)
        manifest.write(connection, keys, shown, timeout=T)
        assert manifest.read(connection, keys, timeout=T) == shown
        return len(calls)

    write_and_read(1)
    alone = write_and_read(2)
    for number in range(20):
        one = ObjectRecord(
            uid=bytes([number]) * 16,
            object_class=CKO.DATA,
            key_type=None,
            state=ObjectState.LIVE,
            revision=0,
            attributes={},
            envelope=None,
        )
        store_record(connection, keys, one, timeout=T)
    assert write_and_read(3) == alone


def test_chunks_of_sealed_data_cannot_be_exchanged_or_left_out(both: list[Member]) -> None:
    connection, keys = both[0].connection, both[0].keys
    sealed = seal_data(connection, keys, b"p", os.urandom(600_000), timeout=T)
    key_id, chunks = msgspec.msgpack.decode(sealed)
    assert len(chunks) == 3
    for order in ([chunks[1], chunks[0], chunks[2]], chunks[:2], []):
        with pytest.raises(IntegrityAlarm):
            open_data(connection, keys, b"p", msgspec.msgpack.encode([key_id, order]), timeout=T)


def test_large_data_through_a_worker_process(both: list[Member]) -> None:
    worker = connect(both[0].token, isolation="process")
    try:
        keys = find_domain(worker, both[0].keys.domain_key_id, both[0].keys.partition_key_id, timeout=T)
        data = os.urandom(3 << 20)
        sealed = seal_data(worker, keys, b"p", data, timeout=T)
        assert open_data(both[1].connection, both[1].keys, b"p", sealed, timeout=T) == data
    finally:
        worker.close()


def test_the_value_of_a_private_data_object(both: list[Member]) -> None:
    attributes = {int(CKA.CLASS): pack_ulong(CKO.DATA)}
    with scratch_session(both[0].connection, timeout=T) as sid:
        envelope = seal_private_data(
            both[0].connection,
            both[0].keys,
            sid,
            b"a secret text",
            uid=b"u" * 16,
            revision=1,
            attributes=attributes,
            timeout=T,
        )
    assert b"secret" not in envelope
    what = record(envelope, object_class=int(CKO.DATA), key_type=None, attributes=attributes)
    assert open_private_data(both[1].connection, both[1].keys, what, timeout=T) == b"a secret text"
    with pytest.raises(IntegrityAlarm):
        open_private_data(both[1].connection, both[1].keys, msgspec.structs.replace(what, revision=2), timeout=T)
