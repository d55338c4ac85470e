"""A journal that was lost, copied or put back (issue 3, 6): real members, real commands."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import plain
from tests.support.groups import GroupFixture, copy_group, make_group, run_client

_MAKE = """
for n in range(2):
    session.generate_key(KeyType.AES, 256, store=True, label=f"key {n}")
session.generate_keypair(KeyType.RSA, 2048, store=True, label="signer")
doomed = session.generate_key(KeyType.AES, 256, store=True, label="doomed")
doomed.destroy()
"""
_NAMES = ["key 0", "key 1", "signer", "signer"]
_LIST = "print(sorted(o.label for o in session.get_objects()))\n"


@pytest.fixture(scope="module")
def template(fast_folder: Path) -> GroupFixture:
    group = make_group(fast_folder / "rebuild-template", members=2, isolation="none")
    run_client(group, _MAKE)
    return group


@pytest.fixture
def group(template: GroupFixture, fast_folder: Path) -> Iterator[GroupFixture]:
    folder = fast_folder / "rebuild"
    copied = copy_group(template, folder)
    assert copied.admin("sync").returncode == 0
    yield copied
    shutil.rmtree(folder)


def lose(group: GroupFixture) -> None:
    for end in ("", "-wal", "-shm", ".view"):
        (group.folder / f"journal.db{end}").unlink(missing_ok=True)


def test_a_lost_journal_is_rebuilt_and_the_group_replicates_again(group: GroupFixture) -> None:
    lose(group)
    refused = group.admin("status")
    assert "journal rebuild" in refused.stdout + refused.stderr
    done = group.admin("journal", "rebuild", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    told = json.loads(done.stdout)
    assert told["objects"] == 4 and told["doubtful"] == [] and told["not_replicable"] == []
    assert any("destroyed before now" in text for text in told["unknown"])
    synced = group.admin("sync")
    assert synced.returncode == 0, synced.stderr + synced.stdout
    made = run_client(group, 'session.generate_key(KeyType.AES, 256, store=True, label="new")\n' + _LIST)
    assert made.strip().endswith(str(sorted([*_NAMES, "new"])))
    for name in group.members:
        assert sorted(plain.labels(group.members[name])) == sorted([*_NAMES, "new"])

    # one that is well is not overwritten without a word
    again = group.admin("journal", "rebuild")
    assert again.returncode == 2 and "nothing was changed" in again.stderr
    assert group.admin("verify").returncode == 0


def test_a_journal_that_was_put_back_changes_nothing_until_it_is_reconciled(group: GroupFixture) -> None:
    """A backup of the file is put back after a key was made, and another one destroyed."""
    journal = group.folder / "journal.db"
    kept = group.folder / "kept.db"
    put_back(kept, journal)
    run_client(
        group,
        'session.generate_key(KeyType.AES, 256, store=True, label="later")\n'
        'next(iter(session.get_objects({Attribute.LABEL: "key 0"}))).destroy()\n',
    )
    assert group.admin("sync").returncode == 0
    put_back(journal, kept)

    program = (
        "import hagroup\n"
        "try:\n"
        '    session.generate_key(KeyType.AES, 256, store=True, label="never")\n'
        "except hagroup.HAError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    told = run_client(group, program)
    assert "no change is made until `ha-admin recover`" in told, told
    assert group.admin("recover").returncode == 2
    done = group.admin("recover", "--yes")
    assert "'key 0'" in done.stdout and "doubtful" in done.stdout, done.stdout + done.stderr
    group.admin("sync")
    assert run_client(group, _LIST).strip() == str(sorted([*_NAMES, "later"][1:]))
    for name in group.members:
        assert sorted(plain.labels(group.members[name])) == sorted([*_NAMES, "later"][1:])


def test_what_one_member_alone_still_has_is_neither_served_nor_destroyed(group: GroupFixture) -> None:
    group.stop("hsm2")
    run_client(group, 'next(iter(session.get_objects({Attribute.LABEL: "key 0"}))).destroy()\n')
    group.bring_back("hsm2")
    lose(group)
    done = group.admin("journal", "rebuild", "--json")
    assert done.returncode == 1, done.stderr + done.stdout
    (doubtful,) = json.loads(done.stdout)["doubtful"]
    assert doubtful["label"] == "key 0"
    assert group.admin("sync").returncode == 0
    assert run_client(group, _LIST).strip() == str(_NAMES[1:])
    assert "key 0" in plain.labels(group.members["hsm2"])
    assert "key 0" not in plain.labels(group.members["hsm1"])


def test_a_copy_is_refused_until_it_is_adopted(group: GroupFixture) -> None:
    journal, copy = group.folder / "journal.db", group.folder / "copy.db"
    run_client(group, 'next(iter(session.get_objects({Attribute.LABEL: "key 0"}))).destroy()\n')
    shutil.copy(journal, copy)
    journal.unlink()
    copy.rename(journal)
    refused = group.admin("sync")
    assert refused.returncode == 2 and "journal adopt" in refused.stderr and "is not the file" in refused.stderr
    assert "not confirmed" in group.admin("journal", "adopt").stderr
    done = group.admin("journal", "adopt", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert group.admin("sync").returncode == 0
    assert run_client(group, _LIST).strip() == str(_NAMES[1:])


def put_back(journal: Path, kept: Path) -> None:
    """Into the very file: only the members' manifests can tell."""
    source, target = sqlite3.connect(kept), sqlite3.connect(journal)
    source.backup(target)
    source.close()
    target.close()


