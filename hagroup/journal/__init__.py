"""The journal: the one place that orders changes (DESIGN.md 4).

etcd's client (requests, urllib3, ssl) is loaded where a group has its journal there: for every program whose journal is
SQLite it would be a third of the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hagroup.config.model import JournalSection, SqliteUrl
from hagroup.core.clock import Clock
from hagroup.core.records import MemberRecord
from hagroup.journal.api import Contents, Journal
from hagroup.journal.clock import SystemClock
from hagroup.journal.sqlite import SqliteJournal

if TYPE_CHECKING:
    from hagroup.journal.etcd import EtcdJournal

__all__ = [
    "EtcdJournal",
    "Journal",
    "SqliteJournal",
    "SystemClock",
    "create_journal",
    "delete_journal",
    "open_for_moving",
    "open_journal",
]


def __getattr__(name: str) -> Any:
    if name != "EtcdJournal":
        raise AttributeError(name)
    return _etcd()


def _etcd() -> type[EtcdJournal]:
    from hagroup.journal.etcd import EtcdJournal

    return EtcdJournal


def open_journal(section: JournalSection, *, clock: Clock | None = None) -> Journal:
    """Open the journal that ``[journal]`` names.

    :raises JournalUnavailable, JournalMismatch: see :meth:`SqliteJournal.open` and :meth:`EtcdJournal.open`.
    """
    clock = clock or SystemClock()
    if isinstance(section.url, SqliteUrl):
        return SqliteJournal.open(section.url.path, clock=clock)
    return _etcd().open(section, clock=clock)


def create_journal(
    section: JournalSection,
    *,
    label: str,
    serial: str,
    members: Sequence[MemberRecord],
    domain_key_id: bytes,
    partition_key_id: bytes,
    reference: bytes,
    contents: Contents | None = None,
    command: str = "",
    clock: Clock,
) -> None:
    """Make the journal of a new group where ``[journal]`` says. It appears whole or not at all.

    :param contents: what it begins with where it takes the place of another; see ``create`` of both.
    :param command: goes on where this is interrupted: until then it is sealed.
    :raises JournalUnavailable: there is one already, or none can be made there.
    """
    if isinstance(section.url, SqliteUrl):
        SqliteJournal.create(
            section.url.path,
            label=label,
            serial=serial,
            members=members,
            domain_key_id=domain_key_id,
            partition_key_id=partition_key_id,
            reference=reference,
            contents=contents,
            command=command,
            clock=clock,
        )
        return
    _etcd().create(
        section,
        label=label,
        serial=serial,
        members=members,
        domain_key_id=domain_key_id,
        partition_key_id=partition_key_id,
        reference=reference,
        contents=contents,
        command=command,
        clock=clock,
    )


def open_for_moving(section: JournalSection, *, clock: Clock) -> SqliteJournal | EtcdJournal:
    """Open it although it is sealed: for whoever moves it."""
    if isinstance(section.url, SqliteUrl):
        return SqliteJournal.open(section.url.path, clock=clock, for_moving=True)
    return _etcd().open(section, clock=clock, for_moving=True)


def delete_journal(section: JournalSection) -> None:
    """Take back what :func:`create_journal` made: nobody else has it open."""
    if isinstance(section.url, SqliteUrl):
        path = section.url.path
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        return
    _etcd().delete(section)
