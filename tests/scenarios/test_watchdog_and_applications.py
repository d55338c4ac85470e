"""What the watchdog sees reaches applications; and a watchdog that is killed in any phase of its loop."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import hagroup as pkcs11
from hagroup.config.load import load
from hagroup.core.calls import Ckr
from hagroup.engine import whole_token
from hagroup.journal import open_journal
from hagroup.watchdog.group import GroupWatch
from hagroup.watchdog.memory import recall
from tests.support import plain
from tests.support.faults import FaultControl, build_interposer
from tests.support.faulty import engine
from tests.support.groups import PIN, GroupFixture, make_group, run_client, wait_until
from tests.support.softhsm import SOFTHSM
from tests.support.watchdogs import configure, events, kinds, make_hook, watching

CALL = 30.0
"""Seconds: who paid a timeout would be noticed, however slow the machine is."""
APPLICATION = r"""
import json, sys, time
import hagroup as pkcs11
from hagroup import KeyType, bootstrap

groups = []
started = bootstrap.start_group
def start_group(*args, **kwargs):
    groups.append(started(*args, **kwargs))
    return groups[-1]
bootstrap.start_group = start_group
token = pkcs11.lib(sys.argv[1]).get_token(token_label="payments")
session = token.open(rw=True, user_pin=sys.argv[2])
key = session.generate_key(KeyType.AES, 256, store=True, label="used")
groups[0].supervisor.settle()
for line in sys.stdin:
    answer = None
    if line.strip() == "states":
        answer = {name: member.state.value for name, member in groups[0].roster.members.items()}
    else:
        longest = 0.0
        for _ in range(30):
            begun = time.monotonic()
            key.encrypt(b"x" * 16, mechanism_param=bytes(16))
            longest = max(longest, time.monotonic() - begun)
        answer = longest
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def group(fast_folder: Path) -> GroupFixture:
    return make_group(fast_folder / "told")


