"""A new host comes to a group from one member's address and the PIN (issue 3, 6): real members, real commands."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.serialization import load_der_public_key

from hagroup.config.load import load
from hagroup.journal import open_journal
from tests.support import forked_admin, plain
from tests.support.forked_admin import Done
from tests.support.groups import PIN, GroupFixture, address, make_group, run_client

_MAKE = """
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
def group(fast_folder: Path) -> GroupFixture:
    """The first host's. Its file was changed by hand, and its first member has a module of its own."""
    made = make_group(fast_folder / "join-first", members=2, isolation="none")
    run_client(made, _MAKE)
    module(made).symlink_to(made.members["hsm1"]["module"])
    text = made.toml.read_text().replace("call     = 5.0", "call     = 4.5")
    made.toml.write_text(text.replace(f'"{made.members["hsm1"]["module"]}"', f'"{module(made)}"', 1))
    made.reload()
    assert made.admin("sync").returncode == 0
    return made


def module(group: GroupFixture) -> Path:
    return group.folder / "libsofthsm-elsewhere.so"


def join(
    group: GroupFixture,
    folder: Path,
    *more: str,
    pin: str = PIN,
    watch: Path | None = None,
    kill_before: int = 0,
    **change: str,
) -> Done:
    """From one member's address and the PIN."""
    words = ["--config", str(folder / "hagroup.toml"), "group", "join", *address(group, "hsm2", **change)]
    words += ["--pin-env", "IT", *more]
    return forked_admin.run(*words, environment={"IT": pin}, watch=watch, kill_before=kill_before)


def refused(done: Done, folder: Path) -> str:
    """One sentence, and nothing in the folder."""
    assert done.returncode in (2, 3), done.stdout + done.stderr
    assert not folder.exists() or not list(folder.iterdir())
    assert len(done.stderr.strip().splitlines()) == 1 and "nothing was changed" in done.stderr, done.stderr
    return done.stderr


def test_what_cannot_be_is_refused_with_nothing_done(group: GroupFixture, fast_folder: Path) -> None:
    folder = fast_folder / "join-refused"
    assert "/nowhere/lib.so does not exist" in refused(join(group, folder, module="/nowhere/lib.so"), folder)
    assert "not confirmed" in refused(join(group, folder), folder)
    assert "refused its user PIN" in refused(join(group, folder, "--yes", pin="4321"), folder)
    plain.labels(group.members["hsm2"])  # a person logs in: the token has no count low any more
    module(group).rename(module(group).with_suffix(".away"))
    try:
        assert f'member "hsm1": its module {module(group)}' in refused(join(group, folder, "--yes"), folder)
    finally:
        module(group).with_suffix(".away").rename(module(group))


def test_killed_anywhere_the_same_command_completes_it(group: GroupFixture, fast_folder: Path) -> None:
    step, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        folder = fast_folder / f"join-killed-{(step := step + 1)}"
        status = join(group, folder, "--yes", watch=folder, kill_before=step).returncode
        again = join(group, folder, "--yes")
        whole = "this host is in a group" in again.stderr  # it was killed after all was done
        assert again.returncode == 0 or whole, f"killed before change {step}: {again.stdout}{again.stderr}"
        config = load(folder / "hagroup.toml")
        journal = open_journal(config.journal)
        try:
            assert journal.counts()["live"] == 2
            assert {member.name for member in journal.members()} == set(group.members)
        finally:
            journal.close()
        left = {path.name for path in folder.iterdir() if path.name.startswith(".journal") and path.is_file()}
        assert not left, f"killed before change {step}: {left}"
        shutil.rmtree(folder)
    print(f"killed before each of {step - 1} changes to files")
    assert step > 6


def test_a_new_host_comes_from_one_address_and_the_pin(group: GroupFixture, fast_folder: Path) -> None:
    folder = fast_folder / "join-second"
    done = join(group, folder, "--yes", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["origin"].endswith(f":{group.toml}") and told["rebuilt"]["objects"] == 2
    assert any("destroyed before now" in text for text in told["rebuilt"]["unknown"])
    second = GroupFixture(folder / "hagroup.toml")
    second.reload()
    assert (second.toml.stat().st_mode & 0o777) == 0o600
    assert second.members == group.members
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
    assert "this host is in a group" in join(group, folder, "--yes").stderr
    program = (
        "import hagroup\ntry:\n    session.generate_key(KeyType.AES, 256, store=True, label='never')\n"
        "except hagroup.HAError as error:\n    print(error)\n"
    )
    assert "ha-admin recover" in run_client(group, program)
