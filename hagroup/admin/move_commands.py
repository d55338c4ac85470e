"""``ha-admin journal move``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from hagroup.admin.options import Json, Yes, chosen_config, confirm, print_json, say
from hagroup.config.load import load
from hagroup.config.model import EtcdUrl, GroupConfig, JournalSection, SqliteUrl
from hagroup.config.urls import BadUrl, parse_journal_url
from hagroup.config.write import journal_section
from hagroup.engine import move as moving
from hagroup.errors import ConfigurationError
from hagroup.journal.clock import SystemClock

File = Annotated[Path | None, typer.Option(metavar="FILE", help="as in [journal], for the journal that is not there")]


def move(
    source: Annotated[str, typer.Argument(metavar="FROM", help="as in [journal] url: sqlite:FILE or etcd://...")],
    target: Annotated[str, typer.Argument(metavar="TO", help="the same; nothing may be there yet")],
    ca: File = None,
    cert: File = None,
    key: File = None,
    user: Annotated[str | None, typer.Option(help="as in [journal], for the journal that is not there")] = None,
    password_file: File = None,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="leave an interrupted move; FROM takes changes again")
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Move the journal to another place: from SQLite to etcd, or back. Interrupted, the same command completes it.

    Programs that run go on signing meanwhile; their changes are refused, and from its end on they have to be started
    again with the new [journal], which is printed. Whoever still has the old one is told where it went.
    """
    config = load(chosen_config())
    more = {"ca": ca, "cert": cert, "key": key, "password_file": password_file}
    for name, file in more.items():
        if file is not None and not file.is_file():
            raise ConfigurationError(f"--{name.replace('_', '-')} {file} is not a file; nothing was moved")
    files = {name: None if file is None else file.absolute() for name, file in more.items()}
    urls = _url(config, source), _url(config, target)
    if urls[0] == urls[1] or config.journal.url not in urls:
        raise ConfigurationError(
            f"{config.path}: [journal] url is {config.journal.url}: one of FROM and TO has to be that, the other one "
            "another place; nothing was moved"
        )
    old, new = (_section(config, url, user, files) for url in urls)
    clock = SystemClock()
    if cancel:
        moving.cancel(old, new, clock=clock)
        say(f"{old.url} is the journal, and takes changes")
        return
    question = (
        f"Move the journal of group {config.group.label} from {old.url} to {new.url}? (programs can change nothing "
        "until they are started again with the new [journal])"
    )
    if not yes and not confirm(question):
        raise ConfigurationError("not confirmed (give --yes in scripts); nothing was moved")
    command = f"ha-admin journal move {old.url} {new.url}"
    done = moving.move(old, new, serial=config.group.serial, command=command, clock=clock)
    if as_json:
        print_json(done)
        return
    say(f"the journal was moved to {done.target}: {done.objects} objects, {done.tombstones} tombstones, compared")
    say("Write this in place of [journal] in every hagroup.toml, start all programs again, and run `ha-admin sync`:\n")
    say(journal_section(new, config.folder))


def _url(config: GroupConfig, text: str) -> SqliteUrl | EtcdUrl:
    try:
        return parse_journal_url(text, config.folder)
    except BadUrl as error:
        shown = f"{text!r} " if error.harmless else ""
        raise ConfigurationError(f"the journal's URL {shown}must be {error}; nothing was moved") from None


def _section(
    config: GroupConfig, url: SqliteUrl | EtcdUrl, user: str | None, files: dict[str, Path | None]
) -> JournalSection:
    """As the file says where it names this one; else as the options say."""
    if url == config.journal.url:
        return config.journal
    section = JournalSection(url=url, mirror=config.journal.mirror, offline_serving=config.journal.offline_serving)
    if isinstance(url, SqliteUrl):
        return section
    # A mirror is one host's: the members get the sealed records, in the inventory with which the new epoch begins.
    return msgspec.structs.replace(section, mirror=None, user=user, **files)
