"""Who is logged in on the virtual token, in this process (DESIGN.md 1.1), and PIN changes on all members (4.7)."""

from __future__ import annotations

import threading
from collections.abc import Callable

from hagroup.config.logging import get_logger
from hagroup.config.pins import Pin, pin_source_identity
from hagroup.core.calls import Ckr, DeadlinePassed
from hagroup.core.ckr import CKR
from hagroup.core.records import LoginState
from hagroup.engine.login import APPLICATION, CKU_SO, CKU_USER, PIN_ERRORS
from hagroup.engine.member import Life, Member
from hagroup.engine.roster import CONNECTION_LOST, Roster, open_life
from hagroup.errors import DomainMismatch, GroupUnavailable, HAError, MemberQuarantined, NotOnGroup
from hagroup.members import ModuleProblem

log = get_logger(__name__)


class Access:
    """Login state of the virtual token. The members' own logins are made and kept apart from it."""

    def __init__(self, roster: Roster, on_logout: Callable[[], None]) -> None:
        self._roster = roster
        self._on_logout = on_logout
        self._lock = threading.RLock()
        self._who: int | None = None
        self._so: list[Life] = []
        self._so_pin: Pin | None = None
        self.user = False
        """The normal user is logged in: private objects show."""

    @property
    def who(self) -> int | None:
        return self._who

    def renew_after_fork(self) -> None:
        """The child keeps who is logged in (as a forked PKCS#11 application would after logging in again)."""
        self._lock = threading.RLock()
        self._so.clear()

    def _nobody_yet(self, user_type: int) -> None:
        if self._who == user_type:
            raise Ckr(CKR.USER_ALREADY_LOGGED_IN, "C_Login")
        if self._who is not None:
            raise Ckr(CKR.USER_ANOTHER_ALREADY_LOGGED_IN, "C_Login")

    # -- the normal user -----------------------------------------------------------------------------------
    def login(self, pin: bytes) -> None:
        """Check the PIN on one member (or against what this process logged in with), then use it on the others."""
        with self._lock:
            self._nobody_yet(CKU_USER)
            candidate = Pin(pin)
            known = self._roster.pins.known(candidate)
            if known is None:
                known = self._wait_for_sources(candidate)
            if known is False:
                raise Ckr(CKR.PIN_INCORRECT, "C_Login")
            if known is None:
                self._check_on_one(candidate)
            self._log_in_the_others(candidate)
            self._who = CKU_USER
            self.user = True

    def _wait_for_sources(self, pin: Pin) -> bool | None:
        """Members with a PIN source of their own log in by themselves: compare with theirs, no attempt is made."""
        if all(member.config.pin is None for member in self._roster.members.values()):
            return None
        self._roster.wake()

        def settled() -> bool:
            return self._roster.pins.known(pin) is not None or not self._roster.may_come()

        self._roster.wait_for_change(self._roster.config.timeouts.call * 2, settled)
        return self._roster.pins.known(pin)

    def _connected(self) -> list[tuple[Member, Life]]:
        """Members that are connected, the one with the latest recorded success first."""
        self._roster.wake()

        def somebody() -> bool:
            connected = any(member.life is not None for member in self._roster.members.values())
            return connected or not self._roster.may_come()

        self._roster.wait_for_change(self._roster.config.timeouts.call * 2, somebody)
        when = {
            record.member: record.boot_time
            for record in self._roster.journal.logins()
            if record.state is LoginState.ACCEPTED
        }
        found = [(member, member.life) for member in self._roster.members.values() if member.life is not None]
        return sorted(found, key=lambda item: -when.get(item[0].name, 0.0))

    def _check_on_one(self, pin: Pin) -> None:
        """C_Login on one member. Refused: the application's error, and no other member is touched."""
        why: list[str] = []
        for member, life in self._connected():
            try:
                self._roster.log_in_first(member, life, pin)
                return
            except Ckr as error:
                if error.rv in PIN_ERRORS:
                    raise
                self._roster.lost(member, life, str(error))
                why.append(f"{member.name}: {error}")
            except (DeadlinePassed, *CONNECTION_LOST) as error:
                self._roster.lost(member, life, str(error))
                why.append(f"{member.name}: {error}")
        raise GroupUnavailable("no member could check the PIN: " + ("; ".join(why) or "none is connected"))

    def _log_in_the_others(self, pin: Pin) -> None:
        waiting = [
            self._roster.submit(self._log_in_one, member, life, pin)
            for member in self._roster.members.values()
            if (life := member.life) is not None and not life.logged_in and member.config.pin is None
        ]
        for future in waiting:
            future.result()

    def _log_in_one(self, member: Member, life: Life, pin: Pin) -> None:
        try:
            self._roster.log_in(member, life, pin, APPLICATION, "")
        except (MemberQuarantined, DomainMismatch) as error:
            self._roster.quarantine(member, str(error))
        except (Ckr, DeadlinePassed, *CONNECTION_LOST) as error:
            self._roster.lost(member, life, str(error))

    def logout(self) -> None:
        """The virtual token is public again. Members stay logged in; nothing private is shown or used."""
        with self._lock:
            if self._who is None:
                raise Ckr(CKR.USER_NOT_LOGGED_IN, "C_Logout")
            self._end_so()
            self._who = None
            self.user = False
            if self._roster.config.group.recovery_mode == "basic":
                self._roster.pins.forget_application()
            self._on_logout()

    # -- the security officer ------------------------------------------------------------------------------
    def login_so(self, pin: bytes) -> None:
        """In a worker of its own: on a member it fails while user sessions are open."""
        with self._lock:
            self._nobody_yet(CKU_SO)
            candidate = Pin(pin)
            errors: list[str] = []
            for member in list(self._roster.members.values()):
                try:
                    self._so.append(self._so_life(member, candidate))
                    break
                except Ckr as error:
                    if error.rv in PIN_ERRORS:
                        raise
                    errors.append(f"{member.name}: {error}")
                except (DeadlinePassed, ModuleProblem, HAError, *CONNECTION_LOST) as error:
                    errors.append(f"{member.name}: {error}")
            if not self._so:
                raise GroupUnavailable("no member could check the SO PIN: " + "; ".join(errors))
            self._so_pin = candidate
            self._who = CKU_SO

    def _so_life(self, member: Member, pin: Pin) -> Life:
        record = self._roster.view.members[member.name]
        timeout = self._roster.config.timeouts.call
        life = open_life(member.config, self._roster.journal, generation=1, timeout=timeout, serial=record.serial)
        try:
            life.connection.login(CKU_SO, pin.reveal(), timeout=timeout)
        except BaseException:
            life.connection.kill()
            raise
        return life

    def _end_so(self) -> None:
        for life in self._so:
            life.connection.close()
        self._so.clear()
        self._so_pin = None

    # -- PIN changes ---------------------------------------------------------------------------------------
    def _all_in_service(self, what: str) -> list[tuple[Member, Life]]:
        everyone = list(self._roster.members.values())
        found = [(member, member.life) for member in everyone if member.serving and member.life is not None]
        if len(found) < len(everyone):
            away = ", ".join(member.name for member in everyone if not member.serving)
            raise NotOnGroup(f"{what} needs every member in service, or the PINs would differ; not in service: {away}")
        return found

    def set_pin(self, old: bytes, new: bytes) -> None:
        """Change the logged-in user's PIN on every member, after the old one was proved on every member."""
        with self._lock:
            if self._who == CKU_SO:
                raise NotOnGroup("the SO PIN is changed on each member by its own tools, not through the group")
            if self._who is None:
                raise Ckr(CKR.USER_NOT_LOGGED_IN, "C_SetPIN")
            if self._roster.pins.known(Pin(old)) is not True:
                raise Ckr(CKR.PIN_INCORRECT, "C_SetPIN")
            members = self._all_in_service("C_SetPIN")
            self._check_length(members, new, "C_SetPIN")
            timeout = self._roster.config.timeouts.generate
            self._change(members, new, lambda _, life: life.connection.set_pin(old, new, timeout=timeout), "C_SetPIN")

    def init_pin(self, pin: bytes) -> None:
        """The SO sets the user's PIN on every member, after the SO PIN was proved on every member."""
        with self._lock:
            if self._who != CKU_SO or self._so_pin is None:
                raise Ckr(CKR.USER_NOT_LOGGED_IN, "C_InitPIN")
            members = self._all_in_service("C_InitPIN")
            self._check_length(members, pin, "C_InitPIN")
            officers = {life.token.serial: life for life in self._so}
            for member, life in members:
                if life.token.serial not in officers:
                    officer = self._so_life(member, self._so_pin)
                    self._so.append(officer)
                    officers[life.token.serial] = officer
            timeout = self._roster.config.timeouts.generate
            self._change(
                members,
                pin,
                lambda _, life: officers[life.token.serial].connection.init_pin(pin, timeout=timeout),
                "C_InitPIN",
            )

    @staticmethod
    def _check_length(members: list[tuple[Member, Life]], pin: bytes, function: str) -> None:
        for _, life in members:
            if not life.token.min_pin_len <= len(pin) <= life.token.max_pin_len:
                raise Ckr(CKR.PIN_LEN_RANGE, function)

    def _change(
        self,
        members: list[tuple[Member, Life]],
        new: bytes,
        change: Callable[[Member, Life], None],
        function: str,
    ) -> None:
        changed = 0
        for member, life in members:
            try:
                change(member, life)
                changed += 1
            except Ckr as error:
                if not changed and error.rv in PIN_ERRORS:
                    raise
                self._roster.quarantine(
                    member, f"{function} failed on it and not on others, its PIN may differ: {error}"
                )
            except (DeadlinePassed, *CONNECTION_LOST) as error:
                self._roster.lost(member, life, str(error))
                self._roster.quarantine(member, f"{function} had no answer, its PIN may be the old or the new: {error}")
        self._roster.pins.replace_all(Pin(new))
        self._roster.journal.event("pin changed", f"{function} on {changed} of {len(members)} members")
        stale = [pin_source_identity(member.config.pin) for member, _ in members if member.config.pin is not None]
        if stale:
            log.warning("pin.sources-stale", sources=stale, remedy="put the new PIN into them")
