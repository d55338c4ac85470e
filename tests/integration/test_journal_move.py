"""The journal moves to etcd and back, and an etcd journal is put back from a backup: real members, real commands."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from hagroup.config.load import load
from hagroup.config.model import SqliteUrl
from hagroup.config.write import journal_section
from hagroup.journal import SystemClock, open_for_moving
from tests.support import plain
from tests.support.etcd import Cluster
from tests.support.groups import GroupFixture, make_group, run_client, wait_until
from tests.support.hosts import Host
from tests.support.terminal import Terminal

_HA_ADMIN = (sys.executable, "-m", "hagroup.admin.cli")
_MAKE = """
session.generate_keypair(KeyType.RSA, 1024, store=True, label="signer")
for label in ("kept", "doomed"):
    session.generate_key(KeyType.AES, 256, store=True, label=label)
for one in session.get_objects({Attribute.LABEL: "doomed"}):
    one.destroy()
"""
_LIST = "print(sorted(one.label for one in session.get_objects()))"


@pytest.fixture(scope="module")
def node() -> Iterator[Cluster]:
    made = Cluster(1)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def group(fast_folder: Path) -> GroupFixture:
    made = make_group(fast_folder / "moving", members=2)
    run_client(made, _MAKE)
    return made


def _options(node: Cluster) -> list[str]:
    section = node.section("moved")
    return ["--ca", str(section.ca), "--cert", str(section.cert), "--key", str(section.key)]


def _configured(group: GroupFixture, journal: object) -> None:
    """Write another [journal], as a person does."""
    config = load(group.toml)
    text = group.toml.read_text()
    old = journal_section(config.journal, config.folder)
    assert old in text
    group.toml.write_text(text.replace(old, journal_section(journal, config.folder)))  # type: ignore[arg-type]


def _not_confirmed(group: GroupFixture, words: list[str]) -> None:
    """Nobody is there who says yes, or the one who is says no."""
    done = group.admin("journal", "move", *words)
    assert done.returncode == 2 and "not confirmed (give --yes in scripts); nothing was moved" in done.stderr, done
    terminal = Terminal([*_HA_ADMIN, "--config", group.toml, "journal", "move", *words])
    terminal.expect("[y/N]")
    terminal.send("n\n")
    assert terminal.end() == 2, terminal.text


def _in_order(group: GroupFixture, labels: list[str]) -> None:
    done = group.admin("sync")
    assert done.returncode == 0, done.stdout + done.stderr
    assert run_client(group, _LIST).strip() == str(labels)
    for member in group.members.values():
        assert sorted(plain.labels(member)) == labels
    for command in (["verify"], ["journal", "verify"]):
        done = group.admin(*command)
        assert done.returncode == 0, done.stdout + done.stderr


def test_to_etcd_under_a_running_program(group: GroupFixture, node: Cluster) -> None:
    old, new = load(group.toml).journal, node.section("moved")
    host = Host(group)
    try:
        host.started()
        host.do("find", "signer")
        for broken in (["sqlite:other.db", str(new.url)], ["x", "y"]):
            done = group.admin("journal", "move", *broken)
            assert done.returncode == 2 and "nothing was moved" in done.stderr, done.stderr
        _not_confirmed(group, ["sqlite:journal.db", str(new.url), *_options(node)])
        host.do("aes", "doomed")
        host.do("destroy", "doomed")
        journal = open_for_moving(old, clock=SystemClock())  # a move that was cut off after its first step
        journal.begin_move(str(new.url), at_once=True)
        journal.close()
        refused = host.ask("aes", "refused")
        assert "JournalUnavailable" in refused["error"] and str(new.url) in refused["text"], refused
        assert host.do("sign", "signer") == 128
        done = group.admin("journal", "move", "sqlite:journal.db", str(new.url), "--cancel", *_options(node))
        assert done.returncode == 0, done.stderr
        host.do("aes", "meanwhile")

        command = [*_HA_ADMIN, "--config", str(group.toml), "journal", "move"]
        process = subprocess.Popen([*command, "sqlite:journal.db", str(new.url), "--yes", *_options(node)])
        made = 0
        while "ok" in host.ask("aes", "more"):
            made += 1
            time.sleep(0.2)  # a program that has pauses: the move begins in one
        process.send_signal(signal.SIGKILL)  # wherever it is by now
        process.wait()
        done = group.admin("journal", "move", "sqlite:journal.db", str(new.url), "--yes", *_options(node))
        assert done.returncode == 0, done.stderr
        assert str(new.url) in done.stdout and "[journal]" in done.stdout
        assert host.do("sign", "signer") == 128, "as without the journal"
        refused = host.ask("aes", "refused")
        assert str(new.url) in refused["text"], refused
    finally:
        host.close()
    for again in (["status"], ["journal", "rebuild", "--yes"], ["sync"]):
        done = group.admin(*again)
        assert done.returncode != 0 and f"moved to {new.url}" in done.stdout + done.stderr, done.stdout + done.stderr
    _configured(group, msgspec.structs.replace(new, mirror=old.mirror, offline_serving=old.offline_serving))
    _in_order(group, ["kept", "meanwhile", *["more"] * made, "signer", "signer"])
    run_client(group, 'for one in session.get_objects({Attribute.LABEL: "more"}): one.destroy()')


def test_a_restored_etcd_is_reconciled_with_the_members(group: GroupFixture, node: Cluster) -> None:
    run_client(group, 'session.generate_key(KeyType.AES, 256, store=True, label="old")')
    data, backup = node.folder / "node1", node.folder / "backup"
    _stop(node)
    shutil.copytree(data, backup)
    _start(node)
    run_client(group, 'session.get_key(label="old").destroy()')
    run_client(group, 'session.generate_key(KeyType.AES, 256, store=True, label="new")')
    _stop(node)
    shutil.rmtree(data)
    backup.rename(data)
    _start(node)
    assert group.admin("sync").returncode != 0, "it is behind: nothing is changed by it"
    for member in group.members.values():
        assert "new" in plain.labels(member)
    for step in (5, 6):  # killed where it seals the old journal, and keeps a copy of it
        assert group.admin("recover", "--yes", kill_before=step).returncode == -signal.SIGKILL
    refused = group.admin("sync")
    assert refused.returncode != 0 and "is not complete" in refused.stderr, refused.stderr
    for step in itertools.count(1):  # and then before each change, going on from where the one before was killed
        done = group.admin("recover", "--yes", kill_before=step)
        if done.returncode != -signal.SIGKILL:
            break
    assert step > 5
    assert done.returncode == 1, done.stdout + done.stderr
    assert "rebuilt: 5 objects" in done.stdout and "doubtful, neither taken over nor destroyed: 'old'" in done.stdout
    _in_order(group, ["kept", "meanwhile", "new", "signer", "signer"])


def _stop(node: Cluster) -> None:
    pid = int((node.folder / "node1.pid").read_text())
    node.kill("node1")
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text(), "it is gone")


def _start(node: Cluster) -> None:
    node.restart("node1")
    node.wait()


def test_back_to_sqlite(group: GroupFixture, node: Cluster) -> None:
    url = str(load(group.toml).journal.url)
    done = group.admin("journal", "move", url, "sqlite:journal.db", "--yes")
    assert done.returncode == 2 and "exists already" in done.stderr, done.stderr
    _not_confirmed(group, [url, "sqlite:back.db"])
    assert not (group.folder / "back.db").exists()
    terminal = Terminal([*_HA_ADMIN, "--config", group.toml, "journal", "move", url, "sqlite:back.db"])
    terminal.expect("[y/N]")
    terminal.send("y\n")
    assert terminal.end() == 0, terminal.text
    old = load(group.toml).journal
    done = group.admin("status")
    assert f"moved to sqlite:{group.folder}/back.db" in done.stdout + done.stderr
    back = SqliteUrl(path=group.folder / "back.db")
    _configured(group, msgspec.structs.replace(old, url=back, ca=None, cert=None, key=None))
    _in_order(group, ["kept", "meanwhile", "new", "signer", "signer"])
