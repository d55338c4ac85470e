"""Members and leases in a SQLite journal."""

from __future__ import annotations

from msgspec.structs import replace

from hagroup.core.records import Lease, MemberRecord, Membership, OwedKind, OwedRow, Role
from hagroup.journal import rows
from hagroup.journal.api import LeaseLost, StaleMembership
from hagroup.journal.opened import Opened
from hagroup.journal.transaction import Transaction

_HINDERS_SHOWN = 1_000
"""A member that was just listed in a large group owes a million rows: all writers would wait until they were read."""


class Members(Opened):
    """The part of :class:`SqliteJournal` about the group and who is in it."""

    def add_member(self, member: MemberRecord) -> int:
        with self._write() as t:
            if t.member(member.name) is not None:
                raise ValueError(f'member "{member.name}" is in the group already')
            # Whatever was changed up to now may be brought to it, and so show in its manifest.
            added = replace(member, membership=Membership.JOINING, since=t.wall, announced=t.change)
            insert_member(t, added)
            # NULL locators: the record's own. One statement, whatever the number of objects.
            owed = t.sql.execute(
                f"INSERT INTO owed ({rows.OWED_WRITTEN}) "
                "SELECT uid, ?, ?, revision, NULL, ?, 0, 0, NULL, NULL, NULL FROM objects",
                (member.name, OwedKind.INSTALL.value, t.change),
            )
            t.head.owed += owed.rowcount
            t.touch_all()
            return moved_membership(t)

    def remove_member(self, name: str) -> int:
        with self._write() as t:
            _expect_member(t, name)
            owed = t.sql.execute("DELETE FROM owed WHERE member = ?", (name,))
            t.head.owed -= owed.rowcount
            for table, column in (
                ("copies", "member"),
                ("logins", "member"),
                ("observations", "member"),
                ("members", "name"),
            ):
                t.sql.execute(f"DELETE FROM {table} WHERE {column} = ?", (name,))
            t.touch_all()
            return moved_membership(t)

    def update_member(
        self,
        name: str,
        *,
        membership: Membership | None = None,
        role: Role | None = None,
        draining: bool | None = None,
        reason: str | None = None,
        serial: str | None = None,
    ) -> int:
        with self._write() as t:
            member = _expect_member(t, name)
            if membership is not None:
                member = replace(member, membership=membership, reason=reason, since=t.wall)
            if role is not None:
                member = replace(member, role=role)
            if draining is not None:
                member = replace(member, draining=draining)
            if serial is not None:
                member = replace(member, serial=serial)
            t.put_member(member)
            return moved_membership(t)

    def set_member_facts(
        self,
        name: str,
        *,
        default_extractable: bool | None = None,
        low: int | None = None,
        transport: bytes | None = None,
    ) -> None:
        with self._write() as t:
            member = _expect_member(t, name)
            if default_extractable is not None:
                member = replace(member, default_extractable=default_extractable)
            if low is not None:
                member = replace(member, low=low)
            if transport is not None:
                member = replace(member, transport=transport)
            t.put_member(member)

    def admit(self, name: str, *, barrier: int, low: int, lease: Lease | None) -> list[OwedRow]:
        with self._write() as t:
            t.expect_lease(lease)
            member = t.member(name)
            if member is None or member.membership is Membership.QUARANTINED:
                raise StaleMembership(f'member "{name}" was quarantined or removed meanwhile')
            hinders = rows.load_owed(
                t.sql,
                "w.member = ? AND w.change <= ? AND w.attempts IS NULL AND w.reason IS NULL ORDER BY w.change LIMIT ?",
                (name, barrier, _HINDERS_SHOWN),
            )
            if hinders:
                return hinders
            if member.membership is not Membership.ADMITTED:
                member = replace(member, membership=Membership.ADMITTED, reason=None, since=t.wall)
                moved_membership(t)
            t.put_member(replace(member, low=low))
            return []

    def manifest_confirmed(self, name: str, *, high: int, low: int | None = None) -> None:
        with self._write() as t:
            member = t.member(name)
            if member is None:
                return
            after = replace(member, confirmed=max(member.confirmed, high), low=member.low if low is None else low)
            if after != member:
                t.put_member(after)

    def update_group(self, *, label: str) -> None:
        with self._write() as t:
            t.sql.execute("UPDATE identity SET label = ?", (label,))
            t.touch_members()

    # -- leases --------------------------------------------------------------------------------------------------

    def acquire_lease(self, name: str, *, ttl: float) -> Lease | None:
        with self._write() as t:
            found = t.sql.execute("SELECT owner, token, expires FROM leases WHERE name = ?", (name,)).fetchone()
            owner, token, expires = found or (None, 0, 0.0)
            if owner not in (None, self.owner) and expires > t.now and t.alive(owner):
                return None
            lease = Lease(name, self.owner, token + 1, t.now + ttl)
            t.sql.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)", (name, *_lease_values(lease)))
            return lease

    def renew_lease(self, lease: Lease, *, ttl: float) -> Lease:
        with self._write() as t:
            t.expect_lease(lease)
            renewed = replace(lease, expires=t.now + ttl)
            t.sql.execute("UPDATE leases SET expires = ? WHERE name = ?", (renewed.expires, lease.name))
            return renewed

    def lease_held(self, name: str) -> bool:
        statement = "SELECT owner, expires FROM leases WHERE name = ?"
        found = self._read(lambda connection: connection.execute(statement, (name,)).fetchone())
        owner, expires = found or (None, 0.0)
        return owner is not None and expires > self._clock.boot() and self.owner_alive(owner)

    def release_lease(self, lease: Lease) -> None:
        with self._write() as t:
            try:
                t.expect_lease(lease)
            except LeaseLost:
                return  # nothing to give back
            t.sql.execute("UPDATE leases SET owner = NULL WHERE name = ?", (lease.name,))


def insert_member(t: Transaction, member: MemberRecord) -> None:
    """At the end of the list."""
    position = t.one("SELECT COALESCE(MAX(position), 0) + 1 FROM members")
    record, low, announced, confirmed = rows.from_member(member)
    t.sql.execute(
        "INSERT INTO members VALUES (?, ?, ?, ?, ?, ?)", (member.name, position, record, low, announced, confirmed)
    )
    t.touch_members()


def _lease_values(lease: Lease) -> tuple[str, int, float]:
    return lease.owner, lease.token, lease.expires


def _expect_member(t: Transaction, name: str) -> MemberRecord:
    member = t.member(name)
    if member is None:
        raise ValueError(f'the group has no member "{name}"')
    return member


def moved_membership(t: Transaction) -> int:
    t.touch_members()
    t.head.membership_revision += 1
    return t.head.membership_revision
