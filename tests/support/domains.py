"""Tokens that do not share both secrets of a cloning domain, and that a group refuses them (T 3.4.12, 3.4.13)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hagroup as pkcs11
from hagroup import KeyType
from hagroup.errors import ConfigurationError
from tests.support import plain
from tests.support.faulty import engine
from tests.support.groups import PIN, SO_PIN, GroupFixture, wait_until
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


def check_refused_at_create(folder: Path, second: tuple[bytes, bytes | None], sentence: str) -> None:
    """``ha-admin group create`` over tokens of which hsm1 holds a domain's keys, hsm2 these, and hsm3 none."""
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


def check_refused_in_service(group: GroupFixture, session: Any, sentence: str) -> None:
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
