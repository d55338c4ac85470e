"""``ha-admin journal rebuild`` and ``adopt``, and ``recover`` where the journal is behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from hagroup import journal as journals
from hagroup.admin import commands
from hagroup.admin.options import (
    DEGRADED,
    Json,
    PinEnv,
    PinFile,
    PinOptions,
    Yes,
    chosen_config,
    print_json,
    say,
    typed,
)
from hagroup.config.load import load
from hagroup.config.model import GroupConfig, SqliteUrl
from hagroup.config.write import set_group_serial
from hagroup.core.rebuilding import Former
from hagroup.core.records import Event
from hagroup.engine import membership
from hagroup.engine import rebuild as rebuilding
from hagroup.errors import ConfigurationError, HAError, JournalUnavailable
from hagroup.journal import SqliteJournal, open_journal
from hagroup.journal.clock import SystemClock
from hagroup.journal.sealed import Sealed, Why
from hagroup.journal.sqlite import tidy

Keep = Annotated[
    list[str] | None, typer.Option("--keep", metavar="UID", help="take this doubtful object over all the same")
]


def rebuild(
    keep: Keep = None, pin_file: PinFile = None, pin_env: PinEnv = None, yes: Yes = False, as_json: Json = False
) -> None:
    """Make a lost journal anew from the members, their manifests and [journal] mirror; say what cannot be known.

    A file that is there is moved aside, never overwritten; one that is well only after its group's label was typed.
    Then every member goes through a full inventory before it serves. Interrupted, the same command completes it.
    """
    config = load(chosen_config())
    with alone(config):
        if config.group.serial is None and (serial := _serial(config)) is not None:
            set_group_serial(config.path, serial)
            say(f"the journal {config.journal.url} is there and well; its serial number {serial} is written")
            return
        _refuse_if_well(config, yes=yes)
        _rebuild(config, _readable(config), keep or [], pin=(pin_file, pin_env), as_json=as_json)


def unfinished(path: Path) -> str | None:
    """Why nobody can use the journal: making it anew was cut off. None: it was not. (A file appears whole.)"""
    config = load(path)
    if isinstance(config.journal.url, SqliteUrl):
        return None
    with suppress(HAError):  # whoever opens it next says what is wrong with it
        journal = journals.EtcdJournal.open(config.journal, read_only=True, for_moving=True)
        sealed = journal.sealed()
        journal.close()
        if sealed is not None and sealed.why is Why.MAKING and sealed.other == rebuilding.COMMAND:
            return str(sealed.refusal(config.journal.url))
    return None


def reconcile(behind: str, *, pin: PinOptions, yes: bool) -> None:
    """A journal that is behind the group: what it knows and what members know together make the next one."""
    config = load(chosen_config())
    say(behind)
    question = (
        f"Make it anew, from what it knows and what the members know? Type the group's label {config.group.label}"
    )
    if not yes and not typed(question, config.group.label):
        raise ConfigurationError(f"{behind}; not confirmed (give --yes in scripts); nothing was changed")
    with alone(config):
        _rebuild(config, _readable(config), [], pin=pin, as_json=False)


def _rebuild(
    config: GroupConfig,
    former: tuple[Former, list[Event], str] | None,
    keep: Iterable[str],
    *,
    pin: PinOptions,
    as_json: bool,
) -> None:
    try:
        kept = [bytes.fromhex(uid) for uid in keep]
    except ValueError:
        raise ConfigurationError("--keep takes the UID that `journal rebuild` printed; nothing was changed") from None
    pins = commands.user_pins(config, pin)
    done = rebuilding.rebuild(config, pins, former=former, keep=kept, clock=SystemClock())
    if config.group.serial is None:
        set_group_serial(config.path, done.group)
    if as_json:
        print_json(done)
    else:
        show(done)
    if done.doubtful or done.not_replicable or done.away:
        raise typer.Exit(DEGRADED)


def show(done: rebuilding.Rebuilt) -> None:
    say(f"the journal was rebuilt: {done.objects} objects, {done.tombstones} tombstones")
    for name, text in done.members.items():
        say(f"member {name}: {text}")
    for name, why in done.away.items():
        say(f"member {name} contributed nothing: {why}")
    if done.aside is not None:
        say(f"the journal that was there is now {done.aside}")
    for one in done.doubtful:
        print(f"doubtful, neither taken over nor destroyed: {one['label']!r} ({one['uid']}): {one['why']}")
    for text in done.not_replicable:
        print(f"cannot be replicated: {text}")
    for text in done.unknown:
        print(f"not known: {text}")
    say("each member goes through a full inventory before it serves: `ha-admin sync` does it now")


def _there(config: GroupConfig) -> bool:
    """Whether there is anything in the journal's place."""
    if isinstance(config.journal.url, SqliteUrl):
        return config.journal.url.path.exists()
    return journals.EtcdJournal.exists(config.journal)


