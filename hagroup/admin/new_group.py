"""``ha-admin group create`` where there is no hagroup.toml yet: from options, or from answers at a terminal.

What may stand in the file is decided where it is read (``config.load``): each answer is tried there.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec
import typer

from hagroup.admin.member_commands import environment
from hagroup.admin.show import table
from hagroup.config import permissions, write
from hagroup.config.model import (
    EtcdUrl,
    GroupConfig,
    GroupSection,
    JournalSection,
    MemberConfig,
    PinSource,
    SqliteUrl,
    Timeouts,
    is_softhsm,
)
from hagroup.config.urls import BadUrl, parse_journal_url
from hagroup.core.calls import Ckr
from hagroup.core.records import Role
from hagroup.engine.opening import CONNECTION_LOST, START_TIMEOUT
from hagroup.errors import ConfigurationError
from hagroup.members import ConnectionSettings, ModuleProblem, tokens_in
from hagroup.members.api import TokenInfo

MEMBER = "NAME,module=FILE,serial=SERIAL[,env=K=V][,pin-file=FILE]"
_KEYS = ("module", "serial", "label", "env", "pin-file", "pin-env")
_JOURNAL = "sqlite:journal.db"
_FILES = ("ca", "cert", "key")
_TOKEN_INITIALIZED, _USER_PIN_INITIALIZED = 0x400, 0x8
_NOT_CHANGED = "; nothing was changed"

_T = TypeVar("_T")
Members: TypeAlias = tuple[MemberConfig, ...]


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """What the options say of a configuration that is to be made."""

    label: str | None = None
    members: tuple[str, ...] = ()
    """Each as :data:`MEMBER` has it."""
    journal: str | None = None
    files: dict[str, Path] = {}
    """``ca``, ``cert`` and ``key`` of a journal on etcd."""
    min_replicas: int | None = None

    @property
    def options(self) -> list[str]:
        """Those that were given."""
        named: dict[str, object] = {"--label": self.label, "--member": self.members or None, "--journal": self.journal}
        named |= {f"--journal-{name}": file for name, file in self.files.items()}
        named["--min-replicas"] = self.min_replicas
        return [name for name, value in named.items() if value is not None]


def refuse_options(path: Path, given: Given) -> None:
    """:raises ConfigurationError: options for a new configuration were given, and there is one."""
    if given.options:
        raise ConfigurationError(
            f"{path} exists already, and {', '.join(given.options)} would make a new one: leave them out to create the "
            f"group that it describes, or name another file{_NOT_CHANGED}"
        )


@contextmanager
def place_for(path: Path) -> Iterator[None]:
    """The folder of a new configuration; one that is made for it goes again where no group comes to be.

    :raises ConfigurationError: others may write there.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        permissions.check_folder_of(path)
        yield
    except BaseException as error:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, permissions.Unsafe):
            raise ConfigurationError(f"no configuration can be written here: {error}{_NOT_CHANGED}") from None
        raise


def compose(path: Path, given: Given) -> GroupConfig:
    """The configuration that is to be at ``path``, where nothing is yet. What options do not say a person is asked.

    :raises ConfigurationError: nobody can be asked, or it could not be read; nothing was changed.
    """
    missing = [name for name in ("--label", "--member") if name not in given.options]
    if missing and not sys.stdin.isatty():
        raise ConfigurationError(
            f"{path} does not exist: give {' and '.join(missing)} to make it, or run this on a terminal, which asks"
        )
    if missing:
        typer.echo(f"{path} does not exist: it is made from your answers. Ctrl-C ends this, and nothing is changed.")
    try:
        return _compose(path, given, asking=bool(missing))
    except ConfigurationError as error:
        raise ConfigurationError(f"{str(error).removesuffix(_NOT_CHANGED)}{_NOT_CHANGED}") from None


