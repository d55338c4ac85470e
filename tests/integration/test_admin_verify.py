"""``verify``, ``sync --dry-run`` and ``--adopt``, ``journal …`` by real processes (issue 4)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.support import plain
from tests.support.groups import GroupFixture, make_group, run_client, wait_until
from tests.support.newcomers import tamper

MAKE = """
session.generate_keypair(KeyType.RSA, 2048, store=True, label='signer')
session.generate_key(KeyType.AES, 256, store=True, label='aes')
session.generate_key(KeyType.AES, 256, store=True, label='relabelled')
session.generate_key(KeyType.AES, 256, store=True, label='exchanged')
session.create_object({Attribute.CLASS: ObjectClass.DATA, Attribute.LABEL: 'data', Attribute.VALUE: b'v',
    Attribute.TOKEN: True, Attribute.PRIVATE: False})
"""


@pytest.fixture(scope="module")
def shared(fast_folder: Any) -> GroupFixture:
    group = make_group(fast_folder / "verified", members=2)
    run_client(group, MAKE)
    return group


def document(group: GroupFixture, *arguments: str, expected: int = 0) -> Any:
    done = group.admin(*arguments, "--json")
    assert done.returncode == expected, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_verify_finds_nothing(shared: GroupFixture) -> None:
    found = document(shared, "verify")
    assert found["members"] == ["hsm1", "hsm2"]
    assert found["objects"] == 6
    assert found["proved"] == 12
    assert found["unproven"] == found["differences"] == found["unmanaged"] == []
    assert {member["unmanaged"] for member in shared.status()["members"]} == {0}
    assert "no differences" in shared.admin("verify").stdout


def test_unproven_is_said(shared: GroupFixture) -> None:
    """A private RSA key that may do nothing cannot be shown to be whole."""
    run_client(
        shared,
        "session.generate_keypair(KeyType.RSA, 2048, store=True, label='idle', capabilities=0,\n"
        "    private_template={Attribute.DERIVE: True})\n",
    )
    found = document(shared, "verify")
    assert [(one["label"], one["member"]) for one in found["unproven"]] == [("idle", "hsm1"), ("idle", "hsm2")]
    assert "UNPROVEN" in shared.admin("verify").stdout
    run_client(shared, "for key in session.get_objects({Attribute.LABEL: 'idle'}): key.destroy()\n")


def test_verify_finds_what_was_done_behind_the_back(new_group: Callable[..., GroupFixture]) -> None:
    group = new_group(members=2)
    run_client(group, MAKE)
    tamper(
        group.members["hsm2"],
        "session.get_key(label='aes').destroy()\n"
        "session.get_key(label='signer', object_class=ObjectClass.PUBLIC_KEY)[Attribute.ENCRYPT] = False\n"
        "old = session.get_key(label='exchanged')\n"
        "template = {Attribute.ID: old[Attribute.ID]}\n"
        "old.destroy()\n"
        "session.generate_key(KeyType.AES, 256, store=True, label='exchanged', id=template[Attribute.ID])\n"
        "session.generate_key(KeyType.AES, 128, store=True, label='stranger')\n",
    )
    found = document(group, "verify", expected=1)
    differences = {(one["label"], one["member"]): one["difference"] for one in found["differences"]}
    assert differences[("aes", "hsm2")] == "missing"
    assert differences[("exchanged", "hsm2")] == "another key"
    assert differences[("signer", "hsm2")] == "attributes differ"
    assert {member for _, member in differences} == {"hsm2"}
    assert "CKA_ENCRYPT" in group.admin("verify").stdout
    assert "stranger" in {one["label"] for one in found["unmanaged"]}
    counted = {member["name"]: member["unmanaged"] for member in group.status()["members"]}
    assert counted["hsm1"] == 0
    assert counted["hsm2"] >= 1
    plain_before = plain.labels(group.members["hsm2"])
    assert "--repair" in group.admin("verify").stdout
    done = group.admin("verify", "--repair")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "differences:" in done.stdout
    assert done.stdout.rstrip().count("no differences") == 1
    there = plain.labels(group.members["hsm2"])
    assert there.count("aes") == 1
    assert there.count("exchanged") == plain_before.count("exchanged") + 1  # what is not the group's stays
    assert "stranger" in there
    assert group.admin("verify").returncode == 0


def test_dry_run_tells_the_reasons_and_changes_nothing(new_group: Callable[..., GroupFixture]) -> None:
    group = new_group(members=2)
    run_client(group, "session.generate_key(KeyType.AES, 256, store=True, label='old')\n" + MAKE)
    assert group.admin("sync", "--dry-run").stdout.strip() == "nothing is to be done"
    group.take_away("hsm2")
    run_client(
        group,
        "session.generate_key(KeyType.AES, 256, store=True, label='new')\n"
        "session.get_key(label='old').destroy()\n"
        "session.get_key(label='aes')[Attribute.LABEL] = 'renamed'\n",
    )
    steps = document(group, "sync", "--dry-run", expected=1)
    told = {(one["member"], one["action"], one["label"]): one["reason"] for one in steps}
    assert "made while" in told[("hsm2", "install", "new")]
    assert "destroyed on the group at" in told[("hsm2", "destroy", "old")]
    assert "revision 2, it has 1" in told[("hsm2", "set", "renamed")]
    assert document(group, "sync", "--dry-run", expected=1) == steps
    todo = document(group, "journal", "todo", expected=1)
    assert {"hsm1": "done", "hsm2": "to do (1)"} in [one["members"] for one in todo]
    group.bring_back("hsm2")
    wait_until(lambda: group.admin("sync").returncode == 0, "sync")
    assert document(group, "sync", "--dry-run") == []
    assert document(group, "journal", "todo") == []


STRANGERS = """
from pkcs11.util.rsa import decode_rsa_public_key
key = session.generate_key(KeyType.AES, 256, store=True, label='stranger', id=b'77',
    template={Attribute.EXTRACTABLE: True, Attribute.SENSITIVE: False})