def _refuse_if_elsewhere(config: GroupConfig, sealed: Sealed | None) -> None:
    if sealed is not None and sealed.why is not Why.MAKING:
        raise ConfigurationError(
            f"the journal {config.journal.url} is not the group's any more: {sealed.refusal(config.journal.url)}"
        )


@contextmanager
def alone(config: GroupConfig) -> Iterator[None]:
    """One at a time makes the journal anew; what one that was cut off left is removed. (On etcd the sealed head sees
    to it: of two the later one goes on.)"""
    if not isinstance(config.journal.url, SqliteUrl):
        yield
        return
    path = config.journal.url.path
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigurationError(f"{path.parent}: {error.strerror}; nothing was changed") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        tidy(path)
        for left in path.parent.glob(f".{path.name}.reading-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    except BlockingIOError:
        raise ConfigurationError(
            f"another ha-admin is making the journal {path} anew just now: wait for its end; nothing was changed"
        ) from None
    finally:
        os.close(folder)


def _serial(config: GroupConfig) -> str | None:
    """Of the group whose well journal is there: an earlier attempt was cut off just before it was written."""
    if not _there(config):
        return None
    try:
        journal = open_journal(config.journal, clock=SystemClock())
    except HAError:
        return None
    try:
        found = journal.group()
        return found.serial if found.label == config.group.label else None
    finally:
        journal.close()


def _is_well(config: GroupConfig) -> bool:
    """Whether the journal that is there can be used as it is.

    :raises JournalUnavailable: it is in use just now, or not ours to replace.
    :raises GroupUnavailable: another ha-admin is at work.
    """
    if not _there(config):
        return False
    if isinstance(config.journal.url, SqliteUrl):
        SqliteJournal.expect_replaceable(config.journal.url.path)
    try:
        journal = open_journal(config.journal, clock=SystemClock())
    except HAError:
        return False
    try:
        with membership.alone(journal):
            return True
    finally:
        journal.close()


def _refuse_if_well(config: GroupConfig, *, yes: bool) -> None:
    if not _is_well(config):
        return
    label = config.group.label
    question = f"The journal {config.journal.url} is there and well. Type the group's label to make it anew"
    if not yes and not typed(question, label):
        raise ConfigurationError(
            f"the journal {config.journal.url} is there and well: not confirmed (give --yes in scripts); nothing was "
            "changed"
        )


def _readable(config: GroupConfig) -> tuple[Former, list[Event], str] | None:
    """What can still be read of the journal that is there: of a file from a copy that is thrown away."""
    if not _there(config):
        return None
    if not isinstance(config.journal.url, SqliteUrl):
        former = journals.EtcdJournal.open_former(config.journal)
        try:
            _refuse_if_elsewhere(config, former.sealed())
            return rebuilding.former_of(former)
        finally:
            former.close()
    path = config.journal.url.path
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.reading-") as folder:
        copy = Path(folder) / path.name
        try:
            for end in ("", "-wal"):
                if (there := path.with_name(path.name + end)).exists():
                    shutil.copy2(there, copy.with_name(copy.name + end))
            SqliteJournal.adopt_file(copy)
            journal = SqliteJournal.open(copy, for_moving=True)
            try:
                _refuse_if_elsewhere(config, journal.sealed())
                return rebuilding.former_of(journal)
            finally:
                journal.close()
        except (JournalUnavailable, OSError) as error:
            say(f"nothing can be read of the journal that is there ({error})")
            return None


def adopt(pin_file: PinFile = None, pin_env: PinEnv = None, yes: Yes = False, as_json: Json = False) -> None:
    """Take over a journal that was copied or restored here, as far as the members agree with it.

    It may be older than the group, and then it would bring back what was destroyed since: so it is made anew from what
    it knows and what the members know. Nobody may use another copy of it any more.
    """
    config = load(chosen_config())
    url = config.journal.url
    if not _there(config):
        raise ConfigurationError(f"{url} does not exist; if it was lost, run `ha-admin journal rebuild`")
    _is_well(config)
    label = config.group.label
    question = f"Make {url} the journal of group {label}, in place of any other? Type the group's label"
    if not yes and not typed(question, label):
        raise ConfigurationError("not confirmed (give --yes in scripts); nothing was changed")
    with alone(config):
        former = _readable(config)
        if former is None:
            raise ConfigurationError(
                f"{url} cannot be read; `ha-admin journal rebuild` does without; nothing was changed"
            )
        _rebuild(config, former, [], pin=(pin_file, pin_env), as_json=as_json)
