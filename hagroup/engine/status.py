"""What ``status`` shows: the journal's knowledge of the group, and whether each member answers now. Needs no PIN."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import msgspec

from hagroup.config.model import GroupConfig, MemberConfig
from hagroup.core.calls import Ckr, DeadlinePassed
from hagroup.core.clock import Clock
from hagroup.core.records import WATCHDOG, Event, MemberRecord, Membership, Observation, OwedKind, OwedRow
from hagroup.core.since import failed_since, in_service_since
from hagroup.core.watch import DELIVERED, MemberTold, Told, detection_bound
from hagroup.engine.login import pin_trouble
from hagroup.engine.opening import CONNECTION_LOST, open_life
from hagroup.engine.told import told_in
from hagroup.engine.verify import RECENT, UNMANAGED_COUNTED, unmanaged_counted
from hagroup.errors import HAError
from hagroup.journal.api import Journal
from hagroup.journal.clock import SystemClock
from hagroup.members import ModuleProblem

FAILED, IN_SERVICE = "failed", "in service"


class MemberStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One member; the numbers count objects."""

    name: str
    serial: str
    role: str
    state: str
    in_sync: bool
    missing: int
    """Objects that it has to be given."""
    stale: int
    """Objects whose attributes it has to be brought up to."""
    pending_deletes: int
    unmanaged: int | None
    """Objects on its token that the group does not know, as counted last; None: not lately (``verify`` counts)."""
    since: str
    """Since when it is in ``state``, as far as anybody noticed (RFC 3339); empty: not known."""
    reason: str | None
    """Why it is not in service or not in sync, and what to do."""
    site: str | None = None
    unanswered: int = 0
    """Changes that some client asked it for and that it has not answered (DESIGN.md 4.1)."""
    latency_ms: float | None = None
    """How long it took to answer just now; None: it was not asked here, or did not answer."""


class GroupStatus(msgspec.Struct, frozen=True, kw_only=True):
    label: str
    serial: str
    in_sync: bool
    state: str
    """``ok``, ``degraded`` (a member is not in service), ``out of sync`` or ``down`` (no member answers)."""


class JournalStatus(msgspec.Struct, frozen=True, kw_only=True):
    url: str
    ok: bool
    reason: str | None = None
    """Why it cannot be read; the members' numbers are not known then."""


class LastEvent(msgspec.Struct, frozen=True, kw_only=True):
    time: str
    kind: str
    member: str | None
    text: str


class Detection(msgspec.Struct, frozen=True, kw_only=True):
    """How soon a failure is told where a watchdog runs with this configuration; all in seconds but ``threshold``."""

    interval: float
    threshold: int
    probe: float
    detection_bound: float
    """``interval`` times ``threshold`` and ``probe``."""


class ClientPassedOver(msgspec.Struct, frozen=True, kw_only=True):
    """It may go on with what it knew before (DESIGN.md 4.5)."""

    host: str
    process: int
    since: str
    what: str
    """The change that it did not acknowledge."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The document that ``ha-admin status --json`` prints; fields are added, never renamed."""

    group: GroupStatus
    members: list[MemberStatus]
    objects: int
    tombstones: int
    journal: JournalStatus
    detection: Detection | None = None
    watchdog: bool | None = None
    """Whether one watches this group now; None: not known without the journal."""
    passed_over: list[ClientPassedOver] = []
    """Programs that a change did not wait for any longer, until they are heard of again, or a person says that they
    are over."""
    events: list[LastEvent] = []
    """The last ones, oldest first."""


class _Answer(msgspec.Struct, frozen=True):
    """What a member said when it was asked."""

    why_not: str | None
    latency_ms: float | None = None


class _Known(msgspec.Struct, frozen=True):
    """What the journal tells of all members, read once."""

    events: Sequence[Event]
    owed: Mapping[str, list[OwedRow]]
    told: Told
    """By the watchdog."""
    watched: bool
    """One watches now, so that what it told last is so."""
    seen: Sequence[tuple[Observation, float]]
    """By processes of this machine that live, and when (wall clock)."""


def _read(config: GroupConfig, journal: Journal, clock: Clock) -> _Known:
    events = journal.events(limit=RECENT)
    ago = clock.wall() - clock.boot()
    here = {client.owner for client in journal.clients() if client.here}
    return _Known(
        events=events,
        owed=owed_by_member(journal),
        told=told_in(events),
        watched=journal.lease_held(f"watchdog/{config.group.serial}"),
        seen=[(one, one.boot_time + ago) for one in journal.observations() if one.observer in here],
    )


def gather(
    config: GroupConfig,
    journal: Journal,
    answers: Mapping[str, str | None] | None = None,
    *,
    clock: Clock | None = None,
) -> Status:
    """Read the journal and ask every member, in parallel, whether its token is there; nothing is changed.

    :param answers: what is known already by member's name (None: it answers; else why not): nobody is asked.
    :raises JournalUnavailable: the journal cannot be read.
    """
    _, records = journal.view()
    configured = {member.name: member for member in config.members}
    asked: dict[str, _Answer] = {name: _Answer(why_not) for name, why_not in (answers or {}).items()}
    if answers is None:
        with ThreadPoolExecutor(max_workers=max(1, len(records))) as pool:
            futures = {
                record.name: pool.submit(_ask, configured[record.name], journal, record, config.timeouts.call)
                for record in records
                if record.name in configured
            }
            asked = {name: future.result() for name, future in futures.items()}
    elsewhere = _Answer("not in hagroup.toml of this host")
    known = _read(config, journal, clock or SystemClock())  # a watchdog gathers this with every heartbeat
    members = [
        _member(record, known, asked.get(record.name, elsewhere), configured.get(record.name)) for record in records
    ]
    counts = journal.counts()
    return Status(
        group=GroupStatus(
            label=config.group.label,
            serial=config.group.serial or "",
            in_sync=all(member.in_sync for member in members),
            state=_group_state(members),
        ),
        members=members,
        objects=counts["live"],
        tombstones=counts["tombstones"],
        journal=JournalStatus(url=str(config.journal.url), ok=True),
        watchdog=known.watched,
        events=[
            LastEvent(time=_rfc3339(event.time), kind=event.kind, member=event.member, text=event.text)
            for event in known.events[-50:]
            if event.kind != UNMANAGED_COUNTED and event.text not in ("", DELIVERED)
        ][-_EVENTS:],
        detection=_detection(config),
        passed_over=[
            ClientPassedOver(host=one.host, process=one.process, since=_rfc3339(one.time), what=one.what)
            for one in journal.passed_over()
        ],
    )


