"""Engines over simulated members in one thread: the pool works at once, the supervisor runs when told to, time and
random numbers are injected. So a history is exactly what its steps say, and can be run again.

Everything a client does outside of itself (a call to a member, a call to the journal) is an *interaction*: the places
where it may be killed, where faults happen, and where other clients come in between.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import tenacity

from hagroup.config.model import GroupConfig, GroupSection, JournalSection, MemberConfig, PinSource, SqliteUrl, Timeouts
from hagroup.core.attributes import CKA, CKK, CKO, pack_bool, pack_ulong
from hagroup.core.calls import Ckr, DeadlinePassed, MemberGone, Template
from hagroup.core.records import MemberRecord, Membership, Role
from hagroup.engine import calls, manifest, opening
from hagroup.engine.challenge import reference_envelope
from hagroup.engine.domain_keys import DOMAIN_LABEL, PARTITION_LABEL, find_domain
from hagroup.engine.group import GroupEngine
from hagroup.engine.login import CKU_USER
from hagroup.engine.membership import BEING_REMOVED
from hagroup.engine.session import VirtualSession
from hagroup.errors import GroupUnavailable, HAError, JournalOutcomeUnknown, JournalUnavailable
from hagroup.journal import Journal, SqliteJournal
from hagroup.members import ConnectionSettings, ModuleProblem
from tests.support.journals import FakeClock
from tests.support.simulated import Fate, SimConnection, SimMember, SimObject

PIN = b"1234"
LATE_WINDOW = 600.0
_LOCAL = frozenset(["view_number", "owner_alive", "worker_dead", "being_changed", "cut_off", "forget_cut_off", "close"])
"""Not in the database: no client can be interrupted or refused there."""
_WRITES = frozenset(
    [
        "begin_create",
        "go_live",
        "abandon_create",
        "begin_set",
        "commit_set",
        "rollback_set",
        "destroy",
        "claim",
        "confirm",
        "undone",
        "give_up",
        "owe",
        "clear_doubt",
        "resolve_attempts",
        "update_member",
        "set_member_facts",
        "admit",
        "add_member",
        "remove_member",
        "begin_rotation",
        "rewrap",
        "finish_rotation",
        "manifest_confirmed",
        "acquire_lease",
        "renew_lease",
        "release_lease",
        "adopt_intent",
        "observe",
        "begin_login",
        "end_login",
        "forget_login",
        "event",
    ]
)


Patch = tuple[Any, str, Any]
"""Whose, which, and what stands there meanwhile."""


class Killed(BaseException):
    """The client is killed here (kill -9): nothing of it runs any more."""


class AtOnce(Executor):
    """Work is done when it is handed in, in the calling thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class _Time:
    """In place of the module ``time``."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock

    def monotonic(self) -> float:
        return self._clock.now

    def sleep(self, seconds: float) -> None:
        self._clock.now += seconds


class _Changed(threading.Condition):
    """Waiting for a member's state to change is letting the background work, and time pass."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        for _ in range(2):
            if predicate() or not timeout:
                break
            self._process.background()
            if not predicate():
                self._process.simulation.clock.now += timeout / 2
        return predicate()


class _Journal:
    """A client's journal: the real one, with interactions."""

    def __init__(self, process: Process, journal: SqliteJournal) -> None:
        self._process = process
        self._journal = journal

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._journal, name)
        if not callable(found) or name in _LOCAL:
            return found
        process, real = self._process, self._journal
        writes = name in _WRITES

        def call(*args: Any, **kwargs: Any) -> Any:
            process.interact(f"journal.{name}", writes)
            if process.journal_fails(writes):
                raise JournalUnavailable("the journal cannot be reached (simulated): nothing was changed")
            before = {intent.id: intent.owner for intent in real.intents()} if process.is_lost(writes) else None
            result = found(*args, **kwargs)
            if before is not None:
                self._disown(before)
                raise JournalOutcomeUnknown(f"no answer to {name} (simulated)")
            if writes:
                process.interact(f"journal.{name}, done", True)
            return result

        setattr(self, name, call)
        return call

    def _disown(self, before: Mapping[str, str]) -> None:
        """As the journal on etcd does where it finds out later: an intent that nobody heard of is nobody's."""
        for intent in self._journal.intents():
            if before.get(intent.id) != intent.owner:
                with self._journal._write() as t:
                    t.sql.execute("UPDATE intents SET owner = ? WHERE id = ?", (f"{intent.owner} (gave up)", intent.id))


