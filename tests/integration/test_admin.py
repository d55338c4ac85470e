"""``ha-admin`` as people and programs meet it: help, exit statuses, documents, no traceback whatever is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hagroup.admin.cli import app
from hagroup.config.load import load
from hagroup.engine import outstanding, plan
from hagroup.journal import open_journal
from tests.support.groups import PIN, ROOT, GroupFixture, make_group, run_client, wait_until
from tests.support.terminal import Terminal

FINE, DEGRADED, USAGE, UNREACHABLE = 0, 1, 2, 3
ADMIN = [sys.executable, "-m", "hagroup.admin.cli"]


@pytest.fixture(scope="module")
def group(fast_folder: Path) -> GroupFixture:
    made = make_group(fast_folder / "admin")
    run_client(made, "session.generate_key(KeyType.AES, 128, store=True, label='a key')\n")
    assert made.admin("sync").returncode == FINE
    return made


@pytest.fixture(scope="module")
def bare(fast_folder: Path) -> GroupFixture:
    return make_group(fast_folder / "admin-bare", "--no-pin-sources", members=2)


NOBODY_SPECIAL = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
"""Permissions of files count for root too."""


def run(
    *arguments: str, env: dict[str, str] | None = None, before: Sequence[str] = (), **more: Any
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*before, *ADMIN, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
        env={name: value for name, value in (os.environ | (env or {})).items() if name != "HAGROUP_CONFIG" or env},
        **more,
    )
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    return done


def refused(done: subprocess.CompletedProcess[str], status: int = USAGE) -> str:
    """One sentence on standard error, nothing else."""
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    assert done.stderr.startswith("ha-admin: ")
    assert len(done.stderr.strip().splitlines()) == 1
    return done.stderr


def help_of(*path: str) -> str:
    """In this process: there are many commands."""
    done = CliRunner().invoke(app, [*path, "--help"])
    assert done.exit_code == FINE, path
    return done.output


def commands_of(*path: str) -> list[str]:
    section = help_of(*path).split("Commands:")
    return re.findall(r"^  (\w[\w-]*)  ", section[1], re.MULTILINE) if len(section) == 2 else []


def test_every_command_has_help() -> None:
    found = commands_of()
    assert {"group", "member", "status", "sync", "objects"} <= set(found)
    for name in found:
        for path in [(name,), *((name, inner) for inner in commands_of(name))]:
            lines = help_of(*path).split("Usage:")[1].strip().splitlines()
            assert len(lines) > 2, f"{path}: says nothing about itself"
            assert lines[2].strip(), path
    assert run("status", "--help").returncode == FINE


def test_the_installed_script_is_the_same() -> None:
    script = Path(sys.executable).with_name("ha-admin")
    done = subprocess.run([str(script), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == FINE
    assert "Exit status: 0 fine" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [(), ("frobnicate",), ("status", "--nope"), ("objects", "--member"), ("group",), ("group", "frobnicate")],
)
def test_usage(group: GroupFixture, arguments: tuple[str, ...]) -> None:
    done = run("--config", str(group.toml), *arguments)
    assert done.returncode == USAGE
    assert done.stderr + done.stdout


# -- configuration -------------------------------------------------------------------------------------------------


def test_no_configuration(tmp_path: Path) -> None:
    assert "HAGROUP_CONFIG" in refused(run("status"))
    assert "does not exist" in refused(run("--config", str(tmp_path / "none.toml"), "status"))
    refused(run("--config", str(tmp_path), "status"))
    refused(run("status", env={"HAGROUP_CONFIG": str(tmp_path / "none.toml")}))


def test_configuration_from_the_environment(group: GroupFixture) -> None:
    assert run("status", env={"HAGROUP_CONFIG": str(group.toml)}).returncode == FINE


def test_broken_configuration(group: GroupFixture, tmp_path: Path) -> None:
    broken = tmp_path / "hagroup.toml"
    broken.write_text(group.toml.read_text().replace("min_replicas", "min_replika"))
    broken.chmod(0o600)
    assert "min_replika" in refused(run("--config", str(broken), "status"))
    broken.write_text("this is no TOML")
    assert "line 1" in refused(run("--config", str(broken), "status"))


def test_configuration_that_others_may_write(group: GroupFixture, tmp_path: Path) -> None:
    copy = tmp_path / "hagroup.toml"
    copy.write_text(group.toml.read_text())
    copy.chmod(0o666)
    refused(run("--config", str(copy), "status"))


def test_unreadable_configuration(group: GroupFixture, tmp_path: Path) -> None:
    copy = tmp_path / "hagroup.toml"
    copy.write_text(group.toml.read_text())
    copy.chmod(0)
    assert str(copy) in refused(run("--config", str(copy), "status", before=NOBODY_SPECIAL))


def test_group_that_was_not_created(group: GroupFixture, tmp_path: Path) -> None:
    text = "\n".join(line for line in absolute(group).splitlines() if not line.startswith("serial "))
    copy = tmp_path / "hagroup.toml"
    copy.write_text(text)
    copy.chmod(0o600)
    for command in ("status", "sync", "objects"):
        assert "group create" in refused(run("--config", str(copy), command))


def test_group_that_was_created_already(group: GroupFixture) -> None:
    assert "created already" in refused(group.admin("group", "create", "--yes"))


# -- journal -------------------------------------------------------------------------------------------------------


def test_journal_that_is_not_there(group: GroupFixture) -> None:
    journal = group.folder / "journal.db"
    journal.rename(journal.with_suffix(".away"))
    try:
        done = run("--config", str(group.toml), "status")
        assert done.returncode == DEGRADED
        assert "not reachable" in done.stdout
        assert "since" not in done.stdout, "that is not known without the journal"
        assert str(journal) in done.stdout.replace("\n", "")
        document = json.loads(run("--config", str(group.toml), "status", "--json").stdout)
        assert document["journal"]["ok"] is False
        assert document["group"]["in_sync"] is False
        assert [member["state"] for member in document["members"]] == ["answers"] * 3
        for command in ("sync", "objects"):
            assert str(journal) in refused(run("--config", str(group.toml), command))
    finally:
        journal.with_suffix(".away").rename(journal)
    assert run("--config", str(group.toml), "status").returncode == FINE


def test_damaged_journal(group: GroupFixture, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    place.mkdir(mode=0o700)
    (place / "journal.db").write_bytes(b"no journal" * 1000)
    (place / "journal.db").chmod(0o600)
    (place / "hagroup.toml").write_text(absolute(group))
    (place / "hagroup.toml").chmod(0o600)
    done = run("--config", str(place / "hagroup.toml"), "objects")
    assert "journal" in refused(done)


def absolute(group: GroupFixture) -> str:
    """The configuration with the members' paths made absolute, to be used from another folder."""
    text = re.sub(r'(SOFTHSM2_CONF = ")(hsm)', rf"\g<1>{group.folder}/\g<2>", group.toml.read_text())
    return re.sub(r'(file = ")(hsm)', rf"\g<1>{group.folder}/\g<2>", text)


