"""``backup create`` and ``restore``, and a rehearsed disaster: a group from one kept token and a file (issue 4)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.support import plain
from tests.support.groups import SO_PIN, GroupFixture, run_client, wait_until
from tests.support.newcomers import private

MAKE = """
session.generate_keypair(KeyType.RSA, 2048, store=True, label='signer')
session.generate_key(KeyType.AES, 256, store=True, label='kept')
session.generate_key(KeyType.AES, 256, store=True, label='changed')
session.create_object({Attribute.CLASS: ObjectClass.DATA, Attribute.LABEL: 'private data', Attribute.VALUE: b'secret!!',
    Attribute.TOKEN: True, Attribute.PRIVATE: True})
"""


def outcomes(group: GroupFixture, *arguments: str) -> dict[tuple[str, str], list[str]]:
    done = group.admin("backup", "restore", *arguments, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[tuple[str, str], list[str]] = {}
    for one in json.loads(done.stdout):
        found.setdefault((one["label"], one["outcome"]), []).append(one["uid"])
    return found


def sign(member: dict[str, Any]) -> bytes:
    return plain.use(member, "sign", 3, "signer", b"data", "SHA256_RSA_PKCS")


def test_restore_brings_back_only_what_is_named(new_group: Callable[..., GroupFixture]) -> None:
    group = new_group(members=2)
    run_client(group, MAKE)
    file = group.folder / "backup"
    expected = sign(group.members["hsm1"])
    made = group.admin("backup", "create", str(file))
    assert made.returncode == 0, made.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    assert b"secret!!" not in file.read_bytes()
    assert group.admin("backup", "create", str(file)).returncode == 2
    assert group.admin("backup", "create", str(group.folder / "b2"), "--label", "no such").returncode == 2
    assert group.admin("backup", "create", str(group.folder / "some"), "--label", "kept").returncode == 0
    assert len(outcomes(group, str(group.folder / "some"), "--dry-run")) == 1
    run_client(
        group,
        "for key in session.get_objects({Attribute.LABEL: 'signer'}): key.destroy()\n"
        "session.get_key(label='changed')[Attribute.LABEL] = 'new label'\n",
    )

    found = outcomes(group, str(file), "--yes")
    uids = found.pop(("signer", "destroyed"))
    assert len(uids) == 2
    assert {outcome for _, outcome in found} == {"there already"}
    remaining = ["kept", "new label", "private data"]
    wait_until(  # what the programs left to do in the background may just be written
        lambda: [plain.labels(member) for member in group.members.values()] == [remaining] * 2, "what remains"
    )

    named = [option for uid in uids for option in ("--resurrect", uid)]
    found = outcomes(group, str(file), "--yes", *named)
    assert len(found[("signer", "resurrected")]) == 2
    for member in group.members.values():
        assert plain.labels(member) == [*remaining, "signer", "signer"]
        assert sign(member) == expected
    assert ("signer", "resurrected") not in outcomes(group, str(file), "--yes", *named)
    seen = run_client(
        group,
        "key = session.get_key(label='signer', object_class=ObjectClass.PRIVATE_KEY)\n"
        "print(key.sign(b'data', mechanism=Mechanism.SHA256_RSA_PKCS).hex())\n",
    )
    assert bytes.fromhex(seen) == expected
    assert group.admin("verify").returncode == 0

    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 1
    (group.folder / "damaged").write_bytes(damaged)
    refused = group.admin("backup", "restore", str(group.folder / "damaged"), "--yes")
    assert refused.returncode == 2
    assert "tampered" in refused.stderr
    (group.folder / "nothing").write_bytes(b"x")
    assert "no backup" in group.admin("backup", "restore", str(group.folder / "nothing"), "--yes").stderr
    unknown = group.admin("backup", "restore", str(file), "--yes", "--resurrect", "00" * 16)
    assert unknown.returncode == 2
    other = new_group(members=1)
    refused = other.admin("backup", "restore", str(file), "--yes")
    assert refused.returncode == 2
    assert "another partition secret" in refused.stderr


def test_a_rehearsed_disaster(group: GroupFixture) -> None:
    """The journal and two members are lost; what is left is one token and the file."""
    run_client(group, MAKE)
    file = group.folder / "backup"
    assert group.admin("backup", "create", str(file)).returncode == 0
    expected = sign(group.members["hsm1"])
    kept = group.members["hsm3"]
    done = group.admin("member", "remove", "hsm3", "--keep", "--yes")
    assert done.returncode == 0, done.stderr
    text = group.toml.read_text()
    section = text[text.index("[[member]]") : text.index("[[member]]", text.index("[[member]]") + 1)]
    folder = group.folder / "after"
    folder.mkdir(mode=0o700)
    toml = '[group]\nlabel = "payments"\nmin_replicas = 1\n[journal]\nurl = "sqlite:journal.db"\n' + section.replace(
        '"hsm1"', '"hsm3"'
    ).replace("hsm1/", f"{group.folder}/hsm3/").replace(group.members["hsm1"]["serial"], kept["serial"])
    private(folder / "hagroup.toml", toml)
    private(folder / "so-pin", SO_PIN)
    after = GroupFixture(folder / "hagroup.toml")
    created = after.admin("group", "create", "--so-pin-file", str(folder / "so-pin"), "--yes")
    assert created.returncode == 0, created.stderr
    after.reload()
    found = outcomes(after, str(file), "--yes")
    assert {outcome for _, outcome in found} == {"restored"}
    assert plain.labels(kept) == ["changed", "kept", "private data", "signer", "signer"]
    assert sign(kept) == expected
    assert after.admin("verify").returncode == 0, after.admin("verify").stdout
    assert after.admin("status").returncode == 0
    seen = run_client(after, "print(next(session.get_objects({Attribute.LABEL: 'private data'}))[Attribute.VALUE])\n")
    assert seen.strip() == "b'secret!!'"
    assert {outcome for _, outcome in outcomes(after, str(file), "--yes")} == {"there already"}
