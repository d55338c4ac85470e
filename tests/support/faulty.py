"""A group whose members misbehave on request: each one's module is the fault interposer over SoftHSM.

Making a group takes seconds, so the tests share one (``fault_group``); each ends with :meth:`FaultGroup.heal`.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import hagroup as pkcs11
from hagroup import Attribute
from hagroup.core.pace import Paces
from tests.support import plain
from tests.support.faults import FaultControl, build_interposer
from tests.support.groups import PIN, GroupFixture, make_group, wait_until
from tests.support.softhsm import SOFTHSM

CALL, GENERATE, PROBE = 1.0, 3.0, 0.4
BOUND = 3 * CALL + 1.0
"""The longest call that the README allows."""
ONE_HANG = CALL + PROBE + 0.6
"""The longest call where one member hangs: its deadline, and a moment on a busy machine."""

_groups: dict[Path, FaultGroup] = {}


class FaultGroup:
    """A group of three on disk, the fault controls of its members, and the library opened on it."""

    def __init__(self, group: GroupFixture) -> None:
        self.group = group
        self.controls = {name: FaultControl(group.folder / name / "faults").init() for name in sorted(group.members)}
        self.inline = self.variant("inline", '"process"', '"none"')
        """The same group for a client with isolation ``none``."""

    def variant(self, name: str, old: str, new: str) -> Path:
        """The configuration with one thing changed, beside the original: another client of the same group."""
        text = self.group.toml.read_text()
        assert old in text
        path = self.group.folder / f"{name}.toml"
        path.write_text(text.replace(old, new))
        path.chmod(0o600)
        return path

    @property
    def names(self) -> list[str]:
        return list(self.controls)

    @contextlib.contextmanager
    def client(self, isolation: str = "process", toml: Path | None = None) -> Iterator[Any]:
        """A logged-in read-write session of this process, with all members in service."""
        lib = pkcs11.lib(str(toml or (self.group.toml if isolation == "process" else self.inline)))
        try:
            with lib.get_token(token_label="payments").open(rw=True, user_pin=PIN) as session:
                self.wait_serving(session)
                yield session
        finally:
            self.clear()
            lib.unload()

    @staticmethod
    def prefer(session: Any, name: str) -> None:
        """This thread's next call goes to this member, if that is as good as others."""
        roster = engine(session).roster
        roster.choosing.here.last = roster.members[name]
        roster.choosing.paces = Paces()  # one that just failed may be the slowest

    @staticmethod
    def in_use(session: Any) -> str:
        """The member that a call or stream is on just now (there is one)."""
        (name,) = [name for name, member in engine(session).roster.members.items() if member.outstanding]
        return str(name)

    def kill(self, session: Any, name: str) -> None:
        """SIGKILL to this process's worker; returns when it is noticed."""
        member = engine(session).roster.members[name]
        life = member.life
        worker = wait_until(lambda: self.group.workers().get(name), f"a worker of {name}")
        worker.send_signal(signal.SIGKILL)
        wait_until(lambda: life is None or not life.connection.alive, f"the end of {name}'s worker")

    @staticmethod
    def states(session: Any) -> dict[str, str]:
        """Each member's state in this process."""
        return {name: member.state.value for name, member in engine(session).roster.members.items()}

    def wait_serving(self, session: Any, *names: str) -> None:
        """Until these members (all) are in service here, and owe nothing."""
        group = engine(session)

        def ready() -> bool:
            for member in group.roster.members.values():
                member.next_attempt = 0.0  # what earlier faults made it wait for is not what is tested
            group.supervisor.wake()
            lives = {member.name: member.life for member in group.roster.serving()}  # a dead one may not be noticed yet
            return {name for name, life in lives.items() if life and life.connection.alive} >= set(names or self.names)

        wait_until(ready, f"members {names or self.names} in service")

    def wait_failed(self, session: Any, *names: str) -> None:
        """Until none of these members (all) is connected; random numbers are asked for, so that it is noticed."""
        members = engine(session).roster.members

        def failed() -> bool:
            with contextlib.suppress(pkcs11.PKCS11Error):
                session.generate_random(64)
            return all(members[name].life is None for name in names or self.names)

        wait_until(failed, f"members {names or self.names} failed")

    def clear(self) -> None:
        for control in self.controls.values():
            control.clear()

    def heal(self, session: Any) -> None:
        """No faults; every member in service, owing nothing; no intent open."""
        self.clear()
        self.wait_serving(session)
        for member in engine(session).roster.members.values():
            member.failures = 0
        journal = engine(session).journal

        def settled() -> bool:
            engine(session).supervisor.wake()
            return not journal.owed() and not journal.intents()

        try:
            wait_until(settled, "the end of all that is owed")
        except AssertionError as error:
            raise AssertionError(f"{error}; owed: {journal.owed()}; intents: {journal.intents()}") from None

    def labels(self, *, own: bool = False) -> dict[str, list[str]]:
        """Labels of the objects on each token (``own``: hagroup's too), read with plain pkcs11."""

        def read(member: dict[str, Any]) -> list[str]:
            return sorted(item["label"] for item in plain.objects(member, own=own))

        with ThreadPoolExecutor() as pool:
            return dict(zip(self.names, pool.map(read, self.group.members.values()), strict=True))

    def check_tokens(self, session: Any, *, shown_once: bool = True) -> None:
        """What the group has is on every token exactly once, with its record, and nothing else: no ghosts.

        While what a member shows is renewed in the background the token has two: then it is read again.

        :param shown_once: not where a member may have been lost in that: then the older one goes with the next renewal.
        """
        live = list(engine(session).journal.objects())
        wanted = [record.attributes[Attribute.LABEL].decode() for record in live]
        wanted += [f"hagroup:object:{record.uid.hex()}:{record.revision}" for record in live]
        wanted += ["hagroup domain key", "hagroup member key", "hagroup partition key"]

        def read() -> dict[str, list[str]] | None:
            labels = self.labels(own=True)
            shown = [Counter(filter(None, map(_what_is_shown, found))) for found in labels.values()]
            if all(len(kinds) == 2 and (set(kinds.values()) == {1} or not shown_once) for kinds in shown):
                return labels
            return None

        for name, found in wait_until(read, "one manifest and one configuration on each member").items():
            there = Counter(label for label in found if not _what_is_shown(label))
            assert there == Counter(wanted), f"{name} has {there - Counter(wanted)}, lacks {Counter(wanted) - there}"


