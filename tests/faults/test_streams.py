"""A multi-part operation whose member fails in the middle is replayed on another one, and gives the right result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hagroup import Attribute, KeyType, Mechanism
from hagroup.errors import StreamTooLong
from tests.support.faulty import CALL, PROBE, FaultGroup

# By turns long ones, which a worker process sees in shared memory, and which its module gets in pieces; and short ones.
CHUNKS = [bytes([number]) * (1000 if number % 2 else 100_000) for number in range(8)]
DATA = b"".join(CHUNKS)
IV = b"0123456789abcdef"
Fail = Callable[[FaultGroup, Any, str], None]


def killed(faulty: FaultGroup, session: Any, member: str) -> None:
    faulty.kill(session, member)


def device_error(faulty: FaultGroup, session: Any, member: str) -> None:
    faulty.controls[member].add("crypto", "error", rv="CKR_DEVICE_ERROR", times=1)


def hangs(faulty: FaultGroup, session: Any, member: str) -> None:
    faulty.controls[member].add("crypto", "hang", times=1)


def crashes_after(faulty: FaultGroup, session: Any, member: str) -> None:
    """Executed; the reply never came."""
    faulty.controls[member].add("crypto", "crash-after", times=1)


def in_a_part(faulty: FaultGroup, session: Any, member: str) -> None:
    """After the module took a piece of the part, and gave its output."""
    faulty.controls[member].add("C_*Update", "error", rv="CKR_DEVICE_ERROR", skip=1, times=1)


def last(faulty: FaultGroup, session: Any, member: str) -> None:
    """Only the final call fails."""
    faulty.controls[member].add("C_*Final", "error", rv="CKR_DEVICE_ERROR", times=1)


FAILURES = [killed, device_error, hangs, crashes_after, in_a_part, last]


@pytest.fixture(scope="module")
def keys(faulty: FaultGroup, client: Any) -> Iterator[dict[str, Any]]:
    public, private = client.generate_keypair(KeyType.RSA, 2048, store=True, label="stream")
    secret = client.generate_key(KeyType.AES, 256, store=True, label="stream")
    faulty.heal(client)
    yield {"public": public, "private": private, "secret": secret}
    for item in list(client.get_objects({Attribute.TOKEN: True})):
        item.destroy()


def failing(faulty: FaultGroup, session: Any, fail: Fail, chunks: list[bytes]) -> Iterator[bytes]:
    """The chunks; half-way the member that the operation is on fails."""
    for number, chunk in enumerate(chunks):
        if number == len(chunks) // 2:
            fail(faulty, session, faulty.in_use(session))
        yield chunk


@pytest.mark.parametrize("fail", FAILURES)
def test_encrypt_and_decrypt(faulty: FaultGroup, session: Any, keys: dict[str, Any], fail: Fail) -> None:
    secret = keys["secret"]
    expected = secret.encrypt(DATA, mechanism_param=IV)
    out = list(secret.encrypt(failing(faulty, session, fail, CHUNKS), mechanism_param=IV))
    assert b"".join(out) == expected
    assert len(out) > len(CHUNKS) // 2, "output is given out as it comes"
    faulty.heal(session)
    pieces = [expected[start : start + 80_000] for start in range(0, len(expected), 80_000)]
    assert b"".join(secret.decrypt(failing(faulty, session, fail, pieces), mechanism_param=IV)) == DATA


@pytest.mark.parametrize("fail", FAILURES)
def test_sign_verify_and_digest(faulty: FaultGroup, session: Any, keys: dict[str, Any], fail: Fail) -> None:
    public, private = keys["public"], keys["private"]
    expected = private.sign(DATA, mechanism=Mechanism.SHA256_RSA_PKCS)
    signed = private.sign(failing(faulty, session, fail, CHUNKS), mechanism=Mechanism.SHA256_RSA_PKCS)
    assert signed == expected
    faulty.heal(session)
    assert public.verify(failing(faulty, session, fail, CHUNKS), expected, mechanism=Mechanism.SHA256_RSA_PKCS)
    faulty.heal(session)
    digest = session.digest(DATA, mechanism=Mechanism.SHA256)
    assert session.digest(failing(faulty, session, fail, CHUNKS), mechanism=Mechanism.SHA256) == digest


def test_a_key_that_its_member_does_not_have_yet(faulty: FaultGroup, session: Any) -> None:
    """Digested in the middle of a stream: it goes on with a member that has the key."""
    control = faulty.controls["hsm2"]
    faulty.prefer(session, "hsm1")
    held = control.add("C_UnwrapKey", "late", times=1)
    template = {Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}
    key = session.generate_key(KeyType.AES, 128, store=True, label="digested", template=template)
    control.wait_held(held)
    expected = hashlib.sha256(b"before" + key[Attribute.VALUE] + b"after").digest()
    faulty.prefer(session, "hsm2")
    assert session.digest((b"before", key, b"after"), mechanism=Mechanism.SHA256) == expected
    control.clear()
    key.destroy()


def test_a_second_member_fails_in_the_replay(faulty: FaultGroup, session: Any, keys: dict[str, Any]) -> None:
    expected = keys["private"].sign(DATA, mechanism=Mechanism.SHA256_RSA_PKCS)

    def chunks() -> Iterator[bytes]:
        for number, chunk in enumerate(CHUNKS):
            if number in (2, 5):
                faulty.kill(session, faulty.in_use(session))
            yield chunk

    assert keys["private"].sign(chunks(), mechanism=Mechanism.SHA256_RSA_PKCS) == expected


def test_a_stream_longer_than_is_kept(faulty: FaultGroup, keys: dict[str, Any]) -> None:
    """Past the limit it cannot be replayed: a clear error, at once; what goes well is not limited."""
    chunks = [chunk[:1000] for chunk in CHUNKS]
    data = b"".join(chunks)
    with faulty.client(toml=faulty.variant("short", 'replay_limit  = "16MiB"', 'replay_limit  = "4KiB"')) as session:
        secret = session.get_key(key_type=KeyType.AES, label="stream")
        expected = secret.encrypt(data, mechanism_param=IV)
        assert b"".join(secret.encrypt(iter(chunks), mechanism_param=IV)) == expected
        with pytest.raises(StreamTooLong, match="replay_limit"):
            list(secret.encrypt(failing(faulty, session, killed, chunks * 2), mechanism_param=IV))
        early = failing(faulty, session, killed, chunks[:4])
        assert b"".join(secret.encrypt(early, mechanism_param=IV)) == secret.encrypt(
            b"".join(chunks[:4]), mechanism_param=IV
        )
        faulty.heal(session)
    assert CALL > PROBE