def test_an_older_configuration_is_refused(group: GroupFixture) -> None:
    """Members were added since, or are other tokens now; one that was removed since is not used, and told."""
    text = group.toml.read_text()
    sections = text.split("[[member]]")
    serial = group.members["hsm2"]["serial"]
    third = sections[2].replace('"hsm2"', '"hsm3"').replace(serial, "0123456789abcdef")
    for older, told in (
        (
            "[[member]]".join(sections[:2]).replace("min_replicas  = 2", "min_replicas  = 1"),
            "has a member 'hsm2' that this file does not have",
        ),
        (
            text.replace(serial, "0123456789abcdef"),
            f"has token_serial 0123456789abcdef, the group's member of that name has {serial}",
        ),
    ):
        group.toml.write_text(older)
        refused = group.admin("sync")
        assert refused.returncode == 2 and told in refused.stderr, refused.stderr
        program = (
            f"import hagroup\ntry: hagroup.lib({str(group.toml)!r})\nexcept hagroup.HAError as error: print(error)"
        )
        assert (
            told in subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        )
    group.toml.write_text("[[member]]".join([*sections, third]))
    assert group.admin("sync").returncode == 0
    assert {one["name"] for one in group.status()["members"]} == {"hsm1", "hsm2"}
    doctor = group.admin("doctor")
    assert "hsm3" in doctor.stdout, doctor.stdout
    group.toml.write_text(text)


def test_a_journal_of_before_the_group_was_cleared_brings_nothing_back(group: GroupFixture) -> None:
    journal, kept = group.folder / "journal.db", group.folder / "kept.db"
    put_back(kept, journal)
    assert group.admin("clear", "--yes").returncode == 0
    put_back(journal, kept)
    program = "try: session.generate_key(KeyType.AES, 256, store=True)\nexcept pkcs11.HAError as error: print(error)\n"
    assert "no change is made until `ha-admin recover`" in run_client(group, program)
    assert "doubtful" in group.admin("recover", "--yes").stdout
    assert group.admin("sync").returncode == 0
    assert run_client(group, _LIST).strip() == "[]"
    for name in group.members:
        assert plain.labels(group.members[name]) == []


def test_killed_anywhere_the_same_command_completes_it(template: GroupFixture, fast_folder: Path) -> None:
    """A journal that was copied, with changes in its log: what it knows is not lost to an attempt that was cut off. One
    member was away when a key was destroyed: only the journal knows that."""
    began, state = fast_folder / "rebuild-began", fast_folder / "rebuild-state"
    first = copy_group(template, began)
    assert first.admin("sync").returncode == 0
    first.take_away("hsm2")
    program = (
        'next(iter(session.get_objects({Attribute.LABEL: "key 0"}))).destroy()\n'
        f"import subprocess\nsubprocess.run(['cp', '-a', {str(began)!r}, {str(state)!r}], check=True)\n"
    )
    run_client(first, program)
    assert (state / "journal.db-wal").stat().st_size > 0
    (state / "hsm2" / "tokens.away").rename(state / "hsm2" / "tokens")

    def completes(group: GroupFixture, step: int) -> None:
        again = group.admin("journal", "adopt", "--yes", "--json")
        assert again.returncode == 0, f"killed before change {step}: {again.stdout}{again.stderr}"
        told = json.loads(again.stdout)
        assert (told["objects"], told["tombstones"], told["doubtful"]) == (3, 2, []), step

    group = killed_before_each_change(state, began, ("adopt", "--yes"), completes)
    assert group.admin("sync").returncode == 0
    for name in group.members:
        assert plain.labels(group.members[name]) == _NAMES[1:]


def test_killed_anywhere_in_the_rebuild_of_a_lost_file(group: GroupFixture) -> None:
    lose(group)

    def completes(group: GroupFixture, step: int) -> None:
        again = group.admin("journal", "rebuild", "--json")
        if again.returncode:  # it was complete
            assert again.returncode == 2 and "nothing was changed" in again.stderr, (step, again.stderr)
        else:
            told = json.loads(again.stdout)
            assert (told["objects"], told["doubtful"], told["not_replicable"]) == (4, [], []), step

    killed = killed_before_each_change(group.folder, group.folder, ("rebuild",), completes)
    assert killed.admin("sync").returncode == 0
    assert killed.admin("verify").returncode == 0
    for name in killed.members:
        assert sorted(plain.labels(killed.members[name])) == sorted(_NAMES)


def killed_before_each_change(
    state: Path, called: Path, command: tuple[str, ...], completes: Callable[[GroupFixture, int], None]
) -> GroupFixture:
    """Kill ``journal COMMAND`` before each of the changes that it makes to files; returns the group of the last run.

    :param state: the group's folder as the command finds it, and ``called`` where it was when it was made.
    """
    step = 0
    while True:
        folder = state.with_name("rebuild-killed")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(state, folder)
        for file in [folder / "hagroup.toml", *folder.glob("*/softhsm2.conf")]:
            file.write_text(file.read_text().replace(str(called), str(folder)))
        group = GroupFixture(folder / "hagroup.toml")
        group.reload()
        done = group.admin("journal", *command, watch=folder, kill_before=(step := step + 1))
        completes(group, step)
        left = {path.name.partition("replaced")[0] for path in folder.iterdir() if "journal" in path.name}
        assert left <= {"journal.db", "journal.db.", "journal.db.view", ".journal.db.locks"}, (
            f"killed before change {step}: {left}"
        )
        if done.returncode != -signal.SIGKILL:
            break
    print(f"killed before each of {step - 1} changes to files")
    assert step > 4
    return group