class Process:
    """What does something outside of itself, and may be killed there."""

    def __init__(self, simulation: Simulation, name: str) -> None:
        self.simulation = simulation
        self.name = name
        self.dead = False
        self.kill_in: int | None = None
        """Interactions with an effect that it still lives through."""
        self.journal_fault_in: int | None = None
        self.journal_lost_in: int | None = None
        """Writes to the journal until one is carried out and gets no answer."""
        self.intrusion: tuple[int, Callable[[], None]] | None = None
        self._in_background = False
        self.engine: GroupEngine

    def interact(self, what: str, effect: bool) -> None:
        """It does something outside of itself now, or has just done it."""
        if self.dead:
            raise Killed
        self.simulation.note(self, what)
        if self.intrusion is not None and self.simulation.depth < 2:
            left, action = self.intrusion
            self.intrusion = (left - 1, action) if left > 0 else None
            if left <= 0:
                self.simulation.depth += 1
                try:
                    action()
                finally:
                    self.simulation.depth -= 1
                if self.dead:
                    raise Killed
        if effect and self.kill_in is not None:
            self.kill_in -= 1
            if self.kill_in < 0:
                self.dead = True
                raise Killed

    def journal_fails(self, writes: bool) -> bool:
        return writes and self._is_due("journal_fault_in")

    def is_lost(self, writes: bool) -> bool:
        return writes and self._is_due("journal_lost_in")

    def _is_due(self, name: str) -> bool:
        """Counts down what is to happen once."""
        left: int | None = getattr(self, name)
        setattr(self, name, left - 1 if left else None)
        return left == 0

    def open(self) -> tuple[SqliteJournal, Journal]:
        """The group's journal, and the same with interactions."""
        real = SqliteJournal.open(self.simulation.path, clock=self.simulation.clock, busy_timeout=0.2)
        self.simulation.owners[real.owner] = self
        return real, _Journal(self, real)

    def run(self, config: GroupConfig, journal: Journal) -> GroupEngine:
        """The group in this process."""
        self.engine = GroupEngine(config, journal, self.simulation.clock, workers=AtOnce, supervised=False)
        self.engine.roster.changed = _Changed(self)
        self.background()
        return self.engine

    def background(self) -> None:
        """One look of its supervisor."""
        if self._in_background:
            return
        self._in_background = True
        try:
            self.engine.supervisor.tick()
        except JournalUnavailable:
            pass
        finally:
            self._in_background = False

    def bury(self) -> None:
        """Its locks are free, its workers gone."""
        self.dead = True
        mine = {owner for owner, process in self.simulation.owners.items() if process is self}
        for member in self.simulation.members.values():
            for connection in list(member.connections):
                if connection.owner in mine:
                    connection.kill()


class Client(Process):
    """One process of an application: an engine and a logged-in session."""

    def __init__(self, simulation: Simulation, name: str) -> None:
        super().__init__(simulation, name)
        self.session: VirtualSession | None = None
        self.real, self.journal = self.open()

    def start(self) -> None:
        self.run(self.simulation.configuration(), self.journal)

    def would_wait(self) -> bool:
        """Another thread of this process would have to wait for one that is in the middle of something: there is only
        one thread here, so it cannot come in now."""
        engine = self.engine
        locks = [engine.view._lock, engine.supervisor.resync._recovery._one_at_a_time]
        locks += [member.manifest_lock for member in engine.roster.members.values()]
        return any(lock.locked() for lock in locks)

    def ready(self) -> VirtualSession:
        """A logged-in session. :raises HAError, Ckr: not now."""
        if self.session is None:
            session = self.engine.open_session(rw=True)
            session.login(CKU_USER, PIN)
            self.session = session
        return self.session

    def fork(self) -> None:
        """It goes on as its own forked child, and the parent ends. (Between two calls: what another thread was in the
        middle of does not exist in a child.)"""
        self.real._database.before_fork()
        self.real._database.after_fork_in_child()
        self.real.after_fork_in_child()
        self.engine.renew_after_fork()
        self.simulation.owners[self.real.owner] = self
        self.engine.roster.changed = _Changed(self)

    def bury(self) -> None:
        self.real.close()
        super().bury()


