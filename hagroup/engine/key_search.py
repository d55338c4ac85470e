"""The domain's keys on each connected member: found and proved after its login, and again where they were replaced."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from hagroup.core.calls import Ckr, DeadlinePassed, MemberGone
from hagroup.engine import holding, manifest
from hagroup.engine.domain_keys import DomainKeys, KeysMissing
from hagroup.engine.member import Life, Member
from hagroup.engine.opening import CONNECTION_LOST
from hagroup.errors import DomainMismatch, HAError

if TYPE_CHECKING:
    from hagroup.engine.roster import Roster


class KeySearch:
    """Of the members of one process."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._rotation = roster.view.group.rotation
        self.on_new_keys: Callable[[], None] = lambda: None
        """The domain's keys were changed, and are known on one more member."""

    def find(self, member: Member, life: Life) -> None:
        """After a login: the domain's keys, proved by the member (G9), and what its manifest says (DESIGN.md 4.6)."""
        timeout = self._roster.config.timeouts.call
        reading: list[Future[manifest.Manifest | None]] = []

        def read_already(keys: DomainKeys) -> None:
            reading.append(self._roster.run(partial(manifest.read, life.connection, keys, timeout=timeout)))

        try:
            begun = self._roster.clock.boot()
            life.keys = self._learn(member, life, read_already)
            with self._roster.changed:
                self._roster.choosing.paces.proved(member.name, self._roster.clock.boot() - begun)
            shown = reading[0].result() if reading else None  # believed only now that the keys were proved
            manifest.check(self._roster.journal, self._roster.view, member, life, timeout=timeout, shown=shown)
        except BaseException as error:
            life.keys = None
            self._roster.lost(member, life, str(error))  # it is logged in, and must not serve by that
            raise
        # The check may just have taken its admission away.
        self._roster.view.refresh()
        self._roster.follow_journal()
        if member.life is life:
            with self._roster.changed:
                self._roster.head_start.served(member, self._roster.clock.boot())
            self._roster.wake()

    def _learn(self, member: Member, life: Life, found: Callable[[DomainKeys], None] | None = None) -> DomainKeys:
        journal, group = self._roster.journal, self._roster.view.group
        record, wrap = self._roster.view.members[member.name], member.config.wrap_mechanism
        timeout = self._roster.config.timeouts.generate
        try:
            keys = holding.learn(journal, group, record, wrap, life.connection, timeout=timeout, found=found)
        except KeysMissing as error:
            before, member.keyless = member.keyless, life
            if before in (None, life):  # a token that is just going away has nothing: believed of the next life
                raise MemberGone(f"{error} (it is looked for again)", sent=False) from error
            raise
        member.keyless = None
        return keys

    def usable(self, member: Member) -> bool:
        """Whether this process has the keys on this member under which everything new is sealed."""
        life = member.life
        return life is not None and holding.current(life.keys, self._roster.view.group)

    def heed_rotation(self) -> None:
        """The domain's keys were changed: look for the new ones on every connected member, without stopping it."""
        group = self._roster.view.group
        rotation = group.rotation
        if rotation != self._rotation:
            self._rotation = rotation
            self._roster.submit(self.on_new_keys)
        for member in self._roster.members.values():
            life = member.life
            if (
                life is None
                or life.keys is None
                or member.learning
                or holding.current(life.keys, self._roster.view.group)
            ):
                continue
            member.learning = True
            self._roster.submit(self._learn_anew, member, life)

    def _learn_anew(self, member: Member, life: Life) -> None:
        try:
            keys = self._learn(member, life)
            with self._roster.changed:
                if member.life is life:
                    life.keys = keys
        except DomainMismatch as error:
            self._roster.quarantine(member, str(error))
        except (Ckr, DeadlinePassed, HAError, *CONNECTION_LOST) as error:
            self._roster.lost(member, life, str(error))
        finally:
            with self._roster.changed:
                member.learning = False
                self._roster.changed.notify_all()
        self.on_new_keys()

    def check(self, member: Member, life: Life) -> None:
        """A handle is none. It may be that of a domain key (the member was joined to the domain anew): they are looked
        for again."""
        with self._roster.changed:
            if life.keys is None or member.learning:
                return
            member.learning = True
        self._learn_anew(member, life)
