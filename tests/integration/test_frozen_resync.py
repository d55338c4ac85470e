"""A process is frozen while it brings a member up to date: another one takes over once its lease has run out, and what
it still does when it wakes counts for nothing (issue 3; DESIGN.md 4.1, 4.6)."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hagroup.core.records import Membership
from hagroup.journal import SqliteJournal
from tests.support.clients import clients, everywhere
from tests.support.groups import make_group, run_client, wait_until

LEASE = 2.0
_RESYNCS = f"""
import signal, sys, threading
from hagroup import bootstrap
from hagroup.engine import replicate, resync
from hagroup.journal import SqliteJournal
from tests.support.clients import Client
from tests.support.groups import GroupFixture
from pathlib import Path

resync.LEASE = {LEASE}
install = replicate.replica.install
claims = []

def freeze():
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread goes no further

def freezes(connection, *arguments, **options):
    if sys.argv[2] == "before" and not claims:
        claims.append(True)
        freeze()
    result = install(connection, *arguments, **options)
    if sys.argv[2] == "after" and not claims:
        claims.append(True)
        freeze()
    return result

replicate.replica.install = freezes
confirm = SqliteJournal.confirm

def confirms(self, said, **options):
    try:
        accepted = confirm(self, said, **options)
    except Exception as error:
        accepted = type(error).__name__
        raise
    finally:
        print("confirmed", [one.member for one in said], accepted, flush=True)
    return accepted

SqliteJournal.confirm = confirms
client = Client(GroupFixture(Path(sys.argv[1])))
client.wait_serving()
client.sync()
print("whole", flush=True)
sys.stdin.readline()
client.close()
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_frozen_resyncer_is_succeeded_and_its_late_writes_are_refused(fast_folder: Path, when: str) -> None:
    group = make_group(fast_folder / f"frozen_{when}")
    group.take_away("hsm3")
    labels = [f"key {number}" for number in range(4)]
    run_client(
        group, "".join(f"session.generate_key(KeyType.AES, 256, store=True, label={label!r})\n" for label in labels)
    )
    group.bring_back("hsm3")
    journal = SqliteJournal.open(group.folder / "journal.db")
    journal.update_member("hsm3", membership=Membership.OUT_OF_SYNC, reason="it is looked at")
    journal.close()
    command = [sys.executable, "-c", _RESYNCS, str(group.toml), when]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as frozen:
        try:
            wait_until(lambda: _is_stopped(frozen.pid), "the process that resyncs is frozen")
            with clients(group, 1) as (other,):  # waits until all members are in service
                assert frozen.poll() is None and _is_stopped(frozen.pid)
                admitted = {
                    member.name for member in other.journal.members() if member.membership is Membership.ADMITTED
                }
                assert admitted == set(group.members)
                frozen.send_signal(signal.SIGCONT)
                assert frozen.stdin is not None and frozen.stdout is not None
                said = []
                for line in frozen.stdout:
                    said.append(line.strip())
                    if line == "whole\n":
                        break
                assert said[-1:] == ["whole"], said
                late = [line for line in said if "hsm3" in line]
                first = next(line for line in late if "StaleMembership" not in line)  # then it looks again
                assert first == "confirmed ['hsm3'] LeaseLost", said
                other.sync()
                everywhere(group, *labels)
        finally:
            frozen.kill()


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
