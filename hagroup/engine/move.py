"""A group's journal moves to another place: from SQLite to etcd, or back (DESIGN.md 4.6).

The old one is sealed before anything is read, and says where it went before the new one takes its first change. Killed
anywhere, the same command goes on.
"""

from __future__ import annotations

import time

import msgspec

from hagroup import journal as journals
from hagroup.config.logging import get_logger
from hagroup.config.model import JournalSection, SqliteUrl
from hagroup.core.clock import Clock
from hagroup.core.moves import JOURNAL_MOVED, confirmed, moved
from hagroup.errors import ConfigurationError, JournalMismatch, JournalUnavailable
from hagroup.journal import SqliteJournal, create_journal, delete_journal, open_for_moving
from hagroup.journal.moving import difference, digest, digest_of, everything
from hagroup.journal.sealed import Sealed, Why

log = get_logger(__name__)

_PATIENCE = 10.0
"""Seconds to wait for an instant when no change is under way."""


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """What was moved; fields are added, never renamed."""

    source: str
    target: str
    objects: int
    tombstones: int
    epoch: str


def move(source: JournalSection, target: JournalSection, *, serial: str | None, command: str, clock: Clock) -> Moved:
    """Make the journal at ``target`` take the place of the one at ``source``.

    :param serial: the group's; another's journal is not moved.
    :param command: goes on where this is interrupted; told to whoever opens the new one before it is complete.
    :raises JournalMismatch, ConfigurationError: nothing was moved, and the old one takes changes as before.
    :raises JournalUnavailable: one of them cannot be reached; the same command goes on.
    """
    old = open_for_moving(source, clock=clock)
    try:
        if old.group().serial != serial:
            raise JournalMismatch(f"the journal {source.url} is of another group ({old.group().serial})")
        before = old.sealed()
        if before is None:
            _expect_room(target)
        sealed = _sealed(old, str(target.url))
        if sealed.why is Why.MAKING or sealed.other != str(target.url):
            raise ConfigurationError(f"the journal {source.url} {sealed.why.value} to {sealed.other}: go on with that")
        if sealed.why is Why.MOVING:
            _copy(old, target, sealed.epoch, command, clock)
            old.end_move()
        new = open_for_moving(target, clock=clock)
        try:
            if new.group().epoch != sealed.epoch:
                raise JournalMismatch(f"the journal {target.url} is not the one that {source.url} was moved to")
            if new.sealed() is not None:
                data = {**moved(old.group().epoch, sealed.epoch), **confirmed(old.members())}
                _say_so(new, f"from {source.url} to {target.url}", data)
                new.open_up()
            counts = new.counts()
        finally:
            new.close()
    finally:
        old.close()
    log.info("journal.moved", target=str(target.url))
    return Moved(
        source=str(source.url),
        target=str(target.url),
        objects=counts["live"],
        tombstones=counts["tombstones"],
        epoch=sealed.epoch,
    )


def _sealed(old: SqliteJournal | journals.EtcdJournal, to: str) -> Sealed:
    """At an instant when nothing is under way, if one comes soon."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        found = old.begin_move(to)
        if found is not None:
            return found
        time.sleep(0.002)
    found = old.begin_move(to, at_once=True)
    assert found is not None
    return found


def _say_so(new: SqliteJournal | journals.EtcdJournal, text: str, data: dict[str, str]) -> None:
    """Before anybody opens the new one: who does finds tokens of the epoch before. Once, also where that was killed."""
    if not any(event.kind == JOURNAL_MOVED and event.data == data for event in new.events(limit=1)):
        new.event(JOURNAL_MOVED, text, data=data)


def cancel(source: JournalSection, target: JournalSection, *, clock: Clock) -> None:
    """The old one takes changes again, and what the new one has of it by now goes.

    :raises JournalUnavailable: it was moved for good.
    """
    old = open_for_moving(source, clock=clock)
    try:
        sealed = old.sealed()
        old.cancel_move()
    finally:
        old.close()
    if sealed is None or sealed.other != str(target.url):
        return
    try:
        new = open_for_moving(target, clock=clock)
    except JournalUnavailable:
        return  # there is none, or it cannot be reached: it is sealed
    making = new.sealed()
    new.close()
    if making is not None and making.epoch == sealed.epoch:
        delete_journal(target)


def _expect_room(target: JournalSection) -> None:
    """Before anything is sealed: the place can be reached, and is free."""
    if isinstance(target.url, SqliteUrl):
        if target.url.path.exists():
            raise ConfigurationError(f"{target.url.path} exists already: nothing was moved")
        if not target.url.path.parent.is_dir():
            raise ConfigurationError(f"{target.url.path.parent} is no folder: nothing was moved")
    elif journals.EtcdJournal.exists(target):
        raise ConfigurationError(f"there is a journal {target.url} already: nothing was moved; choose another name")


def _copy(
    old: SqliteJournal | journals.EtcdJournal, target: JournalSection, epoch: str, command: str, clock: Clock
) -> None:
    group, members, contents = everything(old, epoch)
    expected = digest_of(group, members, contents)
    if not _whole(target):
        try:
            create_journal(
                target,
                label=group.label,
                serial=group.serial,
                members=members,
                domain_key_id=group.domain_key_id,
                partition_key_id=group.partition_key_id,
                reference=group.reference,
                contents=contents,
                command=command,
                clock=clock,
            )
        except JournalUnavailable:
            if not _whole(target):
                raise
            # another ha-admin with the same command was quicker: what it made is compared like one's own
    del contents  # one of both journals in memory is enough
    new = open_for_moving(target, clock=clock)
    try:
        why = difference(expected, digest(new))
    finally:
        new.close()
    moving = old.sealed()
    if (
        why is not None and moving is not None and moving.why is Why.MOVING
    ):  # else another ha-admin brought it to its end
        raise JournalUnavailable(
            f"the journal {target.url} does not hold what the old one holds ({why}): changes are still refused; run "
            f"`{command}` with --cancel, then without"
        )


def _whole(target: JournalSection) -> bool:
    """Whether it was made by an earlier attempt: a file is there whole or not at all."""
    return isinstance(target.url, SqliteUrl) and target.url.path.exists()
