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
from hagroup.core.records import Event, MemberRecord, Membership, OwedKind, OwedRow
from hagroup.core.watch import DELIVERED, detection_bound
from hagroup.engine.login import pin_trouble
from hagroup.engine.opening import CONNECTION_LOST, open_life
from hagroup.engine.verify import RECENT, UNMANAGED_COUNTED, unmanaged_counted
from hagroup.errors import HAError
from hagroup.journal.api import Journal
from hagroup.members import ModuleProblem


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
    """When ``state`` last changed, as far as the journal knows (RFC 3339)."""
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
    events: list[LastEvent] = []
    """The last ones, oldest first."""


class _Answer(msgspec.Struct, frozen=True):
    """What a member said when it was asked."""

    why_not: str | None
    latency_ms: float | None = None


def gather(config: GroupConfig, journal: Journal, answers: Mapping[str, str | None] | None = None) -> Status:
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
    # each read once: a watchdog gathers this with every heartbeat
    events, owed = journal.events(limit=RECENT), owed_by_member(journal)
    members = [
        _member(
            record, owed.get(record.name, []), events, asked.get(record.name, elsewhere), configured.get(record.name)
        )
        for record in records
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
        watchdog=journal.lease_held(f"watchdog/{config.group.serial}"),
        events=[
            LastEvent(time=_rfc3339(event.time), kind=event.kind, member=event.member, text=event.text)
            for event in events[-50:]
            if event.kind != UNMANAGED_COUNTED and event.text not in ("", DELIVERED)
        ][-_EVENTS:],
        detection=_detection(config),
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
            state="failed" if answer else "answers",
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
    rows: Sequence[OwedRow],
    events: Sequence[Event],
    answer: _Answer,
    config: MemberConfig | None,
) -> MemberStatus:
    owed = Counter(row.kind for row in rows)
    unreachable = answer.why_not
    if record.membership is not Membership.ADMITTED:
        state, reason = record.membership.value, record.reason
    elif unreachable is not None:
        state, reason = "failed", unreachable
    elif record.draining:
        state, reason = "draining", record.reason
    else:
        state, reason = "in service", None
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
        unmanaged=unmanaged_counted(events, record.name),
        since=_rfc3339(record.since),
        reason=reason or (refusals[0] if refusals else None),
        site=None if config is None else config.site,
        unanswered=sum(row.sent for row in rows),
        latency_ms=answer.latency_ms,
    )


def _group_state(members: list[MemberStatus]) -> str:
    serving = [member for member in members if member.state == "in service"]
    if not serving:
        return "down"
    if len(serving) < len(members):
        return "degraded"
    return "ok" if all(member.in_sync for member in members) else "out of sync"
