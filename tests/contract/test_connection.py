"""One contract for both kinds of connection, on a real SoftHSM token; then what only a worker process promises."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from hagroup.core.calls import Ckr, DeadlinePassed, Handle, MemberGone, StaleGeneration, WorkerFault
from hagroup.core.ckr import CKR
from hagroup.members.open import (
    ConnectionSettings,
    InlineConnection,
    ModuleProblem,
    ProcessConnection,
    open_connection,
)
from hagroup.members.window import Window
from tests.support.softhsm import TokenFixture, make_token, token_folder

Connection = ProcessConnection | InlineConnection

T = 20.0
TRUE, FALSE = b"\x01", b"\x00"
CKA_CLASS, CKA_TOKEN, CKA_PRIVATE, CKA_LABEL, CKA_APPLICATION, CKA_VALUE = 0, 1, 2, 3, 0x10, 0x11
CKA_KEY_TYPE, CKA_ID, CKA_SENSITIVE, CKA_ENCRYPT, CKA_DECRYPT = 0x100, 0x102, 0x103, 0x104, 0x105
CKA_WRAP, CKA_UNWRAP, CKA_SIGN, CKA_VERIFY, CKA_DERIVE = 0x106, 0x107, 0x108, 0x10A, 0x10C
CKA_MODULUS, CKA_MODULUS_BITS, CKA_PUBLIC_EXPONENT, CKA_VALUE_LEN = 0x120, 0x121, 0x122, 0x161
CKA_EXTRACTABLE, CKA_ALWAYS_AUTHENTICATE, CKA_EC_PARAMS, CKA_EC_POINT = 0x162, 0x202, 0x180, 0x181
CKA_UNWRAP_TEMPLATE = 0x40000212
SHA256_RSA_PKCS, RSA_PKCS, RSA_PKCS_PSS, RSA_PKCS_OAEP = 0x40, 0x1, 0xD, 0x9
SHA_1, SHA256, AES_CBC_PAD, AES_GCM, AES_CTR, AES_ECB, AES_KEY_WRAP_PAD = (
    0x220,
    0x250,
    0x1085,
    0x1087,
    0x1086,
    0x1081,
    0x210A,
)
ECDSA, ECDH1_DERIVE, SHA256_HMAC = 0x1041, 0x1050, 0x251
P256 = bytes.fromhex("06082a8648ce3d030107")


def ulong(number: int) -> bytes:
    return number.to_bytes(ctypes.sizeof(ctypes.c_ulong), sys.byteorder)


def freeze(pid: int) -> None:
    """SIGSTOP; returns when every thread has stopped: until then the worker may still answer."""
    os.kill(pid, signal.SIGSTOP)

    def runs(task: Path) -> bool:
        try:
            return (task / "stat").read_text().rpartition(")")[2].split()[0] != "T"
        except FileNotFoundError:
            return False  # it has ended

    until(lambda: not any(runs(task) for task in Path(f"/proc/{pid}/task").iterdir()))


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits for a condition; a test that needs a fixed time is a test that fails on a slow day."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with token_folder() as path:
        yield path


@pytest.fixture(scope="module")
def token(folder: Path) -> TokenFixture:
    return make_token(folder / "one", "contract")


@pytest.fixture(scope="module")
def other_token(folder: Path) -> TokenFixture:
    return make_token(folder / "two", "contract", user_pin="4321")


def settings(token: TokenFixture, **changes: object) -> ConnectionSettings:
    plain = ConnectionSettings(name="hsm1", module=token.module, env=token.env, token_serial=token.serial)
    return msgspec.structs.replace(plain, **changes)


_generations = iter(range(1, 100_000, 100))


@contextlib.contextmanager
def connected(token: TokenFixture, isolation: str, pin: bytes | None = b"1234") -> Iterator[Connection]:
    connection = open_connection(settings(token), generation=next(_generations), isolation=isolation, timeout=T)
    try:
        if pin is not None:
            connection.login(1, pin, timeout=T)
        yield connection
    finally:
        connection.close()


@pytest.fixture(params=["process", "none"], scope="module")
def isolation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def c(token: TokenFixture, isolation: str) -> Iterator[Connection]:
    """One connection for all tests that leave it as they found it."""
    with connected(token, isolation) as connection:
        yield connection


@pytest.fixture
def worker(token: TokenFixture) -> Iterator[ProcessConnection]:
    with connected(token, "process") as connection:
        assert isinstance(connection, ProcessConnection)
        yield connection


def aes(c: Connection, sid: int = 0, **more: bytes) -> Handle:
    template: list[tuple[int, bytes | list[object]]] = [
        (CKA_VALUE_LEN, ulong(32)),
        *[(k, TRUE) for k in (CKA_ENCRYPT, CKA_DECRYPT, CKA_WRAP, CKA_UNWRAP, CKA_EXTRACTABLE)],
        *[(globals()[name], value) for name, value in more.items()],
    ]
    return c.generate((0x1080, None), template, sid=sid, timeout=T)


def rsa_pair(c: Connection, **more: bytes) -> tuple[Handle, Handle]:
    public = [
        (CKA_MODULUS_BITS, ulong(1024)), (CKA_PUBLIC_EXPONENT, b"\x01\x00\x01"),
        (CKA_VERIFY, TRUE), (CKA_ENCRYPT, TRUE),
    ]  # fmt: skip
    private = [
        (CKA_SIGN, TRUE), (CKA_DECRYPT, TRUE), (CKA_EXTRACTABLE, TRUE),
        *[(globals()[name], value) for name, value in more.items()],
    ]  # fmt: skip
    return c.generate_pair((0, None), public, private, timeout=60)


def ec_pair(c: Connection) -> tuple[Handle, Handle]:
    public = [(CKA_EC_PARAMS, P256), (CKA_VERIFY, TRUE)]
    private = [(CKA_SIGN, TRUE), (CKA_DERIVE, TRUE)]
    return c.generate_pair((0x1040, None), public, private, timeout=T)


def rv_of(call: Callable[[], object]) -> int:
    with pytest.raises(Ckr) as caught:
        call()
    return caught.value.rv


# -- information


def test_information(c: Connection, token: TokenFixture) -> None:
    assert c.alive
    info = c.token_info(timeout=T)
    assert (info.label, info.serial) == ("contract", token.serial)
    assert c.module_info.manufacturer == "SoftHSM"
    assert c.module_info.cryptoki_version == (2, 40)
    assert not c.module_info.has_v30
    assert c.mechanisms(timeout=T)[SHA256_RSA_PKCS].max_key >= 4096
    assert c.probe(timeout=T).serial == token.serial
    assert len(c.random(16, timeout=T)) == 16
    assert len(c.random(100_000, timeout=T)) == 100_000


# -- objects


def test_create_find_get_set_copy_destroy(c: Connection) -> None:
    template = [(CKA_CLASS, ulong(0)), (CKA_TOKEN, TRUE), (CKA_LABEL, b"note"), (CKA_VALUE, b"\x00x")]
    note = c.create(template, timeout=T)
    assert c.find([(CKA_LABEL, b"note")], timeout=T) == [note]
    values, failures = c.get(note, [CKA_LABEL, CKA_VALUE, CKA_APPLICATION, CKA_MODULUS], timeout=T)
    assert values == {CKA_LABEL: b"note", CKA_VALUE: b"\x00x", CKA_APPLICATION: b""}
    assert failures == {CKA_MODULUS: CKR.ATTRIBUTE_TYPE_INVALID}
    c.set(note, [(CKA_LABEL, b"changed")], timeout=T)
    copy = c.copy(note, [(CKA_LABEL, b"second")], timeout=T)
    assert c.get(copy, [CKA_LABEL], timeout=T)[0] == {CKA_LABEL: b"second"}
    assert c.get(note, [CKA_LABEL], timeout=T)[0] == {CKA_LABEL: b"changed"}
    c.destroy(note, timeout=T)
    c.destroy(copy, timeout=T)
    assert rv_of(lambda: c.get(note, [CKA_LABEL], timeout=T)) == CKR.OBJECT_HANDLE_INVALID
    assert c.find([(CKA_LABEL, b"changed")], timeout=T) == []


def test_find_with_limit_and_more_than_one_batch(c: Connection) -> None:
    sid = c.open_session(timeout=T)
    template = [(CKA_CLASS, ulong(0)), (CKA_LABEL, b"many"), (CKA_VALUE, b"")]
    made = {c.create(template, sid=sid, timeout=T) for _ in range(600)}
    assert set(c.find([(CKA_LABEL, b"many")], timeout=T)) == made
    assert len(c.find([(CKA_LABEL, b"many")], limit=520, timeout=T)) == 520
    assert len(c.find([(CKA_LABEL, b"many")], limit=1, timeout=T)) == 1
    c.close_session(sid, timeout=T)
    assert c.find([(CKA_LABEL, b"many")], timeout=T) == []


def test_sensitive_value_does_not_hide_the_others(c: Connection) -> None:
    key = aes(c, CKA_SENSITIVE=TRUE)
    values, failures = c.get(key, [CKA_VALUE, CKA_KEY_TYPE, CKA_VALUE_LEN, CKA_MODULUS], timeout=T)
    assert values == {CKA_KEY_TYPE: ulong(0x1F), CKA_VALUE_LEN: ulong(32)}
    assert failures == {CKA_VALUE: CKR.ATTRIBUTE_SENSITIVE, CKA_MODULUS: CKR.ATTRIBUTE_TYPE_INVALID}


def test_session_objects_outlive_pooled_sessions(c: Connection) -> None:
    key = aes(c, CKA_LABEL=b"lasting")
    # An operation that is given up in the middle closes its pooled session.
    public, private = rsa_pair(c, CKA_ALWAYS_AUTHENTICATE=TRUE)
    for _ in range(3):
        assert rv_of(lambda: c.sign((RSA_PKCS, None), private, b"x", pin=b"wrong", timeout=T)) == CKR.PIN_INCORRECT
        assert rv_of(lambda: aes(c, CKA_VALUE_LEN=ulong(5))) != CKR.OK
    assert c.find([(CKA_LABEL, b"lasting")], timeout=T) == [key]
    assert c.encrypt((AES_ECB, None), key, bytes(16), timeout=T)
    c.destroy(key, timeout=T)
    signature = c.sign((RSA_PKCS, None), private, b"x", pin=b"1234", timeout=T)
    c.verify((RSA_PKCS, None), public, b"x", signature, timeout=T)


def test_session_objects_of_a_named_session_end_with_it(c: Connection) -> None:
    sid = c.open_session(timeout=T)
    key = aes(c, sid=sid, CKA_LABEL=b"scratch")
    assert c.find([(CKA_LABEL, b"scratch")], timeout=T) == [key]
    c.close_session(sid, timeout=T)
    c.close_session(sid, timeout=T)
    assert c.find([(CKA_LABEL, b"scratch")], timeout=T) == []
    assert rv_of(lambda: c.find([], sid=sid, timeout=T)) == CKR.SESSION_HANDLE_INVALID


def test_read_only_session(c: Connection) -> None:
    sid = c.open_session(rw=False, timeout=T)
    template = [(CKA_CLASS, ulong(0)), (CKA_TOKEN, TRUE), (CKA_VALUE, b"x")]
    assert rv_of(lambda: c.create(template, sid=sid, timeout=T)) == CKR.SESSION_READ_ONLY
    c.close_session(sid, timeout=T)


def test_a_template_that_cannot_be_laid_out_is_refused(c: Connection) -> None:
    assert rv_of(lambda: c.create([(CKA_CLASS, 5)], timeout=T)) == CKR.ARGUMENTS_BAD  # type: ignore[list-item]
    key = aes(c)
    assert rv_of(lambda: c.encrypt((AES_CTR, ["ctr", 32, b"short"]), key, b"x", timeout=T)) == CKR.ARGUMENTS_BAD
    assert rv_of(lambda: c.encrypt((AES_CTR, ["unknown"]), key, b"x", timeout=T)) == CKR.ARGUMENTS_BAD


# -- keys


def test_rsa_sign_verify_and_parameters(c: Connection) -> None:
    public, private = rsa_pair(c)
    signature = c.sign((SHA256_RSA_PKCS, None), private, b"data", timeout=T)
    c.verify((SHA256_RSA_PKCS, None), public, b"data", signature, timeout=T)
    bad = lambda: c.verify((SHA256_RSA_PKCS, None), public, b"other", signature, timeout=T)  # noqa: E731
    assert rv_of(bad) == CKR.SIGNATURE_INVALID
    modulus = c.get(public, [CKA_MODULUS], timeout=T)[0][CKA_MODULUS]
    key = rsa.RSAPublicNumbers(65537, int.from_bytes(modulus)).public_key()
    key.verify(signature, b"data", padding.PKCS1v15(), hashes.SHA256())

    pss = (RSA_PKCS_PSS, ["pss", SHA256, 2, 32])
    signature = c.sign(pss, private, _sha256(b"data"), timeout=T)
    key.verify(signature, b"data", padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())
    oaep = (RSA_PKCS_OAEP, ["oaep", SHA_1, 1, None])
    assert c.decrypt(oaep, private, c.encrypt(oaep, public, b"secret", timeout=T), timeout=T) == b"secret"


def _sha256(data: bytes) -> bytes:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(data)
    return digest.finalize()


def test_ecdsa_and_ecdh(c: Connection) -> None:
    (public_a, private_a), (public_b, private_b) = ec_pair(c), ec_pair(c)
    signature = c.sign((ECDSA, None), private_a, bytes(32), timeout=T)
    c.verify((ECDSA, None), public_a, bytes(32), signature, timeout=T)
    points = [c.get(p, [CKA_EC_POINT], timeout=T)[0][CKA_EC_POINT] for p in (public_a, public_b)]
    template = [
        (CKA_CLASS, ulong(4)), (CKA_KEY_TYPE, ulong(0x10)), (CKA_VALUE_LEN, ulong(32)),
        (CKA_SENSITIVE, FALSE), (CKA_EXTRACTABLE, TRUE),
    ]  # fmt: skip
    shared = [
        c.get(c.derive((ECDH1_DERIVE, ["ecdh", 1, None, point]), key, template, timeout=T), [CKA_VALUE], timeout=T)[0]
        for key, point in ((private_a, points[1]), (private_b, points[0]))
    ]
    assert shared[0] == shared[1]
    assert len(shared[0][CKA_VALUE]) == 32


def test_aes_mechanisms(c: Connection) -> None:
    key = aes(c)
    gcm = (AES_GCM, ["gcm", b"n" * 12, b"attributes", 128])
    sealed = c.encrypt(gcm, key, b"data", timeout=T)
    assert c.decrypt(gcm, key, sealed, timeout=T) == b"data"
    other = (AES_GCM, ["gcm", b"n" * 12, b"others", 128])
    assert rv_of(lambda: c.decrypt(other, key, sealed, timeout=T)) in (CKR.GENERAL_ERROR, CKR.ENCRYPTED_DATA_INVALID)
    without = (AES_GCM, ["gcm", b"n" * 12, None, 128])
    assert c.decrypt(without, key, c.encrypt(without, key, b"", timeout=T), timeout=T) == b""
    counter = (AES_CTR, ["ctr", 32, b"n" * 12 + b"\0\0\0\1"])
    assert c.decrypt(counter, key, c.encrypt(counter, key, b"data", timeout=T), timeout=T) == b"data"
    cbc = (AES_CBC_PAD, bytes(16))
    assert c.decrypt(cbc, key, c.encrypt(cbc, key, b"data", timeout=T), timeout=T) == b"data"


def test_wrap_and_unwrap(c: Connection) -> None:
    wrapping, secret = aes(c), aes(c, CKA_SENSITIVE=FALSE)
    _, private = rsa_pair(c)
    kwp = (AES_KEY_WRAP_PAD, None)
    wrapped = c.wrap(kwp, wrapping, secret, timeout=T)
    assert len(wrapped) == 40
    template = [(CKA_CLASS, ulong(4)), (CKA_KEY_TYPE, ulong(0x1F)), (CKA_SENSITIVE, FALSE), (CKA_EXTRACTABLE, TRUE)]
    copy = c.unwrap(kwp, wrapping, wrapped, template, timeout=T)
    assert c.get(copy, [CKA_VALUE], timeout=T) == c.get(secret, [CKA_VALUE], timeout=T)
    wrapped = c.wrap(kwp, wrapping, private, timeout=T)
    template = [(CKA_CLASS, ulong(3)), (CKA_KEY_TYPE, ulong(0)), (CKA_SIGN, TRUE)]
    again = c.unwrap(kwp, wrapping, wrapped, template, timeout=T)
    assert c.sign((SHA256_RSA_PKCS, None), again, b"d", timeout=T) == c.sign(
        (SHA256_RSA_PKCS, None), private, b"d", timeout=T
    )
    damaged = bytes([wrapped[0] ^ 1]) + wrapped[1:]
    assert rv_of(lambda: c.unwrap(kwp, wrapping, damaged, template, timeout=T)) != CKR.OK
    assert all(not c.get(h, [CKA_CLASS], timeout=T)[1] for h in c.find([], timeout=T)), "a ghost stayed"


def test_nested_unwrap_template(c: Connection) -> None:
    required = [(CKA_SENSITIVE, TRUE), (CKA_LABEL, b"forced")]
    template = [(CKA_VALUE_LEN, ulong(32)), (CKA_WRAP, TRUE), (CKA_UNWRAP, TRUE), (CKA_UNWRAP_TEMPLATE, required)]
    wrapping = c.generate((0x1080, None), template, timeout=T)
    wrapped = c.wrap((AES_KEY_WRAP_PAD, None), wrapping, aes(c), timeout=T)
    fits = [(CKA_CLASS, ulong(4)), (CKA_KEY_TYPE, ulong(0x1F)), (CKA_LABEL, b"forced")]
    key = c.unwrap((AES_KEY_WRAP_PAD, None), wrapping, wrapped, [*fits, (CKA_SENSITIVE, TRUE)], timeout=T)
    assert c.get(key, [CKA_VALUE], timeout=T) == ({}, {CKA_VALUE: CKR.ATTRIBUTE_SENSITIVE})
    refused = lambda: c.unwrap((AES_KEY_WRAP_PAD, None), wrapping, wrapped, [*fits, (CKA_SENSITIVE, FALSE)], timeout=T)  # noqa: E731
    assert rv_of(refused) != CKR.OK
    value = c.get(wrapping, [CKA_LABEL, CKA_UNWRAP_TEMPLATE], timeout=T)[0][CKA_UNWRAP_TEMPLATE]
    assert sorted(msgspec.msgpack.decode(value)) == [[CKA_LABEL, b"forced"], [CKA_SENSITIVE, TRUE]]


def test_digests(c: Connection) -> None:
    assert c.digest((SHA256, None), [b"abc"], timeout=T) == _sha256(b"abc")
    assert c.digest((SHA256, None), [], timeout=T) == _sha256(b"")
    assert c.digest((SHA256, None), [b"a", b"bc"], timeout=T) == _sha256(b"abc")
    key = aes(c, CKA_SENSITIVE=FALSE)
    value = c.get(key, [CKA_VALUE], timeout=T)[0][CKA_VALUE]
    assert c.digest((SHA256, None), [b"salt", key], timeout=T) == _sha256(b"salt" + value)
    # A key that cannot be digested leaves a half-done operation behind: nobody may inherit it.
    _, private = rsa_pair(c)
    assert rv_of(lambda: c.digest((SHA256, None), [b"salt", private], timeout=T)) == CKR.KEY_INDIGESTIBLE
    assert c.digest((SHA256, None), [b"abc"], timeout=T) == _sha256(b"abc")


def test_return_values_are_the_modules_own(c: Connection) -> None:
    key = c.generate((0x1080, None), [(CKA_VALUE_LEN, ulong(16)), (CKA_ENCRYPT, FALSE)], timeout=T)
    assert rv_of(lambda: c.encrypt((AES_ECB, None), key, bytes(16), timeout=T)) == CKR.KEY_FUNCTION_NOT_PERMITTED
    assert rv_of(lambda: c.sign((0x7FFFFFFF, None), key, b"", timeout=T)) == CKR.MECHANISM_INVALID
    assert rv_of(lambda: c.encapsulate((0x17, None), key, [], timeout=T)) == CKR.FUNCTION_NOT_SUPPORTED
    assert rv_of(lambda: c.login(1, b"1234", timeout=T)) == CKR.USER_ALREADY_LOGGED_IN


def test_an_error_inside_an_operation_on_a_named_session_leaves_it_usable(c: Connection) -> None:
    public, private = rsa_pair(c, CKA_ALWAYS_AUTHENTICATE=TRUE)
    sid = c.open_session(timeout=T)
    for _ in range(2):
        wrong = lambda: c.sign((RSA_PKCS, None), private, b"x", pin=b"bad!", sid=sid, timeout=T)  # noqa: E731
        assert rv_of(wrong) == CKR.PIN_INCORRECT
    signature = c.sign((RSA_PKCS, None), private, b"x", pin=b"1234", sid=sid, timeout=T)
    c.verify((RSA_PKCS, None), public, b"x", signature, sid=sid, timeout=T)
    c.close_session(sid, timeout=T)


def test_large_payloads(c: Connection) -> None:
    key = aes(c)
    data = os.urandom(1 << 20) * 64
    counter = (AES_CTR, ["ctr", 32, bytes(16)])
    sealed = c.encrypt(counter, key, data, timeout=60)
    assert len(sealed) == len(data)
    assert sealed != data
    assert c.decrypt(counter, key, sealed, timeout=60) == data
    assert c.digest((SHA256, None), [data], timeout=60) == _sha256(data)


def test_an_error_about_a_large_payload(c: Connection) -> None:
    key = aes(c)
    data = os.urandom(100_000)
    counter = (AES_CTR, ["ctr", 32, bytes(16)])
    sealed = c.encrypt(counter, key, data, timeout=T)
    assert rv_of(lambda: c.decrypt((AES_CBC_PAD, bytes(16)), key, sealed + b"odd", timeout=T)) != CKR.OK
    assert c.decrypt(counter, key, sealed, timeout=T) == data
    assert len(c.random(100_000, timeout=T)) == 100_000


# -- streams


def test_streams(c: Connection) -> None:
    public, private = rsa_pair(c)
    stream = c.stream_open("sign", (SHA256_RSA_PKCS, None), private, timeout=T)
    for part in (b"da", b"", b"ta"):
        assert c.stream_update(stream, part, timeout=T) == b""
    signature = c.stream_final(stream, timeout=T)
    assert signature == c.sign((SHA256_RSA_PKCS, None), private, b"data", timeout=T)
    for data, answer in ((b"data", CKR.OK), (b"other", CKR.SIGNATURE_INVALID)):
        stream = c.stream_open("verify", (SHA256_RSA_PKCS, None), public, timeout=T)
        c.stream_update(stream, data, timeout=T)
        if answer == CKR.OK:
            assert c.stream_final(stream, signature, timeout=T) == b""
        else:
            assert rv_of(lambda stream=stream: c.stream_final(stream, signature, timeout=T)) == answer  # type: ignore[misc]
    digest = c.stream_open("digest", (SHA256, None), 0, timeout=T)
    c.stream_update(digest, b"abc", timeout=T)
    assert c.stream_final(digest, timeout=T) == _sha256(b"abc")
    assert rv_of(lambda: c.stream_update(digest, b"more", timeout=T)) == CKR.SESSION_HANDLE_INVALID
    c.stream_cancel(digest, timeout=T)


def test_interleaved_streams(c: Connection) -> None:
    key = aes(c)
    cbc = (AES_CBC_PAD, bytes(16))
    plain = {n: [bytes([n]) * 37 for _ in range(9)] for n in range(4)}
    streams = {n: c.stream_open("encrypt", cbc, key, timeout=T) for n in plain}
    sealed = dict.fromkeys(plain, b"")
    for step in range(9):
        for n, stream in streams.items():
            sealed[n] += c.stream_update(stream, plain[n][step], timeout=T)
            assert c.random(4, timeout=T)
    for n, stream in streams.items():
        sealed[n] += c.stream_final(stream, timeout=T)
        assert sealed[n] == c.encrypt(cbc, key, b"".join(plain[n]), timeout=T)
    # Parts of any length, which go into the module in pieces.
    data = os.urandom(3_000_000)
    stream = c.stream_open("encrypt", cbc, key, timeout=T)
    borders = [0, 1, 100_000, 165_537, 165_600, 2_300_000, 3_000_000]
    out = b"".join(c.stream_update(stream, data[a:b], timeout=T) for a, b in itertools.pairwise(borders))
    assert out + c.stream_final(stream, timeout=T) == c.encrypt(cbc, key, data, timeout=T)
    digest = c.stream_open("digest", (SHA256, None), 0, timeout=T)
    for a, b in itertools.pairwise(borders):
        assert c.stream_update(digest, data[a:b], timeout=T) == b""
    assert c.stream_final(digest, timeout=T) == _sha256(data)
    # GCM holds everything back until its tag was checked: more than any buffer was meant for.
    gcm = (AES_GCM, ["gcm", b"n" * 12, b"", 128])
    data = os.urandom(200_000)
    stream = c.stream_open("decrypt", gcm, key, timeout=T)
    out = c.stream_update(stream, c.encrypt(gcm, key, data, timeout=T), timeout=T)
    assert out + c.stream_final(stream, timeout=T) == data


def test_a_cancelled_stream_and_a_failed_one_leave_nothing(c: Connection) -> None:
    key = aes(c)
    stream = c.stream_open("encrypt", (AES_CBC_PAD, bytes(16)), key, timeout=T)
    c.stream_update(stream, b"part", timeout=T)
    c.stream_cancel(stream, timeout=T)
    c.stream_cancel(stream, timeout=T)
    stream = c.stream_open("decrypt", (AES_CBC_PAD, bytes(16)), key, timeout=T)
    c.stream_update(stream, b"not a multiple", timeout=T)
    assert rv_of(lambda: c.stream_final(stream, timeout=T)) != CKR.OK
    for _ in range(3):
        c.encrypt((AES_CBC_PAD, bytes(16)), key, b"x", timeout=T)


# -- threads


def test_sixteen_threads(c: Connection) -> None:
    public, private = rsa_pair(c)
    wanted = c.sign((SHA256_RSA_PKCS, None), private, b"data", timeout=T)
    end = time.monotonic() + 1.5
    problems: list[object] = []

    def load(number: int) -> None:
        try:
            while time.monotonic() < end:
                assert c.sign((SHA256_RSA_PKCS, None), private, b"data", timeout=T) == wanted
                if number % 4 == 0:
                    assert rv_of(lambda: c.sign((AES_ECB, None), private, b"", timeout=T)) != CKR.OPERATION_ACTIVE
                    c.destroy(aes(c), timeout=T)
                if number % 4 == 1:
                    stream = c.stream_open("verify", (SHA256_RSA_PKCS, None), public, timeout=T)
                    c.stream_update(stream, b"data", timeout=T)
                    c.stream_final(stream, wanted, timeout=T)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=load, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


# -- lives


def test_logout_ends_the_generation(token: TokenFixture, isolation: str) -> None:
    with connected(token, isolation) as c:
        first = c.generation
        key = aes(c, CKA_TOKEN=TRUE, CKA_LABEL=b"kept")
        sid = c.open_session(timeout=T)
        stream = c.stream_open("encrypt", (AES_CBC_PAD, bytes(16)), key, timeout=T)
        c.logout(timeout=T)
        assert c.generation > first
        with pytest.raises(StaleGeneration):
            c.encrypt((AES_ECB, None), key, bytes(16), timeout=T)
        with pytest.raises(Ckr):
            c.stream_update(stream, b"x", timeout=T)
        assert c.find([(CKA_LABEL, b"kept")], timeout=T) == []
        c.login(1, b"1234", timeout=T)
        with pytest.raises(StaleGeneration):
            c.destroy(key, timeout=T)
        assert rv_of(lambda: c.find([], sid=sid, timeout=T)) == CKR.SESSION_HANDLE_INVALID
        (again,) = c.find([(CKA_LABEL, b"kept")], timeout=T)
        c.destroy(again, timeout=T)


def test_handles_of_another_connection_are_refused(token: TokenFixture, isolation: str, c: Connection) -> None:
    key = aes(c)
    with connected(token, isolation) as other, pytest.raises(StaleGeneration):
        other.encrypt((AES_ECB, None), key, bytes(16), timeout=T)


def test_logout_waits_for_the_calls_inside(token: TokenFixture, isolation: str) -> None:
    with connected(token, isolation) as c:
        _, private = rsa_pair(c)
        problems: list[object] = []
        begun = threading.Barrier(9)

        def load() -> None:
            begun.wait()
            try:
                while True:
                    c.sign((SHA256_RSA_PKCS, None), private, b"data", timeout=T)
            except StaleGeneration:
                pass
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=load) for _ in range(8)]
        for thread in threads:
            thread.start()
        begun.wait()
        c.logout(timeout=T)
        for thread in threads:
            thread.join(T)
        assert problems == []


def test_security_officer_and_pins(folder: Path, isolation: str) -> None:
    token = make_token(folder / f"pins-{isolation}", "pins")
    with connected(token, isolation, pin=None) as c:
        assert rv_of(lambda: c.login(1, b"9999", timeout=T)) == CKR.PIN_INCORRECT
        c.probe(timeout=T)
        c.login(0, token.so_pin.encode(), timeout=T)
        c.init_pin(b"5678", timeout=T)
        c.logout(timeout=T)
        c.login(1, b"5678", timeout=T)
        c.set_pin(b"5678", b"8765", timeout=T)
        c.logout(timeout=T)
        c.login(1, b"8765", timeout=T)


def test_two_members_on_one_module(token: TokenFixture, other_token: TokenFixture, isolation: str) -> None:
    before = os.environ.get("SOFTHSM2_CONF")
    with connected(token, isolation) as one, connected(other_token, isolation, pin=b"4321") as two:
        assert one.token_info(timeout=T).serial == token.serial
        assert two.token_info(timeout=T).serial == other_token.serial
        label = f"mine-{isolation}".encode()
        note = one.create([(CKA_CLASS, ulong(0)), (CKA_TOKEN, TRUE), (CKA_LABEL, label)], timeout=T)
        assert two.find([(CKA_LABEL, label)], timeout=T) == []
        two.close()
        assert not two.alive
        one.destroy(note, timeout=T)
    assert os.environ.get("SOFTHSM2_CONF") == before


# -- starting


def test_start_problems_say_what_to_do(token: TokenFixture, isolation: str, tmp_path: Path) -> None:
    def text(**changes: object) -> str:
        with pytest.raises(ModuleProblem) as caught:
            open_connection(settings(token, **changes), generation=1, isolation=isolation, timeout=T)
        return str(caught.value)

    assert "does not exist" in text(module="/nowhere/x.so")
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    assert str(broken) in text(module=str(broken))
    assert "not a PKCS#11 module" in text(module=_some_library())
    missing = text(token_serial="ffff")
    assert "ffff" in missing
    assert token.serial in missing
    assert "2 tokens" not in missing


def _some_library() -> str:
    import _ctypes

    return str(_ctypes.__file__)


def test_several_tokens_match(folder: Path, isolation: str) -> None:
    make_token(folder / "twins", "twin")
    token = make_token(folder / "twins", "twin")
    ambiguous = settings(token, token_serial=None, token_label="twin")
    with pytest.raises(ModuleProblem, match=r"tokens of .* match"):
        open_connection(ambiguous, generation=1, isolation=isolation, timeout=T)
    exact = msgspec.structs.replace(ambiguous, token_serial=token.serial)
    open_connection(exact, generation=1, isolation=isolation, timeout=T).close()


def test_lock_file(token: TokenFixture, isolation: str, tmp_path: Path) -> None:
    def free() -> bool:
        with open(tmp_path / "lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            return True

    locked = settings(token, lock_file=str(tmp_path / "lock"))
    connection = open_connection(locked, generation=1, isolation=isolation, timeout=T)
    assert not free()
    with pytest.raises(MemberGone, match="lock"):
        open_connection(locked, generation=2, isolation=isolation, timeout=T)
    connection.close()
    until(free)


def test_closed_connection(token: TokenFixture, isolation: str) -> None:
    with connected(token, isolation) as c:
        c.close()
        assert not c.alive
        with pytest.raises(MemberGone) as caught:
            c.random(1, timeout=T)
        assert not caught.value.sent
        c.close()
        c.kill()


# -- modules in this process only


def test_reopening_loads_no_further_copy(token: TokenFixture) -> None:
    def copies() -> int:
        return Path("/proc/self/maps").read_text().count("hagroup-")

    with connected(token, "none") as one, connected(token, "none") as two:
        assert one.token_info(timeout=T) == two.token_info(timeout=T)
        before = copies()
    for _ in range(3):
        with connected(token, "none") as c:
            assert c.probe(timeout=T)
    assert copies() == before > 0


def test_forked_child_loads_its_own_copy(token: TokenFixture) -> None:
    with connected(token, "none") as c:
        note = c.create([(CKA_CLASS, ulong(0)), (CKA_TOKEN, TRUE), (CKA_LABEL, b"forked")], timeout=T)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                c.abandon_after_fork()
                with pytest.raises(MemberGone):
                    c.random(1, timeout=T)
                with connected(token, "none") as own:
                    assert len(own.find([(CKA_LABEL, b"forked")], timeout=T)) == 1
                c.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert c.find([(CKA_LABEL, b"forked")], timeout=T) == [note]
        c.destroy(note, timeout=T)


# -- worker processes only


def test_a_fault_of_the_workers_own_is_named_by_its_place(worker: ProcessConnection) -> None:
    with pytest.raises(WorkerFault, match=r"TypeError in .*worker\.py") as caught:
        worker._call("login", 0, [1, "secret"], T)
    assert "secret" not in str(caught.value)
    with pytest.raises(WorkerFault, match="KeyError"):
        worker._call("no such operation", 0, [], T)
    assert len(worker.random(4, timeout=T)) == 4


def test_killed_in_the_middle(worker: ProcessConnection) -> None:
    errors: list[BaseException] = []

    def generate() -> None:
        try:
            while True:
                rsa_pair(worker)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    until(lambda: bool(worker.outstanding()))
    os.kill(worker.pid, signal.SIGKILL)
    thread.join(T)
    assert isinstance(errors[0], MemberGone)
    assert not worker.alive
    with pytest.raises(MemberGone) as caught:
        worker.random(1, timeout=T)
    assert not caught.value.sent
    worker.kill()
    until(lambda: not Path(f"/proc/{worker.pid}").exists())


@pytest.mark.parametrize("size", [16, 1_000_000, 3_000_000])
def test_a_request_that_a_killed_worker_never_read(worker: ProcessConnection, size: int) -> None:
    """It was not carried out, and may be asked of another member without doubt, however long it was."""
    worker.random(1, timeout=T)  # a channel is there
    os.kill(worker.pid, signal.SIGSTOP)
    until(lambda: "T (stopped)" in Path(f"/proc/{worker.pid}/status").read_text())
    errors: list[BaseException] = []

    def seed() -> None:
        try:
            worker.seed(bytes(size), timeout=T)
        except MemberGone as error:
            errors.append(error)

    thread = threading.Thread(target=seed)
    thread.start()
    (channel,) = worker._channels
    until(lambda: is_unread(channel._socket))
    os.kill(worker.pid, signal.SIGKILL)
    thread.join(T)
    (error,) = errors
    assert isinstance(error, MemberGone) and not error.sent


def is_unread(sent: socket.socket) -> bool:
    """Something that was sent waits at the other end (SIOCOUTQ)."""
    return bool(struct.unpack("i", fcntl.ioctl(sent, termios.TIOCOUTQ, bytes(4)))[0])


def test_kill_wakes_callers_and_leaves_no_zombie(worker: ProcessConnection) -> None:
    freeze(worker.pid)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            worker.random(1, timeout=60)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: len(worker.outstanding()) == 3)
    worker.kill()
    for thread in threads:
        thread.join(T)
    assert [type(error) for error in errors] == [MemberGone] * 3
    until(lambda: not Path(f"/proc/{worker.pid}").exists())


def test_stopped_worker_costs_the_deadline_and_no_reply_goes_astray(worker: ProcessConnection) -> None:
    _, private = rsa_pair(worker)
    wanted = {n: worker.sign((SHA256_RSA_PKCS, None), private, bytes([n]), timeout=T) for n in range(4)}
    results: list[object] = []

    def patient() -> None:
        results.append(worker.sign((SHA256_RSA_PKCS, None), private, b"\x03", timeout=T))

    freeze(worker.pid)
    other = threading.Thread(target=patient)
    other.start()
    until(lambda: bool(worker.outstanding()))
    begin = time.monotonic()
    for n in (0, 1):
        with pytest.raises(DeadlinePassed):
            worker.sign((SHA256_RSA_PKCS, None), private, bytes([n]), timeout=0.2)
    with pytest.raises(DeadlinePassed):
        worker.probe(timeout=0.2)
    assert time.monotonic() - begin < 3
    assert len(worker.outstanding()) == 1
    os.kill(worker.pid, signal.SIGCONT)
    for n in (2, 0, 1, 3) * 5:
        assert worker.sign((SHA256_RSA_PKCS, None), private, bytes([n]), timeout=T) == wanted[n]
    other.join(T)
    assert results == [wanted[3]]
    assert worker.outstanding() == []


def test_let_go_it_finishes_its_call_and_leaves(worker: ProcessConnection) -> None:
    gone = os.pidfd_open(worker.pid)
    used = psutil.Process(worker.pid).cpu_times().user
    public: list[tuple[int, bytes | list[object]]] = [(CKA_MODULUS_BITS, ulong(4096)), (CKA_TOKEN, TRUE)]
    private: list[tuple[int, bytes | list[object]]] = [(CKA_TOKEN, TRUE)]
    made: list[tuple[Handle, Handle]] = []
    other = threading.Thread(target=lambda: made.append(worker.generate_pair((0, None), public, private, timeout=T)))
    other.start()
    until(lambda: psutil.Process(worker.pid).cpu_times().user > used + 0.05)  # it is in the module
    worker.let_go()
    with pytest.raises(MemberGone):
        worker.random(3, timeout=T)
    other.join(T)
    assert len(made) == 1
    assert select.select([gone], [], [], T)[0]
    os.close(gone)


LARGE = os.urandom(200_000)


def windows(pid: int | str = "self") -> int:
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:hagroup")


def test_nothing_large_stays_in_shared_memory(worker: ProcessConnection) -> None:
    key = aes(worker)
    cbc = (AES_CBC_PAD, bytes(16))
    sealed = worker.encrypt(cbc, key, LARGE, timeout=T)
    assert worker.decrypt(cbc, key, sealed, timeout=T) == LARGE
    assert rv_of(lambda: worker.decrypt(cbc, key, sealed[:-16], timeout=T)) != CKR.OK
    assert_wiped(worker)

    def two_threads(stream: int) -> None:
        """One part on a channel of its own: another one is in use meanwhile."""
        channel = worker._idle.pop()
        worker.stream_update(stream, LARGE, timeout=T)
        worker._idle.append(channel)
        worker.stream_update(stream, LARGE, timeout=T)

    for end in (worker.stream_final, worker.stream_cancel):
        stream = worker.stream_open("encrypt", cbc, key, timeout=T)
        two_threads(stream)
        end(stream, timeout=T)
        assert_wiped(worker)
    stream = worker.stream_open("decrypt", cbc, key, timeout=T)
    two_threads(stream)
    generation = worker.generation
    worker.logout(timeout=T)
    with pytest.raises(StaleGeneration):
        worker._call("stream_update", generation, [stream, LARGE], T)
    assert_wiped(worker)


def assert_wiped(worker: ProcessConnection) -> None:
    windows = [channel._window for channel in worker._channels]
    assert windows
    for window in windows:
        assert isinstance(window, Window)
        memory = bytes(window._mapped().bytes)
        assert memory.count(0) == len(memory)


def test_a_late_large_call_disturbs_no_other(worker: ProcessConnection) -> None:
    key = aes(worker)
    counter = (AES_CTR, ["ctr", 32, bytes(16)])
    sealed = worker.encrypt(counter, key, LARGE, timeout=T)
    before = windows()
    freeze(worker.pid)
    for data in (bytes(300_000), b"\1" * 300_000):
        with pytest.raises(DeadlinePassed):
            worker.encrypt(counter, key, data, timeout=0.1)
    assert windows() < before, "given up with the call"
    os.kill(worker.pid, signal.SIGCONT)
    for _ in range(5):
        assert worker.encrypt(counter, key, LARGE, timeout=T) == sealed


def test_without_shared_memory(worker: ProcessConnection, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox may refuse it: everything goes through the socket."""

    def refused(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "memfd_create", refused)
    for channel in worker._idle[:]:
        worker._discard(channel)
    worker._idle.clear()
    key = aes(worker)
    counter = (AES_CTR, ["ctr", 32, bytes(16)])
    sealed = worker.encrypt(counter, key, LARGE, timeout=T)
    assert worker.decrypt(counter, key, sealed, timeout=T) == LARGE


