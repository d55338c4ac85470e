"""T 3.4.12, 3.4.13: members that do not share both secrets of the domain are refused, with the sentence that says
which; nothing is created anywhere. When a group is created, and when a member of one shows up with other secrets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hagroup as pkcs11
from hagroup import KeyType
from hagroup.errors import ConfigurationError
from tests.support import plain
from tests.support.faulty import engine
from tests.support.groups import PIN, SO_PIN, GroupFixture, make_group, wait_until
from tests.support.softhsm import SOFTHSM, TokenFixture, make_token

DOMAIN, PARTITION = b"D" * 32, b"P" * 32
DOMAIN_ID, PARTITION_ID = b"d" * 16, b"p" * 16

_IMPLANT = """
import json, os, sys, pkcs11
from pkcs11 import Attribute, KeyType, ObjectClass
asked = json.load(sys.stdin)
token = pkcs11.lib(asked["module"]).get_token(token_serial=asked["serial"].encode())
with token.open(rw=True, user_pin=asked["pin"]) as session:
    for label, id_, value, uses in asked["keys"]:
        for old in list(session.get_objects({Attribute.LABEL: label})) if asked["replace"] else []:
            id_ = id_ or old[Attribute.ID].hex()
            old.destroy()
        session.create_object({
            Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.KEY_TYPE: KeyType.AES, Attribute.TOKEN: True,
            Attribute.PRIVATE: True, Attribute.SENSITIVE: True, Attribute.LABEL: label,
            Attribute.ID: bytes.fromhex(id_), Attribute.VALUE: bytes.fromhex(value),
            **{Attribute[use]: True for use in uses}})
"""


def implant(member: dict[str, Any], domain: bytes | None, partition: bytes | None, *, ids: bool = True) -> None:
    """Make the domain's keys by hand. ``ids=False``: in place of those that are there, with their CKA_ID."""
    keys = []
    for label, id_, value, uses in (
        ("hagroup domain key", DOMAIN_ID, domain, ["WRAP", "UNWRAP"]),
        ("hagroup partition key", PARTITION_ID, partition, ["ENCRYPT", "DECRYPT"]),
    ):
        if value is not None:
            keys.append([label, id_.hex() if ids else "", value.hex(), uses])
    asked = {"module": member["module"], "serial": member["serial"], "pin": PIN, "keys": keys, "replace": not ids}
    done = subprocess.run(
        [sys.executable, "-c", _IMPLANT],
        input=json.dumps(asked),
        env=os.environ | member["env"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def as_member(token: TokenFixture) -> dict[str, Any]:
    return {"module": SOFTHSM, "serial": token.serial, "env": token.env}


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        pytest.param((b"x" * 32, PARTITION), "another domain key", id="3.4.12"),
        pytest.param((DOMAIN, b"x" * 32), "partition secret differs", id="3.4.13"),
        pytest.param((b"x" * 32, b"y" * 32), "secret differs", id="both"),
        pytest.param((DOMAIN, None), "0 partition keys", id="half a domain"),
    ],
)
def test_group_create(
    fast_folder: Path, request: pytest.FixtureRequest, second: tuple[bytes, bytes | None], sentence: str
) -> None:
    folder = fast_folder / f"domains-{request.node.callspec.id.replace(' ', '-')}"
    folder.mkdir(mode=0o700)
    tokens = {name: make_token(folder / name, f"token {name}", SO_PIN, PIN) for name in ("hsm1", "hsm2", "hsm3")}
    implant(as_member(tokens["hsm1"]), DOMAIN, PARTITION)
    implant(as_member(tokens["hsm2"]), *second)
    for name in ("pin", "so-pin", "hagroup.toml"):
        (folder / name).touch(mode=0o600)
    (folder / "pin").write_text(PIN)
    (folder / "so-pin").write_text(SO_PIN)
    members = "".join(
        f'[[member]]\nname = "{name}"\nmodule = "{SOFTHSM}"\ntoken_serial = "{token.serial}"\n'
        f'env = {{ SOFTHSM2_CONF = "{token.conf}" }}\npin = {{ file = "pin" }}\n'
        for name, token in tokens.items()
    )
    text = f'[group]\nlabel = "payments"\n{members}'
    (folder / "hagroup.toml").write_text(text)
    before = {name: plain.objects(as_member(token), own=True) for name, token in tokens.items()}
    group = GroupFixture(folder / "hagroup.toml")
    done = group.admin("group", "create", "--yes", "--so-pin-file", str(folder / "so-pin"))
    assert done.returncode == 2, done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert 'member "hsm2"' in line
    assert sentence in line
    assert {name: plain.objects(as_member(token), own=True) for name, token in tokens.items()} == before
    assert not list(folder.glob("journal*"))
    assert (folder / "hagroup.toml").read_text() == text
    with pytest.raises(ConfigurationError, match="group create"):
        pkcs11.lib(str(folder / "hagroup.toml"))


