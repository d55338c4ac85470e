"""``ha-admin group create`` without a hagroup.toml: it is made from options, or from answers at a terminal."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hagroup.config.load import load
from hagroup.config.model import PinSource
from tests.support import plain
from tests.support.groups import PIN, SO_PIN, GroupFixture, run_client
from tests.support.newcomers import private
from tests.support.softhsm import SOFTHSM, make_token
from tests.support.terminal import Terminal

ADMIN = [sys.executable, "-m", "hagroup.admin.cli"]
Lines = Callable[["Rack"], list[str]]


class Rack:
    """Three tokens of one module, PIN files, and a place where no configuration is."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        self.folder = folder
        self.tokens = [make_token(folder / "vendor", f"partition {number}", SO_PIN, PIN) for number in (1, 2, 3)]
        self.conf = self.tokens[0].conf
        self.pin = private(folder / "user-pin", PIN)
        self.so_pin = private(folder / "so-pin", SO_PIN)
        self.toml = folder / "etc" / "payments" / "hagroup.toml"
        self.group = GroupFixture(self.toml)

    def member(self, number: int, *more: str) -> list[str]:
        words = [f"hsm{number}", f"module={SOFTHSM}", f"serial={self.tokens[number - 1].serial}"]
        words += [f"env=SOFTHSM2_CONF={self.conf}", f"pin-file={self.pin}"]
        return ["--member", ",".join([*words, *more])]

    @property
    def script(self) -> list[str]:
        return ["--label", "payments", *self.member(1), *self.member(2), "--so-pin-file", str(self.so_pin), "--yes"]

    def create(self, *options: str) -> Any:
        return self.group.admin("group", "create", *options)

    def plain(self, number: int) -> dict[str, Any]:
        return {"module": SOFTHSM, "serial": self.tokens[number].serial, "env": {"SOFTHSM2_CONF": str(self.conf)}}

    def check_untouched(self) -> None:
        assert not (self.folder / "etc").exists(), "nor is a folder left that was made for it"
        for number in range(3):
            assert plain.objects(self.plain(number), own=True) == []

    def check_made(self, label: str, members: dict[str, int]) -> None:
        assert self.toml.stat().st_mode & 0o777 == 0o600
        assert not list(self.toml.parent.glob(".hagroup*"))
        config = load(self.toml)
        assert config.group.label == label and config.group.serial is not None
        serials = {name: self.tokens[number].serial for name, number in members.items()}
        assert {member.name: member.token_serial for member in config.members} == serials
        assert self.group.admin("status").returncode == 0
        run_client(self.group, "session.generate_key(KeyType.AES, 256, store=True, label='key')\n")
        assert self.group.admin("sync").returncode == 0
        for number in members.values():
            assert plain.labels(self.plain(number)) == ["key"]


@pytest.fixture(scope="module")
def rack(fast_folder: Path) -> Rack:
    return Rack(fast_folder / "rack")


def one_sentence(done: Any, *said: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("ha-admin: ") and "Traceback" not in line
    for text in said:
        assert text in line, line


def without(option: str) -> Lines:
    def lines(rack: Rack) -> list[str]:
        words = rack.script
        while option in words:
            place = words.index(option)
            del words[place : place + (1 if option == "--yes" else 2)]
        return words

    return lines


def but(change: Callable[[Rack, list[str]], list[str]]) -> Lines:
    return lambda rack: change(rack, rack.script)


def changed(old: str, new: str) -> Lines:
    return lambda rack: [word.replace(old, new, 1) for word in rack.script]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        pytest.param(lambda rack: ["--yes"], ["does not exist: give --label and --member to make it"], id="nothing"),
        pytest.param(without("--label"), ["give --label to make it"], id="no label"),
        pytest.param(without("--member"), ["give --member to make it"], id="no member"),
        pytest.param(without("--yes"), ["not confirmed (give --yes in scripts)"], id="not confirmed"),
        pytest.param(without("--so-pin-file"), ["the SO PIN is needed: give --so-pin-file"], id="no SO PIN"),
        pytest.param(changed("pin-file=", "pin="), ["--member hsm1: pin is not known; write NAME,"], id="PIN in argv"),
        pytest.param(changed("module=", "env="), ["--member hsm1: module is needed"], id="no module"),
        pytest.param(changed("serial=", "env="), ["--member hsm1: either serial or label is needed"], id="no token"),
        pytest.param(changed("hsm1,", "hsm1,serial=1,"), ["serial is given twice"], id="a key twice"),
        pytest.param(changed("env=SOFTHSM2_CONF=", "env=SOFTHSM2_CONF,env=A="), ["write NAME=VALUE"], id="no value"),
        pytest.param(changed("libsofthsm2.so", "none.so"), ['"hsm1" module', "does not exist"], id="no such module"),
        pytest.param(changed("user-pin", "none"), ['"hsm1" pin.file', "does not exist"], id="no such PIN file"),
        pytest.param(changed("hsm2,", "hsm1,"), ["name is that of another member"], id="one name twice"),
        pytest.param(changed("payments", "p" * 33), ["label must be at most 32 bytes long"], id="long label"),
        pytest.param(changed("payments", ""), ["[group] label must not be empty"], id="empty label"),
        pytest.param(but(lambda rack, words: [*words, "--min-replicas", "3"]), ["min_replicas"], id="replicas"),
        pytest.param(but(lambda rack, words: [*words, "--journal", "x"]), ["the journal's URL 'x' must be"], id="URL"),
        pytest.param(
            but(lambda rack, words: [*words, "--journal-ca", str(rack.pin)]), ["ca is only for an etcd"], id="CA"
        ),
        pytest.param(
            but(lambda rack, words: [*words, "--journal", f"sqlite:{rack.pin}/journal.db"]), ["journal.db"], id="late"
        ),
        pytest.param(
            but(lambda rack, words: [*words, "--so-pin-file", str(private(rack.folder / "wrong", "99999999"))]),
            ['member "hsm1" refused the SO PIN', "nothing was changed"],
            id="wrong SO PIN",
        ),
    ],
)
def test_refused_and_nothing_is_left(rack: Rack, lines: Lines, said: list[str]) -> None:
    """What a script may have wrong, from the first word to what is found out last."""
    done = rack.create(*lines(rack))
    one_sentence(done, *said)
    assert PIN not in done.stderr.replace(str(rack.folder), "").split() and "99999999" not in done.stderr
    rack.check_untouched()


