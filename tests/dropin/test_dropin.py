"""python-pkcs11's own tests have the same outcomes on a group as on python-pkcs11 itself, but for those named here."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hagroup.members.module import ConnectionSettings
from tests.dropin.run_suite import ROOT, direct_target, fetch_suite, run_suite
from tests.support.softhsm import TokenFixture, make_token, token_folder

LABEL, PIN, SO_PIN = "DROPIN", "1234", "12345678"
PINS = {"label": LABEL, "pin": PIN, "so_pin": SO_PIN}
_NAMED = ["--label", LABEL, "--pin", PIN, "--so-pin", SO_PIN]
MAKE_GROUP = ROOT / "softhsm-fixtures" / "make-group"

# They count SoftHSM's second, uninitialised slot: a group shows its virtual slot alone.
ONE_SLOT = {
    "test_slots_and_tokens.py::SlotsAndTokensTests::test_get_slots",
    "test_slots_and_tokens.py::SlotsAndTokensTests::test_get_tokens",
}
# They look at CKA_TOKEN itself: python-pkcs11 fails them too when all keys are token objects.
NOT_STORED = {
    "test_attributes.py::AttributeMapperTests::test_private_key_template_is_not_shared_between_calls",
    "test_attributes.py::AttributeMapperTests::test_public_key_template_is_not_shared_between_calls",
    "test_sessions.py::SessionTests::test_generate_key",
}
# SoftHSM 2.6 cannot wrap Edwards keys, so that they cannot be replicated.
NOT_REPLICABLE = {
    "test_ecc.py::ECCTests::test_sign_ed25519",
    "test_ecc.py::ECCTests::test_sign_ed448",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def suite() -> Path:
    return fetch_suite()


def _token(folder: Path) -> TokenFixture:
    return make_token(folder, LABEL, SO_PIN, PIN)


def _plain(*, force_token: bool) -> dict[str, str]:
    with token_folder() as folder:
        return _outcomes(run_suite({"kind": "plain"}, env=_token(folder).env, force_token=force_token, **PINS))


def _outcomes(results: dict[str, dict[str, str]]) -> dict[str, str]:
    return {name: result["outcome"] for name, result in results.items()}


def _differ(results: dict[str, dict[str, str]], expected: dict[str, str]) -> dict[str, Any]:
    assert results.keys() == expected.keys()
    return {name: result for name, result in results.items() if result["outcome"] != expected[name]}


@pytest.fixture(scope="module")
def plain() -> dict[str, str]:
    return _plain(force_token=False)


@pytest.fixture(scope="module")
def plain_stored() -> dict[str, str]:
    return _plain(force_token=True)


@pytest.fixture(scope="module")
def direct() -> Iterator[dict[str, Any]]:
    with token_folder() as folder:
        token = _token(folder)
        yield direct_target(
            ConnectionSettings(name="only", module=token.module, env=token.env, token_label=token.label)
        )


@pytest.fixture(scope="module", params=["process", "none"])
def group(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    with token_folder() as folder:
        made = subprocess.run(
            [str(MAKE_GROUP), str(folder / "group"), "--members", "3", "--isolation", request.param, *_NAMED],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert made.returncode == 0, made.stderr
        yield {"kind": "group", "config": made.stdout.strip().splitlines()[-1]}


def test_plain_is_what_it_was(plain: dict[str, str], plain_stored: dict[str, str]) -> None:
    assert Counter(plain.values()) == {"passed": 145, "skipped": 18}
    assert {name for name, outcome in plain_stored.items() if outcome == "failed"} == NOT_STORED


def test_facade_alone(direct: dict[str, Any], plain: dict[str, str]) -> None:
    assert _differ(run_suite(direct, **PINS), plain).keys() == ONE_SLOT


def test_facade_alone_with_token_objects(direct: dict[str, Any], plain_stored: dict[str, str]) -> None:
    assert _differ(run_suite(direct, force_token=True, **PINS), plain_stored).keys() == ONE_SLOT


def test_group(group: dict[str, Any], plain: dict[str, str]) -> None:
    assert _differ(run_suite(group, **PINS), plain).keys() == ONE_SLOT


def test_group_with_token_objects(group: dict[str, Any], plain_stored: dict[str, str]) -> None:
    differ = _differ(run_suite(group, force_token=True, **PINS), plain_stored)
    assert differ.keys() == ONE_SLOT | NOT_REPLICABLE
    assert all("NotReplicable" in differ[name]["message"] for name in NOT_REPLICABLE)
