"""``ha-admin`` over simulated members: the command itself, in this process, which may be killed at each interaction.

``hagroup.toml``, PINs and shares are real files; the journal is a real one.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import typer.main

from hagroup import bootstrap
from hagroup.admin import cli, commands, options
from hagroup.config import logging, write
from hagroup.config.load import load
from hagroup.config.model import GroupConfig, JournalSection, MemberConfig, PinSource
from hagroup.core.attributes import CKA
from hagroup.core.clock import Clock
from hagroup.engine import configuration, domain_rotation, leaving, manifest, membership, setup, unfinished
from hagroup.engine.domain_keys import DOMAIN_LABEL, PARTITION_LABEL
from hagroup.engine.group import GroupEngine
from hagroup.engine.token_contents import MEMBER_KEY_LABEL
from hagroup.journal import Journal, SqliteJournal, create_journal
from tests.support.commands import made_once
from tests.support.history import Broken
from tests.support.simulated import SimMember
from tests.support.simulation import LATE_WINDOW, PIN, AtOnce, Killed, Patch, Process, Simulation


@dataclass
class Done:
    """How a command ended."""

    status: int | None
    """None: it was killed."""
    out: str
    err: str


class Command(Process):
    """One run of ha-admin."""

    def __init__(self, simulation: Administered, name: str) -> None:
        super().__init__(simulation, name)
        self._opened: list[SqliteJournal] = []
        simulation.owners[name] = self
        simulation.without_journal = name

    def open_journal(self, section: JournalSection, *, clock: Clock) -> Journal:
        real, journal = self.open()
        self._opened.append(real)
        return journal

    def bury(self) -> None:
        for journal in self._opened:
            journal.close()
        super().bury()


class Administered(Simulation):
    """A group that is administered, or tokens of which one is to be made."""

    def __init__(self, folder: Path, seed: int, *, grouped: bool = True) -> None:
        super().__init__(folder, seed)
        self._grouped = grouped
        self.folder = folder
        self.command: Command
        self.members["hsm4"] = SimMember("hsm4", "serial-hsm4", PIN, local=False, now=self.clock.boot)
        """In no group yet."""
        module = folder / "simulated.so"
        module.touch()
        so_pin = folder / "so-pin"
        so_pin.write_bytes(self.members["hsm1"].token.so_pin)
        so_pin.chmod(0o600)
        (folder / "pin").rename(folder / "user-pin")
        users = PinSource(file=folder / "user-pin")
        listed = tuple(msgspec.structs.replace(one, module=module, pin=users) for one in self.config.members)
        group = self.config.group if grouped else msgspec.structs.replace(self.config.group, serial=None)
        self.config = msgspec.structs.replace(self.config, members=listed, group=group)
        write.write_new(self.config, mode=0o600)

    def configuration(self) -> GroupConfig:
        return load(self.config.path)

    def patches(self) -> list[Patch]:
        clock = self.clock
        return [
            *super().patches(),
            *((module, "time", self.time) for module in (membership, leaving, domain_rotation)),
            *((module, "open_journal", self._open_journal) for module in (bootstrap, commands, setup, unfinished)),
            *((module, "SystemClock", lambda: clock) for module in (bootstrap, commands)),
            (bootstrap, "GroupEngine", self._engine),
            (setup, "create_journal", self._around("create_journal", create_journal)),
            (setup, "ThreadPoolExecutor", lambda max_workers: AtOnce()),
            (write, "_replace", self._around("hagroup.toml", write._replace)),
            (typer.main, "get_command", made_once),
            (logging, "prepare", lambda *_, **__: None),
        ]

    def _set_up(self) -> None:
        if self._grouped:
            super()._set_up()
        for member in self.members.values():
            member.script, member.after = self._script, self._after

    def _end(self) -> None:
        if hasattr(self, "journal"):
            super()._end()

    def _open_journal(self, section: JournalSection, *, clock: Clock) -> Journal:
        return self.command.open_journal(section, clock=clock)

    def _engine(self, config: GroupConfig, journal: Journal, clock: Clock, *, one_first: bool) -> GroupEngine:
        return self.command.run(config, journal)

    def _around(self, what: str, true: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.command.interact(what, True)
            result = true(*arguments, **keywords)
            self.command.interact(f"{what}, done", True)
            return result

        return call

    # -- commands ----------------------------------------------------------------------------------------------
    def admin(self, *words: str, arm: Callable[[Command], object] = lambda _: None) -> Done:
        """Run a command.

        :param arm: sets a trap for it.
        """
        self.command = Command(self, f"command{len(self.owners)}")
        arm(self.command)
        out, err = io.StringIO(), io.StringIO()
        status: int | None = None
        with _as_program(words, self.config.path, out, err):
            try:
                cli.main()
            except Killed:
                pass
            except SystemExit as ended:
                status = int(ended.code or 0)
            finally:
                self.command.bury()
        if "Traceback" in err.getvalue():
            raise Broken(err.getvalue())
        return Done(status, out.getvalue(), err.getvalue())

    def member_add(self) -> list[str]:
        """``member add hsm4``, from its first word on."""
        token = self.members["hsm4"].token
        module, pin = self.folder / "simulated.so", self.folder / "user-pin"
        words = ["member", "add", "hsm4", "--module", str(module), "--token-serial", token.serial]
        return [*words, "--pin-file", str(pin), "--yes", *self.officer()]

    def officer(self) -> list[str]:
        return ["--so-pin-file", str(self.folder / "so-pin")]

    def newcomer(self) -> MemberConfig | None:
        return next((one for one in self.configuration().members if one.name == "hsm4"), None)

    # -- what must hold ----------------------------------------------------------------------------------------
    def _outstanding(self, name: str) -> bool:
        """``journal todo`` says that somebody has to destroy what is on a member that was removed."""
        return any(event.data.get(f"member:{name}") == "to do" for event in self.journal.events())

    def check_domain(self, *, at_rest: bool) -> None:
        """Each listed member holds the group's two keys, once, and one manifest and configuration beside them; nobody
        else holds anything.

        :param at_rest: it had time to be given the configuration.
        """
        group, listed = self.journal.view()
        wanted = {DOMAIN_LABEL: group.domain_key_id, PARTITION_LABEL: group.partition_key_id}
        secrets: set[tuple[bytes, bytes | None]] = set()
        for name, member in self.members.items():
            own = [item for item in member.token.objects.values() if item.label.startswith(b"hagroup")]
            ghosts = [item for item in member.token.objects.values() if not item.attributes]
            if ghosts:
                raise Broken(f"{name} holds {len(ghosts)} ghosts")
            if name not in {record.name for record in listed}:
                if own and not self._outstanding(name):
                    raise Broken(f"{name} is in no group, and holds {[item.label for item in own]}")
                continue
            keys = [item for item in own if item.label in wanted]
            if sorted((item.label, item.attributes[CKA.ID]) for item in keys) != sorted(wanted.items()):
                raise Broken(f"{name} holds {[(item.label, item.attributes[CKA.ID]) for item in keys]}")
            secrets.update((item.label, item.secret) for item in keys)
            pairs = [item for item in own if item.label == MEMBER_KEY_LABEL]
            shown = [item for item in own if item.label.startswith(configuration.LABEL)]
            manifests = [item for item in own if item.label.startswith(manifest.LABEL)]
            rest = [item for item in own if item not in (*keys, *pairs, *shown, *manifests)]
            rest = [item for item in rest if not item.label.startswith(b"hagroup:object:")]
            # an older configuration or manifest may stand beside the newest one until the next is written
            few = len(pairs) <= 1 and len(shown) in ((1, 2) if at_rest else (0, 1, 2)) and len(manifests) in (1, 2)
            if rest or not few:
                raise Broken(f"{name} holds {[item.label for item in own]}")
        if len(secrets) != 2:
            raise Broken("members hold different keys of the domain")


@contextlib.contextmanager
def _as_program(words: tuple[str, ...], config: Path, out: io.StringIO, err: io.StringIO) -> Iterator[None]:
    before = sys.argv, options._chosen, sys.stdin
    with open(os.devnull) as nothing, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv, options._chosen, sys.stdin = ["ha-admin", "--config", str(config), *words], {}, nothing
        try:
            yield
        finally:
            sys.argv, options._chosen, sys.stdin = before


__all__ = ["LATE_WINDOW", "Administered", "Command", "Done"]
