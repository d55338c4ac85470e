"""Prometheus metrics: made from the latest reports when somebody asks, but for what has to be counted as it happens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hagroup.core.states import State
from hagroup.engine.status import IN_SERVICE
from hagroup.watchdog.group import Report

_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class _Reports(Collector):
    """Gauges of all groups."""

    def __init__(self, reports: Callable[[], Iterable[Report]]) -> None:
        self._reports = reports

    def collect(self) -> Iterator[Metric]:
        reports = list(self._reports())
        yield from _group_gauges(reports)
        yield from _member_gauges([report for report in reports if report.active])


def _gauge(name: str, text: str, labels: list[str], values: Iterable[tuple[list[str], float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"hagroup_{name}", text, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family


def _group_gauges(reports: list[Report]) -> Iterator[Metric]:
    group = ["group"]
    known = [(report, report.status) for report in reports if report.active and report.status is not None]
    yield _gauge(
        "watchdog_active", "1: this watchdog is the group's active one", group, [([r.label], r.active) for r in reports]
    )
    yield _gauge("detection_bound_seconds", "a failure is told within", group, [([r.label], r.bound) for r in reports])
    yield _gauge("journal_up", "1: the journal answers", group, [([r.label], r.journal) for r in reports if r.active])
    yield _gauge(
        "members_up",
        "members in service",
        group,
        [([r.label], sum(member.state == IN_SERVICE for member in s.members)) for r, s in known],
    )
    yield _gauge("members", "members of the group", group, [([r.label], len(s.members)) for r, s in known])
    yield _gauge("objects", "live objects", group, [([r.label], s.objects) for r, s in known])
    yield _gauge("tombstones", "destroyed objects", group, [([r.label], s.tombstones) for r, s in known])
    yield _gauge("intents", "changes under way", group, [([r.label], r.intents) for r, _ in known])
    yield _gauge(
        "last_heartbeat_timestamp_seconds",
        "when members were last asked",
        group,
        [([r.label], r.time) for r, _ in known],
    )
    yield _gauge(
        "last_verify_timestamp_seconds",
        "when all replicas had been proved; 0: not since this watchdog began",
        group,
        [([r.label], r.verified.finished or 0.0) for r, _ in known],
    )
    yield _gauge("replicas_proved", "by this watchdog", group, [([r.label], r.verified.proved) for r, _ in known])
    yield _gauge("replicas_wrong", "found by this watchdog", group, [([r.label], r.verified.wrong) for r, _ in known])


def _member_gauges(reports: list[Report]) -> Iterator[Metric]:
    labels = ["group", "member"]
    known = [
        (report, [report.label, member.name], member)
        for report in reports
        if report.status is not None
        for member in report.status.members
    ]
    yield _gauge(
        "member_up", "1: in service", labels, [(where, member.state == IN_SERVICE) for _, where, member in known]
    )
    yield _gauge(
        "member_heartbeat_ok",
        "1: it answered the last heartbeat",
        labels,
        [(where, r.beats[m.name].ok) for r, where, m in known if m.name in r.beats],
    )
    yield _gauge(
        "member_state",
        "1 for the state in which the watchdog has the member",
        [*labels, "state"],
        [
            ([*where, state.value], r.states[m.name] == state.value)
            for r, where, m in known
            if m.name in r.states
            for state in State
        ],
    )
    yield _gauge(
        "member_state_seconds",
        "how long it has been in this state",
        labels,
        [(where, max(0.0, r.boot - r.since[m.name])) for r, where, m in known if m.name in r.since],
    )
    yield _gauge(
        "member_admitted_since_timestamp_seconds",
        "since when a member that is in service is",
        labels,
        [
            (where, datetime.fromisoformat(m.since).timestamp())
            for _, where, m in known
            if m.state == IN_SERVICE and m.since
        ],
    )
    yield _gauge(
        "member_outstanding_calls",
        "calls of this watchdog alone that are under way; what applications call only they know",
        labels,
        [(where, r.outstanding.get(m.name, 0)) for r, where, m in known],
    )
    yield _gauge(
        "member_unanswered_changes",
        "changes that applications or others asked it for and that it has not answered, from the journal",
        labels,
        [(where, m.unanswered) for _, where, m in known],
    )
    yield _gauge(
        "member_resync_backlog",
        "objects to be brought up to date",
        [*labels, "kind"],
        [
            ([*where, kind], value)
            for _, where, m in known
            for kind, value in (("install", m.missing), ("set", m.stale), ("destroy", m.pending_deletes))
        ],
    )
    yield _gauge(
        "member_free_private_memory_bytes",
        "as the token says",
        labels,
        [
            (where, memory)
            for r, where, m in known
            if (beat := r.beats.get(m.name)) is not None and (memory := beat.free_memory) is not None
        ],
    )


class Metrics:
    """The registry of one service."""

    def __init__(self, reports: Callable[[], Iterable[Report]]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Reports(reports))
        labels = ["group", "member"]
        self._latency = Histogram(
            "hagroup_heartbeat_seconds", "answered heartbeats", labels, registry=self.registry, buckets=_BUCKETS
        )
        self._errors = Counter(
            "hagroup_heartbeat_errors", "heartbeats without a good answer", [*labels, "error"], registry=self.registry
        )
        self._events = Counter("hagroup_events", "events told", ["group", "kind"], registry=self.registry)
        self._counted: dict[str, set[str]] = {}

    def count(self, report: Report) -> None:
        """One heartbeat of one group."""
        if not report.active:
            return
        for name, beat in report.beats.items():
            if beat.ok:
                self._latency.labels(report.label, name).observe(beat.seconds)
            else:
                self._errors.labels(report.label, name, beat.error or "unknown").inc()
        counted = self._counted.get(report.serial, set())
        for event in report.events:
            if event.id not in counted:
                self._events.labels(event.group, event.kind.value).inc()
        self._counted[report.serial] = {event.id for event in report.events}

    def render(self) -> bytes:
        return generate_latest(self.registry)
