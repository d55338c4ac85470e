"""Observations, logins and events in a SQLite journal: what processes tell each other besides changes of objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from hagroup.core.records import Event, Lease, LoginRecord, LoginState, Observation, Seal
from hagroup.journal import rows
from hagroup.journal.opened import Opened
from hagroup.journal.rules import login_refused
from hagroup.journal.transaction import Transaction

_LOGIN = "member, source, stamp, state, owner, boot_time"
_before = msgspec.msgpack.Decoder(LoginRecord | None).decode
_data = msgspec.msgpack.Decoder(dict[str, str]).decode


class Notes(Opened):
    """The part of :class:`SqliteJournal` about what was seen, tried and done."""

    # -- observations --------------------------------------------------------------------------------------------

    def observe(self, observations: Sequence[Observation]) -> None:
        with self._write() as t:
            for seen in observations:
                kept = t.sql.execute(
                    "SELECT ok, boot_time FROM observations WHERE member = ? AND observer = ?",
                    (seen.member, seen.observer),
                ).fetchone()
                if kept is not None and kept[1] > seen.boot_time:
                    continue
                t.sql.execute(
                    "INSERT OR REPLACE INTO observations VALUES (?, ?, ?, ?, ?, ?)",
                    (seen.member, seen.observer, seen.site, seen.ok, seen.kind, seen.boot_time),
                )
                if kept is None or bool(kept[0]) != seen.ok:
                    t.notice()

    def observations(self, member: str | None = None) -> list[Observation]:
        where, values = ("1", ()) if member is None else ("member = ?", (member,))
        found = self._read(
            lambda connection: connection.execute(
                "SELECT member, observer, site, ok, kind, boot_time FROM observations "
                f"WHERE {where} ORDER BY boot_time",
                values,
            ).fetchall()
        )
        return [
            Observation(member=m, observer=observer, site=site, ok=bool(ok), kind=kind, boot_time=boot_time)
            for m, observer, site, ok, kind, boot_time in found
        ]

    # -- logins --------------------------------------------------------------------------------------------------

    def begin_login(self, member: str, source: str, stamp: str, *, clear: bool) -> LoginRecord | None:
        with self._write() as t:
            trying = _trying(t, member)
            if trying is not None:
                record = trying[0]
                if t.alive(record.owner):
                    return record
                # It died in between: nobody knows whether its PIN was refused, unless the token does.
                _end(t, trying, None if clear else LoginState.REFUSED)
            kept = _login(t, member, source)
            found = t.sql.execute(f"SELECT {_LOGIN} FROM logins WHERE source = ? AND stamp = ?", (source, stamp))
            refusal = login_refused(member, source, stamp, [_to_login(row) for row in found], t.alive)
            if refusal is not None:
                return refusal
            t.sql.execute(
                "INSERT OR REPLACE INTO logins VALUES (?, ?, ?, ?, ?, ?, ?)",
                (member, source, stamp, LoginState.TRYING.value, self.owner, t.now, rows.encode(kept)),
            )
        return None

    def end_login(self, member: str, state: LoginState | None) -> None:
        with self._write() as t:
            trying = _trying(t, member)
            if trying is not None and trying[0].owner == self.owner:
                _end(t, trying, state)

    def logins(self) -> list[LoginRecord]:
        statement = f"SELECT {_LOGIN} FROM logins ORDER BY member, source"
        return [_to_login(row) for row in self._read(lambda connection: connection.execute(statement).fetchall())]

    def forget_login(self, member: str) -> None:
        with self._write() as t:
            trying = _trying(t, member)
            kept = trying[0].source if trying is not None and t.alive(trying[0].owner) else None
            t.sql.execute("DELETE FROM logins WHERE member = ? AND source IS NOT ?", (member, kept))

    # -- events --------------------------------------------------------------------------------------------------

    def event(self, kind: str, text: str, *, member: str | None = None, data: Mapping[str, str] | None = None) -> None:
        with self._write() as t:
            t.sql.execute(
                "INSERT INTO events (time, kind, member, text, data) VALUES (?, ?, ?, ?, ?)",
                (t.wall, kind, member, text, rows.encode(dict(data or {}))),
            )

    def put_seal(self, seal: Seal, *, lease: Lease) -> None:
        with self._write() as t:
            t.expect_lease(lease)
            before = self._group(t.sql).seal
            if before is not None and before.number > seal.number:
                raise ValueError(f"the events up to {before.number} are sealed already")
            t.sql.execute("INSERT OR REPLACE INTO seal VALUES (1, ?)", (rows.encode(seal),))
            t.touch_members()

    def events(self, *, limit: int = 100, since: int = 0) -> list[Event]:
        statement = "SELECT * FROM events WHERE number > ? ORDER BY number DESC LIMIT ?"
        found = self._read(lambda connection: connection.execute(statement, (since, limit)).fetchall())
        return [
            Event(number=number, time=time, kind=kind, member=member, text=text, data=_data(data))
            for number, time, kind, member, text, data in reversed(found)
        ]


def _to_login(row: rows.Row) -> LoginRecord:
    member, source, stamp, state, owner, boot_time = row
    return LoginRecord(
        member=member, source=source, stamp=stamp, state=LoginState(state), owner=owner, boot_time=boot_time
    )


def _login(t: Transaction, member: str, source: str) -> LoginRecord | None:
    found = t.sql.execute(f"SELECT {_LOGIN} FROM logins WHERE member = ? AND source = ?", (member, source)).fetchone()
    return None if found is None else _to_login(found)


def _trying(t: Transaction, member: str) -> tuple[LoginRecord, LoginRecord | None] | None:
    """The attempt that is under way on a member (one at a time, over all sources), and what was known before it."""
    found = t.sql.execute(
        f"SELECT {_LOGIN}, before FROM logins WHERE member = ? AND state = 'trying'", (member,)
    ).fetchone()
    return None if found is None else (_to_login(found[:-1]), _before(found[-1]))


def _end(t: Transaction, trying: tuple[LoginRecord, LoginRecord | None], state: LoginState | None) -> None:
    record, before = trying
    after = before if state is None else msgspec.structs.replace(record, state=state, boot_time=t.now)
    t.sql.execute("DELETE FROM logins WHERE member = ? AND source = ?", (record.member, record.source))
    if after is not None:
        t.sql.execute(
            "INSERT INTO logins VALUES (?, ?, ?, ?, ?, ?, NULL)",
            (after.member, after.source, after.stamp, after.state.value, after.owner, after.boot_time),
        )
