"""T 3.4.3: 12 threads sign while one member fails in every way that a member can; no call raises or stalls."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hagroup import KeyType, Mechanism
from tests.support.faulty import BOUND, CALL, ONE_HANG, FaultGroup, Load, fault_group
from tests.support.groups import wait_until

VICTIM = "hsm2"
THREADS = 12


@pytest.fixture(scope="module")
def faulty(fast_folder: Path) -> FaultGroup:
    return fault_group(fast_folder)


@pytest.fixture(scope="module")
def clients(faulty: FaultGroup) -> Iterator[Callable[[str], tuple[Any, Any]]]:
    """By isolation: a session and the private key that it signs with."""
    opened: dict[str, tuple[Any, Any]] = {}
    with ExitStack() as stack:

        def client(isolation: str) -> tuple[Any, Any]:
            if isolation not in opened:
                session = stack.enter_context(faulty.client(isolation))
                label = f"signer {isolation}"
                public, private = session.generate_keypair(KeyType.RSA, 2048, store=True, label=label)
                stack.callback(public.destroy)
                stack.callback(private.destroy)
                faulty.heal(session)
                opened[isolation] = session, private
            return opened[isolation]

        yield client


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


@pytest.mark.parametrize(
    ("fault", "isolation"),
    [
        (killed, "process"),
        (stopped, "process"),
        (hangs, "process"),
        (device_error, "process"),
        (absent, "process"),
        (crashes, "process"),
        (device_error, "none"),  # what hangs or crashes in the caller's own process cannot be cut off (G5)
    ],
)
def test_a_member_fails_under_load(
    faulty: FaultGroup,
    clients: Callable[[str], tuple[Any, Any]],
    fault: Callable[[FaultGroup], None],
    isolation: str,
) -> None:
    session, private = clients(isolation)
    control = faulty.controls[VICTIM]
    expected = private.sign(b"data", mechanism=Mechanism.SHA256_RSA_PKCS)

    def sign(_: int) -> None:
        assert private.sign(b"data", mechanism=Mechanism.SHA256_RSA_PKCS) == expected

    with Load(sign, THREADS) as load:
        load.wait_for(100)
        worker = faulty.group.workers().get(VICTIM)
        assert control.counts()["C_Sign"], "the member that is to fail takes part"
        since = time.monotonic()
        fault(faulty)
        load.wait_for(300)
        wait_until(lambda: load.errors or time.monotonic() > since + 2 * ONE_HANG, "a while with the fault")
        assert load.longest_silence(since) < ONE_HANG, "throughput goes on with the others"
        faulty.clear()
        control.reset()
        wait_until(lambda: load.errors or control.counts().get("C_Sign", 0) > 20, f"{VICTIM} signs again")
    assert not load.errors, load.errors[0]
    assert load.longest() < (BOUND if fault is stopped else ONE_HANG)
    assert sum(took > CALL for _, took in load.since(since)) <= THREADS, "at most one stall for each caller"
    faulty.heal(session)
    if fault in (killed, stopped, crashes):
        assert worker is not None
        assert faulty.group.workers()[VICTIM].pid != worker.pid, "started again in the background"