class Simulation:
    """Members, the journal's file, time, and the clients."""

    def __init__(self, folder: Path, seed: int, *, members: int = 3, local: bool = False) -> None:
        self.clock = FakeClock()
        self.time = _Time(self.clock)
        self.path = folder / "journal.db"
        self.seed = seed
        self.depth = 0
        self.owners: dict[str, Process] = {}
        self.kill_next_in: int | None = None
        """Like ``kill_in``, of the next client that starts."""
        self.without_journal = ""
        """The owner of connections that are made without one."""
        self.faults: dict[str, list[tuple[int, Fate, bool]]] = {}
        self.unexpected: list[str] = []
        self.log: list[str] | None = None
        """Every interaction, where somebody wants to see them."""
        self._drawn = 0
        names = [f"hsm{number + 1}" for number in range(members)]
        self.members = {
            name: SimMember(name, f"serial-{name}", PIN, local=local, now=self.clock.boot) for name in names
        }
        pin = folder / "pin"
        pin.write_bytes(PIN)
        pin.chmod(0o600)
        self.config = GroupConfig(
            path=folder / "hagroup.toml",
            group=GroupSection(label="payments", serial="74007601"),
            journal=JournalSection(url=SqliteUrl(self.path)),
            timeouts=Timeouts(call=1.0, generate=1.0, probe=0.5),
            members=tuple(
                MemberConfig(
                    name=name,
                    module=Path("/simulated.so"),
                    token_serial=member.token.serial,
                    pin=PinSource(file=pin),
                    late_window=LATE_WINDOW,
                    local=local,
                )
                for name, member in self.members.items()
            ),
        )

    def configuration(self) -> GroupConfig:
        """As a program that starts reads it."""
        return self.config

    # -- the world outside of the engine -----------------------------------------------------------------------
    def random(self, length: int) -> bytes:
        self._drawn += 1
        return hashlib.shake_128(f"{self.seed}:{self._drawn}".encode()).digest(length)

    @contextlib.contextmanager
    def running(self) -> Iterator[Simulation]:
        """Time, random numbers and members are ours; what the background logs as an error is kept."""
        logger = logging.getLogger("hagroup")
        keeper = _Keeper(self)
        before = (logger.level, logger.propagate)
        with contextlib.ExitStack() as stack:
            for owner, name, value in self.patches():
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
            logger.addHandler(keeper)
            stack.callback(logger.removeHandler, keeper)
            logger.setLevel(logging.ERROR)
            logger.propagate = False
            stack.callback(setattr, logger, "propagate", before[1])
            stack.callback(logger.setLevel, before[0])
            stack.callback(self._end)
            self._set_up()
            yield self

    def patches(self) -> list[Patch]:
        return [
            (os, "urandom", self.random),
            (random, "_urandom", self.random),
            (calls, "time", self.time),
            (tenacity.nap, "time", self.time),
            (tenacity, "time", self.time),
            (opening, "open_connection", self._open),
        ]

    def _end(self) -> None:
        for client in list(self.owners.values()):
            client.bury()
        self.journal.close()

    def _open(self, settings: ConnectionSettings, *, generation: int, isolation: str, timeout: float) -> SimConnection:
        owner = Path(settings.lock_file or self.without_journal).name.partition("-")[0]
        self.owners[owner].interact(f"{settings.name} start", False)
        member = self.members[settings.name]
        if member.down:
            raise MemberGone(f"{settings.name} is off", sent=False)
        if member.hung:
            raise DeadlinePassed(f"{settings.name} does not answer")
        if settings.token_serial != member.token.serial:
            raise ModuleProblem(f"{settings.name} has no token with serial {settings.token_serial}")
        return member.connect(generation, settings.lock_file, owner)

    def _script(self, connection: SimConnection, name: str, changes: bool) -> Fate:
        member = connection.member.name
        self.owners[connection.owner].interact(f"{member} {name}", changes)
        waiting = self.faults.get(member, [])
        for place, (left, fate, only_changes) in enumerate(waiting):
            if only_changes and not changes:
                continue
            if left <= 0:
                del waiting[place]
                return fate
            waiting[place] = (left - 1, fate, only_changes)
            break
        return Fate.FINE

    def _after(self, connection: SimConnection, name: str, changes: bool) -> None:
        if changes:
            self.owners[connection.owner].interact(f"{connection.member.name} {name}, done", True)

    def note(self, process: Process, what: str) -> None:
        if self.log is not None:
            self.log.append(f"{'    ' * (self.depth + 1)}{process.name} {what}")

    # -- the group ---------------------------------------------------------------------------------------------
    def _set_up(self) -> None:
        """As ``ha-admin group create`` leaves it; the domain's keys are put there directly."""
        ids = self.random(16), self.random(16)
        secrets = self.random(32), self.random(32)
        members = [self.members[one.name] for one in self.config.members]
        for member in members:
            self.give_domain(member, ids, secrets)
        self.domain = ids, secrets
        records = [
            MemberRecord(name=m.name, serial=m.token.serial, role=Role.ACTIVE, membership=Membership.ADMITTED)
            for m in members
        ]
        first = members[0]
        connection = first.connect(1, None, "")
        connection.login(CKU_USER, PIN, timeout=1)
        keys = find_domain(connection, *ids, timeout=1)
        SqliteJournal.create(
            self.path,
            label="payments",
            serial="74007601",
            members=records,
            domain_key_id=ids[0],
            partition_key_id=ids[1],
            reference=reference_envelope(connection, keys, timeout=1),
            clock=self.clock,
        )
        connection.kill()
        self.journal = SqliteJournal.open(self.path, clock=self.clock)
        group, listed = self.journal.view()
        for member in members:
            connection = member.connect(1, None, "")
            connection.login(CKU_USER, PIN, timeout=1)
            keys = find_domain(connection, *ids, timeout=1)
            shown = manifest.compose(group, {one.name: one for one in listed}, low=0, high=0)
            manifest.write(connection, keys, shown, timeout=1)
            connection.kill()
            member.script, member.after = self._script, self._after

    def listed(self) -> list[SimMember]:
        """Those that are in the group, and not just being taken out of it."""
        return [self.members[one.name] for one in self.journal.members() if one.reason != BEING_REMOVED]

    def joined(self, member: SimMember) -> bool:
        """Whether the domain's keys are on its token."""
        return {DOMAIN_LABEL, PARTITION_LABEL} <= {item.label for item in member.token.objects.values()}

    def give_domain(self, member: SimMember, ids: tuple[bytes, bytes], secrets: tuple[bytes, bytes]) -> None:
        """As ``ha-admin domain join``."""
        for label, key_id, secret in zip((DOMAIN_LABEL, PARTITION_LABEL), ids, secrets, strict=True):
            domain = label == DOMAIN_LABEL
            attributes = {
                CKA.CLASS: pack_ulong(CKO.SECRET_KEY),
                CKA.KEY_TYPE: pack_ulong(CKK.AES),
                CKA.LABEL: label,
                CKA.ID: key_id,
                **dict.fromkeys((CKA.TOKEN, CKA.PRIVATE, CKA.SENSITIVE, CKA.DESTROYABLE), pack_bool(True)),
                **dict.fromkeys((CKA.EXTRACTABLE, CKA.WRAP_WITH_TRUSTED), pack_bool(True)),
                **dict.fromkeys((CKA.WRAP, CKA.UNWRAP), pack_bool(domain)),
                **dict.fromkeys((CKA.ENCRYPT, CKA.DECRYPT), pack_bool(not domain)),
            }
            number = member.next_number()
            packed = {int(n): value for n, value in attributes.items()}
            member.token.objects[number] = SimObject(number, packed, secret, None)

    def client(self, name: str) -> Client:
        made = Client(self, name)
        made.kill_in, self.kill_next_in = self.kill_next_in, None
        try:
            made.start()
        except BaseException:
            made.bury()
            raise
        return made


class _Keeper(logging.Handler):
    """Exceptions that nobody but the log saw."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(logging.ERROR)
        self._simulation = simulation

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self._simulation.unexpected.append(self.format(record))


EXPECTED = (Ckr, HAError, GroupUnavailable)
"""What a call of an application may raise."""


def key_template(label: bytes, **flags: bool) -> Template:
    """A token object's template with these flags."""
    names = {name: getattr(CKA, name.upper()) for name in flags}
    template: Template = [(int(CKA.TOKEN), pack_bool(True)), (int(CKA.LABEL), label)]
    return template + [(int(names[name]), pack_bool(value)) for name, value in flags.items()]
