"""Members and leases, for every backend."""

from __future__ import annotations

from msgspec.structs import replace

from hagroup.core.records import Lease, MemberRecord, Membership, OwedRow, Role
from hagroup.journal.api import LeaseLost, StaleMembership
from hagroup.journal.transaction import Transaction, Writer, one_transaction

_HINDERS_SHOWN = 1_000
"""A member that was just listed in a large group owes a million rows: all writers would wait until they were read."""


class Members(Writer):
    """The part of a journal about the group and who is in it."""

    @one_transaction
    def add_member(self, member: MemberRecord) -> int:
        with self._write() as t:
            if t.member(member.name) is not None:
                raise ValueError(f'member "{member.name}" is in the group already')
            # Whatever was changed up to now may be brought to it, and so show in its manifest.
            added = replace(member, membership=Membership.JOINING, since=t.wall, announced=t.change)
            t.insert_member(added)
            t.owe_everything(member.name)
            t.touch_all()
            return t.move_membership()

    @one_transaction
    def remove_member(self, name: str) -> int:
        with self._write() as t:
            _expect_member(t, name)
            t.drop_member(name)
            t.touch_all()
            return t.move_membership()

    @one_transaction
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
                moved = draining != member.draining and member.membership is Membership.ADMITTED
                member = replace(member, draining=draining, since=t.wall if moved else member.since)
            if serial is not None:
                member = replace(member, serial=serial)
            t.put_member(member)
            return t.move_membership()

    @one_transaction
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

    @one_transaction
    def admit(
        self, name: str, *, barrier: int, low: int, lease: Lease | None, membership_revision: int
    ) -> list[OwedRow]:
        with self._write() as t:
            t.expect_lease(lease)
            t.expect_membership(membership_revision)
            member = t.member(name)
            if member is None or member.membership is Membership.QUARANTINED:
                raise StaleMembership(f'member "{name}" was quarantined or removed meanwhile')
            hinders = t.hinders(name, barrier, _HINDERS_SHOWN)
            if hinders:
                return hinders
            if member.membership is not Membership.ADMITTED:
                member = replace(member, membership=Membership.ADMITTED, reason=None, since=t.wall)
                t.move_membership()
            t.put_member(replace(member, low=low))
            return []

    @one_transaction
    def manifest_confirmed(self, name: str, *, high: int, low: int | None = None) -> None:
        with self._write() as t:
            member = t.member(name)
            if member is None:
                return
            after = replace(member, confirmed=max(member.confirmed, high), low=member.low if low is None else low)
            if after != member:
                t.put_member(after)

    @one_transaction
    def update_group(self, *, label: str) -> None:
        with self._write() as t:
            t.update_identity(label=label)
            t.touch_members()

    # -- leases --------------------------------------------------------------------------------------------------

    @one_transaction
    def acquire_lease(self, name: str, *, ttl: float) -> Lease | None:
        with self._write() as t:
            owner, token, expires = t.lease(name) or (None, 0, 0.0)
            if owner not in (None, self.owner) and expires > t.now and t.alive(owner):
                return None
            lease = Lease(name, self.owner, token + 1, t.now + ttl)
            t.put_lease(lease)
            return lease

    @one_transaction
    def renew_lease(self, lease: Lease, *, ttl: float) -> Lease:
        with self._write() as t:
            t.expect_lease(lease)
            renewed = replace(lease, expires=t.now + ttl)
            t.put_lease(renewed)
            return renewed

    @one_transaction
    def release_lease(self, lease: Lease) -> None:
        with self._write() as t:
            try:
                t.expect_lease(lease)
            except LeaseLost:
                return  # nothing to give back
            t.free_lease(lease.name)


def _expect_member(t: Transaction, name: str) -> MemberRecord:
    member = t.member(name)
    if member is None:
        raise ValueError(f'the group has no member "{name}"')
    return member
