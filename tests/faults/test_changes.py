"""A member dies, hangs or loses its reply inside a change: nothing is lost, nothing is there twice (G6, G7)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hagroup import Attribute, KeyType, ObjectClass
from tests.support.faults import FaultControl
from tests.support.faulty import CALL, GENERATE, FaultGroup
from tests.support.groups import wait_until

VICTIM = "hsm2"
ACTIONS = ["error-after", "hang-after", "crash", "crash-after"]


def generate(session: Any, label: str) -> None:
    session.generate_key(KeyType.AES, 256, store=True, label=label)


def create(session: Any, label: str) -> None:
    session.create_object(
        {
            Attribute.CLASS: ObjectClass.SECRET_KEY,
            Attribute.KEY_TYPE: KeyType.AES,
            Attribute.TOKEN: True,
            Attribute.LABEL: label,
            Attribute.VALUE: bytes(range(32)),
        }
    )


def change_label(session: Any, label: str) -> None:
    session.get_key(label=f"{label} before")[Attribute.LABEL] = label


def destroy(session: Any, label: str) -> None:
    session.get_key(label=f"{label} before").destroy()


def has_fired(control: FaultControl, rule: int) -> bool:
    return any(one.fired for one in control.rules() if one.id == rule)


# What the member is asked for in each, and the calls before that one with the same function.
WHERE: dict[Callable[[Any, str], None], list[tuple[str, int]]] = {
    generate: [("C_GenerateKey", 0), ("C_UnwrapKey", 0), ("C_UnwrapKey", 1), ("C_CreateObject", 0)],
    create: [("C_CreateObject", 0), ("C_UnwrapKey", 1), ("C_CreateObject", 1)],
    change_label: [("C_CreateObject", 0), ("C_SetAttributeValue", 0), ("C_DestroyObject", 1)],
    destroy: [("C_DestroyObject", 0), ("C_DestroyObject", 1), ("C_DestroyObject", 2)],
}


@pytest.fixture(scope="module")
def client(faulty: FaultGroup) -> Iterator[Any]:
    """With a short deadline for changes: a member that hangs costs the test no more than it must."""
    with faulty.client(toml=faulty.variant("hasty", f"generate = {GENERATE}", f"generate = {CALL}")) as session:
        yield session


@pytest.fixture(autouse=True)
def tidy(faulty: FaultGroup, session: Any) -> Iterator[None]:
    yield
    faulty.clear()
    for item in list(session.get_objects({Attribute.TOKEN: True})):
        item.destroy()


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("operation", WHERE)
def test_it_happened_once(faulty: FaultGroup, session: Any, operation: Callable[[Any, str], None], action: str) -> None:
    control = faulty.controls[VICTIM]
    labels = []
    for function, skip in WHERE[operation]:
        label = f"{function} {skip}"
        if operation in (change_label, destroy):
            session.generate_key(KeyType.AES, 256, store=True, label=f"{label} before")
            faulty.heal(session)
        faulty.prefer(session, VICTIM)
        rule = control.add(function, action, skip=skip, times=1)
        operation(session, label)
        wait_until(functools.partial(has_fired, control, rule), f"{action} in {label}")
        if action == "hang-after":
            control.wait_held(rule)
            faulty.kill(session, VICTIM)
        faulty.heal(session)
        if operation is not destroy:
            labels.append(label)
    assert sorted(item[Attribute.LABEL] for item in session.get_objects({Attribute.TOKEN: True})) == sorted(labels)
    faulty.check_tokens(session)
    for label in labels:
        assert session.get_key(label=label).encrypt(b"usable", mechanism_param=bytes(16))
