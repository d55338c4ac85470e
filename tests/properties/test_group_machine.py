"""Random histories of a group (issue 3): several clients over simulated members, with everything that goes wrong.

Hypothesis draws, and shortens what breaks. ``tools/explore`` runs many more by seed, with every interaction shown.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.history import CLIENT_STEPS, TROUBLE, WORLD_STEPS, History, Step, play, random_steps
from tests.support.simulation import Simulation

SEEDS = 12
NUMBERS = st.integers(0, 1 << 12)


class GroupMachine(RuleBasedStateMachine):
    """One history: its steps are drawn, it heals at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.stack = contextlib.ExitStack()
        self.stack.callback(shutil.rmtree, self.folder)
        self.history: History | None = None
        self.broken = False

    @initialize(seed=st.integers(0, 7), local=st.booleans())
    def begin(self, seed: int, local: bool) -> None:
        simulation = self.stack.enter_context(Simulation(self.folder, seed, local=local).running())
        self.history = History(simulation, [None, None])

    def _run(self, name: str, first: int, second: int, third: int) -> None:
        assert self.history is not None
        try:
            self.history.run((name, first, second, third))
        except BaseException:
            self.broken = True
            raise

    @rule(client=st.integers(0, 1), kind=st.integers(0, 4))
    def create(self, client: int, kind: int) -> None:
        self._run("create", client, kind, 0)

    @rule(name=st.sampled_from(CLIENT_STEPS[1:]), client=st.integers(0, 1), which=NUMBERS)
    def application(self, name: str, client: int, which: int) -> None:
        self._run(name, client, which, 0)

    @rule(name=st.sampled_from(WORLD_STEPS), member=st.integers(0, 2), how=NUMBERS, when=NUMBERS)
    def world(self, name: str, member: int, how: int, when: int) -> None:
        self._run(name, member, how, when)

    @rule(name=st.sampled_from(TROUBLE), client=st.integers(0, 1), when=NUMBERS, what=NUMBERS)
    def trouble(self, name: str, client: int, when: int, what: int) -> None:
        self._run(name, client, when, what)

    @rule(client=st.integers(0, 1))
    def tick(self, client: int) -> None:
        self._run("tick", client, 0, 0)

    @invariant()
    def holds(self) -> None:
        if self.history is not None:
            self.history.check()

    def teardown(self) -> None:
        with self.stack:
            if self.history is not None and not self.broken:
                self.history.finish()


GroupMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestGroupMachine = GroupMachine.TestCase


@pytest.mark.parametrize("block", range(SEEDS))
def test_histories_of_seeds(block: int) -> None:
    """What ``tools/explore`` does, a few of them."""
    for seed in range(block * 10, block * 10 + 10):
        play(random_steps(seed, 50), seed)


