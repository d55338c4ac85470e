"""The group's configuration, kept on each member beside its manifest: a new host needs one member's address and the PIN
(DESIGN.md 4.6).

An object of its own, and not a part of the manifest: it is larger, and changes far more seldom. A token that has no
room for it is a member like any other.
"""

from __future__ import annotations

import socket
import zlib
from collections.abc import Mapping

import msgspec

from hagroup.config.load import load, load_text
from hagroup.config.logging import get_logger
from hagroup.config.model import GroupConfig
from hagroup.config.write import portable
from hagroup.core.calls import Ckr, DeadlinePassed
from hagroup.core.records import GroupRecord, MemberRecord
from hagroup.engine.kept import Kept
from hagroup.engine.member import Life, Member
from hagroup.engine.opening import CONNECTION_LOST
from hagroup.engine.roster import Roster
from hagroup.engine.view import View
from hagroup.errors import ConfigurationError
from hagroup.journal.api import Journal

log = get_logger(__name__)

LEASE = 60.0
_LONGEST = 1 << 20
"""Bytes of a configuration: what unpacks to more was not written by hagroup."""


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """What is sealed on the member. No PIN and no source of one."""

    group: str
    """The group's serial number."""
    epoch: str
    revision: int
    """Of the membership, when it was written."""
    number: int
    """Later ones of one epoch and revision have higher ones."""
    origin: str
    """Host and file that it is from."""
    members: dict[str, str]
    """Name to serial number, as of that revision."""
    text: bytes
    """:func:`hagroup.config.write.portable`, packed: about 800 bytes for three members."""

    @property
    def order(self) -> tuple[str, int, int]:
        """Later ones compare greater."""
        return self.epoch, self.revision, self.number

    @property
    def mark(self) -> str:
        """The same, as text."""
        return f"{self.epoch}:{self.revision:016x}:{self.number:08x}"

    def config(self, path: str) -> GroupConfig:
        """As ``path`` would have it.

        :raises ConfigurationError: it is not one, or of a later hagroup.
        """
        unpacking = zlib.decompressobj()
        try:
            text = unpacking.decompress(self.text, _LONGEST).decode()
        except (zlib.error, UnicodeDecodeError):
            raise ConfigurationError(
                f"the configuration on the members (from {self.origin}) cannot be read; write {path} by hand"
            ) from None
        return load_text(text, path)


KEPT = Kept("configuration", Configuration)
read, write, reseal = KEPT.read, KEPT.write, KEPT.reseal
LABEL = KEPT.label


def compose(config: GroupConfig, group: GroupRecord, members: Mapping[str, MemberRecord]) -> Configuration:
    """:param config: of a file that has all ``members``; others are left out."""
    shown = tuple(member for member in config.members if member.name in members)
    text = portable(msgspec.structs.replace(config, members=shown))
    return Configuration(
        group=group.serial,
        epoch=group.epoch,
        revision=group.membership_revision,
        number=0,
        origin=f"{socket.gethostname()}:{config.path}",
        members={name: member.serial for name, member in members.items()},
        text=zlib.compress(text.encode(), 9),
    )


def successor(found: Configuration | None, ours: Configuration, *, insist: bool = False) -> Configuration | None:
    """What takes the place of ``found`` on a member; None: it stays.

    Hosts may have different files: each puts its own there when the membership moved, and its own later state in the
    place of an earlier one, but not its own in the place of another's over and over.

    :param insist: a person asks for it: in the place of another's, too.
    """
    if found is None or found.group != ours.group or found.epoch < ours.epoch:
        return ours
    if found.epoch > ours.epoch or found.revision > ours.revision or found.text == ours.text:
        return None
    if found.revision < ours.revision:
        return ours
    if insist or found.origin == ours.origin:
        return msgspec.structs.replace(ours, number=found.number + 1)
    return None


class Keeper:
    """Sees to it that every member shows how the group is reached; of one process."""

    def __init__(self, roster: Roster, view: View, journal: Journal) -> None:
        self._roster = roster
        self._view = view
        self._journal = journal

    def keep(self, *, insist: bool = False) -> None:
        """Look at the members of which this is not known, one process at a time; does nothing where it cannot.

        :param insist: look at all, and put this host's file in the place of another's.
        """
        if self._roster.journal_behind() is not None:
            return
        self._view.refresh()
        try:
            config = load(self._roster.config.path)  # as it is now, not as it was when this process started
        except ConfigurationError:
            return  # a person is just changing it
        group, members = self._view.group, self._view.members
        if not set(members) <= {member.name for member in config.members}:
            return
        ours = compose(config, group, members)
        known = (ours.epoch, ours.members, ours.text)
        waiting = [
            (member, member.life)
            for member in self._roster.members.values()
            if member.life is not None
            and (insist or member.life.configuration != known)
            and self._roster.keys.usable(member)
        ]
        if not waiting:
            return
        lease = self._journal.acquire_lease("configuration", ttl=LEASE)
        if lease is None:
            return
        try:
            for member, life in waiting:
                self._show(member, life, ours, insist=insist)
                life.configuration = known
        finally:
            self._journal.release_lease(lease)

    def _show(self, member: Member, life: Life, ours: Configuration, *, insist: bool) -> None:
        timeout = self._roster.config.timeouts.generate
        assert life.keys is not None
        try:
            wanted = successor(read(life.connection, life.keys, timeout=timeout), ours, insist=insist)
            if wanted is not None:
                write(life.connection, life.keys, wanted, timeout=timeout)
        except Ckr as error:  # no room, or too large for it: nobody is served worse by that
            log.warning("member.configuration-not-kept", member=member.name, reason=str(error))
        except (DeadlinePassed, *CONNECTION_LOST) as error:
            self._roster.lost(member, life, str(error))
