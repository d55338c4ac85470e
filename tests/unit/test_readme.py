"""What the documentation says of the code, compared with the code."""

from __future__ import annotations

import re
from pathlib import Path

from hagroup.core.states import diagram

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