FOUND: dict[str, tuple[int, list[Step]]] = {
    # a write was cut off, and its ghost stayed on the token
    "ghost": (
        4,
        [
            ("fault", 37445, 42876, 2383),
            ("create", 38457, 25089, 58214),
        ],
    ),
    # a connection that ended before a change was sent showed as MemberGone in the application
    "member gone": (
        23,
        [
            ("create", 61074, 25774, 60160),
            ("create", 38750, 28305, 12013),
            ("fault", 21617, 1543, 58286),
            ("pin", 44928, 54323, 21638),
            ("off", 3955, 22697, 58893),
            ("set_label", 36376, 57951, 994),
        ],
    ),
    # the journal failed at the end of a login, which then counted as under way for ever
    "login for ever": (
        36,
        [
            ("find", 21959, 23264, 8347),
            ("time", 2124, 49868, 45626),
            ("journal_error", 27515, 29325, 46575),
            ("create", 19342, 18379, 23746),
            ("destroy", 36697, 38681, 342),
            ("pin", 39337, 7817, 39171),
            ("tick", 4475, 65233, 10480),
            ("set_label", 32031, 65018, 31801),
        ],
    ),
    # a restored token held a destroyed object under its earlier label
    "restored, destroyed": (
        1111,
        [
            ("create", 10737, 46623, 36929),
            ("snapshot", 31616, 28164, 19768),
            ("set_label", 38979, 31370, 31334),
            ("create", 57302, 36668, 16119),
            ("hang", 13850, 1528, 29948),
            ("create", 5807, 19568, 61810),
            ("destroy", 55989, 28446, 54511),
            ("restore", 1619, 3206, 6929),
        ],
    ),
    # a restored token lacked what was created since, and its manifest did not show it
    "restored, created since": (
        3071,
        [
            ("snapshot", 8030, 37855, 41207),
            ("create", 23345, 10329, 57862),
            ("restore", 7358, 26661, 12174),
        ],
    ),
    # a token was put back to a state between an object and the record beside it
    "between object and record": (
        904683,
        [
            ("hang", 28663, 42838, 61386),
            ("create", 30603, 33375, 45859),
            ("back", 25669, 2361, 50963),
            ("fault", 4747, 29354, 37091),
            ("create", 3036, 43938, 35263),
            ("hang", 16671, 18252, 7811),
            ("snapshot", 12268, 50003, 13306),
            ("create", 8279, 16378, 723),
            ("restore", 19027, 57013, 18431),
        ],
    ),
    # the same token, whose object was destroyed since: its record alone was not looked for
    "record of a destroyed object": (
        940998,
        [
            ("fault", 27548, 41098, 1909),
            ("create", 36371, 14864, 6402),
            ("snapshot", 50498, 63815, 52751),
            ("destroy", 10104, 54727, 51721),
            ("reboot", 16724, 53558, 18622),
            ("read", 55993, 10376, 3470),
            ("restore", 53993, 51028, 41414),
        ],
    ),
    # what was made late on a token that was put back hid the older one beside it, under a label of before
    "late beside an older one": (
        906442,
        [
            ("create", 8004, 30740, 37419),
            ("snapshot", 38888, 6037, 1191),
            ("set_label", 52454, 7189, 19389),
            ("off", 46249, 4126, 48295),
            ("create", 21428, 9284, 54778),
            ("destroy", 61765, 56639, 2520),
            ("fault", 49898, 27829, 34401),
            ("restore", 29642, 21579, 6821),
            ("set_label", 24581, 53697, 62158),
            ("set_label", 9503, 49011, 58722),
        ],
    ),
    # of two attribute changes at once, one was refused as if the object was gone
    "two changes": (
        4039,
        [
            ("create", 63485, 48850, 15874),
            ("tick", 2964, 17867, 40448),
            ("fault", 14606, 51308, 842),
            ("set_label", 43792, 9306, 23158),
            ("kill", 20968, 56953, 58680),
            ("create", 64025, 36587, 23934),
            ("tick", 32318, 61685, 63672),
            ("intrude", 11715, 36589, 54168),
            ("tick", 28281, 19512, 29059),
            ("set_label", 45731, 26907, 24039),
        ],
    ),
    # a process that knew of a cut-off write went on as its own forked child, which had forgotten it
    "ghost, forgotten in a fork": (
        948557,
        [
            ("tick", 25057, 32075, 11014),
            ("fault", 34123, 40526, 40309),
            ("fault", 7348, 58204, 3221),
            ("fault", 9602, 57307, 25425),
            ("fault", 23655, 15479, 57433),
            ("create", 55014, 14139, 10596),
            ("intrude", 34759, 41327, 49507),
            ("hang", 58920, 47316, 37802),
            ("time", 3798, 43919, 42148),
            ("create", 58579, 45125, 2142),
            ("sign", 18812, 1718, 12908),
            ("time", 46339, 55061, 18999),
            ("destroy", 56523, 2724, 21962),
            ("fork", 41024, 41472, 28692),
        ],
    ),
    # an object was made although the member reported an error; its record was taken away, a restored token lacked it
    "made in spite of an error": (
        958443,
        [
            ("tick", 34108, 63302, 23919),
            ("tick", 10605, 92, 18622),
            ("fault", 43073, 23012, 65502),
            ("create", 54284, 24541, 65435),
            ("create", 39723, 63119, 42875),
            ("snapshot", 55139, 31490, 57364),
            ("tick", 23692, 58673, 9260),
            ("restore", 33494, 52164, 43300),
        ],
    ),
    # a token was put back to before a label changed; what was destroyed since was in doubt when the member was
    # admitted, and was looked for under the names it had later only
    "destroyed, under its name of before": (
        972368,
        [
            ("create", 62473, 52425, 37518),
            ("snapshot", 25019, 13391, 25815),
            ("set_label", 24144, 31491, 12822),
            ("swap", 56668, 28432, 60151),
            ("create", 63918, 32820, 20897),
            ("fault", 15746, 26582, 4793),
            ("restore", 30065, 52438, 56174),
            ("create", 6085, 53998, 50884),
            ("destroy", 7215, 16400, 25200),
        ],
    ),
    # the same where the member owed the object itself, in doubt, and it was destroyed after the admission
    "destroyed since, under its name of before": (
        972368,
        [
            ("create", 62473, 52425, 37518),
            ("snapshot", 25019, 13391, 25815),
            ("set_label", 24144, 31491, 12822),
            ("pin", 4734, 2414, 56650),
            ("swap", 56668, 28432, 60151),
            ("fault", 15746, 26582, 4793),
            ("restore", 30065, 52438, 56174),
            ("create", 6085, 53998, 50884),
            ("destroy", 7215, 16400, 25200),
        ],
    ),
    # the ghost of a write that its own process lost track of stayed
    "ghost, lost track": (
        10206,
        [
            ("fault", 45025, 34185, 393),
            ("create", 58957, 15416, 42589),
            ("journal_error", 54055, 39561, 36334),
            ("set_label", 59501, 65091, 64310),
            ("fault", 20121, 42076, 24787),
            ("create", 18147, 16989, 44991),
        ],
    ),
    # an attribute change was open while no member was in service: nobody was asked, and no member was admitted
    "change of members that all left": (
        30006,
        [
            ("pin", 41158, 13233, 34434),
            ("create", 28193, 62031, 52286),
            ("pin", 41135, 2312, 23390),
            ("create", 60924, 31393, 10991),
            ("kill", 14699, 50783, 33824),
            ("set_label", 17431, 34855, 19151),
            ("set_label", 48673, 17868, 29369),
            ("pin", 32979, 61683, 38171),
        ],
    ),
    # a token was emptied that had confirmed an object which was still being created, and it counted when it went live
    "emptied while creating": (
        30077,
        [
            ("fault", 47756, 53052, 1012),
            ("create", 35717, 32742, 31816),
            ("kill", 36091, 17798, 18721),
            ("create", 133, 55676, 33696),
            ("create", 41919, 21664, 43571),
            ("empty", 1378, 46713, 28628),
            ("tick", 48573, 63810, 55544),
        ],
    ),
    # the same for one that was looked at from its manifest's low on
    "emptied while creating a pair": (
        30082,
        [
            ("create", 10445, 39567, 55562),
            ("kill", 21757, 62959, 49899),
            ("hang", 27980, 47302, 53169),
            ("destroy", 7173, 42601, 51310),
            ("create", 19761, 42260, 49289),
            ("empty", 41127, 24375, 27130),
            ("tick", 50237, 3949, 45350),
        ],
    ),
    # a member was given the domain keys anew while processes were connected to it: they went on with the old handles
    "domain keys anew": (
        200001,
        [
            ("create", 44427, 43536, 29592),
            ("tick", 43774, 46933, 52415),
            ("wipe", 32867, 7690, 30857),
            ("destroy", 37372, 44235, 44708),
        ],
    ),
}
"""Histories that once broke, as short as they could be made: (seed of the group's random numbers, steps)."""


@pytest.mark.parametrize("name", FOUND)
def test_history_that_once_broke(name: str) -> None:
    seed, steps = FOUND[name]
    play(steps, seed)
