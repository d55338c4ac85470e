"""PINs: who may try one, where, and what a refusal means (DESIGN.md 4.7, G10).

A wrong PIN costs one attempt on one member, and nothing is ever retried automatically with a refused PIN. Every
C_Login is announced durably before it is made, so that a process that dies in the middle is not followed by another
one's second attempt.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable

import msgspec

from hagroup.config.logging import get_logger
from hagroup.config.model import MemberConfig
from hagroup.config.pins import Pin, pin_source_identity, pin_source_stamp, read_pin_stamped
from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.core.records import LoginRecord, LoginState
from hagroup.engine.member import Life, Member
from hagroup.errors import ConfigurationError, HAError, JournalOutcomeUnknown
from hagroup.journal.api import Journal

log = get_logger(__name__)

CKU_SO, CKU_USER = 0, 1
USER_PIN_COUNT_LOW, USER_PIN_FINAL_TRY, USER_PIN_LOCKED = 0x10000, 0x20000, 0x40000
PIN_ERRORS = frozenset({CKR.PIN_INCORRECT, CKR.PIN_LOCKED, CKR.PIN_EXPIRED, CKR.PIN_INVALID, CKR.PIN_LEN_RANGE})
APPLICATION = "application"


class LoginHeld(HAError):
    """No PIN was tried on this member, and the group has not judged it: it is out of use for this process until what
    the text names was put right, which then needs nothing else."""


class _Held(msgspec.Struct, frozen=True):
    """A PIN that a member accepted."""

    pin: Pin
    stamp: str = ""
    """Of the member's PIN source at that time; with ``changed``: when the PIN was changed."""
    changed: bool = False
    """It came by a PIN change through this process: the source is behind it."""


class PinStore:
    """The PINs that this process holds in memory: per member from its source, and the application's.

    :param keep: False for ``recovery_mode = "basic"``: nothing is held, each login needs the PIN anew.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._application: Pin | None = None
        self._by_member: dict[str, _Held] = {}

    def renew_after_fork(self) -> None:
        self._lock = threading.Lock()

    def for_member(self, config: MemberConfig) -> tuple[Pin, str, str] | None:
        """(PIN, source, stamp) to log in with on this member; None where there is none yet."""
        with self._lock:
            held = self._by_member.get(config.name)
            application = self._application
        if config.pin is not None:
            if held is not None and held.changed and held.stamp == pin_source_stamp(config.pin):
                return held.pin, APPLICATION, ""
            pin, stamp = read_pin_stamped(config.pin)
            return pin, pin_source_identity(config.pin), stamp
        if held is not None:
            return held.pin, APPLICATION, ""
        if application is not None:
            return application, APPLICATION, ""
        return None

    def accepted(self, member: str, pin: Pin, *, application: bool) -> None:
        if not self._keep:
            return
        with self._lock:
            held = self._by_member.get(member)
            if held is None or not held.changed or held.pin != pin:
                self._by_member[member] = _Held(pin)
            if application:
                self._application = pin

    def accepted_before(self, member: str, pin: Pin) -> bool:
        """Whether this member accepted this PIN in this process: if it refuses it now, the PIN was changed."""
        with self._lock:
            held = self._by_member.get(member)
            return held is not None and held.pin == pin

    def known(self, pin: Pin) -> bool | None:
        """Whether some member accepted this very PIN; None when no member accepted any yet."""
        with self._lock:
            if not self._by_member:
                return None
            return any(pin == held.pin for held in self._by_member.values())

    def differs(self, member: str, pin: Pin) -> bool:
        """Whether this member is known to have another PIN."""
        with self._lock:
            held = self._by_member.get(member)
            return held is not None and held.pin != pin

    def replace_all(self, pin: Pin, members: Iterable[MemberConfig]) -> None:
        """After a PIN change on every member. Until a member's source is changed too, this PIN goes before it."""
        if not self._keep:
            return
        with self._lock:
            for member in members:
                stamp = "" if member.pin is None else pin_source_stamp(member.pin)
                self._by_member[member.name] = _Held(pin, stamp, changed=True)
            self._application = pin

    def forget(self) -> None:
        """What is held may not be right any more: no member is logged in with it, nothing compared with it."""
        with self._lock:
            self._application = None
            self._by_member.clear()


def last_logins(journal: Journal) -> dict[str, float]:
    """When (boot time) each member was last logged in to. A refusal counts where the application's PIN was refused: so
    wrong PINs, even of programs that are started again and again, all go to one member."""
    when: dict[str, float] = {}
    for record in journal.logins():
        if record.state is LoginState.ACCEPTED or record.source == APPLICATION:
            when[record.member] = max(record.boot_time, when.get(record.member, 0.0))
    return when


