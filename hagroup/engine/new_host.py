"""A host that knows one member's address and the PIN, and nothing else, comes to the group (DESIGN.md 4.6).

Nothing on a token is changed here, and nothing is written before everything that can be refused was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from hagroup.config import write
from hagroup.config.load import load_text
from hagroup.config.model import GroupConfig, MemberConfig, PinSource
from hagroup.config.pins import Pin
from hagroup.core.clock import Clock
from hagroup.engine.rebuild import Reached, Rebuilt, newest_of, reach, rebuild_from
from hagroup.errors import ConfigurationError, GroupUnavailable

NOT_CHANGED = "; nothing was changed"
FIRST_TIMEOUT = 60.0
"""Seconds that the first member has for each call: the group's own timeouts are not known yet."""


class NewHost:
    """What the members tell, until it is closed."""

    def __init__(self, path: Path, address: MemberConfig, pin: Pin, own: Mapping[str, tuple[PinSource, Pin]]) -> None:
        """
        :param path: of the configuration file that is to be.
        :param address: of one member; its name is shown where it cannot be reached.
        :param pin: user PIN of the members that have none of their own.
        :param own: PIN source and PIN of those that have, by name.
        """
        self._path = path
        self._address = address
        self._pin = pin
        self._own = own
        self._reached: dict[str, Reached] = {}
        self._away: dict[str, str] = {}
        self.origin = ""
        """Host and file that the configuration is from."""

    def close(self) -> None:
        for one in self._reached.values():
            one.life.connection.close()

    def find(self) -> GroupConfig:
        """The group's configuration as this host is to have it, from the newest that any member shows; the journal and
        its mirror are where that other host had them.

        :raises GroupUnavailable: the member that was given cannot be reached.
        :raises ConfigurationError: it tells of no group, a PIN was refused, or the configuration cannot be used here.
        """
        first = self._reach(self._address, self._pin, timeout=FIRST_TIMEOUT)
        if isinstance(first, str):
            raise GroupUnavailable(f'member "{self._address.name}" cannot tell of a group: {first}{NOT_CHANGED}')
        serial = first.life.token.serial
        name = next((one for one, other in newest_of([first]).members.items() if other == serial), self._address.name)
        self._reached[name] = first
        config = self._here(name)
        while (member := self._next(config)) is not None:
            pin = self._own[member.name][1] if member.name in self._own else self._pin
            one = self._reach(member, pin, timeout=config.timeouts.generate)
            if isinstance(one, str):
                self._away[member.name] = one
            else:
                self._reached[member.name] = one
                config = self._here(name)
        if name not in {member.name for member in config.members}:
            raise ConfigurationError(
                f"the token {serial} is not in group {config.group.label} any more: give the address of another member"
                f"{NOT_CHANGED}"
            )
        return config

    def _reach(self, member: MemberConfig, pin: Pin, *, timeout: float) -> Reached | str:
        try:
            return reach(member, pin, timeout=timeout)
        except ConfigurationError as error:
            if member.name in self._own or not self._reached:
                raise
            raise ConfigurationError(f"{error}; give its own with --member-pin-file {member.name}=FILE") from error

    def _next(self, config: GroupConfig) -> MemberConfig | None:
        return next((one for one in config.members if one.name not in {*self._reached, *self._away}), None)

    def _here(self, name: str) -> GroupConfig:
        """The newest configuration, as this host has it: the member that was given is reached as it was given."""
        shown = newest_of(self._reached.values())
        found = [one.configuration for one in self._reached.values() if one.configuration is not None]
        if not found:
            members = ", ".join(f"{member} ({serial})" for member, serial in shown.members.items())
            raise ConfigurationError(
                f'no configuration is on member "{name}": run `ha-admin sync` where group {shown.label} is used, or '
                f"write {self._path} by hand; its members are {members}{NOT_CHANGED}"
            )
        newest = max(found, key=lambda one: one.order)
        self.origin = newest.origin
        config = newest.config(str(self._path))
        there = {member.name: member for member in config.members}
        missing = sorted(set(shown.members) - set(there))
        if missing:
            raise ConfigurationError(
                f"the configuration on the members that answered (from {newest.origin}) is older than the group, which "
                f"has a member {missing[0]!r}: give the address of another member{NOT_CHANGED}"
            )
        former = there[name].module if name in there else self._address.module
        members_here = tuple(
            self._member_here(member, name, former) for member in config.members if member.name in shown.members
        )
        return msgspec.structs.replace(config, members=members_here)

    def _member_here(self, member: MemberConfig, name: str, former: Path) -> MemberConfig:
        """:param former: where the other host has the module that was given."""
        given = self._address
        module = given.module if member.module == former else member.module
        source = self._own[member.name][0] if member.name in self._own else None
        here = msgspec.structs.replace(member, module=module, pin=source)
        if member.name == name:
            here = msgspec.structs.replace(
                here, module=given.module, env=given.env, init_args=given.init_args or member.init_args
            )
        if not here.module.exists():
            raise ConfigurationError(
                f'member "{member.name}": its module {here.module} (as {self.origin} has it) does not exist on this '
                f"host: install it there, or make a link to where it is{NOT_CHANGED}"
            )
        return here

    def make_journal(self, config: GroupConfig, *, clock: Clock) -> Rebuilt:
        """The journal anew, from the members that answered.

        :param config: of :meth:`find`, with the journal's place on this host.
        """
        return rebuild_from(config, self._reached, self._away, former=None, keep=(), clock=clock)


def check(config: GroupConfig) -> None:
    """Whether the configuration can be used here, before it is written.

    :raises ConfigurationError: it cannot.
    """
    mirror = config.journal.mirror
    if mirror is not None and not mirror.exists():
        raise ConfigurationError(
            f"the group keeps the sealed records of its keys in [journal] mirror {mirror}, which is not there: mount "
            f"it, or name it with --mirror{NOT_CHANGED}"
        )
    load_text(write.render(config), config.path, check_files=True)
