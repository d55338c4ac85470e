"""PINs: who may try one, where, and what a refusal means (DESIGN.md 4.7, G10).

A wrong PIN costs one attempt on one member, and nothing is ever retried automatically with a refused PIN. Every
C_Login is announced durably before it is made, so that a process that dies in the middle is not followed by another
one's second attempt.
"""

from __future__ import annotations

import os
import threading
import time

from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_fixed

from hagroup.config.logging import get_logger
from hagroup.config.model import MemberConfig
from hagroup.config.pins import Pin, pin_source_identity, read_pin_stamped
from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.core.records import LoginRecord, LoginState
from hagroup.engine.member import Life, Member
from hagroup.errors import MemberQuarantined
from hagroup.journal.api import Journal

log = get_logger(__name__)

CKU_SO, CKU_USER = 0, 1
USER_PIN_COUNT_LOW, USER_PIN_FINAL_TRY, USER_PIN_LOCKED = 0x10000, 0x20000, 0x40000
PIN_ERRORS = frozenset({CKR.PIN_INCORRECT, CKR.PIN_LOCKED, CKR.PIN_EXPIRED, CKR.PIN_INVALID, CKR.PIN_LEN_RANGE})
APPLICATION = "application"


class PinStore:
    """The PINs that this process holds in memory: per member from its source, and the application's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._application: Pin | None = None
        self._by_member: dict[str, Pin] = {}

    def for_member(self, config: MemberConfig) -> tuple[Pin, str, str] | None:
        """(PIN, source, stamp) to log in with on this member; None where there is none yet."""
        if config.pin is not None:
            pin, stamp = read_pin_stamped(config.pin)
            return pin, pin_source_identity(config.pin), stamp
        if self._application is not None:
            return self._application, APPLICATION, ""
        return None

    def accepted(self, member: str, pin: Pin, *, application: bool) -> None:
        with self._lock:
            self._by_member[member] = pin
            if application:
                self._application = pin

    def known(self, pin: Pin) -> bool | None:
        """Whether some member accepted this very PIN; None when no member accepted any yet."""
        with self._lock:
            if not self._by_member:
                return None
            return any(pin == other for other in self._by_member.values())

    def replace_all(self, pin: Pin) -> None:
        """After a PIN change on every member."""
        with self._lock:
            self._by_member = dict.fromkeys(self._by_member, pin)
            self._application = pin

    def forget_application(self) -> None:
        """``recovery_mode = "basic"``: the PIN is not kept."""
        with self._lock:
            self._application = None


def log_in(journal: Journal, member: Member, life: Life, pin: Pin, source: str, stamp: str, *, timeout: float) -> None:
    """C_Login(CKU_USER) on one member, announced in the journal.

    :raises MemberQuarantined: it must not be tried: refused before, or the token's counter is low.
    :raises Ckr: what the member answered (``PIN_*``: recorded as refused).
    """
    automatic = source != APPLICATION
    flags = life.connection.token_info(timeout=timeout).flags
    if flags & USER_PIN_LOCKED:
        raise Ckr(CKR.PIN_LOCKED, "C_Login") if not automatic else _held(member, "its user PIN is locked")
    if automatic and flags & (USER_PIN_COUNT_LOW | USER_PIN_FINAL_TRY):
        raise _held(member, "its token reports a failed login (USER_PIN_COUNT_LOW), so no PIN is tried automatically")
    if not automatic:
        stamp = f"{os.getpid()}-{time.monotonic_ns()}"  # a person's (or application's) own attempt is always a new one
    clear = not flags & (USER_PIN_COUNT_LOW | USER_PIN_FINAL_TRY)
    _announce(journal, member, source, stamp, clear=clear, timeout=timeout)
    state: LoginState | None = None
    try:
        life.connection.login(CKU_USER, pin.reveal(), timeout=timeout)
        state = LoginState.ACCEPTED
    except Ckr as error:
        if error.rv == CKR.USER_ALREADY_LOGGED_IN:
            state = LoginState.ACCEPTED
        elif error.rv in PIN_ERRORS:
            state = LoginState.REFUSED
            raise
        else:
            raise
    finally:
        journal.end_login(member.name, state)
    life.logged_in = True


def _announce(journal: Journal, member: Member, source: str, stamp: str, *, clear: bool, timeout: float) -> None:
    def attempt() -> LoginRecord | None:
        return journal.begin_login(member.name, source, stamp, clear=clear)

    def somebody_is_trying(record: LoginRecord | None) -> bool:
        return record is not None and record.state is LoginState.TRYING and journal.owner_alive(record.owner)

    waiting = Retrying(
        retry=retry_if_result(somebody_is_trying), wait=wait_fixed(0.01), stop=stop_after_delay(timeout), reraise=False
    )
    try:
        refusal = waiting(attempt)
    except RetryError as error:
        raise _held(member, "another process is logging in there and does not come to an end") from error
    if refusal is not None:
        raise _held(member, f"its PIN from {refusal.source} was refused before and has not changed since")


def _held(member: Member, why: str) -> MemberQuarantined:
    return MemberQuarantined(
        f'member "{member.name}": not logged in: {why}; correct it, then run `ha-admin member resume {member.name}`'
    )
