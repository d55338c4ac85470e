"""The README's operator chapter, command by command, on a real terminal: prompts, answers and what is shown."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from hagroup.admin.cli import app
from tests.support.groups import ROOT, SO_PIN, make_group, run_client
from tests.support.newcomers import new_token
from tests.support.softhsm import SOFTHSM
from tests.support.terminal import Terminal

ADMIN = Path(sys.executable).with_name("ha-admin")
BLOCKS = re.findall(r"^```console\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def steps() -> list[tuple[str, list[str]]]:
    """Each command with the lines below it."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(BLOCKS).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def test_an_operators_day(fast_folder: Path) -> None:
    group = make_group(fast_folder / "day", members=3)
    token = new_token(group, "hsm4")
    (group.folder / "hsm4" / "pin").rename(group.folder / "hsm4.pin")
    run_client(group, "session.generate_key(KeyType.AES, 256, store=True, label='key')\n")
    assert group.admin("sync").returncode == 0  # the program was gone before all members had it
    assert len(steps()) > 15
    for command, below in steps():
        words = shlex.split(command)
        assert words[0] == "ha-admin"
        words = [
            word.replace("/usr/lib/vendor/libpkcs11.so", SOFTHSM).replace("1234567893", token.serial) for word in words
        ]
        if words[1:3] == ["member", "add"]:
            words += ["--env", f"SOFTHSM2_CONF={token.conf}"]
        terminal = Terminal(
            [ADMIN, *words[1:]], cwd=group.folder, env={"HAGROUP_CONFIG": str(group.toml), "COLUMNS": "120"}
        )
        for line in below:
            prompt, colon, answer = line.rpartition(": ")
            if colon:
                terminal.expect(prompt + ": ")
                terminal.send((SO_PIN if answer.startswith("*") else answer) + "\n")
            else:
                terminal.expect(line)
        status = terminal.end()
        assert status == 0, f"{command}: {status}: {terminal.text}"
        assert SO_PIN not in terminal.text
        assert "Traceback" not in terminal.text


def test_lunas_words_lead_to_commands_that_there_are() -> None:
    (table,) = re.findall(
        r"^### Coming from Luna\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    known = set(typer_commands())
    for command in re.findall(r"`ha-admin ([a-z ]+?)(?: --[a-z]+ [A-Z]+)?`", table):
        assert command in known, command


def typer_commands() -> list[str]:
    import typer.main

    found = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found += [name] if inner is None else [f"{name} {one}" for one in inner]
    return found