def _compose(path: Path, given: Given, *, asking: bool) -> GroupConfig:
    draft = GroupConfig(
        path=path,
        group=GroupSection(label="" if given.label is None else given.label, min_replicas=1),
        journal=JournalSection(url=parse_journal_url(_JOURNAL, path.parent)),
        timeouts=Timeouts(),
        members=(),
    )
    if given.label is None:
        draft = _asked("Label of the group, which programs find it by", lambda text: _labelled(draft, text))
    if given.members:
        members = tuple(_from_option(text) for text in given.members)
    else:
        members = _with_pins(draft, _ask_members(draft))
    if asking and given.journal is None:
        journal = _ask_journal(path.parent)
    else:
        journal = _journal(_url(given.journal or _JOURNAL, path.parent), given.files)
    replicas = given.min_replicas
    if replicas is None:
        replicas = min(GroupSection(label="").min_replicas, len(members))
    group = msgspec.structs.replace(draft.group, min_replicas=replicas)
    return write.check_new(msgspec.structs.replace(draft, group=group, journal=journal, members=members))


# -- from options


def _from_option(text: str) -> MemberConfig:
    name, *settings = re.split(r",(?=[a-z_-]+=)", text)
    found: dict[str, list[str]] = {key: [] for key in _KEYS}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in found:
            raise ConfigurationError(f"--member {name}: {key} is not known; write {MEMBER}")
        if found[key] and key != "env":
            raise ConfigurationError(f"--member {name}: {key} is given twice; write {MEMBER}")
        found[key].append(value)
    one = {key: values[0] if values else None for key, values in found.items()}
    if not one["module"] or bool(one["serial"]) == bool(one["label"]):
        what = "module" if not one["module"] else "either serial or label"
        raise ConfigurationError(f"--member {name}: {what} is needed; write {MEMBER}")
    if one["pin-file"] and one["pin-env"]:
        raise ConfigurationError(f"--member {name}: its PIN comes from a file or from a variable, not from both")
    member = _member(name, Path(one["module"]), environment(found["env"]), serial=one["serial"], label=one["label"])
    if one["pin-file"] or one["pin-env"]:
        file = Path(one["pin-file"]).absolute() if one["pin-file"] else None
        member = msgspec.structs.replace(member, pin=PinSource(file=file, env=one["pin-env"]))
    return member


def _member(
    name: str, module: Path, env: dict[str, str], *, serial: str | None, label: str | None = None
) -> MemberConfig:
    return MemberConfig(
        name=name,
        module=module.absolute(),
        token_serial=serial,
        token_label=label,
        env=env,
        role=Role.ACTIVE,
        local=is_softhsm(module),
    )


def _url(text: str, folder: Path) -> SqliteUrl | EtcdUrl:
    try:
        return parse_journal_url(text, folder)
    except BadUrl as error:
        shown = f"{text!r} " if error.harmless else ""
        raise ConfigurationError(f"the journal's URL {shown}must be {error}") from None


def _journal(url: SqliteUrl | EtcdUrl, files: dict[str, Path]) -> JournalSection:
    return msgspec.structs.replace(JournalSection(url=url), **files)


# -- from answers


def _asked(question: str, read: Callable[[str], _T], default: str | None = None) -> _T:
    """Until the answer can be used."""
    while True:
        try:
            return read(typer.prompt(question, default=default, show_default=bool(default)).strip())
        except ConfigurationError as error:
            typer.echo(f"  {str(error).removesuffix(_NOT_CHANGED)}")


def _labelled(draft: GroupConfig, label: str) -> GroupConfig:
    changed = msgspec.structs.replace(draft, group=msgspec.structs.replace(draft.group, label=label))
    anyone = _member("anyone", Path("any"), {}, serial="0")  # a group is not read without a member
    write.check_new(msgspec.structs.replace(changed, members=(anyone,)), check_files=False)
    return changed


def _ask_members(draft: GroupConfig) -> Members:
    found: Members = ()
    while True:
        if found:
            module = typer.prompt("Another PKCS#11 module (empty: no more)", default="", show_default=False).strip()
        else:
            module = typer.prompt("PKCS#11 module of the HSMs, a file").strip()
        if not module and found:
            return found
        env = _asked(
            "Its environment, as NAME=VALUE NAME=VALUE (empty: none)", lambda text: environment(text.split()), ""
        )
        try:
            found = _ask_tokens(draft, Path(module).absolute(), env, found)
        except ConfigurationError as error:
            typer.echo(f"  {error}")


