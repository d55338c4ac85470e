"""What people get wrong: one clear sentence each, and nothing is loaded, created or changed anywhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hagroup as pkcs11
from hagroup import KeyType, exceptions
from hagroup.errors import ConfigurationError, GroupUnavailable
from tests.support import plain
from tests.support.faults import FaultControl, build_interposer, fault_env
from tests.support.faulty import set_timeouts
from tests.support.groups import PIN, SO_PIN, GroupFixture, make_group
from tests.support.newcomers import tamper
from tests.support.softhsm import SOFTHSM, TokenFixture, make_token
from tests.support.terminal import Terminal

COUNT_LOW = 0x10000
LIBC = next(Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "libc.so" in line)


def private(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def one_sentence(done: subprocess.CompletedProcess[str], status: int) -> str:
    """The command failed with this exit status and one line that says why."""
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("ha-admin: ")
    assert "Traceback" not in line
    return line


# -- configuration -----------------------------------------------------------------------------------------------------


class Written:
    """A right configuration of two tokens that do not exist, and a module that would tell if it was called."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        self.folder = folder
        self.control = FaultControl(folder / "faults").init()
        private(folder / "pin", PIN)
        self.so_pin = private(folder / "so-pin", SO_PIN)
        environment = ", ".join(f'{name} = "{value}"' for name, value in fault_env(self.control, SOFTHSM).items())
        member = (
            f'[[member]]\nname = "%s"\nmodule = "{build_interposer()}"\ntoken_serial = "%s"\n'
            f'env = {{ {environment} }}\npin = {{ file = "pin" }}\n'
        )
        self.text = '[group]\nlabel = "payments"\nmin_replicas = 2\n[journal]\nurl = "sqlite:journal.db"\n'
        self.text += "[timeouts]\ncall = 2\n"
        self.text += member % ("hsm1", "1111") + member % ("hsm2", "2222")
        self.toml = private(folder / "hagroup.toml", self.text)

    def replace(self, old: str, new: str) -> None:
        assert old in self.text
        self.toml.write_text(self.text.replace(old, new, 1))


def no_pin_file(it: Written) -> None:
    (it.folder / "pin").unlink()


def open_pin_file(it: Written) -> None:
    (it.folder / "pin").chmod(0o644)


def open_folder(it: Written) -> None:
    it.folder.chmod(0o777)


def open_file(it: Written) -> None:
    it.toml.chmod(0o666)


def no_file(it: Written) -> None:
    it.toml.unlink()


def change(old: str, new: str) -> Callable[[Written], None]:
    return lambda it: it.replace(old, new)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        pytest.param(change("min_replicas", "min_replica"), r"line 3.*min_replica\b.*min_replicas", id="unknown key"),
        pytest.param(change("[timeouts]", "[timeout]"), r"line 6.*timeout\b.*timeouts", id="unknown section"),
        pytest.param(change("call = 2", 'call = "soon"'), r"line 7.*call.*soon", id="wrong type"),
        pytest.param(change("call = 2", "call = 0.5"), r"call|probe", id="call shorter than probe"),
        pytest.param(
            change("min_replicas = 2", "min_replicas = 3"), r"line 3.*min_replicas.*2", id="too many replicas"
        ),
        pytest.param(change("[group]", "[group"), r"line 1.*not TOML", id="not TOML"),
        pytest.param(change('name = "hsm2"', 'name = "hsm1"'), r"name.*another member", id="one name twice"),
        pytest.param(change('serial = "2222"', 'serial = "1111"'), r"same token", id="one token twice"),
        pytest.param(change("interposer.so", "interposer.no"), r"line 10.*module.*interposer\.no", id="no module"),
        pytest.param(change("sqlite:journal", "mysql:journal"), r"line 5.*url", id="unknown journal"),
        pytest.param(no_pin_file, r"pin.file.*pin", id="no PIN file"),
        pytest.param(open_pin_file, r"pin.file.*pin", id="PIN file for everybody"),
        pytest.param(open_folder, r"written by others", id="folder for everybody"),
        pytest.param(open_file, r"written by others", id="file for everybody"),
        pytest.param(no_file, r"hagroup\.toml", id="no file"),
    ],
)
def test_wrong_configuration(
    fast_folder: Path, request: pytest.FixtureRequest, wrong: Callable[[Written], None], named: str
) -> None:
    it = Written(fast_folder / re.sub(r"\W", "-", request.node.callspec.id))
    wrong(it)
    with pytest.raises(ConfigurationError) as raised:
        pkcs11.lib(str(it.toml))
    text = str(raised.value)
    assert isinstance(raised.value, exceptions.ArgumentsBad)
    assert "\n" not in text
    assert str(it.folder) in text
    assert re.search(named, text.replace(str(it.folder), "")), text
    if wrong in (no_pin_file, open_folder):  # the command says the same, by the same reader
        group = GroupFixture(it.toml)
        assert text in one_sentence(group.admin("group", "create", "--yes", "--so-pin-file", str(it.so_pin)), 2)
        assert text in one_sentence(group.admin("status"), 2)
    assert it.control.counts() == {}, "no module was loaded"
    assert not (it.folder / "journal.db").exists()


