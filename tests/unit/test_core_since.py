"""Since when a member is in the state that is shown."""

from __future__ import annotations

from hagroup.core.since import failed_since, in_service_since


def test_failed_since_the_first_who_did_not_see_it_alive_since() -> None:
    assert failed_since([], []) is None
    assert failed_since([7.0, 5.0], [4.0, 3.0]) == 5.0
    assert failed_since([7.0, 5.0], [6.0]) == 7.0, "it was alive after the other one lost it"
    assert failed_since([5.0], [6.0]) is None


def test_in_service_since_it_was_admitted_or_came_back() -> None:
    assert in_service_since(3.0, None, None) == 3.0
    assert in_service_since(3.0, 9.0, None) == 9.0
    assert in_service_since(3.0, 9.0, 5.0) == 9.0
    assert in_service_since(3.0, None, 5.0) is None, "it was away in between, and nobody knows until when"