def _ask_tokens(draft: GroupConfig, module: Path, env: dict[str, str], found: Members) -> Members:
    """Those that are members already, and those of this module that are to be."""
    known = {one.token_serial for one in found if (one.module, one.env) == (module, env)}
    tokens = [token for token in _tokens(module, env) if token.serial not in known]
    if not tokens:
        raise ConfigurationError(f"{module} has no {'other ' * bool(known)}token that is initialised")
    lines = [
        (str(number), token.serial, token.label, "" if token.flags & _USER_PIN_INITIALIZED else "has no user PIN yet")
        for number, token in enumerate(tokens, 1)
    ]
    table(("token", "serial", "label", "remark"), lines)
    chosen = _asked("Which are to be members? (such as 1,3)", lambda text: _picked(text, tokens), "all")
    for token in chosen:

        def named(name: str, token: TokenInfo = token, others: Members = found) -> Members:
            serial, label = (token.serial, None) if token.serial else (None, token.label)
            return _with(draft, others, _member(name, module, env, serial=serial, label=label))

        question = f"Name of the member with token {token.serial} ({token.label})"
        found = _asked(question, named, f"hsm{len(found) + 1}")
    return found


def _with(draft: GroupConfig, others: Members, member: MemberConfig) -> Members:
    """:raises ConfigurationError: it cannot stand in the file after the others."""
    members = (*others, member)
    write.check_new(msgspec.structs.replace(draft, members=members))
    return members


def _tokens(module: Path, env: dict[str, str]) -> list[TokenInfo]:
    """:raises ConfigurationError: the module cannot be used, or others could put another one in its place."""
    try:
        permissions.check_file(module)
        settings = ConnectionSettings(name=module.name, module=str(module), env=env)
        found = tokens_in(settings, timeout=START_TIMEOUT)
    except (permissions.Unsafe, ModuleProblem, Ckr, *CONNECTION_LOST) as error:
        raise ConfigurationError(str(error).removeprefix(f"member {module.name}: ")) from None
    initialised = [token for token in found if token.flags & _TOKEN_INITIALIZED]
    return sorted(initialised, key=lambda token: (token.label, token.serial))


def _picked(text: str, tokens: list[TokenInfo]) -> list[TokenInfo]:
    if text == "all":
        return tokens
    words = [word for word in re.split(r"[,\s]+", text) if word]
    numbers = [int(word) if word.isdecimal() else 0 for word in words]
    if not numbers or len(set(numbers)) < len(numbers) or not all(1 <= number <= len(tokens) for number in numbers):
        raise ConfigurationError(f"write numbers from 1 to {len(tokens)}, each once, or all")
    return [tokens[number - 1] for number in numbers]


def _with_pins(draft: GroupConfig, members: Members) -> Members:
    """Where each takes its user PIN from; the PIN itself is not asked for here, and never written."""

    def kind(text: str) -> str:
        if text not in ("login", "file", "env"):
            raise ConfigurationError("write login, file or env")
        return text

    question = "User PINs: from programs that log in (login), a file (file) or a variable (env) for each member"
    where = _asked(question, kind, "login")
    if where == "login":
        return members
    found: Members = ()
    for member in members:

        def sourced(text: str, member: MemberConfig = member, others: Members = found) -> Members:
            source = PinSource(file=Path(text).absolute()) if where == "file" else PinSource(env=text)
            return _with(draft, others, msgspec.structs.replace(member, pin=source))

        if where == "file":
            question = f"File with the user PIN of {member.name} (mode 0600)"
            default = str(draft.folder / f"{member.name}.pin")
        else:
            question = f"Variable with the user PIN of {member.name}"
            default = re.sub(r"\W", "_", f"{member.name}_PIN").upper()
        found = _asked(question, sourced, default)
    return found


def _ask_journal(folder: Path) -> JournalSection:
    question = f"Journal: sqlite:FILE (in {folder}) for this host, etcd://HOST:PORT,…/NAME for several"
    url = _asked(question, lambda text: _url(text, folder), _JOURNAL)
    files: dict[str, Path] = {}
    if isinstance(url, EtcdUrl):
        for name, what in zip(_FILES, ("CA of its nodes", "Certificate of this host", "Its key"), strict=True):
            file = typer.prompt(f"{what}, a file (empty: none)", default="", show_default=False).strip()
            if file:
                files[name] = Path(os.path.abspath(file))
    return _journal(url, files)
