"""Files and folders that others may change or read are refused, with a remedy that works."""

from __future__ import annotations

import os
import shlex
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from hagroup.config import permissions
from hagroup.config.load import load
from hagroup.config.model import GroupConfig
from hagroup.errors import ConfigurationError

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
TEXT = """\
[group]
label = "g"
[[member]]
name = "hsm1"
module = "module.so"
token_label = "one"
pin = { file = "pin" }
env = { CONF = "hsm1/conf" }
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory where there is one, so that access lists work too."""
    with TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        yield Path(name)


@pytest.fixture
def file(folder: Path) -> Path:
    path = folder / "hagroup.toml"
    for name, content, mode in (("hagroup.toml", TEXT, 0o644), ("module.so", "", 0o755), ("pin", "1234\n", 0o600)):
        (folder / name).write_text(content)
        (folder / name).chmod(mode)
    return path


def refused(file: Path, *parts: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(file)
    sentence = str(caught.value)
    assert str(file) in sentence
    assert len(sentence.splitlines()) == 1
    for part in parts:
        assert part in sentence
    return sentence


def follow(sentence: str) -> None:
    """Does what the sentence says."""
    subprocess.run(shlex.split(sentence.rpartition(": run ")[2]), check=True)


def test_fine(file: Path) -> None:
    assert isinstance(load(file), GroupConfig)
    assert isinstance(load(os.path.relpath(file)), GroupConfig)


@pytest.mark.parametrize("mode", [0o666, 0o646, 0o664, 0o622])
@pytest.mark.parametrize(("name", "key"), [("hagroup.toml", ""), ("module.so", 'line 5: [[member]] "hsm1" module ')])
def test_files_that_others_may_write(file: Path, name: str, key: str, mode: int) -> None:
    (file.parent / name).chmod(mode)
    follow(refused(file, f"{key}{file.parent / name} may be written by others (mode {mode:04o}): run chmod go-w "))
    load(file)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write(file: Path, mode: int) -> None:
    file.parent.chmod(mode)
    follow(refused(file, f"is in the folder {file.parent}, which may be written by others (mode {mode:04o})"))
    load(file)


def test_a_folder_like_tmp(file: Path) -> None:
    file.parent.chmod(0o1777)
    refused(file, "may be written by others (mode 1777): move the file into a folder of its own")


def test_folders_above_are_not_looked_at(folder: Path, file: Path) -> None:
    below = folder / "below"
    below.mkdir(0o755)
    for name in ("hagroup.toml", "module.so", "pin"):
        (folder / name).rename(below / name)
    folder.chmod(0o1777)
    load(below / "hagroup.toml")


def test_a_link_into_a_folder_that_others_may_write(folder: Path, file: Path) -> None:
    (folder / "open").mkdir()
    (folder / "module.so").rename(folder / "open/module.so")
    (folder / "module.so").symlink_to("open/module.so")
    load(file)
    (folder / "open").chmod(0o777)
    refused(file, 'line 5: [[member]] "hsm1" module', f"is in the folder {folder / 'open'}, which may be written")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o610, 0o400 | 0o040])
def test_a_pin_file_that_others_may_read(file: Path, mode: int) -> None:
    (file.parent / "pin").chmod(mode)
    key = 'line 7: [[member]] "hsm1" pin.file '
    sentence = refused(file, f"{key}{file.parent / 'pin'} may be read by others (mode {mode:04o}): run chmod 600 ")
    assert "1234" not in sentence
    follow(sentence)
    load(file)


def test_a_pin_file_read_only_is_fine(file: Path) -> None:
    (file.parent / "pin").chmod(0o400)
    load(file)


@needs_root
@pytest.mark.parametrize("name", ["hagroup.toml", "module.so", "pin", "."])
def test_files_of_another_user(file: Path, name: str) -> None:
    os.chown(file.parent / name, 12345, 0)
    follow(refused(file, "belongs to user number 12345, who is neither root nor the user who runs this: run chown 0 "))
    load(file)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("hagroup.toml", "configuration file"),
        ("module.so", 'line 5: [[member]] "hsm1" module'),
        ("pin", 'line 7: [[member]] "hsm1" pin.file'),
    ],
)
def test_missing_files(file: Path, name: str, key: str) -> None:
    (file.parent / name).unlink()
    refused(file, f"{key} {file.parent / name} does not exist")
    (file.parent / name).mkdir()
    refused(file, f"{key} {file.parent / name} is not a file")