@pytest.fixture(scope="module")
def group(fast_folder: Path) -> GroupFixture:
    return make_group(fast_folder / "domains", members=2)


@pytest.fixture
def session(group: GroupFixture) -> Iterator[Any]:
    lib = pkcs11.lib(str(group.toml))
    with lib.get_token(token_label="payments").open(rw=True, user_pin=PIN) as session:
        yield session
    lib.unload()


def refused(group: GroupFixture, session: Any, sentence: str) -> None:
    """hsm2 is quarantined for this reason, and gets nothing; the group goes on with hsm1."""
    roster = engine(session).roster
    wait_until(lambda: roster.members["hsm2"].state.value == "quarantined", "the quarantine")
    before = plain.objects(group.members["hsm2"], own=True)
    key = session.generate_key(KeyType.AES, 256, store=True, label=sentence)
    assert key.encrypt(b"data", mechanism_param=bytes(16))
    assert sentence in plain.labels(group.members["hsm1"])
    assert plain.objects(group.members["hsm2"], own=True) == before
    done = group.admin("status", "--json")
    assert done.returncode == 1
    shown = {member["name"]: member for member in json.loads(done.stdout)["members"]}["hsm2"]
    assert shown["state"] == "quarantined"
    assert sentence in shown["reason"]
    assert "\n" not in shown["reason"]


def test_a_member_shows_up_with_another_partition_key(group: GroupFixture, session: Any) -> None:
    """T 3.4.13 in a running group: the owner of the domain key alone cannot have it cloned."""
    roster = engine(session).roster
    wait_until(lambda: len(roster.serving()) == 2, "both members in service")
    implant(group.members["hsm2"], None, b"x" * 32, ids=False)
    group.workers()["hsm2"].kill()
    roster.bury_the_dead()
    refused(group, session, "the partition secret differs")


def test_a_member_shows_up_with_another_domain_key(fast_folder: Path) -> None:
    """T 3.4.12 at the start of a client, where both keys have the right names and identifiers."""
    fresh = make_group(fast_folder / "domains-12", members=2)
    implant(fresh.members["hsm2"], b"x" * 32, None, ids=False)
    lib = pkcs11.lib(str(fresh.toml))
    try:
        with lib.get_token(token_label="payments").open(rw=True, user_pin=PIN) as session:
            refused(fresh, session, "this member has another domain key")
    finally:
        lib.unload()


def test_a_member_that_is_another_groups_token(fast_folder: Path) -> None:
    """The file names the token of another group's hsm2."""
    own = make_group(fast_folder / "domains-own", members=2)
    other = make_group(fast_folder / "domains-other", members=2)
    text = own.toml.read_text()
    for old, new in (
        (own.members["hsm2"]["serial"], other.members["hsm2"]["serial"]),
        ("hsm2/softhsm2.conf", str(other.folder / "hsm2" / "softhsm2.conf")),
    ):
        assert old in text
        text = text.replace(old, new)
    own.toml.write_text(text)
    before = plain.objects(other.members["hsm2"], own=True)
    lib = pkcs11.lib(str(own.toml))
    try:
        with lib.get_token(token_label="payments").open(rw=True, user_pin=PIN) as session:
            roster = engine(session).roster
            wait_until(lambda: roster.members["hsm2"].state.value == "quarantined", "the quarantine")
            session.generate_key(KeyType.AES, 256, store=True, label="mine")
            reason = roster.members["hsm2"].reason
    finally:
        lib.unload()
    assert other.members["hsm2"]["serial"] in reason
    assert own.members["hsm2"]["serial"] in reason
    assert plain.objects(other.members["hsm2"], own=True) == before
    assert other.admin("status").returncode == 0
