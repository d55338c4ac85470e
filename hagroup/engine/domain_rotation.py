"""Changing both keys of the cloning domain while the group serves (DESIGN.md 5; the reasons: README, "Rotation").

1. New keys are made as session objects in one member and handed to every member that is here, beside the present ones;
   for members that are away they are wrapped for their tokens' own transport keys. Nothing refers to them yet.
2. One transaction makes them the group's: all that is sealed from then on is under them. Programs look for them on
   their members as soon as they notice, and serve meanwhile.
3. Every envelope in the journal is opened inside a member and sealed anew; no revision moves, no replica is touched.
4. One transaction says that nothing is under the replaced keys any more; member by member, what the group keeps on the
   token is sealed anew, and the replaced keys are destroyed there (``renewal``).

Cut off before 2, the next attempt drops what it finds; after it, the same call goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from hagroup.config.logging import get_logger
from hagroup.config.pins import Pin
from hagroup.core.records import IntentKind, ObjectRecord, Rotation
from hagroup.engine import membership, renewal, transport
from hagroup.engine.challenge import DomainMember, reference_envelope
from hagroup.engine.domain_keys import DomainKeys, is_sealed, scratch_session
from hagroup.engine.envelope import generation
from hagroup.engine.group import GroupEngine
from hagroup.engine.joining import draft, drop, hand_out, new_ids, wrap_to
from hagroup.engine.member import Life, Member
from hagroup.engine.one_step import one_step
from hagroup.engine.setup import officer_of
from hagroup.errors import ConfigurationError, GroupUnavailable

log = get_logger(__name__)

SETTLE = 1.5
"""Seconds in which every running program notices (it looks each second) and seals anew what it keeps in memory."""
BATCH = 32
_PATIENCE = 120.0
"""Seconds for changes that were under way when the keys were changed, and for members to be done."""

Told = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


class Rotated(msgspec.Struct, frozen=True, kw_only=True):
    """What was done; fields are added, never renamed."""

    domain_key: str
    partition_key: str
    resumed: bool
    """An earlier rotation was brought to its end; no new one was begun."""
    envelopes: int
    done: list[str]
    """Members on which the replaced keys are destroyed."""
    later: list[str]
    """Members that get the new keys, and lose the old ones, when they return."""
    by_hand: list[str]
    """Members that are away and can come to the new keys only by ``domain join``."""


def unfinished(group: GroupEngine) -> bool:
    """Whether an earlier rotation has to be brought to its end first."""
    rotation = group.view.group.rotation
    if rotation is None:
        return False
    return not rotation.finished or any(keys.older is not None for _, _, keys in _present(group))


def rotate(
    group: GroupEngine, so_pin: Pin | None, *, sealed: bool, secrets: tuple[bytes, bytes] | None, told: Told
) -> Rotated:
    """Change both keys; or bring an earlier call's change to its end.

    :param so_pin: of the member that speaks for the group: its security officer agrees. Not needed to go on.
    :param sealed: the new keys can never leave a member. (A sealed domain stays sealed.)
    :param secrets: both new keys, where people hold shares of them.
    :raises GroupUnavailable: no member is there, or something does not come to its end in time: the same call goes on.
    """
    group.follow()
    resumed = unfinished(group)
    if not resumed:
        if so_pin is None:
            raise ConfigurationError(f"the SO PIN is needed{membership.NOT_CHANGED}")
        with one_step():
            _begin(group, so_pin, sealed=sealed, secrets=secrets)
    rotation = group.view.group.rotation
    assert rotation is not None
    envelopes = 0
    if not rotation.finished:
        _wait(group, lambda: _all_know(group), "a member does not come to the new keys")
        envelopes = _seal_all_anew(group, told)
        _seal_notes_anew(group)
        time.sleep(SETTLE)
        group.journal.finish_rotation()
        group.journal.event("domain rotated", f"{envelopes} envelopes sealed anew")
        group.follow()
    return _finish(group, envelopes, resumed=resumed, told=told)


def _present(group: GroupEngine) -> list[tuple[Member, Life, DomainKeys]]:
    return [
        (member, life, keys)
        for member in group.roster.members.values()
        if (life := member.life) is not None and (keys := life.keys) is not None
    ]


def _side(member: Member, life: Life) -> DomainMember:
    return DomainMember(connection=life.connection, name=member.name, wrap_mechanism=member.config.wrap_mechanism)


# -- 1 and 2 -----------------------------------------------------------------------------------------------------------


def _begin(group: GroupEngine, so_pin: Pin, *, sealed: bool, secrets: tuple[bytes, bytes] | None) -> None:
    timeout = group.config.timeouts.generate
    speaker, life, keys = membership.sponsor(group)
    officer_of(
        speaker.config, life, so_pin, journal=group.journal, timeout=timeout
    ).connection.close()  # agreed: the second person
    was_sealed = is_sealed(life.connection, keys, timeout=timeout)
    sealed = sealed or was_sealed
    present = _present(group)
    names = {keys.domain_key_id, keys.partition_key_id}
    for _, one, _ in present:
        renewal.drop_unknown(one.connection, names, timeout=timeout)
        if sealed and not was_sealed:  # a pair that lets keys out under a TRUSTED one does no more
            drop(one.connection, transport.own(one.connection, timeout=timeout), timeout=timeout)
    ids = new_ids()
    with scratch_session(life.connection, timeout=timeout) as sid:
        drafts = draft(life.connection, secrets, sid=sid, timeout=timeout)
        sides = [_side(member, one) for member, one, _ in present]
        new = hand_out(life.connection, sid, drafts, ids, sides, sealed=sealed, timeout=timeout)
        try:
            wrapped = {}
            for name, public in _receivers(group, keys, present, only_present=sealed and not was_sealed).items():
                wrapped[name] = wrap_to(life.connection, drafts, public, sid=sid, timeout=timeout)
            mine = new[[side.name for side in sides].index(speaker.name)]
            reference = reference_envelope(life.connection, mine, timeout=timeout)
            rotation = Rotation(
                domain_key_id=keys.domain_key_id,
                partition_key_id=keys.partition_key_id,
                reference=group.view.group.reference,
                sealed=sealed,
                wrapped=wrapped,
                former=(*_former(group), (keys.domain_key_id, keys.partition_key_id)),
            )
            group.journal.begin_rotation(
                domain_key_id=ids[0], partition_key_id=ids[1], reference=reference, rotation=rotation
            )
        except BaseException:
            if group.journal.group().domain_key_id != ids[0]:
                for side, made in zip(sides, new, strict=True):
                    drop(side.connection, [made.domain, made.partition], timeout=timeout)
            raise
    group.journal.event("domain rotation begun", f"new keys on {', '.join(side.name for side in sides)}")
    group.follow()


def _former(group: GroupEngine) -> tuple[tuple[bytes, bytes], ...]:
    rotation = group.view.group.rotation
    return () if rotation is None else rotation.former


def _receivers(
    group: GroupEngine, keys: DomainKeys, present: Sequence[tuple[Member, Life, DomainKeys]], *, only_present: bool
) -> dict[str, transport.PublicPart]:
    """Transport keys by token: those here are asked, for the others the journal's own sealed note counts."""
    timeout = group.config.timeouts.generate
    _, life, _ = membership.sponsor(group)
    found = {}
    for _, one, _ in present:
        pair = transport.find(one.connection, timeout=timeout)
        if pair is not None:
            found[one.token.serial] = pair.public
    for record in group.view.members.values():
        if record.serial in found or only_present:
            continue
        public = transport.open_public(life.connection, keys, record.serial, record.transport, timeout=timeout)
        if public is not None:
            found[record.serial] = public
    return found


