"""Life of one member as one process sees it: a table of transitions, and nothing else.

A process decides for itself whether it uses a member (its own worker may be the broken part, DESIGN.md 4.5). What
the *group* knows of a member (admitted, out of sync, quarantined, draining, standby) is in the journal. The two meet
here: a member serves a process when the process's state is ``IN_SERVICE`` and the journal says ``admitted``.

An event that the table does not have for a state changes nothing: :func:`next_state` returns the state itself. So a
late report (a timed-out call that comes back after its member was failed) can never bring a member back.
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """State of one member in one process."""

    JOINING = "joining"  # listed, not connected yet
    PROBING = "probing"  # a connection is being made and checked
    RESYNCING = "resyncing"  # connected and checked; brought up to date before it is admitted
    IN_SERVICE = "in service"
    SUSPECT = "suspect"  # a deadline passed; a probe decides
    FAILED = "failed"
    QUARANTINED = "quarantined"  # a person acts


class Event(StrEnum):
    """What happened to a member."""

    CONNECT = "connect"  # the supervisor begins to make a connection
    CHECKED = "checked"  # connected, logged in, domain and manifest right, admitted by the journal
    NOT_ADMITTED = "not admitted"  # connected and checked, but the journal wants it resynced first
    ADMITTED = "admitted"
    TIMEOUT = "timeout"  # a call's deadline passed
    PROBE_OK = "probe ok"
    LOST = "lost"  # device error, worker gone, or the probe failed
    QUARANTINE = "quarantine"
    RELEASE = "release"  # a person says that it is right again


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.JOINING, Event.CONNECT): State.PROBING,
    (State.FAILED, Event.CONNECT): State.PROBING,
    (State.PROBING, Event.CHECKED): State.IN_SERVICE,
    (State.PROBING, Event.NOT_ADMITTED): State.RESYNCING,
    (State.PROBING, Event.LOST): State.FAILED,
    (State.RESYNCING, Event.ADMITTED): State.IN_SERVICE,
    (State.RESYNCING, Event.LOST): State.FAILED,
    (State.IN_SERVICE, Event.TIMEOUT): State.SUSPECT,
    (State.IN_SERVICE, Event.LOST): State.FAILED,
    (State.IN_SERVICE, Event.NOT_ADMITTED): State.RESYNCING,
    (State.SUSPECT, Event.PROBE_OK): State.IN_SERVICE,
    (State.SUSPECT, Event.LOST): State.FAILED,
    (State.SUSPECT, Event.NOT_ADMITTED): State.RESYNCING,
    (State.QUARANTINED, Event.RELEASE): State.FAILED,
    **{(state, Event.QUARANTINE): State.QUARANTINED for state in State},
}


def next_state(state: State, event: Event) -> State:
    """The state after ``event``; the same one where the table has no such event."""
    return TRANSITIONS.get((state, event), state)


def diagram() -> str:
    """The table as lines of text, for hagroup/README.md."""
    rows = [
        f"{state.value:12} --{event.value}--> {after.value}"
        for (state, event), after in TRANSITIONS.items()
        if event is not Event.QUARANTINE
    ]
    rows.append(f"{'any state':12} --{Event.QUARANTINE.value}--> {State.QUARANTINED.value}")
    return "\n".join(rows)