def test_a_pipe_does_not_hold_us(file: Path) -> None:
    (file.parent / "pin").unlink()
    os.mkfifo(file.parent / "pin", 0o600)
    refused(file, "pin is not a file")


def test_text_that_is_not_utf8(file: Path) -> None:
    file.write_bytes(TEXT.encode() + b"# caf\xe9\n")
    refused(file, f"{file}, line 9: the text is not UTF-8")


def test_a_bare_file_name_in_env_that_means_a_file(file: Path) -> None:
    file.write_text(TEXT.replace("hsm1/conf", "conf.d"))
    load(file)
    (file.parent / "conf.d").touch()
    refused(file, 'line 8: [[member]] "hsm1" env.CONF must be written "./conf.d" if it means the file beside')


@pytest.mark.parametrize("kind", ["pin", "hook"])
def test_commands(file: Path, kind: str) -> None:
    def use(command: str) -> str:
        if kind == "hook":
            file.write_text(f'{TEXT}[watchdog]\nhook = ["{command}"]')
            return "line 10: [watchdog] hook "
        file.write_text(TEXT.replace('file = "pin"', f'command = ["{command}"]'))
        return 'line 7: [[member]] "hsm1" pin.command '

    use("true")
    load(file)
    refused(file, f"{use('no-such-command')}names a command that cannot be run: no-such-command")
    refused(file, f"{use('./command')}{file.parent / 'command'} does not exist")
    (file.parent / "command").touch(0o644)
    refused(file, f"{use('./command')}names a command that cannot be run: {file.parent / 'command'}")
    (file.parent / "command").chmod(0o777)
    follow(refused(file, f"{use('./command')}{file.parent / 'command'} may be written by others"))
    load(file)


@pytest.mark.parametrize(
    ("lines", "name", "mode", "part"),
    [
        ('[journal]\nurl = "etcd://h/g"\nca = "ca"', "ca", 0o644, "line 11: [journal] ca "),
        ('[journal]\nurl = "etcd://h/g"\nuser = "u"\npassword_file = "pw"', "pw", 0o600, "line 12: [journal] password"),
        (
            '[watchdog]\nwebhook = { url = "http://h", secret_file = "s" }',
            "s",
            0o600,
            "line 10: [watchdog] webhook.sec",
        ),
    ],
)
def test_other_files(file: Path, lines: str, name: str, mode: int, part: str) -> None:
    file.write_text(TEXT + lines)
    refused(file, part, "does not exist")
    (file.parent / name).touch(mode)
    load(file)
    (file.parent / name).chmod(0o666)
    refused(file, part)


# -- systemd hands credentials to a service's user by an access list on a file of root's

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
NOBODY = 0xFFFFFFFF


def access_list(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@pytest.mark.parametrize(
    ("named", "fine"),
    [
        ([(USER, 4, os.geteuid())], True),
        ([(USER, 4, 12345)], False),
        ([(GROUP, 4, 12345)], False),
    ],
)
def test_access_lists(file: Path, named: list[tuple[int, int, int]], fine: bool) -> None:
    pin = file.parent / "pin"
    entries = [(USER_OBJ, 4, NOBODY), *named, (GROUP_OBJ, 0, NOBODY), (MASK, 4, NOBODY), (OTHER, 0, NOBODY)]
    entries.sort(key=lambda entry: entry[0])
    try:
        os.setxattr(pin, "system.posix_acl_access", access_list(*entries))
    except OSError:
        pytest.skip("no access lists here")
    assert pin.stat().st_mode & 0o777 == 0o440
    if fine:
        permissions.check_file(pin, secret=True)
    else:
        refused(file, "may be read by others (mode 0440)")