def test_no_configuration_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HAGROUP_CONFIG", raising=False)
    with pytest.raises(ConfigurationError, match="HAGROUP_CONFIG"):
        pkcs11.lib()
    command = [sys.executable, "-m", "hagroup.admin.cli", "status"]
    environment = {name: value for name, value in os.environ.items() if name != "HAGROUP_CONFIG"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert "HAGROUP_CONFIG" in one_sentence(done, 2)


def test_a_group_that_was_not_created(fast_folder: Path) -> None:
    it = Written(fast_folder / "not-created")
    with pytest.raises(ConfigurationError, match="group create"):
        pkcs11.lib(str(it.toml))
    assert it.control.counts() == {}


# -- creating a group --------------------------------------------------------------------------------------------------


class Tokens:
    """Two fresh tokens and a configuration for them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        self.folder = folder
        self.tokens: dict[str, TokenFixture] = {
            name: make_token(folder / name, f"token {name}", SO_PIN, PIN) for name in ("hsm1", "hsm2")
        }
        for name in self.tokens:
            private(folder / name / "pin", PIN)
        self.so_pin = private(folder / "so-pin", SO_PIN)
        self.module = dict.fromkeys(self.tokens, SOFTHSM)
        self.pin_sources = True

    @property
    def group(self) -> GroupFixture:
        members = "".join(
            f'[[member]]\nname = "{name}"\nmodule = "{self.module[name]}"\ntoken_serial = "{token.serial}"\n'
            f'env = {{ SOFTHSM2_CONF = "{token.conf}" }}\n'
            + (f'pin = {{ file = "{name}/pin" }}\n' if self.pin_sources else "")
            for name, token in self.tokens.items()
        )
        return GroupFixture(private(self.folder / "hagroup.toml", f'[group]\nlabel = "payments"\n{members}'))

    def create(self, *options: str) -> subprocess.CompletedProcess[str]:
        return self.group.admin("group", "create", "--yes", "--so-pin-file", str(self.so_pin), *options)

    def plain(self, name: str) -> dict[str, Any]:
        token = self.tokens[name]
        return {"module": SOFTHSM, "serial": token.serial, "env": token.env}

    def check_untouched(self) -> None:
        for name in self.tokens:
            assert plain.objects(self.plain(name), own=True) == []
        assert not list(self.folder.glob("journal*"))
        assert "serial =" not in (self.folder / "hagroup.toml").read_text().replace("token_serial", "")


@pytest.fixture
def tokens(fast_folder: Path, request: pytest.FixtureRequest) -> Tokens:
    return Tokens(fast_folder / re.sub(r"\W", "-", request.node.name))


def flags(member: dict[str, Any]) -> int:
    program = (
        "import json, sys, pkcs11\nasked = json.load(sys.stdin)\n"
        "print(int(pkcs11.lib(asked['module']).get_token(token_serial=asked['serial'].encode()).flags))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(member),
        env=os.environ | member["env"],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_wrong_pin_source_when_creating(tokens: Tokens) -> None:
    private(tokens.folder / "hsm1" / "pin", "9999")
    line = one_sentence(tokens.create(), 2)
    assert 'member "hsm1"' in line
    assert "PIN" in line
    assert "9999" not in line
    assert [bool(flags(tokens.plain(name)) & COUNT_LOW) for name in ("hsm1", "hsm2")] == [True, False]
    private(tokens.folder / "hsm1" / "pin", PIN)
    tokens.check_untouched()


def test_wrong_pin_for_all_when_creating(tokens: Tokens) -> None:
    tokens.pin_sources = False
    wrong = private(tokens.folder / "wrong", "9999")
    assert 'member "hsm1"' in one_sentence(tokens.create("--pin-file", str(wrong)), 2)
    assert [bool(flags(tokens.plain(name)) & COUNT_LOW) for name in ("hsm1", "hsm2")] == [True, False]
    tokens.check_untouched()


def test_wrong_so_pin_when_creating(tokens: Tokens) -> None:
    """The second person is asked also where the keys could be made without him."""
    private(tokens.so_pin, "99999999")
    line = one_sentence(tokens.create(), 2)
    assert 'member "hsm1" refused the SO PIN' in line and "nothing was changed" in line
    assert "99999999" not in line
    tokens.check_untouched()


def test_objects_that_members_hold_already(tokens: Tokens) -> None:
    """A person says what becomes of them; in a script they stay where they are, and it is said."""
    program = "session.generate_key(KeyType.AES, 128, store=True, label='mine', template={Attribute.EXTRACTABLE: True})"
    tamper(tokens.plain("hsm2"), program)
    before = plain.labels(tokens.plain("hsm2"))
    stopped = one_sentence(tokens.create("--existing", "stop"), 2)
    assert "1 on hsm2" in stopped and "nothing was changed" in stopped
    config = ["--config", str(tokens.group.toml), "group", "create", "--so-pin-file", str(tokens.so_pin)]
    terminal = Terminal([Path(sys.executable).with_name("ha-admin"), *config])
    terminal.expect("[y/N]")
    terminal.send("y\n")
    terminal.expect("1 on hsm2: copy them to all members, leave them, or stop? [stop]")
    terminal.send("what?\n")
    terminal.send("\n")
    assert terminal.end() == 2, terminal.text
    assert (plain.labels(tokens.plain("hsm1")), plain.labels(tokens.plain("hsm2"))) == ([], before)
    assert not list(tokens.folder.glob("journal*"))
    left = tokens.create()
    assert left.returncode == 0 and "stay as they are" in left.stdout, left.stderr
    assert plain.labels(tokens.plain("hsm1")) == []
    assert GroupFixture(tokens.folder / "hagroup.toml").admin("group", "delete", "--yes").returncode == 0
    copied = tokens.create("--existing", "copy")
    assert copied.returncode == 0 and "1 objects adopted" in copied.stdout, copied.stdout + copied.stderr
    assert plain.labels(tokens.plain("hsm1")) == plain.labels(tokens.plain("hsm2")) == ["mine"]


def test_created_by_two_at_once(tokens: Tokens) -> None:
    """One makes it; the other one is refused, and takes nothing of it back."""
    command = [sys.executable, "-m", "hagroup.admin.cli", "--config", str(tokens.group.toml)]
    create = [*command, "group", "create", "--yes", "--so-pin-file", str(tokens.so_pin)]
    both = [subprocess.Popen(create, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [(*process.communicate(timeout=120), process.returncode) for process in both]
    statuses = sorted(status for _, _, status in ended)
    assert statuses[0] == 0 and statuses[1] in (2, 3), ended
    shown = subprocess.run([*command, "domain", "show"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0 and shown.stdout.count("by itself") == 2, shown.stdout
    assert len(plain.objects(tokens.plain("hsm1"), own=True)) >= 5, "keys, transport key, manifest, configuration"


def test_pin_that_is_not_given(tokens: Tokens) -> None:
    tokens.pin_sources = False
    assert "--pin-file" in one_sentence(tokens.create(), 2)
    tokens.check_untouched()


@pytest.mark.parametrize(
    ("content", "said"), [(None, "is not a PKCS#11 module"), ("a text", "cannot be loaded")], ids=["libc", "text"]
)
def test_module_that_is_not_one(tokens: Tokens, content: str | None, said: str) -> None:
    """For one member of two: the other one is not touched either."""
    module = LIBC if content is None else private(tokens.folder / "module.so", content, 0o755)
    tokens.module["hsm2"] = str(module)
    line = one_sentence(tokens.create(), 2)
    assert "hsm2" in line
    assert str(module) in line
    assert said in line
    tokens.check_untouched()


def test_token_that_is_not_there(tokens: Tokens) -> None:
    text = tokens.group.toml.read_text().replace(tokens.tokens["hsm2"].serial, "0123456789abcdef")
    group = GroupFixture(private(tokens.folder / "other.toml", text))
    line = one_sentence(group.admin("group", "create", "--yes", "--so-pin-file", str(tokens.so_pin)), 2)
    assert "0123456789abcdef" in line
    assert tokens.tokens["hsm2"].serial in line, "what is there instead"
    tokens.check_untouched()


def test_journal_that_cannot_be_written(tokens: Tokens) -> None:
    """Found out last: what was made on the tokens until then is taken back."""
    text = tokens.group.toml.read_text() + '[journal]\nurl = "sqlite:so-pin/journal.db"\n'
    group = GroupFixture(private(tokens.folder / "other.toml", text))
    line = one_sentence(group.admin("group", "create", "--yes", "--so-pin-file", str(tokens.so_pin)), 2)
    assert "so-pin/journal.db" in line
    tokens.check_untouched()


# -- a group that exists -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def existing(fast_folder: Path) -> GroupFixture:
    group = make_group(fast_folder / "existing", members=2)
    set_timeouts(group.toml)
    return group


def variant(group: GroupFixture, name: str, changed: Callable[[str], str]) -> GroupFixture:
    return GroupFixture(private(group.folder / f"{name}.toml", changed(group.toml.read_text())))


def test_unknown_member(existing: GroupFixture) -> None:
    line = one_sentence(existing.admin("objects", "--member", "nope"), 2)
    assert "nope" in line
    assert "hsm1, hsm2" in line


def test_unknown_command_and_option(existing: GroupFixture) -> None:
    for arguments in (["objekts"], ["status", "--jsn"], ["objects", "--member"]):
        done = existing.admin(*arguments)
        assert done.returncode == 2
        assert done.stderr
        assert "Traceback" not in done.stderr


NEW = "--token-serial 1 --yes --pin-file {folder}/hsm1/pin"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"member add new --module {SOFTHSM} {NEW} --wrap-mechanism zz", "--wrap-mechanism zz: write a number"),
        (f"member add new --module {SOFTHSM} {NEW} --wrap-mechanism -1", "--wrap-mechanism -1: write a number"),
        (f"member add new --module {SOFTHSM} {NEW} --env 1X=y", "env.1X must be the name of an environment variable"),
        (f"member add n@w --module {SOFTHSM} {NEW}", 'name must be made of 1 to 64 letters, digits, ".", "_" or "-"'),
        ("domain shares --check --share-file {softhsm}", "is no share; nothing was changed"),
        ("sync --label key", "--label goes with --adopt"),
        ("journal note text --done hsm1 --to-do hsm1", "hsm1 is named twice"),
        ("backup create {folder}/none/file", "/none/file cannot be written: No such file or directory"),
        ("backup restore {folder}/none --yes", "/none: No such file or directory"),
        ("doctor --bundle {folder}/hagroup.toml", "/hagroup.toml exists already and is not overwritten"),
    ],
)
def test_options_that_cannot_be(existing: GroupFixture, words: str, said: str) -> None:
    before = existing.toml.read_text()
    done = existing.admin(*(one.format(folder=existing.folder, softhsm=SOFTHSM) for one in words.split()))
    assert said in one_sentence(done, 2)
    assert existing.toml.read_text() == before


def test_created_twice(existing: GroupFixture) -> None:
    before = {name: plain.objects(member, own=True) for name, member in existing.members.items()}
    so_pin = private(existing.folder / "so-pin", SO_PIN)
    line = one_sentence(existing.admin("group", "create", "--yes", "--so-pin-file", str(so_pin)), 2)
    assert "created already" in line
    bare = variant(existing, "bare", lambda text: re.sub(r"(?m)^serial .*\n", "", text))
    line = one_sentence(bare.admin("group", "create", "--yes", "--so-pin-file", str(so_pin)), 2)
    assert "journal" in line
    assert {name: plain.objects(member, own=True) for name, member in existing.members.items()} == before


def test_one_members_module_is_not_one(existing: GroupFixture) -> None:
    """The group goes on with the other member; ``status`` says what is wrong with this one."""
    one = variant(existing, "one", lambda text: text.replace(SOFTHSM, str(LIBC), 1))
    lib = pkcs11.lib(str(one.toml))
    try:
        with lib.get_token(token_label="payments").open(rw=True, user_pin=PIN) as session:
            session.generate_key(KeyType.AES, 256, store=True, label="on the other").destroy()
    finally:
        lib.unload()
    done = one.admin("status", "--json")
    assert done.returncode == 1
    members = {member["name"]: member for member in json.loads(done.stdout)["members"]}
    assert members["hsm1"]["state"] == "failed"
    assert f"{LIBC} is not a PKCS#11 module" in members["hsm1"]["reason"]
    assert members["hsm2"]["state"] == "in service"


def test_no_members_module_is_one(existing: GroupFixture) -> None:
    none = variant(existing, "none", lambda text: text.replace(SOFTHSM, str(LIBC)))
    lib = pkcs11.lib(str(none.toml))
    try:
        with pytest.raises(GroupUnavailable) as raised:
            lib.get_token(token_label="payments").open(rw=True, user_pin=PIN)
    finally:
        lib.unload()
    assert isinstance(raised.value, exceptions.DeviceError)
    assert "is not a PKCS#11 module" in str(raised.value)
    assert none.admin("status").returncode == 3


def test_another_groups_serial(existing: GroupFixture) -> None:
    other = variant(existing, "other", lambda text: re.sub(r"(?m)^serial .*\n", 'serial = "12345678"\n', text))
    with pytest.raises(pkcs11.PKCS11Error) as raised:
        pkcs11.lib(str(other.toml))
    assert "12345678" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "12345678" in one_sentence(other.admin("sync"), 2)


def test_wrong_pin_for_commands(fast_folder: Path) -> None:
    group = make_group(fast_folder / "bad-pins", "--no-pin-sources", members=2)
    wrong = str(private(group.folder / "wrong", "9999"))
    for command in (["sync"], ["objects", "--member", "hsm1"]):
        line = one_sentence(group.admin(*command, "--pin-file", wrong), 2)
        assert "PIN" in line
        low = [bool(flags(member) & COUNT_LOW) for member in group.members.values()]
        assert low.count(True) == 1, "one attempt on one member"
        right = str(group.folder / "hsm1" / "pin")
        for name in group.members:
            assert group.admin("objects", "--member", name, "--pin-file", right).returncode == 0
        assert not any(flags(member) & COUNT_LOW for member in group.members.values())
