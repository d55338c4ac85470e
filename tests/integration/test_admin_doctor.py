"""``doctor``, ``recover``, ``status --watch``, ``--quiet``, completion, by real processes (issue 4)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest

from hagroup.engine import bundle
from tests.support import plain
from tests.support.groups import GroupFixture, make_group, run_client, wait_until


@pytest.fixture(scope="module")
def shared(fast_folder: Any) -> GroupFixture:
    return make_group(fast_folder / "examined", members=2)


def checks(group: GroupFixture, expected: int) -> dict[str, list[dict[str, str]]]:
    done = group.admin("doctor", "--json")
    assert done.returncode == expected, done.stdout + done.stderr
    found: dict[str, list[dict[str, str]]] = {}
    for one in json.loads(done.stdout):
        found.setdefault(one["subject"], []).append(one)
    return found


def bad(found: dict[str, list[dict[str, str]]]) -> set[str]:
    return {subject for subject, lines in found.items() for line in lines if line["state"] == "bad"}


def test_doctor_finds_nothing(shared: GroupFixture) -> None:
    found = checks(shared, 0)
    assert bad(found) == set()
    assert {"versions", "configuration", "journal", "member hsm1", "member hsm2"} <= set(found)
    assert "python-pkcs11" in found["versions"][-1]["found"]
    assert [line["state"] for line in found["watchdog"]] == ["warning"], "none is running here"
    assert [line["state"] for line in found["clocks"]] == ["ok"]
    assert "1 of" in shared.admin("doctor").stdout
    assert "1 of" not in shared.admin("--quiet", "doctor").stdout


def test_bundle(shared: GroupFixture, tmp_path: Path) -> None:
    """For a support person: everything but secrets, into a new file, also where nothing works."""
    file = tmp_path / "bundle.tar.gz"
    run_client(shared, "session.generate_key(KeyType.AES, 256, store=True, label='very secret name')")
    text = shared.toml.read_text()
    assert "name" in text
    shared.toml.write_text(re.sub(r"^(name +=.*)$", r'\1\ninit_args = "password=hunter2"', text, count=1, flags=re.M))
    try:
        done = shared.admin("doctor", "--bundle", str(file))
    finally:
        shared.toml.write_text(text)
    assert done.returncode == 0, done.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    with tarfile.open(file) as archive:
        found = {entry.name.partition("/")[2]: archive.extractfile(entry).read() for entry in archive}  # type: ignore
    assert {"doctor.json", "hagroup.toml", "status.json", "events.json", "members.json"} <= found.keys()
    assert b"init_args" in found["hagroup.toml"]
    whole = b"\n".join(found.values())
    for secret in (b"hunter2", b"very secret name", b'"1234"'):
        assert secret not in whole
    assert shared.admin("doctor", "--bundle", str(file)).returncode == 2, "over no other file"
    broken = tmp_path / "none.toml"
    broken.write_text("nonsense")
    broken.chmod(0o600)
    command = [sys.executable, "-m", "hagroup.admin.cli", "--config", broken, "doctor", "--bundle", tmp_path / "second"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


SECRETS = r"""
[group]
label = "payments"  # formerly SECRET-0
[[member]]
name = "hsm1"
module = "/usr/lib/vendor.so"
"init_args" = "quoted \" SECRET-1"
pin = { command = ["get]", "SECRET-2"] }
env = { VENDOR_PASSWORD = "SECRET-3", VENDOR_CONF = "vendor.conf", HERE = "./hagroup.toml", GONE = "a/SECRET-4" }
[[member]]
name = "hsm2"
init_args = '''
SECRET-5
'''
pin = "SECRET-6"
pim = { file = "SECRET-7" }
[watchdog]
interval = 5.0
hook = ["/usr/bin/tell", "--token", "SECRET-8"]
webhook = { url = "https://host/SECRET-9", secret_file = "secret" }
[watchdgo]
webhook = { url = "SECRET-10" }
"""


def test_nothing_that_may_be_a_secret_is_in_a_bundle(tmp_path: Path) -> None:
    """However it is written; what nobody knows is left out, too."""
    (tmp_path / "hagroup.toml").write_text(SECRETS)
    shown = bundle.redacted(SECRETS, tmp_path)
    assert "SECRET" not in shown
    found = tomllib.loads(shown)
    assert found["group"] == {"label": "payments"}
    assert [one["name"] for one in found["member"]] == ["hsm1", "hsm2"]
    assert found["member"][0]["module"] == "/usr/lib/vendor.so"
    assert found["member"][0]["env"]["HERE"] == "./hagroup.toml", "a path helps who reads it"
    assert found["watchdog"]["interval"] == 5.0
    with pytest.raises(ValueError, match="Invalid"):
        bundle.redacted("pin = SECRET", tmp_path)


def test_doctor_names_what_is_wrong(shared: GroupFixture) -> None:
    shared.take_away("hsm2")
    try:
        found = checks(shared, 1)
    finally:
        shared.bring_back("hsm2")
    assert bad(found) == {"member hsm2"}
    assert all(line["remedy"] for lines in found.values() for line in lines if line["state"] != "ok")
    pin = shared.folder / "hsm1" / "pin"
    pin.chmod(0o644)
    try:
        found = checks(shared, 1)
    finally:
        pin.chmod(0o600)
    assert str(pin) in found["configuration"][-1]["found"]
    journal = shared.folder / "journal.db"
    journal.rename(shared.folder / "away.db")
    try:
        assert "journal" in bad(checks(shared, 1))
    finally:
        (shared.folder / "away.db").rename(journal)
    assert bad(checks(shared, 0)) == set()


def test_doctor_says_where_a_moved_journal_is(fast_folder: Any) -> None:
    group = make_group(fast_folder / "examined-moved", members=2)
    assert group.admin("journal", "move", "sqlite:journal.db", "sqlite:moved.db", "--yes").returncode == 0
    (line,) = checks(group, 1)["journal"]
    assert f"was moved to sqlite:{group.folder}/moved.db" in line["found"]
    assert f"write sqlite:{group.folder}/moved.db into [journal] url" in line["remedy"], line
    group.toml.write_text(group.toml.read_text().replace("sqlite:journal.db", "sqlite:moved.db"))
    copied = group.folder / "copied.db"
    copied.write_bytes((group.folder / "moved.db").read_bytes())
    (group.folder / "moved.db").unlink()
    copied.rename(group.folder / "moved.db")
    (line,) = checks(group, 1)["journal"]
    assert "journal adopt" in line["remedy"], line


def test_recover(shared: GroupFixture) -> None:
    shared.take_away("hsm2")
    run_client(shared, "session.generate_key(KeyType.AES, 256, store=True, label='late')\n")
    done = shared.admin("recover", "--json")
    assert done.returncode == 1
    members = {member["name"]: member for member in json.loads(done.stdout)["members"]}
    assert members["hsm2"]["owed"] == 1
    assert members["hsm2"]["reason"]
    shared.bring_back("hsm2")
    wait_until(lambda: shared.admin("recover").returncode == 0, "recover")
    assert "late" in plain.labels(shared.members["hsm2"])


def test_watch_refreshes(shared: GroupFixture) -> None:
    command = [sys.executable, "-m", "hagroup.admin.cli", "--config", str(shared.toml)]
    command += ["status", "--watch", "--interval", "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        seen = 0
        for line in watching.stdout:
            seen += line.startswith("group payments")
            if seen == 2:
                break
        watching.send_signal(signal.SIGINT)
        _, errors = watching.communicate(timeout=30)
    assert watching.returncode == 130
    assert "Traceback" not in errors


def test_completion() -> None:
    command = [sys.executable, "-m", "hagroup.admin.cli", "--show-completion", "bash"]
    # typer looks for a shell among the parent processes, and a test run need not have one
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "complete" in done.stdout