print(key[Attribute.VALUE].hex())
session.generate_key(KeyType.AES, 256, store=True, label='locked', template={Attribute.EXTRACTABLE: False})
session.generate_keypair(KeyType.RSA, 2048, store=True, label='pair', id=b'78',
    private_template={Attribute.EXTRACTABLE: True})
"""


def test_adopt(new_group: Callable[..., GroupFixture]) -> None:
    group = new_group(members=2)
    run_client(
        group,
        "session.generate_key(KeyType.AES, 256, store=True, label='gone', template={\n"
        "    Attribute.EXTRACTABLE: True, Attribute.SENSITIVE: False})\n",
    )
    one, two = group.members["hsm1"], group.members["hsm2"]
    value = tamper(one, "print(session.get_key(label='gone')[Attribute.VALUE].hex())").strip()
    run_client(group, "session.get_key(label='gone').destroy()\n")
    secret = tamper(one, STRANGERS).strip()
    tamper(
        one,
        "session.create_object({Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.KEY_TYPE: KeyType.AES,\n"
        "    Attribute.TOKEN: True, Attribute.LABEL: 'back again', Attribute.EXTRACTABLE: True,\n"
        f"    Attribute.VALUE: bytes.fromhex({value!r})}})\n",
    )
    done = {(item["label"], item["uid"] is None): item for item in document(group, "sync", "--adopt", expected=1)}
    assert ("stranger", False) in done
    assert ("pair", False) in done
    assert "EXTRACTABLE" in done[("locked", True)]["refused"]
    assert "destroyed" in done[("back again", True)]["refused"]
    assert plain.labels(one) == ["back again", "locked", "pair", "pair", "stranger"]
    assert plain.labels(two) == ["pair", "pair", "stranger"]
    assert tamper(two, "print(session.get_key(label='stranger')[Attribute.VALUE].hex())").strip() == secret
    signatures = {plain.use(member, "sign", 3, "pair", b"data", "SHA256_RSA_PKCS") for member in (one, two)}
    assert len(signatures) == 1
    seen = run_client(group, "print(session.get_key(label='stranger')[Attribute.ID])\n")
    assert seen.strip() == "b'77'"
    again = document(group, "sync", "--adopt", expected=1)
    assert {item["label"] for item in again} == {"locked", "back again"}
    assert document(group, "verify")["differences"] == []
    check_filter_by_object(group, "stranger", done[("stranger", False)]["uid"])


def check_filter_by_object(group: GroupFixture, label: str, uid: str) -> None:
    """Events about one object, by its label or UID; people who get no data (bundle, hook) do not read of it."""
    (event,) = document(group, "journal", "list", "--object", label)
    assert (event["event"], event["data"]) == ("object adopted", {f"object:{uid}": label})
    assert label not in event["text"] and uid not in event["text"]
    assert document(group, "journal", "list", "--object", uid.upper()) == [event]
    assert document(group, "journal", "list", "--object", "nothing of this name") == []
    assert f"({label!r} {uid})" in group.admin("journal", "tail", "--object", label).stdout


def test_journal(shared: GroupFixture) -> None:
    events = document(shared, "journal", "list")
    assert events[0]["event"] == "group created"
    assert [one["number"] for one in events] == sorted(one["number"] for one in events)
    assert document(shared, "journal", "list", "--since", "2999-01-01") == []
    assert document(shared, "journal", "list", "--until", "2001-01-01") == []
    assert shared.admin("journal", "list", "--since", "yesterday").returncode == 2
    assert all(one["member"] == "hsm2" for one in document(shared, "journal", "list", "--member", "hsm2"))
    for command in ("list", "tail"):
        unknown = shared.admin("journal", command, "--member", "nope")
        assert unknown.returncode == 2 and unknown.stdout == "" and "'nope'" in unknown.stderr, unknown.stderr
    created = document(shared, "journal", "list", "--event", "group created")
    assert [one["event"] for one in created] == ["group created"]
    assert "group created" in shared.admin("journal", "tail", "-n", "1000").stdout
    verified = shared.admin("journal", "verify")
    assert verified.returncode == 0, verified.stdout
    assert "sealed" in verified.stdout


def test_notes_are_the_table_of_what_is_to_do(shared: GroupFixture) -> None:
    noted = shared.admin("journal", "note", "firmware 7.8.4", "--done", "hsm1", "--to-do", "hsm2")
    assert noted.returncode == 0, noted.stderr
    (action,) = document(shared, "journal", "todo", expected=1)
    assert action["action"] == "firmware 7.8.4"
    assert action["members"] == {"hsm1": "done", "hsm2": "to do"}
    shown = shared.admin("journal", "todo")
    assert "complete" in shown.stdout
    number = str(action["number"])
    assert shared.admin("journal", "note", "x", "--action", number, "--done", "hsm9").returncode == 2
    assert shared.admin("journal", "note", "x", "--action", "99999", "--done", "hsm1").returncode == 2
    assert shared.admin("journal", "note", "done now", "--action", number, "--done", "hsm2").returncode == 0
    assert document(shared, "journal", "todo") == []
    (action,) = document(shared, "journal", "todo", "--all")
    assert action["complete"]
