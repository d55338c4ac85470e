"""T 3.4.3: 12 threads sign while one member fails in every way that a member can; no call raises or stalls."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hagroup import KeyType, Mechanism
from tests.support.faulty import BOUND, ONE_HANG, FaultGroup, Load, engine, fault_group
from tests.support.groups import wait_until

VICTIM = "hsm2"


@pytest.fixture(scope="module")
def faulty(fast_folder: Path) -> FaultGroup:
    return fault_group(fast_folder)


@pytest.fixture(scope="module", params=["process", "none"])
def client(faulty: FaultGroup, request: pytest.FixtureRequest) -> Iterator[Any]:
    with faulty.client(request.param) as session:
        public, private = session.generate_keypair(KeyType.RSA, 2048, store=True, label=f"signer {request.param}")
        faulty.wait_serving(session)
        yield session, public, private, request.param
        faulty.heal(session)
        private.destroy()
        public.destroy()


def killed(faulty: FaultGroup) -> None:
    faulty.group.workers()[VICTIM].send_signal(signal.SIGKILL)


def stopped(faulty: FaultGroup) -> None:
    faulty.group.workers()[VICTIM].send_signal(signal.SIGSTOP)


def hangs(faulty: FaultGroup) -> None:
    faulty.controls[VICTIM].add("C_Sign", "hang")


def device_error(faulty: FaultGroup) -> None:
    faulty.controls[VICTIM].add("C_Sign", "error", rv="CKR_DEVICE_ERROR")


def absent(faulty: FaultGroup) -> None:
    faulty.controls[VICTIM].add("all", "absent")


def crashes(faulty: FaultGroup) -> None:
    faulty.controls[VICTIM].add("C_Sign", "crash")


@pytest.mark.parametrize("fault", [killed, stopped, hangs, device_error, absent, crashes])
def test_a_member_fails_under_load(faulty: FaultGroup, client: Any, fault: Callable[[FaultGroup], None]) -> None:
    session, _, private, isolation = client
    if isolation == "none" and fault not in (device_error, absent):
        return  # a library in this process can neither be cut off nor survive its crash (G5)
    control = faulty.controls[VICTIM]
    expected = private.sign(b"data", mechanism=Mechanism.SHA256_RSA_PKCS)

    def sign(_: int) -> None:
        assert private.sign(b"data", mechanism=Mechanism.SHA256_RSA_PKCS) == expected

    with Load(sign) as load:
        load.wait_for(100)
        worker = faulty.group.workers().get(VICTIM)
        before = control.counts()["C_Sign"]
        assert before, "the member that is to fail takes part"
        since = time.monotonic()
        fault(faulty)
        load.wait_for(300)
        wait_until(lambda: load.done() and time.monotonic() > since + 2.5, "a while with the fault")
        assert not load.errors
        assert load.longest_silence(since) < ONE_HANG
        during = load.done()
        faulty.clear()
        control.reset()
        wait_until(lambda: control.counts().get("C_Sign", 0) > 20, f"{VICTIM} signs again")
    assert not load.errors, load.errors[0]
    assert during > 300
    assert load.longest() < (ONE_HANG if fault is not stopped else BOUND)
    faulty.wait_serving(session)
    if fault in (killed, stopped, crashes):
        assert worker is not None
        assert faulty.group.workers()[VICTIM].pid != worker.pid
    assert engine(session).journal.owed() == []
