"""What the watchdog sees reaches applications; and a watchdog that is killed in any phase of its loop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hagroup.config.model import JournalSection, SqliteUrl
from hagroup.core.calls import Ckr
from hagroup.journal import open_journal
from hagroup.watchdog.group import GroupWatch
from hagroup.watchdog.memory import recall
from tests.support import plain
from tests.support.groups import PIN, GroupFixture, make_group, run_client, wait_until
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
    finally:
        watch.stop()
        watch.run()


PHASES = (
    "before acquire_lease", "after acquire_lease", "before _take_up", "after _take_up", "before beat", "after beat",
    "before observe", "after observe", "before remember", "after remember", "before tell", "after tell",
    "after publish", "before renew_lease", "after renew_lease", "before release_lease",
)  # fmt: skip
SAMPLE = ("after observe", "before remember", "after remember", "after tell")
DYING = r"""
import os, signal, sys
from pathlib import Path
from hagroup.journal import SqliteJournal
from hagroup.watchdog import group as loop
from hagroup.watchdog.heartbeat import Heart
from hagroup.watchdog.telling import Teller

wanted = sys.argv[2]
def here(phase):
    if phase == wanted:
        os.kill(os.getpid(), signal.SIGKILL)
def hook(owner, name, called=None):
    method = getattr(owner, name)
    def hooked(*args, **kwargs):
        here("before " + (called or name))
        result = method(*args, **kwargs)
        here("after " + (called or name))
        return result
    setattr(owner, name, hooked)
for owner, name in ((SqliteJournal, "acquire_lease"), (SqliteJournal, "renew_lease"), (SqliteJournal, "observe"),
                    (SqliteJournal, "release_lease"), (loop.GroupWatch, "_take_up"), (Heart, "beat"),
                    (loop, "remember"), (Teller, "tell")):
    hook(owner, name)
hook(loop.GroupWatch, "_publish", "publish")
watch = loop.GroupWatch(Path(sys.argv[1]))
import threading
if wanted == "before release_lease":
    threading.Timer(3.0, watch.stop).start()
watch.run()
"""


def test_killed_in_every_phase_another_one_goes_on(group: GroupFixture) -> None:
    """Each is killed in another phase while something is to be told; whoever comes next tells it, and nothing twice.

    A run takes a sample of the phases; ``HAGROUP_CRASH_ALL=1``: all."""
    hook, told = make_hook(group.folder)
    configure(group, hook, "verify_rate = 0")
    away = False
    phases = PHASES if os.environ.get("HAGROUP_CRASH_ALL") else SAMPLE
    with watching(group):
        pass
    journal = open_journal(JournalSection(url=SqliteUrl(path=group.folder / "journal.db")))
    for phase in phases:
        if (seen := recall(journal).members.get("hsm2")) is None or seen.failed == away:  # else that is to be told yet
            (group.bring_back if away else group.take_away)("hsm2")
            away = not away
        done = subprocess.run(
            [sys.executable, "-c", DYING, str(group.toml), phase], timeout=120, check=False, capture_output=True
        )
        print(f"{phase}: killed; hsm2 {'away' if away else 'there'}")
        assert done.returncode == -signal.SIGKILL, (phase, done.stderr.decode())
    journal.close()
    with watching(group):  # the one that stood by
        if away:
            group.bring_back("hsm2")
        wait_until(lambda: group.status()["group"]["state"] == "ok", "the group to be whole")
        wait_until(lambda: not kinds(told) or kinds(told)[-1] in ("group whole", "resync done"), "all of it told")
    found = events(told)
    expected = ["member failed", "group degraded", "member recovered", "group whole"]
    said = [event["kind"] for event in found if event["kind"] in expected]
    assert said == expected * (len(said) // 4), "each change once, and in order"
    assert said, "something was told"
    assert len({event["id"] for event in found}) == len(found)