def log_in(
    journal: Journal,
    member: Member,
    life: Life,
    pin: Pin,
    source: str,
    stamp: str,
    *,
    automatic: bool,
    timeout: float,
) -> None:
    """C_Login(CKU_USER) on one member, announced in the journal.

    :param automatic: the PIN was not given in this very call: it waits while the token remembers failed logins.
    :raises LoginHeld: it must not be tried: refused before, or the token's counter is low.
    :raises Ckr: what the member answered (``PIN_*``: recorded as refused).
    """
    flags = life.connection.token_info(timeout=timeout).flags
    if flags & USER_PIN_LOCKED:
        raise _held(member, pin_trouble(flags) or "") if automatic else Ckr(CKR.PIN_LOCKED, "C_Login")
    if automatic and (trouble := pin_trouble(flags)):
        raise _held(member, trouble)
    if source == APPLICATION:
        stamp = f"{os.getpid()}-{time.monotonic_ns()}"  # a person's (or application's) own attempt is always a new one
    clear = not flags & (USER_PIN_COUNT_LOW | USER_PIN_FINAL_TRY)
    if member.unreported_login is not None:
        _report(journal, member, member.unreported_login[0])
    try:
        _announce(journal, member, source, stamp, clear=clear, timeout=timeout)
    except BaseException as error:
        if isinstance(error, JournalOutcomeUnknown) or not isinstance(error, HAError):
            member.unreported_login = (None,)  # it may be written down, and nobody will try that PIN now
        raise
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
        _report(journal, member, state)
    life.logged_in = True


def _report(journal: Journal, member: Member, state: LoginState | None) -> None:
    """How the announced attempt ended. Where the journal cannot be written it is said before the next one: until then
    the attempt counts as under way, and this process lives."""
    member.unreported_login = (state,)
    journal.end_login(member.name, state)
    member.unreported_login = None


def _announce(journal: Journal, member: Member, source: str, stamp: str, *, clear: bool, timeout: float) -> None:
    def attempt() -> LoginRecord | None:
        return journal.begin_login(member.name, source, stamp, clear=clear)

    def somebody_is_trying(record: LoginRecord | None) -> bool:
        return record is not None and record.state is LoginState.TRYING and journal.owner_alive(record.owner)

    refusal = attempt()
    if somebody_is_trying(refusal):
        # Loaded where it is needed, which is seldom: it would be a twentieth of every program's start.
        from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_fixed

        patience, pause = stop_after_delay(timeout), wait_fixed(0.01)
        try:
            refusal = Retrying(retry=retry_if_result(somebody_is_trying), wait=pause, stop=patience)(attempt)
        except RetryError as error:
            raise _held(member, "another process is logging in there and does not come to an end") from error
    if refusal is not None:
        where = "" if refusal.member == member.name else f" by {refusal.member}"
        raise _held(
            member,
            f"the PIN from {refusal.source} was refused before{where} and did not change since: correct "
            f"it, or run `ha-admin member resume {refusal.member}` if it is right",
        )


def record_stale(journal: Journal, member: MemberConfig, new: Pin) -> str | None:
    """After a PIN change: the member's source counts as refused before anybody tries it, until it changes.

    :returns: what names the source; None where there is none, or it gives the new PIN already.
    """
    if member.pin is None:
        return None
    try:
        pin, stamp = read_pin_stamped(member.pin)
    except ConfigurationError:
        return pin_source_identity(member.pin)
    if pin == new:
        journal.forget_login(member.name)  # it was refused, or counted so, while the PIN was another one
        return None
    if journal.begin_login(member.name, pin_source_identity(member.pin), stamp, clear=True) is None:
        journal.end_login(member.name, LoginState.REFUSED)
    return pin_source_identity(member.pin)


def pin_trouble(flags: int) -> str | None:
    """Why nobody logs in automatically while the token has these flags; None: all is well."""
    if flags & USER_PIN_LOCKED:
        return "its user PIN is locked (USER_PIN_LOCKED): its SO has to set a new one"
    for flag, name in ((USER_PIN_FINAL_TRY, "USER_PIN_FINAL_TRY"), (USER_PIN_COUNT_LOW, "USER_PIN_COUNT_LOW")):
        if flags & flag:
            return (
                f"its token remembers a failed login ({name}), so no PIN is tried automatically: log in there once "
                "with the right one"
            )
    return None


def _held(member: Member, why: str) -> LoginHeld:
    return LoginHeld(f'member "{member.name}": not logged in: {why}')
