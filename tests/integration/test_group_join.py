"""A new host comes to a group from one member's address and the PIN (issue 3, 6): real members, real commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.serialization import load_der_public_key

from tests.support import plain
from tests.support.groups import PIN, GroupFixture, make_group, run_client

_MAKE = """
from pkcs11.util.rsa import encode_rsa_public_key
public, private = session.generate_keypair(KeyType.RSA, 2048, store=True, label="signer")
session.generate_key(KeyType.AES, 256, store=True, label="doomed").destroy()
"""
_SIGN = """
public = session.get_key(object_class=ObjectClass.PUBLIC_KEY, label="signer")
private = session.get_key(object_class=ObjectClass.PRIVATE_KEY, label="signer")
from pkcs11.util.rsa import encode_rsa_public_key
print(encode_rsa_public_key(public).hex(), private.sign(b"data", mechanism=Mechanism.SHA256_RSA_PKCS).hex())
"""


@pytest.fixture(scope="module")
def group(fast_folder: Path) -> Iterator[GroupFixture]:
    """The first host's. Its third member has left, and its file was changed by hand."""
    made = make_group(fast_folder / "join-first")
    run_client(made, _MAKE)
    removed = made.admin("member", "remove", "hsm3", "--yes")
    assert removed.returncode == 0, removed.stderr
    made.toml.write_text(made.toml.read_text().replace("call     = 5.0", "call     = 4.5"))
    assert made.admin("sync").returncode == 0
    made.members.pop("hsm3")
    return made


def join(
    group: GroupFixture, folder: Path, name: str = "hsm2", *more: str, pin: str = PIN, **change: str
) -> subprocess.CompletedProcess[str]:
    """From one member's address and the PIN."""
    member: dict[str, Any] = group.members[name] | change
    env = [option for key, value in member["env"].items() for option in ("--env", f"{key}={value}")]
    command = [sys.executable, "-m", "hagroup.admin.cli", "--config", str(folder / "hagroup.toml"), "group", "join"]
    return subprocess.run(
        [*command, "--module", member["module"], "--token-serial", member["serial"], *env, "--pin-env", "IT", *more],
        env=os.environ | {"IT": pin},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def refused(done: subprocess.CompletedProcess[str], folder: Path) -> str:
    """One sentence, and nothing in the folder."""
    assert done.returncode in (2, 3), done.stdout + done.stderr
    assert not folder.exists() or not list(folder.iterdir())
    assert len(done.stderr.strip().splitlines()) == 1 and "nothing was changed" in done.stderr, done.stderr
    return done.stderr


def test_what_cannot_be_is_refused_with_nothing_done(group: GroupFixture, fast_folder: Path) -> None:
    folder = fast_folder / "join-refused"
    assert "/nowhere/lib.so does not exist" in refused(join(group, folder, module="/nowhere/lib.so"), folder)
    assert "not confirmed" in refused(join(group, folder), folder)
    assert "refused its user PIN" in refused(join(group, folder, "hsm2", "--yes", pin="4321"), folder)
    plain.labels(group.members["hsm2"])  # a person logs in: the token has no count low any more
    third = {
        "module": group.members["hsm2"]["module"],
        "env": {"SOFTHSM2_CONF": str(group.folder / "hsm3/softhsm2.conf")},
    }
    config = tomllib.loads(group.toml.read_text())
    assert [member["name"] for member in config["member"]] == ["hsm1", "hsm2"]
    serial = next(path.name for path in (group.folder / "hsm3" / "tokens").iterdir())[-17:].replace("-", "")
    group.members["hsm3"] = {**third, "serial": serial}
    try:
        assert "holds no keys of a domain" in refused(join(group, folder, "hsm3", "--yes"), folder)
    finally:
        del group.members["hsm3"]
    # a module that the other host had, and this one has not: one that is reached in another way than the given one
    elsewhere = group.folder / "libsofthsm-elsewhere.so"
    elsewhere.symlink_to(group.members["hsm1"]["module"])
    text = group.toml.read_text()
    group.toml.write_text(text.replace('"/usr/lib/softhsm/libsofthsm2.so"', f'"{elsewhere}"', 1))
    try:
        assert group.admin("sync").returncode == 0
        elsewhere.unlink()
        assert f'member "hsm1": its module {elsewhere}' in refused(join(group, folder, "hsm2", "--yes"), folder)
    finally:
        group.toml.write_text(text)
        assert group.admin("sync").returncode == 0


def test_a_new_host_comes_from_one_address_and_the_pin(group: GroupFixture, fast_folder: Path) -> None:
    folder = fast_folder / "join-second"
    done = join(group, folder, "hsm2", "--yes", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["origin"].endswith(f":{group.toml}") and told["rebuilt"]["objects"] == 2
    assert any("destroyed before now" in text for text in told["rebuilt"]["unknown"])
    second = GroupFixture(folder / "hagroup.toml")
    second.reload()
    assert (second.toml.stat().st_mode & 0o777) == 0o600
    assert second.members == group.members  # the one that left is not there
    text = second.toml.read_text()
    assert "call     = 4.5" in text and "pin " not in text and PIN not in text

    signed = run_client(second, _SIGN).split()
    key = load_der_public_key(bytes.fromhex(signed[0]))
    key.verify(bytes.fromhex(signed[1]), b"data", padding.PKCS1v15(), hashes.SHA256())  # type: ignore[union-attr, call-arg]
    for member in second.members.values():
        signature = plain.use(member, "sign", 3, "signer", b"data", "SHA256_RSA_PKCS")
        assert signature.hex() == signed[1]
        assert plain.labels(member) == ["signer", "signer"]

    # the first host's journal is behind now, and decides nothing more
    assert "this host is in a group" in join(group, folder, "hsm2", "--yes").stderr
    program = (
        "import hagroup\ntry:\n    session.generate_key(KeyType.AES, 256, store=True, label='never')\n"
        "except hagroup.HAError as error:\n    print(error)\n"
    )
    assert "ha-admin recover" in run_client(group, program)
