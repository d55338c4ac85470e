"""Every command of ha-admin, each with what it needs to have something to do: for the tests that try all of them."""

from __future__ import annotations

import contextlib
import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from tests.support.groups import PIN, SO_PIN, GroupFixture, address, copy_group, make_group, run_client
from tests.support.newcomers import new_token, private, tamper
from tests.support.softhsm import SOFTHSM, TokenFixture, make_token

SO = ["--so-pin-file", "{folder}/so-pin"]

READING: dict[str, list[str]] = {
    "group show": [],
    "status": [],
    "objects": [],
    "member list": [],
    "journal list": [],
    "journal tail": [],
    "journal verify": [],
    "journal todo": [],
    "sync --dry-run": [],
}
"""Need the journal alone."""
ASKING: dict[str, list[str]] = {
    "objects --member hsm2": [],
    "verify": [],
    "domain show": [],
    "sync": [],
    "recover": [],
    "sync --adopt": [],
    "backup create": ["{folder}/new-backup"],
}
"""Ask members, and change nothing where nothing is to be changed."""
CHANGING: dict[str, list[str]] = {
    "journal note": ["a note"],
    "member standby hsm2": [],
    "member backup hsm2": [],
    "member activate hsm2": [],
    "member drain hsm2": [],
    "member resume hsm2": [],
    "member add hsm4 --yes": [
        *(
            "--module",
            SOFTHSM,
            "--token-serial",
            "{serial of hsm4}",
            "--env",
            "SOFTHSM2_CONF={folder}/hsm4/softhsm2.conf",
        ),
        *("--isolation", "{isolation}", "--pin-file", "{folder}/hsm4/pin", *SO),
    ],
    "backup restore --yes": ["{folder}/backup"],
    "domain join hsm2": SO,
    "domain shares --shares 2-of-3 --yes": ["--shares-folder", "{folder}/new-shares", *SO],
    "domain rotate --yes": SO,
    "journal move sqlite:journal.db sqlite:moved.db --yes": [],
    "member remove hsm3 --yes": [],
    "group delete --yes": [],
    "clear --yes": [],
    "journal rebuild --yes": [],
    "journal adopt --yes": [],
}
FOUNDING: dict[str, list[str]] = {
    "domain create --yes": SO,
    "group create --yes": SO,
    "group join --yes": ["{address}", "--pin-file", "{folder}/hsm1/pin"],
}
"""Need no journal: there is none yet."""
ALL = {**READING, **ASKING, **CHANGING, "doctor": [], **FOUNDING}

SHARES = ["--shares", "2-of-3", "--shares-folder", "{folder}/new-shares", *SO]
MORE = {"domain rotate --yes --json": SHARES, "domain create --sealed --yes": SHARES}
"""Ways of these that do more, for some tests only."""

_PLACES = {"domain create": "rack", "group create": "rack", "group join": "host"}
"""Folders of their own: tokens without a group, and a host without a configuration."""


def toml_of(group: GroupFixture, line: str) -> Path:
    """The configuration that a command is for."""
    return group.folder / _PLACES.get(" ".join(line.split()[:2]), "") / "hagroup.toml"


def words_of(group: GroupFixture, line: str, more: list[str] | None = None) -> list[str]:
    """A command as it is typed, without its configuration."""
    words = [*line.split(), *({**ALL, **MORE}[line] if more is None else more)]
    if "{address}" in words:
        place = words.index("{address}")
        words[place : place + 1] = address(group, "hsm1")
    isolation = "none" if 'isolation    = "none"' in group.toml.read_text() else "process"
    known = {"{folder}": str(group.folder), "{isolation}": isolation}
    known |= {f"{{serial of {file.parent.name}}}": file.read_text() for file in group.folder.glob("*/serial")}
    return [re.sub(r"\{[^}]+\}", lambda found: known[found[0]], word) for word in words]


def newcomer(group: GroupFixture, name: str) -> TokenFixture:
    """A token that may be added."""
    token = new_token(group, name)
    (group.folder / name / "serial").write_text(token.serial)
    return token


def make_site(folder: Path, *, isolation: str = "none") -> GroupFixture:
    """A group of three, with two keys and a backup; a newcomer, tokens without a group, a folder for a new host."""
    group = make_group(folder, members=3, isolation=isolation)
    newcomer(group, "hsm4")
    run_client(group, "for n in range(2):\n    session.generate_key(KeyType.AES, 256, store=True, label=f'key {n}')\n")
    assert group.admin("backup", "create", str(folder / "backup")).returncode == 0
    assert group.admin("sync").returncode == 0  # and the members show where this group is
    without_keys(folder / "rack", 2, isolation=isolation)
    (folder / "host").mkdir(mode=0o700)
    return group


