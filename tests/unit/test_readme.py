"""What the documentation says of the code, compared with the code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec

from hagroup.config.load import load_text
from hagroup.config.model import WatchdogSection
from hagroup.core.states import diagram
from hagroup.core.watch import GOOD, Kind, WatchEvent
from hagroup.engine import status

ROOT = Path(__file__).resolve().parents[2]


def test_the_state_diagram_is_the_table() -> None:
    text = (ROOT / "hagroup" / "README.md").read_text()
    section = text.split("## States of a member in a process", 1)[1]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert block is not None
    assert block.group(1).strip() == diagram().strip()


def test_links_in_the_readmes_lead_somewhere() -> None:
    for readme in (ROOT / "README.md", ROOT / "hagroup" / "README.md", ROOT / "softhsm-fixtures" / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", readme.read_text()):
            if "://" not in target:
                assert (readme.parent / target).exists(), f"{readme}: {target}"


def chapter(title: str) -> str:
    return (ROOT / "README.md").read_text().split(f"### {title}\n", 1)[1].split("\n### ", 1)[0]


def test_the_watchdogs_chapter_has_all_keys_with_their_defaults_and_all_events(tmp_path: Path) -> None:
    text = chapter("The watchdog")
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    written = re.findall(r"^(?:# )?(\w+) +=", block, re.MULTILINE)
    assert sorted(written) == sorted(WatchdogSection.__struct_fields__)
    member = '[[member]]\nname = "b"\nmodule = "/vendor.so"\ntoken_serial = "1"\n'
    for keys in (block, block.replace("\n# ", "\n")):  # as it stands, and with what is commented out
        text_of_file = f'[group]\nlabel = "a"\n{member}{keys}'
        read = load_text(text_of_file, tmp_path / "hagroup.toml").watchdog
        assert msgspec.structs.replace(read, hook=None, webhook=None) == WatchdogSection()
    assert tomllib.loads(block)["watchdog"]["listen"] == "off"
    table = dict(re.findall(r"^\| `([^|]*?)`[^|]*\| `?([^|`]*)`? *\|$", text, re.MULTILINE))
    for kind in Kind:
        assert f"`{kind.value}`" in text, kind
        assert kind not in GOOD or kind.value in table.values(), f"what {kind} ends"
    for field in WatchEvent.__struct_fields__:
        assert f"`{field}`" in text, field


def test_the_status_document_is_described() -> None:
    text = chapter("For programs: `--json`")
    parts = {"group": status.GroupStatus, "members[]": status.MemberStatus, "journal": status.JournalStatus}
    parts |= {"detection": status.Detection, "events[]": status.LastEvent}
    for part, fields in parts.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"| `{part}`"))
        described = set(re.findall(r"`(\w+)`", line.split("|")[2]))
        assert set(fields.__struct_fields__) <= described, part
    for field in msgspec.structs.fields(status.Status):
        assert re.search(rf"^\| .*`{field.name}(\[\])?`", text, re.MULTILINE), field.name
