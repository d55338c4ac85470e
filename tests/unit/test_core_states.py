"""The table of a member's states: what can and what can never happen, and the diagram in the documentation."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hagroup.core.states import TRANSITIONS, Event, State, diagram, next_state

events = st.lists(st.sampled_from(Event), max_size=40)


def run(sequence: list[Event], start: State = State.JOINING) -> list[State]:
    states = [start]
    for event in sequence:
        states.append(next_state(states[-1], event))
    return states


def test_the_usual_life() -> None:
    assert run([Event.CONNECT, Event.CHECKED, Event.TIMEOUT, Event.PROBE_OK, Event.LOST, Event.CONNECT])[1:] == [
        State.PROBING,
        State.IN_SERVICE,
        State.SUSPECT,
        State.IN_SERVICE,
        State.FAILED,
        State.PROBING,
    ]
    assert run([Event.NOT_ADMITTED, Event.ADMITTED], State.PROBING)[1:] == [State.RESYNCING, State.IN_SERVICE]


def test_every_state_can_be_reached_and_left() -> None:
    reached = {State.JOINING}
    while True:
        more = {next_state(state, event) for state in reached for event in Event}
        if more <= reached:
            break
        reached |= more
    assert reached == set(State)
    for state in State:
        assert any(next_state(state, event) is not state for event in Event), state


@given(events)
def test_what_the_table_does_not_have_changes_nothing(sequence: list[Event]) -> None:
    states = run(sequence)
    for before, event, after in zip(states, sequence, states[1:], strict=False):
        if (before, event) not in TRANSITIONS:
            assert after is before


@given(events)
def test_a_member_serves_only_after_it_was_checked_or_admitted(sequence: list[Event]) -> None:
    """Nothing late brings a failed member back: it has to be connected and checked anew."""
    checked = False
    state = State.JOINING
    for event in sequence:
        after = next_state(state, event)
        if event is Event.CONNECT and after is State.PROBING:
            checked = False
        if event in (Event.CHECKED, Event.NOT_ADMITTED) and state is State.PROBING:
            checked = True
        if after is State.IN_SERVICE:
            assert checked
        if after in (State.FAILED, State.QUARANTINED):
            checked = False
        state = after


@given(events)
def test_only_a_person_ends_a_quarantine(sequence: list[Event]) -> None:
    states = run([Event.QUARANTINE, *(event for event in sequence if event is not Event.RELEASE)])
    assert set(states[1:]) == {State.QUARANTINED}
    assert next_state(State.QUARANTINED, Event.RELEASE) is State.FAILED


@given(st.sampled_from(State))
def test_lost_and_timeout_never_improve_anything(state: State) -> None:
    assert next_state(state, Event.LOST) in (state, State.FAILED)
    assert next_state(state, Event.TIMEOUT) in (state, State.SUSPECT)
    assert next_state(state, Event.QUARANTINE) is State.QUARANTINED


def test_diagram_has_every_transition_once() -> None:
    lines = diagram().splitlines()
    assert len(lines) == len(set(lines))
    assert len(lines) == len([1 for _, event in TRANSITIONS if event is not Event.QUARANTINE]) + 1
    for (state, event), after in TRANSITIONS.items():
        if event is not Event.QUARANTINE:
            assert f"{state.value:12} --{event.value}--> {after.value}" in lines
