"""What members return, and what becomes of it (DESIGN.md 3, "Classifying"): the call, and the member."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from hagroup import Attribute, KeyType, Mechanism, exceptions
from hagroup.errors import GroupUnavailable, HAError
from tests.support.faulty import FaultGroup, engine
from tests.support.groups import wait_until

IV = b"0123456789abcdef"
VICTIM = "hsm2"
PKCS1 = Mechanism.SHA256_RSA_PKCS


@pytest.fixture(scope="module")
def keys(faulty: FaultGroup, client: Any) -> Iterator[dict[str, Any]]:
    public, private = client.generate_keypair(KeyType.RSA, 2048, store=True, label="codes")
    secret = client.generate_key(KeyType.AES, 256, store=True, label="codes")
    faulty.heal(client)
    yield {"public": public, "private": private, "secret": secret}
    for item in list(client.get_objects({Attribute.TOKEN: True})):
        item.destroy()


def in_service(session: Any) -> list[str]:
    return sorted(member.name for member in engine(session).roster.serving())


@pytest.mark.parametrize("function", ["C_SignInit", "C_Sign"])
@pytest.mark.parametrize(
    "code",
    [
        "CKR_USER_NOT_LOGGED_IN",
        "CKR_SESSION_HANDLE_INVALID",
        "CKR_SESSION_CLOSED",
        "CKR_CRYPTOKI_NOT_INITIALIZED",
        "CKR_DEVICE_REMOVED",
        "CKR_TOKEN_NOT_PRESENT",
        "CKR_KEY_HANDLE_INVALID",
        "CKR_GENERAL_ERROR",
        "CKR_FUNCTION_FAILED",
        "CKR_HOST_MEMORY",
        "CKR_SESSION_COUNT",
    ],
)
def test_returned_once_the_call_succeeds(
    faulty: FaultGroup, session: Any, keys: dict[str, Any], code: str, function: str
) -> None:
    expected = keys["private"].sign(b"data", mechanism=PKCS1)
    faulty.prefer(session, VICTIM)
    control = faulty.controls[VICTIM]
    control.add(function, "error", rv=code, times=1)
    assert keys["private"].sign(b"data", mechanism=PKCS1) == expected
    assert [rule.fired for rule in control.rules()] == [1]
    faulty.heal(session)
    control.reset()
    faulty.prefer(session, VICTIM)
    assert keys["private"].sign(b"data", mechanism=PKCS1) == expected
    assert control.counts()["C_Sign"] == 1, "the member takes part again"


@pytest.mark.parametrize(
    "code", ["CKR_USER_NOT_LOGGED_IN", "CKR_SESSION_HANDLE_INVALID", "CKR_CRYPTOKI_NOT_INITIALIZED"]
)
def test_returned_once_by_every_member(faulty: FaultGroup, session: Any, keys: dict[str, Any], code: str) -> None:
    """As when a network HSM restarts: a member whose session was lost gets a new one and is asked again."""
    for control in faulty.controls.values():
        control.add("C_SignInit", "error", rv=code, times=1)
    assert keys["private"].sign(b"data", mechanism=PKCS1)


@pytest.mark.parametrize("function", ["C_GenerateKey", "C_WrapKey", "C_UnwrapKey", "C_CreateObject", "C_Encrypt"])
@pytest.mark.parametrize("code", ["CKR_USER_NOT_LOGGED_IN", "CKR_SESSION_HANDLE_INVALID", "CKR_DEVICE_MEMORY"])
def test_returned_once_in_a_change(faulty: FaultGroup, session: Any, code: str, function: str) -> None:
    faulty.prefer(session, VICTIM)
    control = faulty.controls[VICTIM]
    control.add(function, "error", rv=code, times=1)
    key = session.generate_key(KeyType.AES, 128, store=True, label="changed")
    wait_until(lambda: [rule.fired for rule in control.rules()] == [1], "the fault")  # perhaps after ``min_replicas``
    faulty.heal(session)
    faulty.check_tokens(session)
    key.destroy()


def test_bad_ciphertext_is_the_applications_error(faulty: FaultGroup, session: Any, keys: dict[str, Any]) -> None:
    """SoftHSM answers GENERAL_ERROR, as a broken member might: two members agree, so nobody fails."""
    bad = keys["secret"].encrypt(b"data" * 20, mechanism_param=IV)[:-16] + bytes(16)
    workers = {name: worker.pid for name, worker in faulty.group.workers().items()}
    for control in faulty.controls.values():
        control.reset()
    for _ in range(4):
        with pytest.raises((exceptions.GeneralError, exceptions.EncryptedDataInvalid)):
            keys["secret"].decrypt(bad, mechanism_param=IV)
    assert sum(control.counts().get("C_Decrypt", 0) for control in faulty.controls.values()) == 8
    assert in_service(session) == faulty.names
    assert {name: worker.pid for name, worker in faulty.group.workers().items()} == workers


@pytest.mark.parametrize("code", ["CKR_DATA_LEN_RANGE", "CKR_KEY_FUNCTION_NOT_PERMITTED", "CKR_ARGUMENTS_BAD"])
def test_an_applications_error_is_returned_at_once(
    faulty: FaultGroup, session: Any, keys: dict[str, Any], code: str
) -> None:
    for control in faulty.controls.values():
        control.reset()
        control.add("C_SignInit", "error", rv=code)
    with pytest.raises(exceptions.PKCS11Error) as raised:
        keys["private"].sign(b"data", mechanism=PKCS1)
    assert not isinstance(raised.value, HAError)
    assert sum(control.counts().get("C_SignInit", 0) for control in faulty.controls.values()) == 1
    assert in_service(session) == faulty.names


def test_overload_everywhere_is_waited_for(faulty: FaultGroup, session: Any, keys: dict[str, Any]) -> None:
    for control in faulty.controls.values():
        control.add("C_SignInit", "error", rv="CKR_SESSION_COUNT", times=3)
    assert keys["private"].sign(b"data", mechanism=PKCS1)
    assert in_service(session) == faulty.names


def test_two_members_die_in_one_call(faulty: FaultGroup, session: Any, keys: dict[str, Any]) -> None:
    """It may be the call that kills them: the third is not asked, and stays."""
    for control in faulty.controls.values():
        control.add("C_Sign", "crash", times=1)
    with pytest.raises(exceptions.DeviceError) as raised:
        keys["private"].sign(b"data", mechanism=PKCS1)
    assert isinstance(raised.value, HAError)
    assert "third" in str(raised.value)
    assert sorted(rule.fired for control in faulty.controls.values() for rule in control.rules()) == [0, 1, 1]
    assert len(in_service(session)) >= 1


def test_no_member_left(faulty: FaultGroup, session: Any, keys: dict[str, Any]) -> None:
    """A clear error that an unchanged program catches as DeviceError; it recovers without a restart."""
    for control in faulty.controls.values():
        control.add("all", "absent")
    faulty.wait_failed(session)
    with pytest.raises(GroupUnavailable) as raised:
        keys["private"].sign(b"data", mechanism=PKCS1)
    assert isinstance(raised.value, exceptions.DeviceError)
    faulty.clear()

    def signs() -> bool:
        try:
            return bool(keys["private"].sign(b"data", mechanism=PKCS1))
        except GroupUnavailable:
            return False

    wait_until(signs, "signing after all members came back")


def test_a_token_that_is_full(faulty: FaultGroup, session: Any) -> None:
    """The call succeeds on the others; ``status`` names the member, what it lacks and why; then it catches up."""
    control = faulty.controls[VICTIM]
    faulty.prefer(session, "hsm1")
    control.add("C_UnwrapKey", "error", rv="CKR_DEVICE_MEMORY")
    key = session.generate_key(KeyType.AES, 256, store=True, label="does not fit")
    wait_until(lambda: any(row.reason for row in engine(session).journal.owed(VICTIM)), "the refusal in the journal")
    done = faulty.group.admin("status", "--json")
    assert done.returncode == 1, done.stderr
    members = {member["name"]: member for member in json.loads(done.stdout)["members"]}
    assert members[VICTIM]["missing"] == 1
    assert members[VICTIM]["in_sync"] is False
    assert members[VICTIM]["state"] == "in service"
    assert "CKR_DEVICE_MEMORY" in members[VICTIM]["reason"]
    assert members["hsm1"]["in_sync"]
    assert members["hsm3"]["in_sync"]
    assert {name: labels.count("does not fit") for name, labels in faulty.labels().items()} == {
        "hsm1": 1,
        "hsm2": 0,
        "hsm3": 1,
    }
    assert key.encrypt(b"data", mechanism_param=IV)
    faulty.heal(session)
    faulty.check_tokens(session)
    key.destroy()
