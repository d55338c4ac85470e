"""What ``ha-admin domain show`` tells."""

from __future__ import annotations

import msgspec

from hagroup.engine import transport
from hagroup.engine.domain_keys import is_sealed
from hagroup.engine.enforcement import probe_enforcement
from hagroup.engine.group import GroupEngine


class MemberKeys(msgspec.Struct, frozen=True, kw_only=True):
    """One member; fields are added, never renamed."""

    name: str
    keys: str
    """``both``, ``both and the replaced ones``, or ``not known`` (it is not connected)."""
    leave: str
    """How its keys may be handed on to another member."""
    returns: str
    """Whether it comes to new keys by itself if they are changed while it is away."""
    text: str


class Domain(msgspec.Struct, frozen=True, kw_only=True):
    """The document of ``domain show --json``; fields are added, never renamed."""

    domain_key: str
    partition_key: str
    rotated: bool | None
    """None: the keys were never changed; false: they are just being changed."""
    members: list[MemberKeys]


def gather(group: GroupEngine) -> Domain:
    """Asks every connected member; changes nothing."""
    now = group.view.group
    return Domain(
        domain_key=now.domain_key_id.hex(),
        partition_key=now.partition_key_id.hex(),
        rotated=None if now.rotation is None else now.rotation.finished,
        members=[_member(group, name) for name in group.view.members],
    )


def _member(group: GroupEngine, name: str) -> MemberKeys:
    member = group.roster.members.get(name)
    life = None if member is None else member.life
    if member is None or life is None or life.keys is None:
        why = "it is not in hagroup.toml" if member is None else member.reason or "it is not connected"
        return MemberKeys(name=name, keys="not known", leave="", returns="", text=why)
    timeout = group.config.timeouts.generate
    guarded = probe_enforcement(life.connection, member.config.wrap_mechanism, timeout=timeout)
    sealed = is_sealed(life.connection, life.keys, timeout=timeout)
    return MemberKeys(
        name=name,
        keys="both" if life.keys.older is None else "both and the replaced ones",
        leave="by the shares only" if sealed else "by user and security officer",
        returns="by itself" if transport.find(life.connection, timeout=timeout) else "by `domain join`",
        text="" if guarded.unwrap_template else "CKA_UNWRAP_TEMPLATE is not enforced: PIN and journal open envelopes",
    )
