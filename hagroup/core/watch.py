"""What the watchdog tells people, decided without I/O: from what it saw now and what it told before to what is new.

One value, :class:`Told`, is everything that was told so far. :func:`decide` compares it with a :class:`Sight` and
returns the next one with the events between the two; so each change is told once, however often it is seen, and a
watchdog that takes over goes on from the value that its predecessor left in the journal.
"""

from __future__ import annotations

import math
from enum import StrEnum

import msgspec

from hagroup.core.records import OBJECT_MISSING, OBJECT_REAPPEARED, Membership, Role


class Kind(StrEnum):
    """What can be told. Those in pairs end each other."""

    MEMBER_FAILED = "member failed"
    MEMBER_RECOVERED = "member recovered"
    RECOVERY_FAILED = "recovery attempt failed"
    MEMBER_GIVEN_UP = "member given up"
    MEMBER_QUARANTINED = "member quarantined"
    MEMBER_RELEASED = "member released"
    PIN_REFUSED = "PIN refused"
    CANNOT_RESYNC = "cannot resync"
    OUT_OF_SYNC = "out of sync"
    RESYNC_DONE = "resync done"
    GROUP_DEGRADED = "group degraded"
    GROUP_WHOLE = "group whole"
    BELOW_MIN_REPLICAS = "below min_replicas"
    MIN_REPLICAS_REACHED = "min_replicas reached"
    ALL_LOST = "all members lost"
    SERVING_AGAIN = "group serves again"
    JOURNAL_UNREACHABLE = "journal unreachable"
    JOURNAL_BACK = "journal back"
    TOKEN_NEARLY_FULL = "token nearly full"
    TOKEN_HAS_ROOM = "token has room again"
    EVENT_LOG_BROKEN = "event log broken"
    EVENT_LOG_WHOLE = "event log whole again"
    KEY_REAPPEARED = "tombstoned key reappeared"
    ALARM = "alarm"


GOOD = frozenset(
    {
        Kind.MEMBER_RECOVERED,
        Kind.MEMBER_RELEASED,
        Kind.RESYNC_DONE,
        Kind.GROUP_WHOLE,
        Kind.MIN_REPLICAS_REACHED,
        Kind.SERVING_AGAIN,
        Kind.JOURNAL_BACK,
        Kind.TOKEN_HAS_ROOM,
        Kind.EVENT_LOG_WHOLE,
    }
)
GRAVE = frozenset(
    {
        Kind.ALL_LOST,
        Kind.ALARM,
        Kind.KEY_REAPPEARED,
        Kind.MEMBER_QUARANTINED,
        Kind.PIN_REFUSED,
        Kind.JOURNAL_UNREACHABLE,
        Kind.EVENT_LOG_BROKEN,
    }
)
LOG_ONLY = frozenset({Kind.RECOVERY_FAILED})
"""One for each attempt and not for each change: for the log, not for hook and webhook."""

ALARMS = {"alarm": Kind.ALARM, OBJECT_MISSING: Kind.ALARM, OBJECT_REAPPEARED: Kind.KEY_REAPPEARED}
"""Kinds of journal events that people must hear of, and as what they are told."""
DELIVERED = "all of the above was delivered"
"""Text of the watchdog's own events in the journal that tell nobody anything."""
NEARLY_FULL, ROOM = 0.1, 0.15
"""Shares of a token's memory: less than the first free is told; more than the second has to be free before that is
over, so that one object more or less is not told again and again."""


class Noted(msgspec.Struct, frozen=True, kw_only=True):
    """An event of the journal's own log."""

    number: int
    kind: str
    member: str | None
    text: str


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One member at one heartbeat."""

    name: str
    serial: str
    ok: bool
    """It answered this heartbeat."""
    reason: str | None = None
    """Why it did not, or why it is quarantined."""
    membership: Membership = Membership.ADMITTED
    role: Role = Role.ACTIVE
    draining: bool = False
    usable: bool = True
    """The engine would give it operations: connected, checked and admitted."""
    attempts: int = 0
    """Attempts to connect to it that failed, in a row, as the engine counts them."""
    given_up: bool = False
    """No further attempt will be made."""
    owed: int = 0
    """Objects that it has to be brought up to date in."""
    oldest_owed: int | None = None
    """Change number of the oldest of them."""
    pin: bool = True
    """It is logged in, or there is a PIN to log in with."""
    pin_refused: str | None = None
    """Names the refused PIN source in its present state; None: none is refused."""
    starting: bool = False
    """The engine connects to it for the first time: neither here nor gone."""
    room: float | None = None
    """Share of its token's memory that is free; None: not known now."""


