"""Silent unless asked, readable where asked, and never a PIN."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from hagroup.config.logging import configure, get_logger, is_secret_key, mask_secrets
from hagroup.config.model import PinSource
from hagroup.config.pins import Pin
from hagroup.core.ckr import CKR

SECRET = "s3cret"


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    logger = logging.getLogger("hagroup")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def run(code: str) -> tuple[str, str]:
    lines = ["from hagroup.config.logging import get_logger, configure", "import logging", code]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_an_application_that_configured_nothing_sees_nothing() -> None:
    assert run("get_logger('hagroup.x').critical('boom', a=1)") == ("", "")


def test_an_application_that_configured_logging_sees_a_line() -> None:
    code = "logging.basicConfig(); get_logger('hagroup.x').warning('100% gone', member='hsm1', why='a b', pin='1234')"
    assert run(code) == ("", 'WARNING:hagroup.x:100% gone member=hsm1 why="a b" pin=***\n')


def test_the_applications_structlog_is_left_alone() -> None:
    get_logger("hagroup.x").error("x")
    configure("json", stream=io.StringIO())
    assert not structlog.is_configured()


def lines_of(style: str, **fields: object) -> str:
    stream = io.StringIO()
    configure(style, logging.DEBUG, stream)  # type: ignore[arg-type]
    get_logger("engine.pool").bind(member="hsm1").info("member failed", **fields)
    return stream.getvalue()


class Holder(msgspec.Struct):
    name: str
    value: bytes
    pin: Pin


@pytest.mark.parametrize("style", ["json", "console"])
def test_secrets_are_masked(style: str) -> None:
    pin = Pin(SECRET.encode())
    text = lines_of(
        style,
        given=pin,
        pin=SECRET,
        user_pin=SECRET,
        Password=SECRET,
        CKA_VALUE=SECRET,
        deep={"list": [pin, {"secret": SECRET}], "fine": 1},
        raw=SECRET.encode(),
        holder=Holder("x", SECRET.encode(), pin),
        other=type("Other", (), {"__repr__": lambda self: SECRET})(),
        pin_source="file:/etc/x/pin",
    )
    assert "s3" not in text
    assert "file:/etc/x/pin" in text
    assert text.count("\n") == 1


def test_json() -> None:
    fields = json.loads(
        lines_of("json", rv=CKR.DEVICE_ERROR, path=Path("/a"), level="spoofed", source=PinSource(env="X"))
    )
    assert fields.pop("time").endswith("+00:00")
    assert fields == {
        "level": "info",
        "logger": "hagroup.engine.pool",
        "event": "member failed",
        "member": "hsm1",
        "rv": 0x30,
        "path": "/a",
        "source": {"file": None, "env": "X", "command": None},
    }


def test_console_keeps_to_one_line() -> None:
    text = lines_of("console", label="a\nb", n=1)
    assert text.endswith(' info     member failed member=hsm1 label="a\\nb" n=1\n')


@pytest.mark.parametrize("style", ["json", "console"])
def test_exceptions(style: str) -> None:
    stream = io.StringIO()
    configure(style, stream=stream)  # type: ignore[arg-type]
    log = get_logger("hagroup.x")
    try:
        raise ValueError("why")
    except ValueError as error:
        log.exception("failed", error=error)
        log.error("again", exc_info=(type(error), error, error.__traceback__))
        log.error("and again", exc_info=error)
    text = stream.getvalue()
    assert "ValueError: why" in text
    assert text.count("Traceback") == 3


def test_positional_arguments_and_wrong_formats() -> None:
    stream = io.StringIO()
    configure("console", stream=stream)
    log = get_logger("hagroup.x")
    log.info("%s of %d", "one", 2)
    log.info("100% of %s", Pin(SECRET.encode()), b"raw")
    log.debug("not at this level")
    logging.getLogger("hagroup.plain").info("plain %s", 1)
    lines = [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()]
    assert lines == ["info     one of 2", "info     100% of %s *** <3 bytes>", "info     plain 1"]


def test_configuring_again_replaces() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure("console", stream=first)
    configure("json", stream=second)
    get_logger("hagroup.x").info("x")
    assert first.getvalue() == ""
    assert second.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    ("key", "secret"),
    [("pin", True), ("so_pin", True), ("new-pin", True), ("PASSWORD", True), ("value", True), ("pin_source", False),
     ("pinned", False), ("values_read", False), ("secret_file", False), ("", False)],
)  # fmt: skip
def test_secret_keys(key: str, secret: bool) -> None:
    assert is_secret_key(key) is secret


structures = st.recursive(
    st.just(SECRET.encode()) | st.just(Pin(SECRET.encode())) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(st.dictionaries(st.sampled_from(["a", "pin", "event", "exc"]), structures))
def test_no_structure_hides_a_secret(event: dict[str, object]) -> None:
    assert SECRET not in repr(mask_secrets(None, "info", event))
