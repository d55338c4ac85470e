"""The group's configuration as members show it: what is in it, and what takes the place of what."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from hagroup.config.load import load_text
from hagroup.config.write import portable
from hagroup.engine.configuration import Configuration, successor
from hagroup.errors import ConfigurationError

OURS = Configuration(
    group="1", epoch="00000002-ff", revision=5, number=0, origin="one:/a.toml", members={"a": "1"}, text=b"ours"
)
THEIRS = replace(OURS, origin="two:/a.toml", text=b"theirs")
EARLIER = replace(OURS, number=3, text=b"earlier")


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (None, OURS),
        (OURS, None),
        (replace(OURS, group="2", epoch="00000009-00"), OURS),
        (replace(OURS, epoch="00000001-ff", revision=99), OURS),
        (replace(OURS, epoch="00000003-00", revision=1, text=b"later"), None),
        (replace(THEIRS, revision=4), OURS),
        (replace(EARLIER, revision=6), None),
        (EARLIER, replace(OURS, number=4)),
        (THEIRS, None),
    ],
    ids=[
        "none",
        "same",
        "other group",
        "older epoch",
        "later epoch",
        "members moved",
        "we are behind",
        "ours",
        "theirs",
    ],
)
def test_what_takes_its_place(found: Configuration | None, wanted: Configuration | None) -> None:
    assert successor(found, OURS) == wanted
    if wanted is not None and found is not None and found.group == wanted.group:
        assert wanted.order > found.order and wanted.mark > found.mark


def test_a_person_may_insist() -> None:
    assert successor(THEIRS, OURS, insist=True) == replace(OURS, number=1)
    assert successor(OURS, OURS, insist=True) is None


def test_it_has_whole_paths_and_nothing_of_one_host() -> None:
    text = """
[group]
label = "payments"
serial = "74007601"
min_replicas = 1
site = "zurich"
[journal]
url = "sqlite:journal.db"
[watchdog]
interval = 2.0
hook = ["/bin/true", "secret"]
listen = "127.0.0.1:9000"
[[member]]
name = "hsm1"
module = "lib/libvendor.so"
token_serial = "12"
env = { CONF = "hsm1/conf" }
pin = { command = ["/bin/tell", "secret"] }
"""
    config = load_text(text, "/etc/first/hagroup.toml")
    shown = portable(config)
    assert "secret" not in shown and "pin" not in shown and "9000" not in shown and "zurich" not in shown
    there = load_text(shown, "/srv/second/hagroup.toml")
    assert there.members == (replace(config.members[0], pin=None),)
    assert there.members[0].module == Path("/etc/first/lib/libvendor.so")
    assert str(there.journal.url) == "sqlite:/etc/first/journal.db"
    assert there.watchdog.interval == 2.0


def test_what_is_none_is_told() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot be read; write /x/hagroup\.toml by hand"):
        OURS.config("/x/hagroup.toml")