class Sight(msgspec.Struct, frozen=True, kw_only=True):
    """The group at one heartbeat."""

    group: str
    serial: str
    min_replicas: int
    threshold: int
    journal: bool
    """The journal answers. If not, what is known of the members from it is from before."""
    members: tuple[Seen, ...]
    noted: tuple[Noted, ...] = ()
    """What the journal's event log got since ``Told.noted``."""
    newest: int = 0
    """Number of the newest journal event."""
    log_broken: str | None = None
    """What is wrong with the journal's event log, as of the last check; None: nothing is."""


class MemberTold(msgspec.Struct, frozen=True, kw_only=True):
    """What was told of one member; ``missed`` … ``oldest_owed`` are what the next decision needs."""

    failed: bool = False
    given_up: bool = False
    quarantined: bool = False
    out_of_sync: bool = False
    pin_refused: str | None = None
    no_pin: bool = False
    missed: int = 0
    attempts: int = 0
    """Failed recovery attempts of the present outage that were told."""
    counted: int = 0
    """The engine's count that they correspond to."""
    oldest_owed: int | None = None
    full: bool = False
    missing_since: float | None = None
    """Wall clock of the first heartbeat that it missed of those that count now; it stays until it is back."""
    back_since: float | None = None
    """Wall clock of the last time that it was told to be back."""


class WatchEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One change, as it is told. ``id`` is the same if it has to be told a second time (after a crash in between)."""

    id: str
    kind: Kind
    severity: str
    group: str
    serial: str
    """The group's."""
    time: float
    """Wall clock, seconds since 1970."""
    text: str
    member: str | None = None
    member_serial: str | None = None
    attempt: int | None = None


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was told of one group."""

    sequence: int = 0
    noted: int | None = None
    """Number of the last journal event that was looked at; None: none yet."""
    journal_down: bool = False
    degraded: bool = False
    below: bool = False
    lost: bool = False
    log_broken: bool = False
    members: dict[str, MemberTold] = {}
    undelivered: tuple[WatchEvent, ...] = ()
    """Events of which it is not known that hook and webhook have them: a successor gives them once more."""


def detection_bound(interval: float, threshold: int, probe: float) -> float:
    """Seconds within which a failure is told."""
    return round(interval * threshold + probe, 6)


def lease_time(interval: float, threshold: int, probe: float) -> float:
    """Seconds after which another watchdog takes over from one that hangs: it survives a slow heartbeat, no more."""
    return max(3.0, interval * max(2, threshold) + probe)


def pause_before(attempt: int, *, retry: int, retry_interval: float, jitter: float) -> float:
    """Seconds before recovery attempt ``attempt`` (1 is the first): soon at first, then every ``retry_interval``.

    :param retry: attempts that are made at all; -1: without end. ``math.inf`` is returned past them.
    :param jitter: 0 to 1, at random, so that many hosts do not come at the same instant. It only shortens.
    """
    if 0 <= retry < attempt:
        return math.inf
    if attempt <= 1:
        return 0.0
    return min(retry_interval, 0.2 * 2.0 ** min(attempt - 2, 32)) * (1.0 - 0.25 * jitter)


class _Events:
    """Numbers them."""

    def __init__(self, sight: Sight, sequence: int, now: float) -> None:
        self._sight = sight
        self.now = now
        self.sequence = sequence
        self.events: list[WatchEvent] = []

    def add(self, kind: Kind, text: str, member: Seen | None = None, *, attempt: int | None = None) -> None:
        if kind not in LOG_ONLY:
            self.sequence += 1
        severity = "critical" if kind in GRAVE else "info" if kind in GOOD | LOG_ONLY else "warning"
        self.events.append(
            WatchEvent(
                id=f"{self._sight.serial}-{self.sequence}" + (f"-{attempt}" if kind in LOG_ONLY else ""),
                kind=kind,
                severity=severity,
                group=self._sight.group,
                serial=self._sight.serial,
                time=self.now,
                text=text,
                member=None if member is None else member.name,
                member_serial=None if member is None else member.serial,
                attempt=attempt,
            )
        )


def unreachable_from_the_start(group: str, serial: str, when: str, now: float) -> WatchEvent:
    """Of a watchdog that never had the journal, so that nobody knows what was told, and by whom.

    :param when: the minute, so that two watchdogs which begin with the host tell it under one id.
    """
    text = "the journal cannot be reached since this watchdog began: nothing is known of the group"
    kind = Kind.JOURNAL_UNREACHABLE
    return WatchEvent(
        id=f"{serial}-{when}", kind=kind, severity="critical", group=group, serial=serial, time=now, text=text
    )


def decide(told: Told, sight: Sight, now: float) -> tuple[Told, list[WatchEvent]]:
    """What is new. ``now`` is wall clock and only shown."""
    out = _Events(sight, told.sequence, now)
    if sight.journal == told.journal_down:
        if sight.journal:
            out.add(Kind.JOURNAL_BACK, "the journal can be reached again")
        else:
            out.add(Kind.JOURNAL_UNREACHABLE, "the journal cannot be reached: nothing can be changed or repaired")
    log_broken = _event_log(told, sight, out)
    members = {
        seen.name: _member(told.members.get(seen.name, MemberTold()), seen, sight, out) for seen in sight.members
    }
    noted = _noted(told, sight, out)
    degraded, below, lost = _levels(sight, members)
    _group(told, out, sight, degraded, below, lost)
    after = Told(
        sequence=out.sequence,
        noted=noted,
        journal_down=not sight.journal,
        degraded=degraded,
        below=below,
        lost=lost,
        log_broken=log_broken,
        members=members,
        undelivered=told.undelivered,
    )
    return after, out.events


def _event_log(told: Told, sight: Sight, out: _Events) -> bool:
    if not sight.journal:
        return told.log_broken
    if sight.log_broken is not None and not told.log_broken:
        out.add(Kind.EVENT_LOG_BROKEN, f"the event log of group {sight.group} is broken: {sight.log_broken}")
    elif sight.log_broken is None and told.log_broken:
        out.add(Kind.EVENT_LOG_WHOLE, f"the event log of group {sight.group} is whole again")
    return sight.log_broken is not None


def _member(told: MemberTold, seen: Seen, sight: Sight, out: _Events) -> MemberTold:
    quarantined = seen.membership is Membership.QUARANTINED
    if seen.pin_refused is not None and seen.pin_refused != told.pin_refused:
        out.add(
            Kind.PIN_REFUSED,
            f"member {seen.name} refused the PIN of its source; it is not tried again until a person has corrected it",
            seen,
        )
    if quarantined and not told.quarantined:
        out.add(Kind.MEMBER_QUARANTINED, f"member {seen.name} is quarantined: {seen.reason or 'no reason known'}", seen)
    elif told.quarantined and not quarantined:
        out.add(Kind.MEMBER_RELEASED, f"member {seen.name} is no longer quarantined", seen)
    told = msgspec.structs.replace(told, quarantined=quarantined, pin_refused=seen.pin_refused)
    told = _room(_no_pin(told, seen, out), seen, out)
    if not quarantined:
        told = _alive(told, seen, sight, out)
    return _sync(told, seen, sight, out)


def _no_pin(told: MemberTold, seen: Seen, out: _Events) -> MemberTold:
    if not seen.pin and not told.no_pin:
        out.add(Kind.CANNOT_RESYNC, f"there is no PIN for member {seen.name}: it is watched, but not resynced", seen)
    return msgspec.structs.replace(told, no_pin=not seen.pin)


def _room(told: MemberTold, seen: Seen, out: _Events) -> MemberTold:
    if seen.room is None:
        return told
    full = seen.room < (ROOM if told.full else NEARLY_FULL)
    if full and not told.full:
        out.add(Kind.TOKEN_NEARLY_FULL, f"member {seen.name}: {seen.room:.0%} of its token's memory is free", seen)
    elif told.full and not full:
        out.add(Kind.TOKEN_HAS_ROOM, f"member {seen.name}: {seen.room:.0%} of its token's memory is free again", seen)
    return msgspec.structs.replace(told, full=full)


def _alive(told: MemberTold, seen: Seen, sight: Sight, out: _Events) -> MemberTold:
    if seen.starting and not told.failed:
        return told
    missed = 0 if seen.ok else told.missed + 1
    if missed == 0 and not told.failed:
        told = msgspec.structs.replace(told, missing_since=None)
    elif told.missing_since is None and not told.failed:
        told = msgspec.structs.replace(told, missing_since=out.now)
    if not told.failed:
        if missed < sight.threshold:
            return msgspec.structs.replace(told, missed=missed)
        out.add(Kind.MEMBER_FAILED, f"member {seen.name} failed: {seen.reason or 'no answer'}", seen)
        told = msgspec.structs.replace(told, failed=True, attempts=0, counted=0, given_up=False)
    told = _attempts(msgspec.structs.replace(told, missed=missed), seen, out)
    returned = seen.ok and (seen.usable or seen.role is Role.BACKUP or seen.draining)
    if returned:
        number = told.attempts + 1
        text = f"member {seen.name} is back in service"
        out.add(Kind.MEMBER_RECOVERED, text, seen, attempt=number)
        return msgspec.structs.replace(
            told, failed=False, given_up=False, attempts=0, counted=0, missing_since=None, back_since=out.now
        )
    if seen.given_up and not told.given_up:
        out.add(Kind.MEMBER_GIVEN_UP, f"no further attempt is made to reach member {seen.name}", seen)
    return msgspec.structs.replace(told, given_up=seen.given_up)


def _attempts(told: MemberTold, seen: Seen, out: _Events) -> MemberTold:
    if seen.ok:
        return told
    new = seen.attempts - told.counted if seen.attempts >= told.counted else seen.attempts
    for number in range(told.attempts + 1, told.attempts + new + 1):
        text = f"recovery attempt #{number} failed for member {seen.name}: {seen.reason or 'no answer'}"
        out.add(Kind.RECOVERY_FAILED, text, seen, attempt=number)
    return msgspec.structs.replace(told, attempts=told.attempts + new, counted=seen.attempts)


def _sync(told: MemberTold, seen: Seen, sight: Sight, out: _Events) -> MemberTold:
    """Every change is owed for an instant. Out of sync is what the journal says is, or what stays owed."""
    if not sight.journal:
        return told
    stays = seen.oldest_owed is not None and seen.oldest_owed == told.oldest_owed
    behind = seen.membership is Membership.OUT_OF_SYNC or (seen.owed > 0 and (stays or told.failed or told.out_of_sync))
    if behind and not told.out_of_sync:
        out.add(Kind.OUT_OF_SYNC, f"member {seen.name} is out of sync: {seen.owed} objects to bring up to date", seen)
    elif told.out_of_sync and not behind:
        out.add(Kind.RESYNC_DONE, f"member {seen.name} is in sync again", seen)
    return msgspec.structs.replace(told, out_of_sync=behind, oldest_owed=seen.oldest_owed)


def _noted(told: Told, sight: Sight, out: _Events) -> int | None:
    if not sight.journal:
        return told.noted
    if told.noted is None:
        return sight.newest
    by_name = {seen.name: seen for seen in sight.members}
    for event in sight.noted:
        if event.number > told.noted and event.kind in ALARMS:
            member = None if event.member is None else by_name.get(event.member)
            out.add(ALARMS[event.kind], f"{event.member or sight.group}: {event.text}", member)
    return max(told.noted, sight.newest)


def _levels(sight: Sight, members: dict[str, MemberTold]) -> tuple[bool, bool, bool]:
    """(degraded, below min_replicas, all lost), from what was told of the members: missed once is not lost."""
    expected = [
        seen
        for seen in sight.members
        if seen.role is not Role.BACKUP and not seen.draining and seen.membership is not Membership.JOINING
    ]
    up = [seen for seen in expected if seen.membership is Membership.ADMITTED and not members[seen.name].failed]
    return len(up) < len(expected), len(up) < min(sight.min_replicas, len(sight.members)), bool(expected) and not up


def _group(told: Told, out: _Events, sight: Sight, degraded: bool, below: bool, lost: bool) -> None:
    name = sight.group
    if degraded and not told.degraded:
        out.add(Kind.GROUP_DEGRADED, f"group {name} is degraded: not all of its members are in service")
    if below and not told.below:
        out.add(Kind.BELOW_MIN_REPLICAS, f"group {name} has fewer members in service than min_replicas asks for")
    if lost and not told.lost:
        out.add(Kind.ALL_LOST, f"group {name} has no member in service")
    if told.lost and not lost:
        out.add(Kind.SERVING_AGAIN, f"group {name} has a member in service again")
    if told.below and not below:
        out.add(Kind.MIN_REPLICAS_REACHED, f"group {name} has enough members in service for min_replicas")
    if told.degraded and not degraded:
        out.add(Kind.GROUP_WHOLE, f"group {name} has all of its members in service")


def luna(event: WatchEvent) -> str | None:
    """T's table 5.2: the part of the line after time and process number; None where Luna had no such line."""
    match event.kind:
        case Kind.MEMBER_FAILED:
            return f"HA group: {event.serial} has dropped member: {event.member_serial}"
        case Kind.RECOVERY_FAILED:
            return (
                f"HA group: {event.serial} recovery attempt #{event.attempt} failed for member: {event.member_serial}"
            )
        case Kind.MEMBER_RECOVERED:
            return (
                f"HA group: {event.serial} recovery attempt #{event.attempt} succeeded for member: "
                f"{event.member_serial}"
            )
        case Kind.MEMBER_GIVEN_UP | Kind.MEMBER_QUARANTINED:
            return (
                f"HA group: {event.serial} unable to reach member: {event.member_serial}. Manual Recover or Auto "
                "Recovery will not be able to recover this member"
            )
        case _:
            return None
