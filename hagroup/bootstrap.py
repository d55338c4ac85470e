"""From a path to a group: reads the configuration, opens the journal, starts the engine. Used by all programs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hagroup.config.load import load
from hagroup.config.model import GroupConfig
from hagroup.core.clock import Clock
from hagroup.core.records import GroupRecord, MemberRecord
from hagroup.engine.group import GroupEngine
from hagroup.errors import ConfigurationError, JournalMismatch
from hagroup.journal import open_journal
from hagroup.journal.clock import SystemClock


def open_group(path: str | Path, *, clock: Clock | None = None, one_first: bool = True) -> GroupEngine:
    """The group that ``hagroup.toml`` at ``path`` describes, connected in the background.

    :param one_first: one member is connected before the others: False for what is about all of them.
    :raises ConfigurationError: the file cannot be used; the text names file, key and line.
    :raises JournalUnavailable: a client cannot start without the journal.
    :raises JournalMismatch: the journal is another group's, or a copy.
    """
    return start_group(load(Path(path)), clock=clock, one_first=one_first)


def check_serial(config: GroupConfig, group: GroupRecord) -> None:
    """
    :raises JournalMismatch: the journal that the configuration names is another group's.
    """
    if group.serial != config.group.serial:
        raise JournalMismatch(
            f"{config.path}: [group] serial is {config.group.serial}, but the journal {config.journal.url} "
            f"belongs to group {group.label} ({group.serial}); correct [journal] url or [group] serial"
        )


def check_tokens(config: GroupConfig, members: Iterable[MemberRecord]) -> None:
    """Looked at here, before a member would be found to show another serial number than the group's, and be put out of
    use for everybody.

    :raises ConfigurationError: the file names another token for a member.
    """
    serials = {member.name: member.serial for member in members}
    for member in config.members:
        serial = serials.get(member.name)
        if serial and member.token_serial not in (None, serial):
            raise ConfigurationError(
                f'{config.path}: [[member]] "{member.name}" has token_serial {member.token_serial}, the group\'s member'
                f" of that name has {serial}: the file is older than the group, or wrong; correct it"
            )


def start_group(config: GroupConfig, *, clock: Clock | None = None, one_first: bool = False) -> GroupEngine:
    """The same for a configuration that was read already."""
    clock = clock or SystemClock()
    if config.group.serial is None:
        raise ConfigurationError(
            f"{config.path}: [group] serial is not set: the group was not created yet; "
            f"run `ha-admin --config {config.path} group create`"
        )
    journal = open_journal(config.journal, clock=clock)
    try:
        group, members = journal.view()
        check_serial(config, group)
        configured = {member.name for member in config.members}
        unknown = [member.name for member in members if member.name not in configured]
        if unknown:
            raise ConfigurationError(
                f"{config.path}: the group has a member {unknown[0]!r} that this file does not have: it is older than "
                "the group; add its [[member]] section, or remove it from the group with `ha-admin member remove`"
            )
        check_tokens(config, members)
        return GroupEngine(config, journal, clock, one_first=one_first)
    except BaseException:
        journal.close()
        raise