def test_an_interrupted_exchange_closes_its_channel(worker: ProcessConnection) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    freeze(worker.pid)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            worker.random(3, timeout=T)
    finally:
        signal.signal(signal.SIGALRM, before)
        os.kill(worker.pid, signal.SIGCONT)
    assert len(worker.random(5, timeout=T)) == 5


def test_a_signal_storm_does_not_prolong_the_deadline(worker: ProcessConnection) -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    freeze(worker.pid)
    begin = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        with pytest.raises(DeadlinePassed):
            worker.random(3, timeout=0.3)
        assert time.monotonic() - begin < 3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.kill(worker.pid, signal.SIGCONT)


def test_short_lived_threads_leave_no_descriptors(worker: ProcessConnection) -> None:
    worker.random(1, timeout=T)
    before, mapped = len(os.listdir("/proc/self/fd")), windows()
    for _ in range(50):
        thread = threading.Thread(target=worker.random, args=(1,), kwargs={"timeout": T})
        thread.start()
        thread.join()
    assert len(os.listdir("/proc/self/fd")) <= before
    assert windows() <= mapped


def test_pin_and_environment_are_not_in_a_command_line(worker: ProcessConnection, token: TokenFixture) -> None:
    worker.logout(timeout=T)
    worker.login(1, b"1234", timeout=T)
    arguments = Path(f"/proc/{worker.pid}/cmdline").read_bytes().split(b"\0")
    assert arguments[-2] == b"hsm1"
    for words in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert b"1234" not in words.read_bytes().split(b"\0")
    assert str(token.conf).encode() not in b" ".join(arguments)


