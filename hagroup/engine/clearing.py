"""Emptying the whole group, members that are away included (T 4.4.2: no client refills it)."""

from __future__ import annotations

import msgspec

from hagroup.engine import membership
from hagroup.engine.group import GroupEngine
from hagroup.errors import GroupUnavailable, MemberQuarantined


class Cleared(msgspec.Struct, frozen=True, kw_only=True):
    """What was done; fields are added, never renamed."""

    objects: int
    emptied: list[str]
    """Members that hold nothing of the group any more but its own keys."""
    later: dict[str, str]
    """Members that are emptied before they serve again, and why not now."""


def clear(group: GroupEngine) -> Cleared:
    """Tombstones for everything, in a new epoch; then every member that can be reached is emptied. Interrupted, the
    same call completes it.

    :raises GroupUnavailable: no member is there to be emptied; nothing was changed.
    """
    membership.sponsor(group)
    group.journal.begin_clear()
    gone = 0
    while uids := group.journal.clear_some():
        gone += len(uids)
        if group.mirror is not None:
            for uid in uids:
                group.mirror.drop(uid)
    group.journal.event("group cleared", f"{gone} objects destroyed")
    group.follow()
    emptied, later = [], {}
    for name, member in list(group.roster.members.items()):
        if member.life is None:
            later[name] = member.reason or "it is not connected"
            continue
        try:
            membership.bring_in(group, name)
            emptied.append(name)
        except (GroupUnavailable, MemberQuarantined) as error:
            later[name] = str(error)
    return Cleared(objects=gone, emptied=emptied, later=later)
