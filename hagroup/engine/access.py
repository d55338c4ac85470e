"""Who is logged in on the virtual token, in this process (DESIGN.md 1.1), and PIN changes on all members (4.7)."""

from __future__ import annotations

import threading
from collections.abc import Callable

from hagroup.config.logging import get_logger
from hagroup.config.pins import Pin
from hagroup.core.calls import Ckr, DeadlinePassed
from hagroup.core.ckr import CKR
from hagroup.core.states import State
from hagroup.engine.login import APPLICATION, CKU_SO, CKU_USER, PIN_ERRORS, last_logins, log_in, record_stale
from hagroup.engine.member import Life, Member
from hagroup.engine.opening import CONNECTION_LOST, open_life
from hagroup.engine.roster import PIN_CHANGED, Roster
from hagroup.errors import DomainMismatch, GroupUnavailable, HAError, MemberQuarantined, NotOnGroup, OutcomeUnknown
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
        self.logouts = 0
        """How often somebody logged out: handles of private objects from before are invalid for good."""

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
            self._roster.heed_pin_changes()
            known = self._roster.pins.known(candidate)
            if known is None:
                known = self._wait_for_sources(candidate)
            if known is False:  # by those that came first: the others may know it
                self._roster.all_had_a_turn()
                known = self._roster.pins.known(candidate)
            if known is False and self._some_wait_for_a_pin():
                known = None  # the members that log in by themselves have another PIN than these
            if known is False:
                raise Ckr(CKR.PIN_INCORRECT, "C_Login")
            if known is None:
                self._check_on_one(candidate)
            self._log_in_the_others(candidate)
            self._who = CKU_USER
            self.user = True

    def _some_wait_for_a_pin(self) -> bool:
        return any(
            member.config.pin is None and (life := member.life) is not None and not life.logged_in
            for member in self._roster.members.values()
        )

    def _wait_for_sources(self, pin: Pin) -> bool | None:
        """Members with a PIN source of their own log in by themselves: compare with theirs, no attempt is made."""
        if all(member.config.pin is None for member in self._roster.members.values()):
            return None

        def settled() -> bool:
            return self._roster.pins.known(pin) is not None or not self._roster.may_come()

        self._wait(settled)
        return self._roster.pins.known(pin)

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Within the bound that a call has."""
        self._roster.wake()
        self._roster.wait_for_change(self._roster.config.timeouts.call * 2, condition)

    def _in_order(self) -> list[tuple[Member, Life]]:
        """Connected members, the one with the latest recorded success first; waits for that one, or for any. Those with
        a PIN source come last: it may give another PIN than the application's, which is for the members without one."""
        when = last_logins(self._roster.journal)
        members = sorted(
            self._roster.members.values(),
            key=lambda member: (member.config.pin is not None, -when.get(member.name, 0.0)),
        )

        def ready() -> bool:
            for member in members:
                if member.life is not None:
                    return True
                if self._roster.may_come(member):
                    return False
            return True

        self._wait(ready)
        return [(member, life) for member in members if (life := member.life) is not None]

    def _check_on_one(self, pin: Pin) -> None:
        """C_Login on one member. Refused: the application's error, and no other member is touched."""
        why: list[str] = []
        locked: Ckr | None = None
        for member, life in self._in_order():
            try:
                if life.logged_in:
                    self._prove(member, pin)
                else:
                    self._roster.log_in_first(member, life, pin)
                return
            except Ckr as error:
                if error.rv == CKR.PIN_LOCKED:  # it says nothing of this PIN: the others decide
                    locked = error
                elif error.rv in PIN_ERRORS:
                    raise
                else:
                    self._roster.lost(member, life, str(error))
                why.append(f"{member.name}: {error}")
            except HAError as error:
                why.append(f"{member.name}: {error}")
            except (DeadlinePassed, *CONNECTION_LOST) as error:
                self._roster.lost(member, life, str(error))
                why.append(f"{member.name}: {error}")
        if locked is not None:
            raise locked
        why += [
            f"{member.name}: {member.reason or 'not connected'}"
            for member in self._roster.members.values()
            if member.life is None
        ]
        raise GroupUnavailable("no member could check the PIN: " + "; ".join(why))

    def _prove(self, member: Member, pin: Pin) -> None:
        """C_Login in a module instance of its own: where this process is logged in, a second C_Login says nothing.

        :raises Ckr: ``PIN_*`` and whatever else the member answered.
        :raises HAError: the member could not be asked.
        """
        timeout = self._roster.config.timeouts.call
        try:
            life = self._own_life(member)
        except (DeadlinePassed, ModuleProblem, *CONNECTION_LOST) as error:
            raise GroupUnavailable(f"{member.name} could not check the PIN: {error}") from error
        try:
            log_in(self._roster.journal, member, life, pin, APPLICATION, "", automatic=False, timeout=timeout)
        except (DeadlinePassed, *CONNECTION_LOST) as error:
            raise GroupUnavailable(f"{member.name} could not check the PIN: {error}") from error
        finally:
            life.connection.kill()
        self._roster.pins.accepted(member.name, pin, application=member.config.pin is None)

    def _log_in_the_others(self, pin: Pin) -> None:
        if self._roster.config.group.recovery_mode == "basic":  # who comes later finds no PIN
            self._wait(lambda: not self._roster.may_come())
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
        except (Ckr, DeadlinePassed, HAError, *CONNECTION_LOST) as error:
            self._roster.lost(member, life, str(error))

    def logout(self) -> None:
        """The virtual token is public again. Members stay logged in; nothing private is shown or used."""
        with self._lock:
            if self._who is None:
                raise Ckr(CKR.USER_NOT_LOGGED_IN, "C_Logout")
            self._end_so()
            self._who = None
            self.user = False
            self.logouts += 1
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

    def _own_life(self, member: Member) -> Life:
        """A module instance beside the one that operations use."""
        record = self._roster.view.members[member.name]
        timeout = self._roster.config.timeouts.call
        return open_life(member.config, self._roster.journal, generation=1, timeout=timeout, serial=record.serial)

    def _so_life(self, member: Member, pin: Pin) -> Life:
        timeout = self._roster.config.timeouts.call
        life = self._own_life(member)
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
        """Every member that the journal lists, whatever its role."""
        found, away = [], []
        for name in self._roster.view.members:
            member = self._roster.members.get(name)
            if member is not None and member.state is State.IN_SERVICE and member.life is not None:
                found.append((member, member.life))
            else:
                away.append(name)
        if away:
            raise NotOnGroup(
                f"{what} needs every member in service, or the PINs would differ; not in service: {', '.join(away)}; "
                "nothing was changed"
            )
        return found

    def set_pin(self, old: bytes, new: bytes) -> None:
        """Change the logged-in user's PIN on every member, after the old one was proved on every member."""
        with self._lock:
            if self._who == CKU_SO:
                raise NotOnGroup("the SO PIN is changed on each member by its own tools, not through the group")
            if self._who is None:
                raise Ckr(CKR.USER_NOT_LOGGED_IN, "C_SetPIN")
            self._roster.heed_pin_changes()
            if self._roster.pins.known(Pin(old)) is False:
                raise Ckr(CKR.PIN_INCORRECT, "C_SetPIN")
            members = self._all_in_service("C_SetPIN")
            self._check_length(members, new, "C_SetPIN")
            self._prove_old(members, Pin(old))
            timeout = self._roster.config.timeouts.generate
            self._change(members, new, lambda _, life: life.connection.set_pin(old, new, timeout=timeout), "C_SetPIN")

    def _prove_old(self, members: list[tuple[Member, Life]], old: Pin) -> None:
        """A wrong one is found on the first member; a member that is known to have another one is not tried."""
        others = [member.name for member, _ in members if self._roster.pins.differs(member.name, old)]
        if others:
            raise NotOnGroup(
                f"C_SetPIN gives all members one PIN, but now {', '.join(others)} has another one than the one given; "
                "nothing was changed"
            )
        for number, (member, _) in enumerate(members):
            try:
                self._prove(member, old)
            except Ckr as error:
                if number == 0 or error.rv not in PIN_ERRORS:
                    raise
                raise NotOnGroup(
                    f"C_SetPIN gives all members one PIN, but {member.name} has another one now; nothing was changed"
                ) from error

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
                    officers[life.token.serial] = self._another_officer(member, self._so_pin)
            timeout = self._roster.config.timeouts.generate
            self._change(
                members,
                pin,
                lambda _, life: officers[life.token.serial].connection.init_pin(pin, timeout=timeout),
                "C_InitPIN",
            )

    def _another_officer(self, member: Member, pin: Pin) -> Life:
        try:
            officer = self._so_life(member, pin)
        except (Ckr, DeadlinePassed, ModuleProblem, *CONNECTION_LOST) as error:
            raise NotOnGroup(
                f"C_InitPIN needs the SO on every member, and {member.name} did not let it in ({error}); nothing was "
                "changed"
            ) from error
        self._so.append(officer)
        return officer

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
        journal = self._roster.journal
        journal.event("pin change begins", f"{function} on {len(members)} members")
        changed: list[Member] = []
        for member, life in members:
            try:
                change(member, life)
                changed.append(member)
            except Ckr as error:
                if not changed:  # the first one asked answered no: nothing was changed anywhere
                    raise
                self._roster.quarantine(
                    member, f"{function} failed on it and not on others, its PIN may differ: {error}"
                )
            except (DeadlinePassed, *CONNECTION_LOST) as error:
                self._roster.lost(member, life, str(error))
                self._roster.quarantine(member, f"{function} had no answer, its PIN may be the old or the new: {error}")
        if not changed:
            raise OutcomeUnknown(f"no member answered {function}: look at each member's PIN; all are quarantined")
        self._roster.pins.replace_all(Pin(new), [member.config for member in changed])
        text = f"{function} on {len(changed)} of {len(members)} members"
        journal.event(PIN_CHANGED, text, data={"owner": journal.owner})
        stale = [source for member in changed if (source := record_stale(journal, member.config, Pin(new))) is not None]
        if stale:
            log.warning("pin.sources-stale", sources=stale, remedy="put the new PIN into them")