def test_an_application_stops_using_a_hung_member_and_takes_it_back(group: GroupFixture) -> None:
    """It makes no call meanwhile, so it learns of it from the watchdog alone; and pays no timeout itself."""
    configure(group)
    text = group.toml.read_text()
    group.toml.write_text("\n".join(f"call = {CALL}" if x.startswith("call ") else x for x in text.splitlines()) + "\n")
    with (
        watching(group) as watchdog,
        subprocess.Popen(
            [sys.executable, "-c", APPLICATION, str(group.toml), PIN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as application,
    ):
        assert application.stdin is not None
        assert application.stdout is not None

        def ask(what: str) -> object:
            assert application.stdin is not None
            assert application.stdout is not None
            print(what, file=application.stdin, flush=True)
            return json.loads(application.stdout.readline())

        def state() -> str:
            found = ask("states")
            assert isinstance(found, dict)
            return str(found["hsm2"])

        try:
            wait_until(lambda: state() == "in service", "hsm2 to serve")
            workers = [group.workers(pid)["hsm2"] for pid in (application.pid, watchdog.pid)]
            for worker in workers:
                worker.send_signal(signal.SIGSTOP)
            begun = time.monotonic()
            wait_until(lambda: state() != "in service", "the application to stop using hsm2")
            noticed = time.monotonic() - begun
            longest = ask("use")
            assert isinstance(longest, float)
            assert longest < CALL / 3
            wait_until(lambda: state() == "in service", "the application to take hsm2 back")
            print(f"not used any more after {noticed:.2f} s, longest call then {longest:.3f} s")
        finally:
            application.stdin.close()
            application.wait(60)
    group.toml.write_text(text)


@contextlib.contextmanager
def application_at(toml: Path) -> Iterator[Any]:
    """A session of a program there, once all members serve."""
    lib = pkcs11.lib(str(toml))
    try:
        with lib.get_token(token_label="payments").open(rw=True, user_pin=PIN) as session:
            wait_until(lambda: len(engine(session).roster.serving()) == 3, "all to serve")
            wait_until(
                lambda: all(one.life.proved_since_low for one in engine(session).roster.serving()), "a first look"
            )
            yield session
    finally:
        lib.unload()


def test_two_sites(group: GroupFixture) -> None:
    """One group, programs in two places. Each uses the members that are near it, and those that are far when they have
    to; what the watchdog at one of them sees is heeded there alone."""
    configure(group)
    tomls = {}
    for site in ("zurich", "geneva"):
        text = group.toml.read_text().replace("[group]\n", f'[group]\nsite = "{site}"\n')
        for name, where in (("hsm1", "zurich"), ("hsm2", "geneva"), ("hsm3", "geneva")):
            text = text.replace(f'= "{name}"\n', f'= "{name}"\nsite = "{where}"\n')
        tomls[site] = group.folder / f"{site}.toml"
        tomls[site].write_text(text)
        tomls[site].chmod(0o600)
    at_zurich = dataclasses.replace(group, toml=tomls["zurich"])
    with (
        application_at(tomls["zurich"]) as near,
        application_at(tomls["geneva"]) as far,
        watching(at_zurich),
    ):
        made = near.generate_key(pkcs11.KeyType.AES, 256, store=True, label="of two sites")
        wait_until(lambda: not engine(near).journal.owed(), "all to have the key")
        by_hsm1 = []
        for session, key in ((near, made), (far, far.get_key(label="of two sites"))):
            hsm1 = engine(session).roster.members["hsm1"]
            before = hsm1.answers
            for _ in range(20):
                key.encrypt(bytes(16), mechanism_param=bytes(16))
            by_hsm1.append(hsm1.answers - before)
        print(f"of 20 calls hsm1, at zurich, got {by_hsm1[0]} from there and {by_hsm1[1]} from geneva")
        assert by_hsm1[0] > 15 and by_hsm1[1] < 5
        engine(far).supervisor.sealer.due = lambda: False  # that would write to hsm3
        group.take_away("hsm3")  # nobody uses it: programs learn of it from others
        wait_until(lambda: not engine(near).roster.members["hsm3"].serving, "the program at zurich to know")
        supervisor, journal = engine(far).supervisor, engine(far).journal
        wait_until(lambda: supervisor._observed == journal.view_number(), "the one at geneva to have read of it")
        assert engine(far).roster.members["hsm3"].serving, "it looks when it uses it, and not because of zurich"
        group.bring_back("hsm3")
        wait_until(lambda: len(engine(near).roster.serving()) == 3, "all to serve at zurich again")
    shown = at_zurich.admin("status").stdout
    assert "site" in shown and "geneva" in shown


def test_the_heartbeat_signs_and_leaves_nothing_on_the_token(group: GroupFixture) -> None:
    configure(group, "verify_rate = 0")
    before = {name: plain.labels(member) for name, member in group.members.items()}
    watch = GroupWatch(group.toml)
    try:
        watch.step()
        wait_until(lambda: watch.step() or {b.level for b in watch.report.beats.values()} == {"signature"}, "signing")
        assert {name: plain.labels(member) for name, member in group.members.items()} == before
    finally:
        watch.stop()
        watch.run()
    shown = group.admin("status").stdout
    assert "a watchdog tells a failure within 2 s (0.8 s x 2 + 0.4 s)" in shown
    assert group.status()["detection"]["detection_bound"] == 2.0


def test_a_token_that_is_just_going_away_has_lost_nothing(group: GroupFixture) -> None:
    """It answers searches with nothing first: that is no object missing, if it does not answer for itself then."""
    configure(group, "verify_rate = 0")
    run_client(group, "session.generate_key(KeyType.AES, 256, store=True, label='still there')\n")
    group.admin("sync")
    watch = GroupWatch(group.toml)
    watch.step()
    engine = watch._engine
    assert engine is not None
    try:
        engine.supervisor.settle()
        member, journal = engine.roster.members["hsm1"], engine.journal
        uid = next(iter(journal.objects())).uid
        before = max(event.number for event in journal.events(limit=1))
        assert member.life is not None
        engine.replicator.proves = lambda member, uid: False

        def gone(*arguments: object, **options: object) -> None:
            raise Ckr(0x82, "C_GetAttributeValue")

        member.life.connection.get = gone
        engine.supervisor._prove(member, uid)
        assert [e.kind for e in journal.events(since=before, limit=100) if e.kind == "object missing"] == []
        assert not [row for row in journal.owed("hsm1") if row.uid == uid]
        other = engine.roster.members["hsm2"]  # the same while all of a token is compared
        life = other.life
        assert life is not None
        life.connection.find = lambda *arguments, **options: []
        life.connection.get = gone
        assert not whole_token.owe_what_differs(engine.roster, journal, other, life, with_record=True, timeout=5.0)
        assert other.life is not life, "it is failed, and looked at again when it is back"
        assert not journal.owed("hsm2")
    finally:
        watch.stop()
        watch.run()


def under_the_interposer(group: GroupFixture, name: str) -> FaultControl:
    """The member's module is the fault interposer from now on."""
    control = FaultControl(group.folder / name / "faults").init()
    before, mark, block = group.toml.read_text().partition(f'name         = "{name}"\n')
    block = block.replace(str(SOFTHSM), str(build_interposer()), 1)
    variables = f'HAGROUP_FAULT_MODULE = "{SOFTHSM}", HAGROUP_FAULT_CONTROL = "{control.path}", SOFTHSM2_CONF'
    group.toml.write_text(before + mark + "local = true\n" + block.replace("SOFTHSM2_CONF", variables, 1))
    return control


def made_kept_and_destroyed(group: GroupFixture, name: str) -> Path:
    """The member's token as it was while it had a key that was destroyed since."""
    kept = group.folder / name / "tokens.kept"
    with application_at(group.toml) as session:
        journal = engine(session).journal
        key = session.generate_key(pkcs11.KeyType.AES, 256, store=True, label="destroyed since")
        wait_until(lambda: not journal.owed(), "all to have the key")
        shutil.copytree(group.token_folder(name), kept)
        key.destroy()
        wait_until(lambda: not journal.owed(), "none to have it any more")
    return kept


def test_a_full_token_a_broken_log_and_a_key_that_is_back_are_told_once(group: GroupFixture) -> None:
    hook, told = make_hook(group.folder)
    before = group.toml.read_text()
    control = under_the_interposer(group, "hsm2")
    configure(group, hook, "verify_rate = 0")
    kept = made_kept_and_destroyed(group, "hsm3")
    with (
        watching(group) as watchdog,
        contextlib.closing(sqlite3.connect(group.folder / "journal.db", isolation_level=None)) as journal,
    ):
        control.add("C_GetTokenInfo", "full")
        wait_until(lambda: "token nearly full" in kinds(told), "that the token is nearly full")
        (event,) = journal.execute("SELECT * FROM events WHERE number = 2").fetchall()
        journal.execute("DELETE FROM events WHERE number = 2")
        for times in (2, 3):  # the log is looked at on taking up, and then every five minutes
            watchdog.signal(signal.SIGHUP)
            wait_until(lambda times=times: watchdog.log.read_text().count("watchdog.watching") == times, "a reload")
            wait_until(lambda: "event log broken" in kinds(told), "that the log is broken")
        group.take_away("hsm3")
        wait_until(lambda: "member failed" in kinds(told), "that it is away")
        shutil.rmtree(group.folder / "hsm3" / "tokens.away")
        kept.rename(group.folder / "hsm3" / "tokens.away")
        group.bring_back("hsm3")
        wait_until(lambda: {"tombstoned key reappeared", "group whole"} <= set(kinds(told)), "that the key is back")
        assert "destroyed since" not in plain.labels(group.members["hsm3"])
        listed = json.loads(group.admin("journal", "list", "--object", "destroyed since", "--json").stdout)
        assert [(one["event"], one["member"]) for one in listed] == [("object reappeared", "hsm3")]
        assert "destroyed since" not in told.read_text(), "labels are the application's affair"
        journal.execute(f"INSERT INTO events VALUES ({', '.join('?' * len(event))})", event)
    group.toml.write_text(before)
    found = [(one["kind"], one["member"]) for one in events(told)]
    for once in (
        ("token nearly full", "hsm2"),
        ("event log broken", None),
        ("tombstoned key reappeared", "hsm3"),
    ):
        assert found.count(once) == 1, found


PHASES = (
    "before acquire_lease", "after acquire_lease", "before _take_up", "after _take_up", "before beat", "after beat",
    "before observe", "after observe", "before remember", "after remember", "before tell", "after tell",
    "after publish", "before renew_lease", "after renew_lease", "before release_lease",
)  # fmt: skip
KILLED_IN = ("after observe", "before remember", "after remember", "after tell")
STOPPED_IN = ("after acquire_lease", "before remember", "after beat")
TAKING_UP = PHASES[:4]
LAST = PHASES[-1]
HIT = r"""
import os, signal, sys
from pathlib import Path
from hagroup.journal import SqliteJournal, database
from hagroup.watchdog import group as loop
from hagroup.watchdog.heartbeat import Heart
from hagroup.watchdog.telling import Teller

# sends itself the signal that the file names, in the phase that it names, and says when it is active
wanted, state = Path(sys.argv[2]), Path(f"{sys.argv[2]}.{os.getpid()}")
def here(phase):
    if wanted.exists():
        to, number, where = wanted.read_text().split(" ", 2)
        if to in ("anybody", str(os.getpid())) and where == phase:
            wanted.unlink()
            database._before_fork()  # not while another thread is inside SQLite: who is stopped there stops all changes
            os.kill(os.getpid(), int(number))
            database._after_fork_in_parent()
def hook(owner, name, called=None):
    method = getattr(owner, name)
    def hooked(*args, **kwargs):
        mine = not name.endswith("_lease") or "watchdog/" in str(args[1])  # the engine has leases of its own
        mine and here("before " + (called or name))
        result = method(*args, **kwargs)
        mine and here("after " + (called or name))
        return result
    setattr(owner, name, hooked)
for owner, name in ((SqliteJournal, "acquire_lease"), (SqliteJournal, "renew_lease"), (SqliteJournal, "observe"),
                    (SqliteJournal, "release_lease"), (loop.GroupWatch, "_take_up"), (Heart, "beat"),
                    (loop, "remember"), (Teller, "tell")):
    hook(owner, name)
hook(loop.GroupWatch, "_publish", "publish")
def published(report):
    state.write_text("active" if report.active else "standing by")
watch = loop.GroupWatch(Path(sys.argv[1]), published=published)
signal.signal(signal.SIGTERM, lambda *_: watch.stop())
watch.run()
"""


def in_turn(every: tuple[str, ...], sample: tuple[str, ...]) -> tuple[str, ...]:
    """A run takes a sample of the phases; ``HAGROUP_CRASH_ALL=1``: all."""
    return every if os.environ.get("HAGROUP_CRASH_ALL") else sample


def each_change_once(told: Path) -> None:
    found = events(told)
    expected = ["member failed", "group degraded", "member recovered", "group whole"]
    said = [event["kind"] for event in found if event["kind"] in expected]
    assert said == expected * (len(said) // 4), "each change once, and in order"
    assert said, "something was told"
    assert len({event["id"] for event in found}) == len(found)


def test_killed_in_every_phase_another_one_goes_on(group: GroupFixture) -> None:
    """Each is killed in another phase while something is to be told; whoever comes next tells it, and nothing twice."""
    hook, told = make_hook(group.folder)
    configure(group, hook, "verify_rate = 0")
    away, control = False, group.folder / "hit"
    with watching(group):
        pass
    journal = open_journal(load(group.toml).journal)
    for phase in in_turn(PHASES, KILLED_IN):
        if (seen := recall(journal).members.get("hsm2")) is None or seen.failed == away:  # else that is to be told yet
            (group.bring_back if away else group.take_away)("hsm2")
            away = not away
        control.write_text(f"anybody {signal.SIGKILL:d} {phase}")
        with subprocess.Popen(
            [sys.executable, "-c", HIT, str(group.toml), str(control)], stderr=subprocess.PIPE, text=True
        ) as watchdog:
            if phase == LAST:
                state = control.with_name(f"hit.{watchdog.pid}")
                wait_until(lambda state=state: state.exists() and state.read_text() == "active", "watching")
                watchdog.terminate()
            _, errors = watchdog.communicate(timeout=120)
        print(f"{phase}: killed; hsm2 {'away' if away else 'there'}")
        assert watchdog.returncode == -signal.SIGKILL, (phase, errors)
    journal.close()
    with watching(group):  # the one that stood by
        if away:
            group.bring_back("hsm2")
        wait_until(lambda: group.status()["group"]["state"] == "ok", "the group to be whole")
        wait_until(lambda: not kinds(told) or kinds(told)[-1] in ("group whole", "resync done"), "all of it told")
    each_change_once(told)


class Stoppable:
    """A watchdog that stops itself where it is told to."""

    def __init__(self, group: GroupFixture) -> None:
        self._control = group.folder / "hit"
        self.process = psutil.Popen([sys.executable, "-c", HIT, str(group.toml), str(self._control)])
        self._state = self._control.with_name(f"hit.{self.process.pid}")

    def stop_in(self, phase: str) -> None:
        self._control.write_text(f"{self.process.pid} {signal.SIGSTOP:d} {phase}")

    def stopped(self) -> bool:
        return bool(self.process.status() == psutil.STATUS_STOPPED)

    def says(self, state: str) -> bool:
        return self._state.exists() and self._state.read_text() == state

    def wake(self) -> None:
        self._state.unlink(missing_ok=True)
        self.process.resume()


def test_stopped_in_every_phase_another_one_goes_on(group: GroupFixture) -> None:
    """Two take turns: one stops while something is to be told, and wakes up when the other one has told it and what
    came after it. What it then still writes down or tells is not believed."""
    hook, told = make_hook(group.folder)
    configure(group, hook, "verify_rate = 0")
    with watching(group):
        pass
    watchers = [Stoppable(group)]
    journal = open_journal(load(group.toml).journal)
    try:
        wait_until(lambda: watchers[0].says("active"), "the first to watch")
        watchers.append(Stoppable(group))
        wait_until(lambda: watchers[1].says("standing by"), "the second to stand by")
        active, other = watchers
        for phase in in_turn(PHASES, STOPPED_IN):
            group.take_away("hsm2")
            if phase in TAKING_UP:
                stopped, awake = other, active
                stopped.stop_in(phase)
                awake.process.suspend()
                wait_until(stopped.stopped, f"the other to stop {phase}")
                awake.wake()
            else:
                stopped, awake = active, other
                stopped.stop_in(phase)
                if phase == LAST:
                    stopped.process.terminate()
                wait_until(stopped.stopped, f"the active one to stop {phase}")
            wait_until(lambda awake=awake: awake.says("active"), "one to be active")
            wait_until(lambda: kinds(told)[-1:] == ["group degraded"], "it to be told")
            group.bring_back("hsm2")
            wait_until(lambda: kinds(told)[-1:] == ["group whole"], "that to be told")
            wait_until(lambda: not recall(journal).undelivered, "it to be written down that all was delivered")
            stopped.wake()
            if phase == LAST:
                assert stopped.process.wait(60) == 0
            else:
                wait_until(lambda stopped=stopped: stopped.says("standing by"), "who woke up to stand by")
            active, other = awake, stopped
    finally:
        journal.close()
        for one in watchers:
            if one.process.is_running():
                one.process.resume()
                one.process.terminate()
                one.process.wait(60)
    each_change_once(told)