def test_copied_journal(group: GroupFixture, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    place.mkdir(mode=0o700)
    shutil.copy(group.folder / "journal.db", place / "journal.db")
    (place / "hagroup.toml").write_text(absolute(group))
    (place / "hagroup.toml").chmod(0o600)
    for command in ("status", "objects", "sync"):
        refused(run("--config", str(place / "hagroup.toml"), command))


def test_journal_of_another_group(group: GroupFixture, bare: GroupFixture, tmp_path: Path) -> None:
    place = tmp_path / "mixed"
    place.mkdir(mode=0o700)
    other = absolute(group).replace('"sqlite:journal.db"', f'"sqlite:{bare.folder / "journal.db"}"')
    (place / "hagroup.toml").write_text(other)
    (place / "hagroup.toml").chmod(0o600)
    for command in ("status", "objects", "sync"):
        assert "belongs to group" in refused(run("--config", str(place / "hagroup.toml"), command))


# -- documents -----------------------------------------------------------------------------------------------------


def test_status_document(group: GroupFixture) -> None:
    document = group.status()
    assert set(document) >= {"group", "members", "objects", "tombstones", "journal"}
    assert set(document["group"]) >= {"label", "serial", "in_sync", "state"}
    assert document["group"]["state"] == "ok"
    assert document["group"]["in_sync"] is True
    assert document["objects"] == 1
    assert document["tombstones"] == 0
    assert document["journal"]["ok"] is True
    wanted = {"name", "serial", "role", "state", "in_sync", "missing", "stale", "pending_deletes", "unmanaged", "since"}
    for member in document["members"]:
        assert set(member) >= wanted
        assert member["state"] == "in service"
    assert [member["name"] for member in document["members"]] == ["hsm1", "hsm2", "hsm3"]


def test_objects_document(group: GroupFixture) -> None:
    (shown,) = json.loads(group.admin("objects", "--json").stdout)
    assert shown["label"] == "a key"
    assert shown["object_class"] == "secret key"
    assert shown["key_type"] == "aes"
    on_member = json.loads(group.admin("objects", "--member", "hsm2", "--json").stdout)
    assert [item["id"] for item in on_member if item["label"] == "a key"] == [shown["id"]]
    assert "hsm9" in refused(group.admin("objects", "--member", "hsm9"))
    assert "a key" in group.admin("objects").stdout


def test_sync_document(group: GroupFixture) -> None:
    done = group.admin("sync", "--json")
    assert done.returncode == FINE
    document = json.loads(done.stdout)
    assert document["in_sync"] is True
    assert {member["name"]: member["owed"] for member in document["members"]} == {"hsm1": 0, "hsm2": 0, "hsm3": 0}


def test_degraded_and_nothing_reachable(group: GroupFixture) -> None:
    group.take_away("hsm1")
    try:
        assert run("--config", str(group.toml), "status").returncode == DEGRADED
        assert group.status()["group"]["state"] == "degraded"
        group.take_away("hsm2")
        group.take_away("hsm3")
        done = run("--config", str(group.toml), "status")
        assert done.returncode == UNREACHABLE
        assert "hsm2" in done.stdout
        assert run("--config", str(group.toml), "status", "--json").returncode == UNREACHABLE
        done = run("--config", str(group.toml), "sync")
        assert done.returncode == UNREACHABLE
        done = run("--config", str(group.toml), "objects", "--member", "hsm1")
        assert done.returncode == UNREACHABLE, done.stderr
    finally:
        for name in group.members:
            if not group.token_folder(name).exists():
                group.bring_back(name)
    assert run("--config", str(group.toml), "status").returncode == FINE


def test_output_in_a_pipe_is_plain(group: GroupFixture) -> None:
    for arguments in (("status",), ("objects",), ("sync",)):
        done = group.admin(*arguments)
        assert done.returncode == FINE
        assert "\x1b" not in done.stdout
    cut = subprocess.run(
        f"{' '.join(ADMIN)} --config {group.toml} objects | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in cut.stderr


# -- PINs ----------------------------------------------------------------------------------------------------------


def test_pins_without_a_terminal(bare: GroupFixture, tmp_path: Path) -> None:
    for arguments in (("sync",), ("objects", "--member", "hsm1")):
        assert "--pin-file" in refused(bare.admin(*arguments))
    pin_file = tmp_path / "pin"
    pin_file.write_text(PIN)
    pin_file.chmod(0o600)
    assert bare.admin("sync", "--pin-file", str(pin_file)).returncode == FINE
    assert "not from both" in refused(bare.admin("sync", "--pin-file", str(pin_file), "--pin-env", "X"))
    assert "X_NOT_SET" in refused(bare.admin("sync", "--pin-env", "X_NOT_SET"))
    assert run("--config", str(bare.toml), "sync", "--pin-env", "THE_PIN", env={"THE_PIN": PIN}).returncode == FINE
    refused(bare.admin("sync", "--pin-file", str(tmp_path / "none")))
    pin_file.chmod(0o644)
    assert "pin" in refused(bare.admin("sync", "--pin-file", str(pin_file)))
    pin_file.chmod(0o600)
    pin_file.write_text("wrong")
    done = bare.admin("sync", "--pin-file", str(pin_file))
    assert "PIN" in refused(done, done.returncode)
    assert done.returncode in (USAGE, UNREACHABLE)
    assert bare.admin("status").returncode == DEGRADED, "one member remembers the failed login"
    assert run("--config", str(bare.toml), "sync", "--pin-env", "THE_PIN", env={"THE_PIN": PIN}).returncode == FINE
    assert bare.admin("status").returncode == FINE


def test_prompt_on_a_terminal(bare: GroupFixture) -> None:
    terminal = Terminal([*ADMIN, "--config", str(bare.toml), "sync"])
    terminal.expect("user PIN:")
    terminal.send(PIN + "\n")
    assert terminal.end() == FINE, terminal.output
    assert PIN.encode() not in terminal.output, "a PIN is not echoed"
    terminal = Terminal([*ADMIN, "--config", str(bare.toml), "status"])
    assert terminal.end() == FINE
    assert b"hsm1" in terminal.output


def test_ctrl_c_at_the_prompt(bare: GroupFixture) -> None:
    terminal = Terminal([*ADMIN, "--config", str(bare.toml), "sync"])
    terminal.expect("user PIN:")
    terminal.send("\x03")
    assert terminal.end() in (USAGE, 130)
    assert b"Traceback" not in terminal.output
    assert b"ha-admin:" in terminal.output


def test_ctrl_c_while_it_works(group: GroupFixture) -> None:
    """``--watch`` goes on until then; it leaves no worker behind."""
    process = subprocess.Popen(
        [*ADMIN, "--config", str(group.toml), "status", "--watch", "--interval", "0.2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert "group payments" in process.stdout.readline()
    time.sleep(0.3)  # wherever it is then
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode in (0, 130), (process.returncode, out, err)
    assert "Traceback" not in err
    wait_until(lambda: not group.workers(), "no workers left")


SHOWN = ("status", "sync --dry-run", "journal todo", "verify")
ON_A_TERMINAL = r"""
import sys
from hagroup.admin import cli
toml, *lines = sys.argv[1:]
for line in lines:
    print("==", line, flush=True)
    sys.argv = ["ha-admin", "--config", toml, *line.split()]
    try:
        cli.main()
    except SystemExit:
        pass
"""


@pytest.fixture(scope="module")
def troubled(group: GroupFixture) -> Iterator[GroupFixture]:
    """One member away, something owed to it, something lost on another one, something to do; two sites."""
    text, toml = group.toml.read_text(), group.folder / "sites.toml"
    for name, site in (("hsm1", "zurich-north"), ("hsm2", "geneva"), ("hsm3", "geneva")):
        text = text.replace(f'= "{name}"\n', f'= "{name}"\nsite = "{site}"\n')
    toml.write_text(text)
    toml.chmod(0o600)
    group.take_away("hsm2")
    run_client(group, "session.generate_key(KeyType.AES, 128, store=True, label='made while one was away')\n")
    journal = open_journal(load(group.toml).journal)
    journal.event(outstanding.NOTE, NOTED, data=outstanding.statuses({"hsm1": "to do", "hsm3": "done"}))
    journal.close()
    yield dataclasses.replace(group, toml=toml)
    group.bring_back("hsm2")


NOTED = "replace the power supply of the HSM in the rack at the northern site, and say so in the change calendar"


@pytest.mark.parametrize("columns", [80, 120])
def test_nothing_is_cut_on_a_terminal(troubled: GroupFixture, columns: int) -> None:
    command = [sys.executable, "-c", ON_A_TERMINAL, troubled.toml, *SHOWN]
    terminal = Terminal(command, env={"COLUMNS": ""}, columns=columns)
    assert terminal.end() == 0, terminal.text
    text = re.sub(r"\x1b\[[0-9;]*m", "", terminal.text).replace("\r", "")
    assert [line for line in text.splitlines() if len(line) > columns] == []
    parts = dict(part.split("\n", 1) for part in text.split("== ")[1:])
    read = {name: " ".join(part.split()) for name, part in parts.items()}
    for name, member in troubled.members.items():
        assert re.search(rf"^{name} +{member['serial']} +active ", parts["status"], re.MULTILINE), text
    for piece in ("zurich-north", "geneva", "hsm2: failed: C_Initialize: CKR_GENERAL_ERROR", NOTED):
        assert piece in read["status"], text
    journal = open_journal(load(troubled.toml).journal)
    steps, actions = plan.plan(journal), outstanding.actions(journal)
    journal.close()
    assert steps
    for step in steps:
        assert step.uid is not None and step.uid in parts["sync --dry-run"].split(), text
        assert step.label in read["sync --dry-run"] and step.reason in read["sync --dry-run"], text
    for action in actions:
        assert action.action in read["journal todo"], text
        assert all(status in read["journal todo"] for status in action.members.values()), text
    assert "member not reachable" in read["verify"] and "C_Initialize: CKR_GENERAL_ERROR" in read["verify"], text
