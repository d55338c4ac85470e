"""PIN sources give the PIN or one sentence without it; a Pin shows itself nowhere."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import sys
import time
import traceback
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hagroup.config import pins
from hagroup.config.model import PinSource
from hagroup.config.pins import Pin, pin_source_identity, pin_source_stamp, read_pin, read_pin_stamped
from hagroup.errors import ConfigurationError

SECRET = "s3cret-PIN"


def pin_file(folder: Path, content: bytes) -> PinSource:
    path = folder / "pin"
    path.write_bytes(content)
    path.chmod(0o600)
    return PinSource(file=path)


def command(script: str) -> PinSource:
    return PinSource(command=(sys.executable, "-c", script))


def refused(source: PinSource) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read_pin(source)
    told = "".join(traceback.format_exception(caught.value))
    assert SECRET not in told.replace(f"print('{SECRET}", "")
    assert SECRET not in str(caught.value)
    held: BaseException | None = caught.value
    while held is not None:  # what an error reporter would look through
        assert not getattr(held, "output", None)
        held = held.__cause__ or held.__context__
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "pin"),
    [(b"1234", b"1234"), (b"1234\n", b"1234"), (b"1234\r\n", b"1234"), (b" 12 34 \n", b" 12 34 "), (b"12\r", b"12\r")],
)
def test_file(tmp_path: Path, content: bytes, pin: bytes) -> None:
    assert read_pin(pin_file(tmp_path, content)) == pin


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is empty"),
        (b"\n", "it is empty"),
        (f"{SECRET}\n\n".encode(), "it has more than one line"),
        (f"# the PIN\n{SECRET}\n".encode(), "it has more than one line"),
        (SECRET.encode() * 1000, "it is longer than 1024 bytes"),
        (f"\ufeff{SECRET}".encode(), "it is not plain text"),
        (SECRET.encode("utf-16"), "it is not plain text"),
    ],
)
def test_what_is_surely_not_a_pin_costs_no_attempt(tmp_path: Path, content: bytes, problem: str) -> None:
    assert refused(pin_file(tmp_path, content)).startswith(f"PIN source file:{tmp_path}/pin: {problem}")


def test_a_file_is_checked_again_when_it_is_read(tmp_path: Path) -> None:
    source = pin_file(tmp_path, SECRET.encode())
    assert source.file is not None
    source.file.chmod(0o644)
    assert "may be read by others (mode 0644): run chmod 600" in refused(source)
    source.file.unlink()
    assert refused(source) == f"PIN file {source.file} does not exist"


def test_env(monkeypatch: pytest.MonkeyPatch) -> None:
    source = PinSource(env="HAGROUP_TEST_PIN")
    assert refused(source) == "PIN source env:HAGROUP_TEST_PIN: the variable is not set"
    monkeypatch.setenv("HAGROUP_TEST_PIN", "")
    assert refused(source) == "PIN source env:HAGROUP_TEST_PIN: it is empty"
    monkeypatch.setenv("HAGROUP_TEST_PIN", "geheim-ü")
    assert read_pin(source) == "geheim-ü".encode()


def test_command() -> None:
    assert read_pin(command("import sys; assert sys.stdin.read() == ''; print('12 34')")) == b"12 34"


def test_command_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    script = f"import sys; print('{SECRET}'); print('{SECRET}', file=sys.stderr); sys.exit(3)"
    assert refused(command(script)) == f"PIN source command:{sys.executable}: the command failed with status 3"
    assert refused(command("pass")) == f"PIN source command:{sys.executable}: it is empty"
    assert "the command cannot be started (No such file or directory)" in refused(PinSource(command=("/no/such",)))
    assert capfd.readouterr() == ("", "")


def test_command_that_hangs_is_ended_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "COMMAND_TIMEOUT", 0.5)
    started = tmp_path / "started"
    script = f"""
import os, time
child = os.fork()
if child:
    open({str(started)!r}, 'w').write(str(child))
    print('{SECRET}', flush=True)
time.sleep(600)
"""
    begin = time.monotonic()
    assert refused(command(script)).endswith("the command did not end within 0.5 seconds")
    assert time.monotonic() - begin < 30
    if started.exists() and started.read_text():
        grandchild = int(started.read_text())
        deadline = time.monotonic() + 60
        while _running(grandchild) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not _running(grandchild)


def _running(process: int) -> bool:
    try:
        os.kill(process, signal.SIG_DFL)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_identity(tmp_path: Path) -> None:
    assert pin_source_identity(PinSource(file=tmp_path / "pin")) == f"file:{tmp_path}/pin"
    assert pin_source_identity(PinSource(env="X")) == "env:X"
    assert pin_source_identity(PinSource(command=("/bin/get", SECRET))) == "command:/bin/get"


def test_stamp_changes_with_the_file_and_tells_nothing_of_the_pin(tmp_path: Path) -> None:
    source = pin_file(tmp_path, b"1234")
    path = source.file
    assert path is not None
    first = pin_source_stamp(source)
    assert read_pin_stamped(source)[1] == first == pin_source_stamp(source)
    path.chmod(0o400)
    assert pin_source_stamp(source) == first  # the PIN is the same, so it may not be tried again
    path.chmod(0o600)

    same_time = path.stat()
    path.write_bytes(b"12345678")
    os.utime(path, ns=(same_time.st_atime_ns, same_time.st_mtime_ns))
    assert pin_source_stamp(source) == first  # not even the length

    os.utime(path, ns=(same_time.st_atime_ns, same_time.st_mtime_ns + 1))
    assert pin_source_stamp(source) != first
    other = tmp_path / "other"
    other.write_bytes(b"1234")
    os.utime(other, ns=(same_time.st_atime_ns, same_time.st_mtime_ns))
    other.replace(path)
    assert pin_source_stamp(source) != first
    path.unlink()
    assert pin_source_stamp(source) == "absent"


def test_sources_whose_change_cannot_be_seen_have_no_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pin_source_stamp(PinSource(env="X")) == pin_source_stamp(PinSource(command=("x",))) == ""
    source = pin_file(tmp_path, b"1234")
    assert pin_source_stamp(source) != ""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert pin_source_stamp(source) == ""  # systemd makes the file anew at each start of the service
    assert read_pin_stamped(source) == (Pin(b"1234"), "")


# -- Pin


def test_a_pin_is_not_shown() -> None:
    pin = Pin(SECRET.encode())
    shown = [repr(pin), str(pin), f"{pin}", f"{pin!r:>30}", f"{pin:>30}", "%s %r" % (pin, pin), repr([pin])]  # noqa: UP031
    assert not any("s3" in text or "115" in text for text in shown)
    assert not hasattr(pin, "__dict__")


@pytest.mark.parametrize(
    "way",
    [pickle.dumps, copy.copy, copy.deepcopy, hash, msgspec.json.encode, msgspec.msgpack.encode, bytes, len, iter],
)
def test_a_pin_is_not_taken_away(way: object) -> None:
    with pytest.raises(TypeError) as caught:
        way(Pin(SECRET.encode()))  # type: ignore[operator]
    assert SECRET not in str(caught.value)


def test_wiping() -> None:
    pin = Pin(b"1234")
    held = pin._held
    assert pin.reveal() == b"1234"
    pin.wipe()
    pin.wipe()
    assert held == bytearray(4)
    assert pin.wiped
    with pytest.raises(ValueError, match="wiped"):
        pin.reveal()
    assert pin != Pin(b"1234")


@given(st.binary(max_size=8), st.binary(max_size=8))
def test_equality(one: bytes, other: bytes) -> None:
    assert (Pin(one) == Pin(other)) == (one == other)
    assert Pin(one) != one