def _all_know(group: GroupEngine) -> bool:
    group.follow()
    return bool(_present(group)) and all(group.roster.keys.usable(member) for member, _, _ in _present(group))


def _wait(group: GroupEngine, condition: Callable[[], bool], why_not: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise GroupUnavailable(f"{why_not}; run the same command again to go on")
        group.roster.wait_for_change(0.05, lambda: False)


# -- 3 -----------------------------------------------------------------------------------------------------------------


def _seal_all_anew(group: GroupEngine, told: Told) -> int:
    """Everything that was sealed before; nothing can be begun with such an envelope any more."""
    done = 0
    deadline = time.monotonic() + _PATIENCE
    while True:
        total = group.journal.counts()["live"] + group.journal.counts()["creating"]
        older = [record for record in group.journal.objects() if _is_older(group, record)]
        for start in range(0, len(older), BATCH):
            done += _seal_anew(group, older[start : start + BATCH])
            told("sealing envelopes anew", total - len(older) + start + BATCH, total)
        if not older and not _older_changes(group):
            return done
        if time.monotonic() > deadline:
            raise GroupUnavailable(
                "a change of an object does not come to its end; run the same command again to go on"
            )
        if not older:
            group.supervisor.recover_now()
            group.roster.wait_for_change(0.05, lambda: False)


def _is_older(group: GroupEngine, record: ObjectRecord) -> bool:
    return record.envelope is not None and _older_envelope(group, record.envelope)


def _older_envelope(group: GroupEngine, envelope: bytes) -> bool:
    now = group.view.group
    return generation(envelope) != (now.domain_key_id, now.partition_key_id)


def _older_changes(group: GroupEngine) -> bool:
    """Attribute changes that began before, and would bring an older envelope."""
    return any(
        intent.kind is IntentKind.SET
        and intent.new_envelope is not None
        and _older_envelope(group, intent.new_envelope)
        for intent in group.journal.intents()
    )


def _seal_anew(group: GroupEngine, records: Sequence[ObjectRecord]) -> int:
    after = [group.sealed_under(group.view.group, record) for record in records]
    envelopes = [
        (old.uid, old.revision, old.envelope or b"", new.envelope or b"")
        for old, new in zip(records, after, strict=True)
    ]
    taken = group.journal.rewrap(envelopes)
    if group.mirror is not None:
        fresh = [group.journal.object(record.uid) for record, ok in zip(after, taken, strict=True) if ok]
        group.mirror.put([record for record in fresh if record is not None])
    return sum(taken)


def _seal_notes_anew(group: GroupEngine) -> None:
    """What the journal keeps of the tokens' transport keys: those that are away are needed for the next rotation."""
    timeout = group.config.timeouts.generate
    _, life, keys = membership.sponsor(group)
    for record in list(group.view.members.values()):
        public = transport.open_public(life.connection, keys, record.serial, record.transport, timeout=timeout)
        if public is not None:
            note = transport.sealed_public(life.connection, keys, record.serial, public, timeout=timeout)
            group.journal.set_member_facts(record.name, transport=note)


# -- 4 -----------------------------------------------------------------------------------------------------------------


def _finish(group: GroupEngine, envelopes: int, *, resumed: bool, told: Told) -> Rotated:
    def left() -> list[str]:
        return [member.name for member, life, _ in _present(group) if renewal.due(group.view, life)]

    def over() -> bool:
        group.follow()
        group.supervisor.sync_now()
        told("members that are done", len(_present(group)) - len(left()), len(_present(group)))
        return not left()

    _wait(group, over, "a member still has the old keys")
    now = group.view.group
    assert now.rotation is not None
    done = sorted(member.name for member, _, _ in _present(group))
    away = {name: record for name, record in group.view.members.items() if name not in done}
    return Rotated(
        domain_key=now.domain_key_id.hex(),
        partition_key=now.partition_key_id.hex(),
        resumed=resumed,
        envelopes=envelopes,
        done=done,
        later=sorted(name for name, record in away.items() if record.serial in now.rotation.wrapped),
        by_hand=sorted(name for name, record in away.items() if record.serial not in now.rotation.wrapped),
    )