def test_worker_is_protected_and_detached(worker: ProcessConnection) -> None:
    limits = Path(f"/proc/{worker.pid}/limits").read_text()
    assert next(line for line in limits.splitlines() if "core" in line).split()[4:6] == ["0", "0"]
    assert os.getsid(worker.pid) == worker.pid
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert worker.random(1, timeout=T)
    links = [os.readlink(entry) for entry in Path(f"/proc/{worker.pid}/fd").iterdir()]
    assert not [link for link in links if link.startswith("pipe:")]
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(entry))
    assert not [link for link in links if "memfd" in link], "shared memory has no descriptor that others could open"
    assert sorted(os.readlink(f"/proc/{worker.pid}/fd/{n}") for n in range(3)) == ["/dev/null"] * 3


_PARENT = """
import os, signal, sys, threading
sys.path.insert(0, {root!r})
from hagroup.members.open import ConnectionSettings, open_connection
import msgspec
settings = msgspec.json.decode({settings!r}, type=ConnectionSettings)
c = open_connection(settings, generation=1, isolation="process", timeout=20)
c.login(1, b"1234", timeout=20)
{more}
print(c.pid, flush=True)
sys.stdin.read()
"""


def _parent(token: TokenFixture, more: str = "") -> subprocess.Popen[str]:
    code = _PARENT.format(
        root=str(Path(__file__).parents[2]), settings=msgspec.json.encode(settings(token)).decode(), more=more
    )
    # From a folder and with an environment in which nothing can be imported by chance.
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_worker_leaves_when_its_parent_is_killed(token: TokenFixture) -> None:
    # A forked child keeps the parent's sockets open: the worker must see the parent's death all the same.
    fork = "if os.fork() == 0:\n    signal.pause()"
    with _parent(token, fork) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        parent.kill()
        until(lambda: not Path(f"/proc/{pid}").exists() or _zombie(pid))
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_forked_child_leaves_the_parents_worker_alone(worker: ProcessConnection) -> None:
    worker.random(1, timeout=T)
    descriptors = set(os.listdir("/proc/self/fd"))
    mapped = windows()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            worker.abandon_after_fork()
            assert not worker.alive
            assert windows() < mapped
            sockets = [c for c in os.listdir("/proc/self/fd") if c in descriptors]
            assert len(sockets) < len(descriptors)
            with pytest.raises(MemberGone):
                worker.random(1, timeout=T)
            worker.kill()
            worker.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert worker.alive
    assert len(worker.random(4, timeout=T)) == 4


def test_start_deadline(token: TokenFixture) -> None:
    begin = time.monotonic()
    with pytest.raises(MemberGone, match="did not start") as caught:
        open_connection(settings(token), generation=1, isolation="process", timeout=0.001)
    assert not caught.value.sent
    assert time.monotonic() - begin < 5
