"""The watchdog's port: what it shows, and to whom."""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from hagroup.config.model import Endpoint
from hagroup.core.watch import GRAVE, Kind, WatchEvent
from hagroup.engine.status import GroupStatus, JournalStatus, MemberStatus, Status
from hagroup.watchdog.group import Report
from hagroup.watchdog.heartbeat import Beat
from hagroup.watchdog.metrics import Metrics
from hagroup.watchdog.page import Board, Page
from tests.support.browser import browser

EVENT = WatchEvent(
    id="4711-1",
    kind=Kind.MEMBER_FAILED,
    severity="warning",
    group="payments",
    serial="4711",
    time=0.0,
    text="<b>member hsm1 failed</b>",
)
MEMBER = MemberStatus(
    name="hsm1",
    serial="abc",
    role="active",
    state="failed",
    in_sync=False,
    missing=3,
    stale=0,
    pending_deletes=1,
    unmanaged=None,
    since="2026-01-01T00:00:00+00:00",
    reason="gone",
)
REPORT = Report(
    label="payments",
    serial="4711",
    active=True,
    bound=2.0,
    status=Status(
        group=GroupStatus(label="payments", serial="4711", in_sync=False, state="down"),
        members=[MEMBER],
        objects=7,
        tombstones=2,
        journal=JournalStatus(url="sqlite:/x", ok=True),
    ),
    beats={"hsm1": Beat(ok=False, reason="gone", error="MemberGone")},
    states={"hsm1": "failed"},
    since={"hsm1": 10.0},
    boot=25.0,
    events=(EVENT,),
)
STANDING_BY = Report(label="other", serial="4712", active=False, bound=2.0)


class Served:
    def __init__(self) -> None:
        self.reports = [REPORT, STANDING_BY]
        self.metrics = Metrics(lambda: self.reports)
        self.board = Board(lambda: self.reports)
        self.page = Page(Endpoint("127.0.0.1", 0), self.board, self.metrics.render)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.page.address + path, timeout=60) as reply:
            return str(reply.read().decode())


@pytest.fixture
def served() -> Iterator[Served]:
    one = Served()
    yield one
    one.board.close()
    one.page.stop()


def test_status_document(served: Served) -> None:
    first, second = json.loads(served.get("status.json"))["groups"]
    assert first["group"]["state"] == "down"
    assert first["members"][0]["heartbeat"]["error"] == "MemberGone"
    assert first["events"][0]["id"] == "4711-1"
    assert second["watchdog"]["active"] is False


def test_metrics_count_each_event_and_heartbeat_once(served: Served) -> None:
    for _ in range(3):
        served.metrics.count(REPORT)
    text = served.get("metrics")
    for line in (
        'hagroup_member_up{group="payments",member="hsm1"} 0.0',
        'hagroup_members_up{group="payments"} 0.0',
        'hagroup_member_resync_backlog{group="payments",kind="install",member="hsm1"} 3.0',
        'hagroup_member_state_seconds{group="payments",member="hsm1"} 15.0',
        'hagroup_heartbeat_errors_total{error="MemberGone",group="payments",member="hsm1"} 3.0',
        'hagroup_events_total{group="payments",kind="member failed"} 1.0',
        'hagroup_watchdog_active{group="other"} 0.0',
        'hagroup_tombstones{group="payments"} 2.0',
    ):
        assert line in text.splitlines()
    assert 'hagroup_member_up{group="other"' not in text


def test_page_loads_nothing_from_elsewhere(served: Served) -> None:
    page = served.get("")
    assert "//" not in page.replace("<!doctype", "")
    assert "innerHTML" not in page
    assert 'name="viewport"' in page


def test_feed_goes_on(served: Served) -> None:
    with urllib.request.urlopen(served.page.address + "events", timeout=60) as feed:
        assert json.loads(feed.readline().removeprefix(b"data: "))["groups"][0]["objects"] == 7
        assert feed.readline() == b"\n"
        served.reports = [STANDING_BY]
        served.board.ring()
        assert [one["group"]["label"] for one in json.loads(feed.readline()[6:])["groups"]] == ["other"]


@pytest.mark.parametrize(
    ("host", "status"), [("evil.example:80", 403), ("localhost", 200), ("[::1]:1", 200), ("", 403)]
)
def test_only_under_its_own_name(served: Served, host: str, status: int) -> None:
    address = served.page.address.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("GET", "/status.json", headers={"Host": host})
    assert connection.getresponse().status == status
    connection.close()


def test_unknown_path(served: Served) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        served.get("secrets")
    assert caught.value.code == 404
    caught.value.close()


def test_in_a_real_browser(served: Served, tmp_path: Path) -> None:
    """At a phone's width and a desktop's: it fits, shows what comes by the live feed, and says so when that ends."""
    with browser(tmp_path / "profile") as tab:
        for name, width, phone in (("phone", 390, True), ("desktop", 1280, False)):
            served.reports = [STANDING_BY]
            tab.open(served.page.address, width=width, height=844, phone=phone)
            before = tab.wait_for("Another watchdog is the active one")
            assert "payments" not in before
            served.reports = [REPORT, STANDING_BY]
            served.board.ring()
            seen = tab.wait_for("out of sync: 4 to bring up to date")
            assert "a failure is told within 2 s" in seen
            assert "<b>member hsm1 failed</b>" in seen, "what comes from outside is text"
            assert tab.evaluate("document.getElementById('link').textContent") == "live"
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
            tab.picture(tmp_path / f"{name}.png")
        served.board.close()
        served.page.stop()
        tab.wait_for("what you see may be old")
    print(f"pictures: {tmp_path}")


def test_dashboard_and_alert_rules_know_all_metrics_and_no_other(served: Served) -> None:
    tools = Path(__file__).parents[2] / "tools"
    dashboard, rules = json.loads((tools / "grafana-dashboard.json").read_text()), tools / "prometheus-rules.yml"
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    served.metrics.count(REPORT)
    families = {family.name: {sample.name for sample in family.samples} for family in served.metrics.registry.collect()}
    there = {name for samples in families.values() for name in samples} | {"hagroup_heartbeat_seconds_bucket"}
    of_panels = set(re.findall(r"hagroup_\w+", " ".join(panels)))
    of_rules = set(re.findall(r"hagroup_\w+", rules.read_text()))
    assert (of_panels | of_rules) - there - set(families) == set()
    unseen = [name for name, samples in families.items() if not ({name} | samples) & of_panels]
    assert unseen == [] or (unseen == ["hagroup_heartbeat_seconds"] and "hagroup_heartbeat_seconds_bucket" in of_panels)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    kinds = re.search(r'kind=~"([^"]+)"', rules.read_text())
    assert kinds is not None and set(kinds[1].split("|")) <= {kind.value for kind in Kind}
    for kind in GRAVE:  # each has a rule, by the event or by what it is about
        by_state = ("all members lost", "member quarantined", "journal unreachable")
        assert kind.value in kinds[1] or kind.value in by_state, kind