_EVENTS = 5


def _rfc3339(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).isoformat(timespec="seconds")


def without_journal(config: GroupConfig, why: str) -> Status:
    """What can be said where the journal cannot be read: which members answer."""
    with ThreadPoolExecutor(max_workers=max(1, len(config.members))) as pool:
        timeout = config.timeouts.call
        answers = [one.why_not for one in pool.map(lambda member: _ask(member, None, None, timeout), config.members)]
    members = [
        MemberStatus(
            name=member.name,
            serial=member.token_serial or "",
            role=member.role.value,
            state=FAILED if answer else "answers",
            in_sync=False,
            missing=0,
            stale=0,
            pending_deletes=0,
            unmanaged=None,
            since="",
            reason=answer or "not known without the journal",
        )
        for member, answer in zip(config.members, answers, strict=True)
    ]
    return Status(
        group=GroupStatus(
            label=config.group.label,
            serial=config.group.serial or "",
            in_sync=False,
            state="down" if all(answers) else "degraded",
        ),
        members=members,
        objects=0,
        tombstones=0,
        journal=JournalStatus(url=str(config.journal.url), ok=False, reason=why),
        detection=_detection(config),
    )


def _detection(config: GroupConfig) -> Detection:
    section, probe = config.watchdog, config.timeouts.probe
    return Detection(
        interval=section.interval,
        threshold=section.threshold,
        probe=probe,
        detection_bound=detection_bound(section.interval, section.threshold, probe),
    )


def _ask(config: MemberConfig, journal: Journal | None, record: MemberRecord | None, timeout: float) -> _Answer:
    """Whether its token answers, and how fast."""
    serial = None if record is None else record.serial
    try:
        life = open_life(config, journal, generation=1, timeout=timeout, serial=serial)
    except (Ckr, DeadlinePassed, ModuleProblem, HAError, *CONNECTION_LOST) as error:
        return _Answer(str(error))
    try:
        began = time.monotonic()
        life.connection.probe(timeout=timeout)
        took = (time.monotonic() - began) * 1000
    except (Ckr, DeadlinePassed, *CONNECTION_LOST) as error:
        return _Answer(str(error))
    finally:
        life.connection.close()
    return _Answer(pin_trouble(life.token.flags), round(took, 2))


def owed_by_member(journal: Journal) -> dict[str, list[OwedRow]]:
    """The rows of each member that owes something, by change number."""
    found: dict[str, list[OwedRow]] = {}
    for row in journal.owed():
        found.setdefault(row.member, []).append(row)
    return found


def _member(
    record: MemberRecord,
    known: _Known,
    answer: _Answer,
    config: MemberConfig | None,
) -> MemberStatus:
    rows = known.owed.get(record.name, [])
    owed = Counter(row.kind for row in rows)
    unreachable = answer.why_not
    if record.membership is not Membership.ADMITTED:
        state, reason = record.membership.value, record.reason
    elif unreachable is not None:
        state, reason = FAILED, unreachable
    elif record.draining:
        state, reason = "draining", record.reason
    else:
        state, reason = IN_SERVICE, None
    refusals = [row.reason for row in rows if row.reason]
    return MemberStatus(
        name=record.name,
        serial=record.serial,
        role=record.role.value,
        state=state,
        in_sync=record.membership is Membership.ADMITTED and not owed,
        missing=owed[OwedKind.INSTALL],
        stale=owed[OwedKind.SET],
        pending_deletes=owed[OwedKind.DESTROY],
        unmanaged=unmanaged_counted(known.events, record.name),
        since=_rfc3339(since) if (since := _since(record, state, known)) else "",
        reason=reason or (refusals[0] if refusals else None),
        site=None if config is None else config.site,
        unanswered=sum(row.sent for row in rows),
        latency_ms=answer.latency_ms,
    )


def _since(record: MemberRecord, state: str, known: _Known) -> float | None:
    if state not in (FAILED, IN_SERVICE):
        return record.since
    told = known.told.members.get(record.name, MemberTold())
    seen = [(one, when) for one, when in known.seen if one.member == record.name]
    # The watchdog's own heartbeats are written anew each time: what it told says when they began to fail.
    fails = [when for one, when in seen if not one.ok and one.kind != WATCHDOG]
    if known.watched and told.failed and told.missing_since is not None:
        fails.append(told.missing_since)
    failed = failed_since(fails, [*(when for one, when in seen if one.ok), told.back_since or 0.0])
    return failed if state == FAILED else in_service_since(record.since, told.back_since, failed)


def _group_state(members: list[MemberStatus]) -> str:
    serving = [member for member in members if member.state == IN_SERVICE]
    if not serving:
        return "down"
    if len(serving) < len(members):
        return "degraded"
    return "ok" if all(member.in_sync for member in members) else "out of sync"
