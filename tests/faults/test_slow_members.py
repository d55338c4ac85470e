"""Members that answer everything, each request just in time: a change is many of those, and is bounded (G5)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hagroup as pkcs11
from hagroup import Attribute, KeyType
from tests.faults.test_changes import change_label, create, destroy, generate
from tests.support.faulty import CALL, GENERATE, FaultGroup

SLOW = 0.8 * CALL
"""Seconds for each of the calls below; the deadline of a change is ``CALL`` here."""
FUNCTIONS = [
    "C_GenerateKey",
    "C_GenerateKeyPair",
    "C_WrapKey",
    "C_UnwrapKey",
    "C_EncryptInit",
    "C_CreateObject",
    "C_SetAttributeValue",
    "C_DestroyObject",
]
MOST = 3 * CALL + 2 * CALL + 1.0
"""The longest change that the README allows: three times its deadline, twice ``call``, and a second."""


def generate_pair(session: Any, label: str) -> None:
    session.generate_keypair(KeyType.RSA, 1024, store=True, label=label)


def copy(session: Any, label: str) -> None:
    session.get_key(label=f"{label} before").copy({Attribute.LABEL: label})


@pytest.fixture(scope="module")
def client(faulty: FaultGroup) -> Iterator[Any]:
    with faulty.client(toml=faulty.variant("hasty", f"generate = {GENERATE}", f"generate = {CALL}")) as session:
        yield session


@pytest.mark.parametrize("operation", [generate, generate_pair, create, copy, change_label, destroy])
def test_a_change_is_bounded(faulty: FaultGroup, session: Any, operation: Callable[[Any, str], None]) -> None:
    """Whether it comes to its end in that time or not: it is all there in the end, or nothing is."""
    label = operation.__name__
    if operation in (copy, change_label, destroy):
        session.generate_key(KeyType.AES, 256, store=True, label=f"{label} before")
        faulty.heal(session)
    for control in faulty.controls.values():
        for function in FUNCTIONS:
            control.add(function, "delay", ms=1000 * SLOW)
    begun = time.monotonic()
    with contextlib.suppress(pkcs11.PKCS11Error):
        operation(session, label)
    took = time.monotonic() - begun
    print(f"{label}: {took:.2f} s")
    assert took <= MOST
    faulty.clear()
    for name in faulty.names:
        faulty.kill(session, name)  # else what got no answer may be executed yet, for as long as a late window
    faulty.heal(session)
    faulty.check_tokens(session, shown_once=False)
    for item in list(session.get_objects({Attribute.TOKEN: True})):
        item.destroy()