def _what_is_shown(label: str) -> str:
    """Manifest or configuration: what a member shows of the group, made anew in the background now and then."""
    return next((kind for kind in ("manifest", "configuration") if label.startswith(f"hagroup:{kind}")), "")


def engine(session: Any) -> Any:
    """The engine's group behind a facade session."""
    return session.engine._group


def fault_group(fast_folder: Path) -> FaultGroup:
    """The shared one; made when first asked for."""
    found = _groups.get(fast_folder)
    if found is None:
        found = _groups[fast_folder] = make_fault_group(fast_folder / "faulty")
    return found


def make_fault_group(folder: Path, *options: str, members: int = 3) -> FaultGroup:
    """A group with the interposer as every member's module and short deadlines."""
    module = build_interposer()
    environment = [f"HAGROUP_FAULT_MODULE={SOFTHSM}", "HAGROUP_FAULT_CONTROL={dir}/faults"]
    settings = [word for setting in environment for word in ("--env", setting)]
    group = make_group(folder, "--module", str(module), *settings, *options, members=members)
    set_timeouts(group.toml)
    return FaultGroup(group)


def set_timeouts(toml: Path, call: float = CALL, generate: float = GENERATE, probe: float = PROBE) -> None:
    text = toml.read_text()
    for key, value in (("call", call), ("generate", generate), ("probe", probe)):
        text, count = re.subn(rf"^({key}\s*= )[0-9.]+", rf"\g<1>{value}", text, flags=re.MULTILINE)
        assert count == 1
    toml.write_text(text)


class Load:
    """Threads that sign until they are told to stop; remembers every error and how long each call took."""

    def __init__(self, work: Callable[[int], Any], threads: int = 12) -> None:
        self._work = work
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.errors: list[BaseException] = []
        self.calls: list[tuple[float, float]] = []
        """(when it ended, how long it took), monotonic."""
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(threads)]

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                self._work(number)
            except BaseException as error:
                self.errors.append(error)
            ended = time.monotonic()
            with self._lock:
                self.calls.append((ended, ended - started))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a call never came back"

    def done(self) -> int:
        return len(self.calls)

    def wait_for(self, more: int) -> None:
        """Until ``more`` further calls ended."""
        goal = self.done() + more
        wait_until(lambda: self.done() >= goal or self.errors, f"{more} more calls")

    def since(self, when: float) -> list[tuple[float, float]]:
        """The calls that ended after ``when``."""
        with self._lock:
            return [(ended, took) for ended, took in self.calls if ended > when]

    def longest(self, since: float = 0.0) -> float:
        return max(took for _, took in self.since(since))

    def longest_silence(self, since: float) -> float:
        """The longest time in which no call at all ended."""
        times = sorted([since, *(ended for ended, _ in self.since(since))])
        return max(later - earlier for earlier, later in pairwise(times))
