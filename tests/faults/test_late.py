"""An HSM cannot be fenced: a call that everybody gave up executes later, after the world went on (DESIGN.md 4.1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from hagroup import Attribute, KeyType
from tests.support import plain
from tests.support.faulty import CALL, GENERATE, FaultGroup, engine
from tests.support.groups import wait_until

VICTIM = "hsm2"


@pytest.fixture(scope="module")
def client(faulty: FaultGroup) -> Iterator[Any]:
    with faulty.client(toml=faulty.variant("hasty", f"generate = {GENERATE}", f"generate = {CALL}")) as session:
        yield session


@pytest.fixture
def session(faulty: FaultGroup, client: Any) -> Iterator[Any]:
    """What is in doubt stays that for the late window; a worker that is proved dead ends it at once."""
    yield client
    faulty.clear()
    faulty.kill(client, VICTIM)
    faulty.heal(client)
    faulty.check_tokens(client)


def on_victim(faulty: FaultGroup) -> list[str]:
    return plain.labels(faulty.group.members[VICTIM])


def given_up(faulty: FaultGroup, session: Any) -> None:
    """Until the row of the call is in doubt and its member, which answers the probe, is in service again."""
    journal = engine(session).journal
    wait_until(lambda: any(row.doubt_since is not None for row in journal.owed(VICTIM)), "the doubt in the journal")
    faulty.wait_serving(session)


def settle(faulty: FaultGroup, session: Any) -> None:
    faulty.kill(session, VICTIM)
    faulty.heal(session)
    faulty.check_tokens(session)


def test_a_key_that_arrives_after_it_was_destroyed(faulty: FaultGroup, session: Any) -> None:
    faulty.prefer(session, "hsm1")
    control = faulty.controls[VICTIM]
    rule = control.add("C_UnwrapKey", "late", times=1)
    key = session.generate_key(KeyType.AES, 256, store=True, label="gone")
    control.wait_held(rule)
    given_up(faulty, session)
    encrypted = [key.encrypt(b"data", mechanism_param=bytes(16)) for _ in range(6)]
    assert len(set(encrypted)) == 1, "served by those that have it"
    key.destroy()
    control.release(rule)
    wait_until(lambda: not [call for call in control.in_progress() if call.held_by], "the late call")
    assert not list(session.get_objects({Attribute.LABEL: "gone"})), "never served"

    def swept() -> bool:
        engine(session).supervisor.wake()
        return on_victim(faulty) == []

    wait_until(swept, "the sweep")


def test_a_key_that_arrives_twice(faulty: FaultGroup, session: Any) -> None:
    """The background made it again meanwhile: one remains."""
    faulty.prefer(session, "hsm1")
    control = faulty.controls[VICTIM]
    rule = control.add("C_UnwrapKey", "late", times=1)
    key = session.generate_key(KeyType.AES, 256, store=True, label="twice")
    control.wait_held(rule)
    given_up(faulty, session)
    wait_until(lambda: on_victim(faulty) == ["twice"], "its being made by the background")
    control.release(rule)
    settle(faulty, session)
    assert on_victim(faulty) == ["twice"]
    key.destroy()


def test_a_label_that_was_changed_again_meanwhile(faulty: FaultGroup, session: Any) -> None:
    key = session.generate_key(KeyType.AES, 256, store=True, label="first")
    faulty.heal(session)
    control = faulty.controls[VICTIM]
    rule = control.add("C_SetAttributeValue", "late", times=1)
    key[Attribute.LABEL] = "second"
    control.wait_held(rule)
    given_up(faulty, session)
    key[Attribute.LABEL] = "third"
    control.release(rule)
    settle(faulty, session)
    assert on_victim(faulty) == ["third"]
    key.destroy()
