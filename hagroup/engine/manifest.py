"""The manifest on each member (DESIGN.md 4.6): what the token itself knows of the group and of its own progress.

It tells a journal that was restored (the token has seen more than the journal announced) from a token that was
restored (it has seen less than it confirmed), which no row in the journal can.
"""

from __future__ import annotations

import msgspec

from hagroup.config.logging import get_logger
from hagroup.core.moves import MEMBER_FOLLOWED, is_expected, moved
from hagroup.core.records import GroupRecord, MemberRecord, Membership
from hagroup.engine.kept import Kept
from hagroup.engine.member import Life, Member
from hagroup.engine.view import View
from hagroup.errors import JournalMismatch
from hagroup.journal.api import Journal

log = get_logger(__name__)

_EVERYTHING = 2**31


class OtherGroup(Exception):
    """The token belongs to another hagroup group."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is sealed on the member."""

    group: str
    """The group's serial number."""
    label: str
    epoch: str
    members: dict[str, str]
    """Name to serial number, as of the newest manifest."""
    low: int
    """Every change up to here is finished on this member."""
    high: int
    """Newest tombstone or attribute change that was begun here."""
    sealed: int = 0
    """Number of the last event that the event log's seal covered; 0: none (or written by an earlier hagroup)."""
    head: bytes = b""
    """Of its hash chain, there."""
    revision: int = 0
    """Of the membership that ``members`` shows; 0: written by an earlier hagroup."""

    @property
    def order(self) -> tuple[str, int, int, int]:
        """Later ones compare greater."""
        return self.epoch, self.high, self.low, self.sealed

    @property
    def mark(self) -> str:
        """The same, as text."""
        return f"{self.epoch}:{self.high:016x}:{self.low:016x}:{self.sealed:016x}"


KEPT = Kept("manifest", Manifest)
read, write, reseal = KEPT.read, KEPT.write, KEPT.reseal
LABEL = KEPT.label


def compose(group: GroupRecord, members: dict[str, MemberRecord], *, low: int, high: int) -> Manifest:
    return Manifest(
        group=group.serial,
        label=group.label,
        epoch=group.epoch,
        members={name: member.serial for name, member in members.items()},
        low=low,
        high=high,
        sealed=0 if group.seal is None else group.seal.number,
        head=b"" if group.seal is None else group.seal.head,
        revision=group.membership_revision,
    )


def raise_high(view: View, member: Member, life: Life, change: int, *, timeout: float) -> None:
    """Before a tombstone or attribute change numbered ``change`` is executed on a member: its manifest shows it."""
    assert life.keys is not None
    with member.manifest_lock:
        if life.manifest_high >= change:
            return
        manifest = compose(view.group, view.members, low=_low(view, member, life), high=change)
        write(life.connection, life.keys, manifest, timeout=timeout)
        life.manifest_high = change


def _low(view: View, member: Member, life: Life) -> int:
    """The token's own is older where it was put back to an earlier state: that must stay to be seen until what it does
    not vouch for was looked for, in this life or in a later one."""
    low = view.members[member.name].low
    return low if life.proved_since_low else min(low, life.manifest_low)


def show_seal(view: View, member: Member, life: Life, *, timeout: float) -> None:
    """The member's manifest shows the newest seal of the event log from now on."""
    assert life.keys is not None
    with member.manifest_lock:
        shown = compose(view.group, view.members, low=_low(view, member, life), high=life.manifest_high)
        write(life.connection, life.keys, shown, timeout=timeout)
        life.manifest_sealed, life.manifest_head = shown.sealed, shown.head


def check(
    journal: Journal, view: View, member: Member, life: Life, *, timeout: float, shown: Manifest | None = None
) -> None:
    """On connecting: what the token's manifest says against what the journal says.

    :param shown: what was just read of the token already.
    :raises OtherGroup: the token belongs to another group.
    :raises JournalMismatch: the token has seen changes that this journal never announced: the *journal* was restored
        or copied; nothing may be changed or repaired by it.
    """
    assert life.keys is not None
    record = view.members[member.name]
    found = shown or read(life.connection, life.keys, timeout=timeout)
    behind = None if found is None else _behind(journal, view, member, found)
    member.journal_behind = behind
    if behind is not None:
        raise JournalMismatch(behind)
    if found is None:
        if record.membership is Membership.ADMITTED:
            _resync(journal, member, "its token shows no manifest: it was emptied or replaced")
        return
    life.manifest_epoch = found.epoch
    if found.epoch == view.group.epoch:
        life.manifest_sealed, life.manifest_head = found.sealed, found.head
    else:
        life.manifest_sealed, life.manifest_head = 0, b""
    life.manifest_high = found.high if found.epoch == view.group.epoch else 0
    life.manifest_low = found.low if found.epoch == view.group.epoch else 0
    if found.group != view.group.serial:
        raise OtherGroup(
            f'member "{member.name}" belongs to group {found.label} ({found.group}), not to {view.group.label} '
            f"({view.group.serial}); remove it there first"
        )
    if found.epoch != view.group.epoch:
        if record.membership is not Membership.ADMITTED:
            return  # a full inventory is due there anyway
        again = read(life.connection, life.keys, timeout=timeout)
        if again is not None and again.epoch > found.epoch:  # another process was just about it
            check(journal, view, member, life, timeout=timeout, shown=again)
        else:
            _resync_older_epoch(journal, view, member, found)
    elif found.high < record.confirmed:
        _resync(journal, member, f"its token was restored: shows change {found.high} after {record.confirmed}")


def _resync(journal: Journal, member: Member, why: str) -> None:
    log.error("member.token-restored", member=member.name, reason=why)
    journal.update_member(member.name, membership=Membership.OUT_OF_SYNC, reason=why)
    journal.event("alarm", why, member=member.name)


def _resync_older_epoch(journal: Journal, view: View, member: Member, found: Manifest) -> None:
    """A journal that was moved has a new epoch, and each token shows the one before: no alarm, the first time."""
    epoch = view.group.epoch
    if is_expected(journal.events(limit=_EVERYTHING), member.name, shown=(found.epoch, found.high), epoch=epoch):
        why = "the journal was moved: all on its token is looked through before it serves"
        log.info("member.journal-moved", member=member.name)
        journal.update_member(member.name, membership=Membership.OUT_OF_SYNC, reason=why)
        journal.event(MEMBER_FOLLOWED, why, member=member.name, data=moved(found.epoch, epoch))
    else:
        _resync(journal, member, "its token is of an older epoch of the group")


def _behind(journal: Journal, view: View, member: Member, found: Manifest) -> str | None:
    """Why the *journal* is the older one; None: it is not."""
    if found.group != view.group.serial or found.epoch < view.group.epoch:
        return None
    if found.epoch > view.group.epoch:
        what = f"epoch {found.epoch} instead of {view.group.epoch}"
    elif found.high > view.members[member.name].announced:
        fresh = {record.name: record.announced for record in journal.members()}.get(member.name, 0)
        if found.high <= fresh:
            return None
        what = f"change {found.high}, the journal announced {fresh}"
    else:
        return None
    return (
        f'member "{member.name}" has seen {what}: this journal is older than the group (restored or copied); '
        "no change is made until `ha-admin recover` has reconciled it with the members"
    )
