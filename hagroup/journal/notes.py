"""Observations, logins and events, for every backend: what processes tell each other besides changes of objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from hagroup.core.records import Lease, LoginRecord, LoginState, Observation, Seal
from hagroup.journal.rules import login_refused
from hagroup.journal.transaction import Transaction, Trying, Writer, one_transaction


class Notes(Writer):
    """The part of a journal about what was seen, tried and done."""

    # -- observations --------------------------------------------------------------------------------------------

    @one_transaction
    def observe(self, observations: Sequence[Observation]) -> None:
        with self._write() as t:
            for seen in observations:
                kept = t.observation(seen.member, seen.observer)
                if kept is not None and kept.boot_time > seen.boot_time:
                    continue
                t.put_observation(seen)
                if kept is None or kept.ok != seen.ok:
                    t.notice()

    # -- logins --------------------------------------------------------------------------------------------------

    @one_transaction
    def begin_login(self, member: str, source: str, stamp: str, *, clear: bool) -> LoginRecord | None:
        with self._write() as t:
            trying = _trying(t, member)
            if trying is not None:
                record = trying[0]
                if t.alive(record.owner):
                    return record
                # It died in between: nobody knows whether its PIN was refused, unless the token does.
                _end(t, trying, None if clear else LoginState.REFUSED)
            known = [login for login, _ in t.logins()]
            refusal = login_refused(member, source, stamp, known, t.alive)
            if refusal is not None:
                return refusal
            kept = next((login for login in known if (login.member, login.source) == (member, source)), None)
            t.put_login(_login(t, member, source, stamp, LoginState.TRYING), kept)
        return None

    @one_transaction
    def end_login(self, member: str, state: LoginState | None) -> None:
        with self._write() as t:
            trying = _trying(t, member)
            if trying is not None and trying[0].owner == self.owner:
                _end(t, trying, state)

    @one_transaction
    def forget_login(self, member: str) -> None:
        with self._write() as t:
            trying = _trying(t, member)
            kept = trying[0].source if trying is not None and t.alive(trying[0].owner) else None
            for login, _ in t.logins():
                if login.member == member and login.source != kept:
                    t.drop_login(member, login.source)

    # -- events --------------------------------------------------------------------------------------------------

    @one_transaction
    def event(self, kind: str, text: str, *, member: str | None = None, data: Mapping[str, str] | None = None) -> None:
        with self._write() as t:
            t.add_event(kind, text, member, dict(data or {}))

    @one_transaction
    def put_seal(self, seal: Seal, *, lease: Lease) -> None:
        with self._write() as t:
            t.expect_lease(lease)
            before = t.group().seal
            if before is not None and before.number > seal.number:
                raise ValueError(f"the events up to {before.number} are sealed already")
            t.put_seal(seal)
            t.touch_members()


def _login(t: Transaction, member: str, source: str, stamp: str, state: LoginState) -> LoginRecord:
    return LoginRecord(member=member, source=source, stamp=stamp, state=state, owner=t.owner, boot_time=t.now)


def _trying(t: Transaction, member: str) -> Trying | None:
    """The attempt that is under way on a member (one at a time, over all sources), and what was known before it."""
    for login, before in t.logins():
        if login.member == member and login.state is LoginState.TRYING:
            return login, before
    return None


def _end(t: Transaction, trying: Trying, state: LoginState | None) -> None:
    record, before = trying
    after = before if state is None else replace(record, state=state, boot_time=t.now)
    t.drop_login(record.member, record.source)
    if after is not None:
        t.put_login(after)
