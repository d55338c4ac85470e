"""How quickly members take new objects."""

from __future__ import annotations

from hagroup.core.pace import SLOW, Paces


def test_a_slow_member_counts_for_as_much_as_it_is_slower() -> None:
    paces = Paces()
    assert paces.slower("hsm1", 0.0) == 1.0, "nothing is known of any"
    for _ in range(20):
        for name, seconds in (("hsm1", 0.1), ("hsm2", 1.0), ("hsm3", 0.2)):
            paces.told(name, seconds, 1.0)
    assert paces.slower("hsm1", 1.0) == 1.0
    assert round(paces.slower("hsm2", 1.0)) == 10
    assert paces.slower("hsm3", 1.0) == 1.0, "a busy machine wavers by as much"


def test_one_that_just_came_is_not_tried_with_an_object_of_its_own() -> None:
    paces = Paces()
    paces.told("hsm1", 0.1, 1.0)
    assert paces.slower("hsm2", 1.0) == SLOW
    paces.told("hsm2", 0.1, 1.0)
    assert paces.slower("hsm2", 1.0) == 1.0


def test_what_is_known_grows_old() -> None:
    paces = Paces()
    paces.told("hsm1", 0.1, 1.0)
    paces.told("hsm2", 1.0, 1.0)
    assert paces.slower("hsm2", 50.0) == 10.0
    assert paces.slower("hsm2", 100.0) == 1.0
    paces.told("hsm1", 0.1, 100.0)
    paces.told("hsm2", 0.1, 100.0)
    assert paces.slower("hsm2", 100.0) == 1.0, "what it was like long ago does not count in the average"


def test_where_all_are_quick_there_is_no_slow_one() -> None:
    paces = Paces()
    paces.told("hsm1", 0.0001, 1.0)
    paces.told("hsm2", 0.14, 1.0)
    assert paces.slower("hsm2", 1.0) == 1.0


def test_the_proof_of_the_keys_tells_until_a_member_took_an_object() -> None:
    paces = Paces()
    for name, seconds in (("hsm1", 0.06), ("hsm2", 0.6), ("hsm3", 0.1)):
        paces.proved(name, seconds)
    assert [round(paces.slower(name, 1.0)) for name in ("hsm1", "hsm2", "hsm3")] == [1, 10, 1]
    paces.told("hsm1", 0.1, 1.0)
    assert round(paces.slower("hsm2", 1.0)) == 10, "more than what one counts for of which nothing is known"
    assert paces.slower("hsm3", 1.0) == SLOW
    paces.told("hsm2", 0.1, 1.0)
    assert paces.slower("hsm2", 1.0) == 1.0, "that it was slow then does not matter any more"


def test_a_quick_proof_makes_no_member_slow() -> None:
    paces = Paces()
    paces.proved("hsm1", 0.001)
    paces.proved("hsm2", 0.1)
    assert paces.slower("hsm2", 1.0) == 1.0