def test_folder_for_everybody(rack: Rack, fast_folder: Path) -> None:
    folder = fast_folder / "open"
    folder.mkdir()
    folder.chmod(0o777)
    group = GroupFixture(folder / "hagroup.toml")
    one_sentence(group.admin("group", "create", *rack.script), "may be written by others", "nothing was changed")
    assert list(folder.iterdir()) == []


def test_answers(fast_folder: Path) -> None:
    """At a terminal: what cannot be used is asked for again; the result is shown; nothing is made without a yes."""
    rack = Rack(fast_folder / "asked")
    folder = rack.toml.parent
    others = private(rack.folder / "open-pin", PIN)
    others.chmod(0o644)
    dialogue = [
        ("which programs find it by: ", "p" * 33),
        ("at most 32 bytes long", None),
        ("which programs find it by: ", "payments"),
        ("PKCS#11 module of the HSMs, a file: ", "/none.so"),
        ("(empty: none): ", ""),
        ("/none.so does not exist", None),
        ("PKCS#11 module of the HSMs, a file: ", SOFTHSM),
        ("(empty: none): ", "nothing"),
        ("write NAME=VALUE", None),
        ("(empty: none): ", f"SOFTHSM2_CONF={rack.conf}"),
        ("Which are to be members? (such as 1,3) [all]: ", "1,4"),
        ("write numbers from 1 to 3", None),
        ("(such as 1,3) [all]: ", "1,3"),
        ("[hsm1]: ", ""),
        ("[hsm2]: ", "hsm1"),
        ("name is that of another member", None),
        ("[hsm2]: ", "spare"),
        ("Another PKCS#11 module (empty: no more): ", ""),
        ("for each member [login]: ", "post"),
        ("write login, file or env", None),
        ("for each member [login]: ", "file"),
        (f"File with the user PIN of hsm1 (mode 0600) [{folder}/hsm1.pin]: ", str(others)),
        ("may be read by others", None),
        ("/hsm1.pin]: ", str(rack.pin)),
        (f"[{folder}/spare.pin]: ", str(rack.pin)),
        ("for several [sqlite:journal.db]: ", "mysql:x"),
        ('must be "sqlite:FILE"', None),
        ("for several [sqlite:journal.db]: ", ""),
        ("[[member]]", None),
        ("SO PIN: ", SO_PIN),
        ("Create group payments of hsm1, spare? [y/N]: ", "{answer}"),
    ]
    for answer, status in (("n", 2), ("y", 0)):
        terminal = Terminal([*ADMIN, "--config", str(rack.toml), "group", "create"], columns=200)
        seen = 0
        for text, typed in dialogue:
            seen = terminal.expect(text, after=seen)
            if typed is not None:
                terminal.send(typed.replace("{answer}", answer) + "\n")
        assert terminal.end() == status, terminal.text
        assert SO_PIN not in terminal.text and "Traceback" not in terminal.text
        for token in rack.tokens:
            assert token.serial in terminal.text and token.label in terminal.text
        if status:
            rack.check_untouched()
    rack.check_made("payments", {"hsm1": 0, "spare": 2})
    assert [member.pin for member in load(rack.toml).members] == [PinSource(file=rack.pin)] * 2
    assert plain.objects(rack.plain(1), own=True) == [], "the one that was not chosen"


def test_script(rack: Rack) -> None:
    """All from options; then there is a configuration, and the same options are refused."""
    done = rack.create(*rack.script)
    assert done.returncode == 0, done.stderr
    assert f"{rack.toml} is written" in done.stdout
    rack.check_made("payments", {"hsm1": 0, "hsm2": 1})
    assert load(rack.toml).group.min_replicas == 2
    before = rack.toml.read_bytes()
    one_sentence(rack.create(*rack.script), "exists already, and --label, --member would make a new one")
    one_sentence(rack.create("--yes", "--so-pin-file", str(rack.so_pin)), "was created already")
    assert rack.toml.read_bytes() == before
    other = ["--config", str(rack.toml.parent / "other.toml"), "group", "create", *rack.script]
    done = subprocess.run([*ADMIN, *other], capture_output=True, text=True, check=False)
    one_sentence(done, "the journal", "exists already")
    assert not (rack.toml.parent / "other.toml").exists()


def test_two_at_once(fast_folder: Path) -> None:
    """One makes the group and its file; the other one is refused, and takes nothing of it back."""
    rack = Rack(fast_folder / "twice")
    rack.toml.parent.mkdir(parents=True, mode=0o700)
    command = [*ADMIN, "--config", str(rack.toml), "group", "create", *rack.script]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [(*process.communicate(timeout=120), process.returncode) for process in both]
    statuses = sorted(status for _, _, status in ended)
    assert statuses[0] == 0 and statuses[1] in (2, 3), ended
    rack.check_made("payments", {"hsm1": 0, "hsm2": 1})