def without_keys(folder: Path, members: int, *, isolation: str = "process") -> GroupFixture:
    """Initialised tokens and a hagroup.toml that names them; nothing else was done yet."""
    lines = ["[group]", 'label = "payments"', "[journal]", 'url = "sqlite:journal.db"']
    folder.mkdir(mode=0o700)
    for number in range(1, members + 1):
        name = f"hsm{number}"
        token = make_token(folder / name, name, SO_PIN, PIN)
        private(folder / name / "pin", PIN)
        lines += ["[[member]]", f'name = "{name}"', f'module = "{SOFTHSM}"', f'token_serial = "{token.serial}"']
        lines += [f'isolation = "{isolation}"', f'pin = {{ file = "{name}/pin" }}']
        lines += [f'env = {{ SOFTHSM2_CONF = "{name}/softhsm2.conf" }}']
    private(folder / "so-pin", SO_PIN)
    group = GroupFixture(private(folder / "hagroup.toml", "\n".join([*lines, ""])))
    group.reload()
    return group


# -- something to do ---------------------------------------------------------------------------------------------------


def _behind(group: GroupFixture) -> None:
    """One member missed a key."""
    group.take_away("hsm2")
    run_client(group, "session.generate_key(KeyType.AES, 256, store=True, label='missed')\n")
    group.bring_back("hsm2")


def _forgotten(group: GroupFixture) -> None:
    """Keys that never were destroyed, and the journal knows nothing of."""
    with contextlib.closing(sqlite3.connect(group.folder / "journal.db")) as journal, journal:
        for table in ("objects", "copies", "owed"):
            journal.execute(f"DELETE FROM {table}")
        journal.execute("UPDATE head SET live = 0, owed = 0")


def _empty(group: GroupFixture) -> None:
    assert group.admin("clear", "--yes").returncode == 0


_LOSE_KEYS = """
for label in ("hagroup domain key", "hagroup partition key"):
    for item in session.get_objects({Attribute.LABEL: label}):
        item.destroy()
"""


def _reset(group: GroupFixture) -> None:
    """One member lost the domain's keys."""
    tamper(group.members["hsm2"], _LOSE_KEYS)


def make_transport_keys(site: GroupFixture) -> None:
    """On all tokens that have none yet, as an interrupted attempt to found a group or to join one leaves them: making
    such a key takes most of the time that these commands take."""
    rack = toml_of(site, "group create")
    text = rack.read_text()
    section = text[text.rindex("[[member]]") :].replace("hsm2/", f"{site.folder}/hsm4/").replace('"hsm2"', '"hsm4"')
    section = re.sub("token_serial = .*", f'token_serial = "{(site.folder / "hsm4" / "serial").read_text()}"', section)
    rack.write_text(f"{text}{section}")
    done = site.admin("--config", str(rack), *words_of(site, "domain create --yes"))
    assert done.returncode == 0, done.stderr
    group = GroupFixture(rack)
    group.reload()
    for member in group.members.values():
        tamper(member, _LOSE_KEYS)
    rack.write_text(text)


def _strange(group: GroupFixture) -> None:
    """A key on a member that is not the group's."""
    template = "{Attribute.EXTRACTABLE: True, Attribute.SENSITIVE: False}"
    program = f"session.generate_key(KeyType.AES, 256, store=True, label='stranger', template={template})\n"
    tamper(group.members["hsm1"], program)


def _resting(group: GroupFixture) -> None:
    assert group.admin("member", "standby", "hsm2").returncode == 0


def _draining(group: GroupFixture) -> None:
    assert group.admin("member", "drain", "hsm2").returncode == 0


_PREPARED = {
    "sync": _behind,
    "recover": _behind,
    "sync --dry-run": _behind,
    "sync --adopt": _strange,
    "member activate hsm2": _resting,
    "member resume hsm2": _draining,
    "backup restore --yes": _forgotten,
    "domain join hsm2": _reset,
    "group delete --yes": _empty,
}


class Sites:
    """Copies of one group, each in the state in which a command has something to do."""

    def __init__(self, site: GroupFixture, folder: Path) -> None:
        self._site, self._folder = site, folder
        self._prepared: dict[object, GroupFixture] = {None: site}
        self._made = 0

    @contextlib.contextmanager
    def copy(self, line: str) -> Iterator[GroupFixture]:
        """One that this command may spoil."""
        prepare = _PREPARED.get(line)
        if prepare not in self._prepared:
            found = self._prepared[prepare] = copy_group(self._site, self._folder / f"prepared-{len(self._prepared)}")
            assert prepare is not None
            prepare(found)
        self._made += 1
        group = copy_group(self._prepared[prepare], self._folder / f"copy-{self._made}")
        if line == "group join --yes":  # the members show where this copy is
            assert group.admin("sync").returncode == 0
        yield group
        shutil.rmtree(group.folder)
