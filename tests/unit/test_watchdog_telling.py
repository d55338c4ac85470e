"""Hook, webhook and log of the watchdog: given once, tried again, and never in the way."""

from __future__ import annotations

import io
import json
import logging
import re
import time
from pathlib import Path

import pytest

from hagroup.config.model import WatchdogSection, Webhook
from hagroup.core.watch import Kind, WatchEvent
from hagroup.errors import ConfigurationError
from hagroup.watchdog import install, lines, telling
from hagroup.watchdog.telling import Hook, NotTaken, Post, Teller, signature
from tests.support.groups import wait_until
from tests.support.watchdogs import Receiver, events, make_hook

EVENT = WatchEvent(
    id="4711-1",
    kind=Kind.MEMBER_FAILED,
    severity="warning",
    group="payments",
    serial="4711",
    time=0.0,
    text="member hsm1 failed",
    member="hsm1",
    member_serial="abc",
)


def test_webhook_is_signed_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "_FIRST_PAUSE", 0.05)
    secret = tmp_path / "secret"
    secret.write_text("s3cret\n")
    secret.chmod(0o600)
    receiver = Receiver(503, 503)
    teller = Teller(WatchdogSection(webhook=Webhook(url=receiver.url, secret_file=secret)))
    begun = time.monotonic()
    teller.tell(EVENT)
    assert time.monotonic() - begun < 2.0
    wait_until(lambda: not teller.undelivered(), "delivery")
    assert len(receiver.got) == 3
    headers, body = receiver.got[-1]
    assert headers["X-Hagroup-Signature"] == signature(b"s3cret", body)
    assert headers["X-Hagroup-Event-Id"] == EVENT.id
    assert json.loads(body)["kind"] == "member failed"
    receiver.stop()
    teller.stop(1.0)


def test_a_refusal_of_the_webhook_is_final() -> None:
    receiver = Receiver(403, 302)
    for _ in range(2):
        with pytest.raises(NotTaken) as caught:
            Post(Webhook(url=receiver.url))(EVENT)
        assert caught.value.final
    receiver.stop()


def test_webhook_that_is_not_there_holds_up_nothing() -> None:
    receiver = Receiver()
    receiver.stop()
    teller = Teller(WatchdogSection(webhook=Webhook(url=receiver.url)))
    begun = time.monotonic()
    for _ in range(100):
        teller.tell(EVENT)
    assert time.monotonic() - begun < 10.0
    assert teller.undelivered() == {EVENT.id}
    teller.stop(0.1)


def test_missing_secret_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        Teller(WatchdogSection(webhook=Webhook(url="http://127.0.0.1:1/", secret_file=tmp_path / "none")))


def test_hook_gets_the_event(tmp_path: Path) -> None:
    _, file = make_hook(tmp_path)
    Hook((str(tmp_path / "hook"),))(EVENT)
    assert events(file)[0]["member"] == "hsm1"


def test_hook_does_not_get_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSM1_PIN", "the-pin-of-hsm1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
    command = ("sh", "-c", f"cat > /dev/null; env > {tmp_path}/env")
    Hook(command, hidden=frozenset({"HSM1_PIN"}))(EVENT)
    text = (tmp_path / "env").read_text()
    assert "PATH=" in text
    assert "the-pin-of-hsm1" not in text
    assert "NOTIFY_SOCKET" not in text


def test_hook_that_hangs_is_ended_with_its_children() -> None:
    begun = time.monotonic()
    with pytest.raises(NotTaken, match="did not end"):
        Hook(("sh", "-c", "sleep 60 & sleep 60"), timeout=0.3)(EVENT)
    assert time.monotonic() - begun < 5.0


def test_hook_that_fails() -> None:
    with pytest.raises(NotTaken, match="status 3"):
        Hook(("sh", "-c", "cat > /dev/null; exit 3"))(EVENT)
    with pytest.raises(NotTaken, match="/no/such"):
        Hook(("/no/such/command",))(EVENT)


@pytest.mark.parametrize("style", ["luna", "json", "console"])
def test_log_styles(style: str) -> None:
    stream = io.StringIO()
    root = logging.getLogger("hagroup")
    before = list(root.handlers), root.level, root.propagate
    try:
        lines.configure(style, stream)  # type: ignore[arg-type]
        Teller(WatchdogSection(log_style=style)).log(EVENT)  # type: ignore[arg-type]
    finally:
        root.handlers[:], root.propagate = before[0], before[2]
        root.setLevel(before[1])
    text = stream.getvalue().strip()
    assert len(text.splitlines()) == 1
    if style == "luna":
        assert re.fullmatch(r"\d\d:\d\d:\d\d \[\d+\] HA group: 4711 has dropped member: abc", text)
    elif style == "json":
        assert json.loads(text)["event"] == "member failed"
    else:
        assert "member failed" in text


def test_units_name_the_command_and_are_written_whole(tmp_path: Path) -> None:
    (path, text), *others = install.units(tmp_path)
    assert not others
    assert path.name == "ha-watchdog@.service"
    for wanted in ("Type=notify", "WatchdogSec=", "LoadCredential=", "DynamicUser=yes", "NoNewPrivileges=yes"):
        assert wanted in text
    assert "/usr/bin/ha-watchdog" not in text
    install.write(path, "changed by hand")
    install.write(path, text)
    assert path.read_text() == text
    assert path.with_name(f"{path.name}.before").read_text() == "changed by hand"
