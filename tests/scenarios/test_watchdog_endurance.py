"""What a watchdog costs when it has run for long: 10,000 heartbeats, fourteen hours at one in 5 s, of real members."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.groups import GroupFixture
from tests.support.watchdogs import configure, heartbeats_with_a_flapping_member


@pytest.mark.timeout(900)  # half a minute of processor time, which a busy machine gives in several
def test_memory_and_descriptors_are_flat_with_a_flapping_member(new_group: Callable[..., GroupFixture]) -> None:
    """One member's worker comes and goes all the time. ``tools/bench/watchdog`` shows the figures one by one."""
    group = new_group()
    configure(group, "verify_rate = 0")
    costs = heartbeats_with_a_flapping_member(group, 10_000, every=1000)
    print(f"after each 1,000 heartbeats: {costs}")
    before, after = costs[:5], costs[5:]  # by then its pools of threads, channels and connections are full
    assert max(one.megabytes for one in after) < max(one.megabytes for one in before) + 3.0
    assert max(one.files for one in after) <= max(one.files for one in before) + 6
    assert max(one.threads for one in after) <= max(one.threads for one in before) + 6
