"""Every command in the README does what it says there: they are taken from the text and run, with paths replaced."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hagroup.admin.cli import app
from tests.support import plain
from tests.support.groups import PIN, ROOT, SO_PIN
from tests.support.softhsm import SOFTHSM, make_token
from tests.support.terminal import Terminal

TEXT = (ROOT / "README.md").read_text()
ADMIN = Path(sys.executable).with_name("ha-admin")


def blocks(language: str) -> list[str]:
    """The fenced blocks of that language; ``""`` has the commands."""
    return [
        body for kind, body in re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL) if kind == language
    ]


COMMANDS = [line.split("#")[0].strip() for block in blocks("") for line in block.splitlines() if line.strip()]


def test_all_commands_are_known_here() -> None:
    """A command that is added to the README gets a test below."""
    programs = {
        "tools/demo",
        "tools/test",  # this is what runs these tests
        "softhsm-fixtures/make-group",
        "ha-admin --config hagroup.toml group create",
        "ha-admin --config hagroup.toml status",
    }
    for command in COMMANDS:
        assert any(command == known or command.startswith(known + " ") for known in programs), command
    for program in ("tools/demo", "tools/test"):
        assert os.access(ROOT / program, os.X_OK)


def test_make_group_and_the_program(fast_folder: Path) -> None:
    (command,) = [command for command in COMMANDS if command.startswith("softhsm-fixtures/make-group")]
    assert "/tmp/trial" in command
    folder = fast_folder / "trial"
    words = shlex.split(command.replace("/tmp/trial", str(folder)))
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "hagroup.toml")
    (program,) = blocks("python")
    assert "/tmp/trial/hagroup.toml" in program
    program = program.replace("/tmp/trial", str(folder)) + (
        "    assert public.verify(b'data', signature, mechanism=pkcs11.Mechanism.SHA256_RSA_PKCS)\n"
        "    print('signed')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "signed\n"
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 2, "a folder that holds a group is refused"
    assert "holds a group already" in again.stderr
    assert len(again.stderr.splitlines()) == 1


CREATE, STATUS = (shlex.split(command)[1:] for command in COMMANDS if command.startswith("ha-admin"))


class Own:
    """Two tokens of one module stand for the vendor's; the rest is as in the README."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        self.folder = folder
        self.tokens = [make_token(folder / "vendor", f"partition {number}", SO_PIN, PIN) for number in (1, 2)]
        self.environment = {"SOFTHSM2_CONF": str(self.tokens[0].conf)}
        for name, pin in (("hsm1.pin", PIN), ("hsm2.pin", PIN), ("so.pin", SO_PIN)):
            self.private(name, pin)

    def private(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o600)

    def real(self, text: str) -> str:
        """With the tokens' serial numbers and module."""
        text = text.replace("/usr/lib/vendor/libpkcs11.so", SOFTHSM)
        for given, token in zip(re.findall(r'serial ?= ?"?(\w+)', text), self.tokens, strict=True):
            text = text.replace(given, token.serial)
        return text

    def run(self, words: list[str]) -> str:
        done = subprocess.run(
            [ADMIN, *words],
            cwd=self.folder,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def on_a_terminal(self, *answers: tuple[str, str]) -> None:
        terminal = Terminal([ADMIN, *CREATE], cwd=self.folder, env=self.environment, columns=200)
        seen = 0
        for question, answer in answers:
            seen = terminal.expect(question, after=seen)
            terminal.send(answer + "\n")
        assert terminal.end() == 0, terminal.text
        assert "created" in terminal.text
        assert SO_PIN not in terminal.text

    def check(self) -> None:
        assert "in sync" in self.run(STATUS)
        program = (
            "import sys, hagroup as pkcs11\n"
            "with pkcs11.lib(sys.argv[1]).get_token().open(rw=True, user_pin='1234') as session:\n"
            "    session.generate_key(pkcs11.KeyType.AES, 256, store=True, label='mine')\n"
        )
        command = [sys.executable, "-c", program, self.folder / "hagroup.toml"]
        subprocess.run(command, env=os.environ | self.environment, timeout=60, check=True)
        for token in self.tokens:
            assert plain.labels({"module": SOFTHSM, "serial": token.serial, "env": self.environment}) == ["mine"]


def test_your_own_hsms_from_answers(fast_folder: Path) -> None:
    own = Own(fast_folder / "your-own-asked")
    own.on_a_terminal(
        ("Label of the group", "payments"),
        ("PKCS#11 module", SOFTHSM),
        ("environment", ""),
        ("Which are to be members?", ""),
        ("Name", ""),
        ("Name", ""),
        ("Another PKCS#11 module", ""),
        ("User PINs", "file"),
        ("hsm1.pin]", ""),
        ("hsm2.pin]", ""),
        ("Journal", ""),
        ("SO PIN:", SO_PIN),
        ("[y/N]", "y"),
    )
    own.check()


def test_your_own_hsms_from_options(fast_folder: Path) -> None:
    own = Own(fast_folder / "your-own-told")
    (script,) = (block for block in blocks("sh") if "group create" in block)
    own.run(shlex.split(own.real(script).replace("\\\n", ""))[1:])
    own.check()


def test_your_own_hsms_from_a_file(fast_folder: Path) -> None:
    own = Own(fast_folder / "written")
    (text,) = (block for block in blocks("toml") if "[[member]]" in block)
    own.private("hagroup.toml", own.real(text))
    own.on_a_terminal(("SO PIN:", SO_PIN), ("[y/N]", "y"))
    own.check()


def test_the_table_of_commands() -> None:
    """What the table names is there, with the options that it names."""
    rows = re.findall(r"^\| (`ha-admin [^|]*(?:\\\|[^|]*)*)\|", TEXT, re.MULTILINE)
    assert len(rows) >= 4
    runner = CliRunner()
    for usage in re.findall(r"`ha-admin ([^`]+)`", " ".join(rows)):
        words = usage.replace("\\|", "|").split()
        path = []
        while words and re.fullmatch(r"[a-z][a-z|-]*", words[0]):
            path.append(words.pop(0).split("|"))
        assert path, usage
        for last in path[-1]:
            names = [alternatives[0] for alternatives in path[:-1]] + [last]
            shown = runner.invoke(app, [*names, "--help"])
            assert shown.exit_code == 0, f"{' '.join(names)}: {shown.output}"
            for option in re.findall(r"--[a-z][a-z-]*", " ".join(words)):
                assert option in shown.output, f"ha-admin {' '.join(names)} has no {option}"


@pytest.mark.slow
def test_demo_in_a_pipe() -> None:
    done = subprocess.run(
        [ROOT / "tools" / "demo"], capture_output=True, text=True, timeout=240, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout, "plain lines where it is no terminal"
    lines = done.stdout.splitlines()
    assert sum(line.startswith("ok ") for line in lines) >= 6
    assert not any(line.startswith("FAILED") for line in lines)
    table = lines[next(number for number, line in enumerate(lines) if line.strip().startswith("proven")) :]
    for claim in (
        "no call failed while a member died and came back",
        "all members hold the same keys",
        "the key born meanwhile is on all",
        "the deleted key is on none",
    ):
        assert any(claim in line for line in table), done.stdout


@pytest.mark.slow
def test_demo_on_a_terminal() -> None:
    terminal = Terminal([ROOT / "tools" / "demo"])
    assert terminal.end(240) == 0, terminal.text
    assert "\x1b" in terminal.text, "progress is shown as it goes"
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.text)
    assert "the deleted key is on none" in shown
    assert "proven" in shown
    assert "Traceback" not in shown


def test_demo_says_why_it_failed(tmp_path: Path) -> None:
    """No token can be made: one line and a status other than 0."""
    broken = tmp_path / "bin"
    broken.mkdir()
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "demo.py"],
        env=os.environ | {"PATH": str(broken)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "FAILED:" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
