"""What a member's return value means (DESIGN.md 3, "Classifying what a member returned"), row by row."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hagroup.core.ckr import CKR
from hagroup.core.classify import Verdict, classify

TABLE = {
    Verdict.MEMBER_FAILED: [CKR.DEVICE_ERROR, CKR.DEVICE_REMOVED, CKR.TOKEN_NOT_PRESENT],
    Verdict.QUARANTINE: [CKR.TOKEN_NOT_RECOGNIZED, CKR.FIPS_SELF_TEST_FAILED],
    Verdict.SESSION_LOST: [CKR.SESSION_HANDLE_INVALID, CKR.SESSION_CLOSED, CKR.USER_NOT_LOGGED_IN],
    Verdict.LIBRARY_RESET: [CKR.CRYPTOKI_NOT_INITIALIZED],
    Verdict.STALE_HANDLE: [
        CKR.OBJECT_HANDLE_INVALID,
        CKR.KEY_HANDLE_INVALID,
        CKR.WRAPPING_KEY_HANDLE_INVALID,
        CKR.UNWRAPPING_KEY_HANDLE_INVALID,
    ],
    Verdict.AMBIGUOUS: [CKR.GENERAL_ERROR, CKR.FUNCTION_FAILED],
    Verdict.OVERLOAD: [CKR.DEVICE_MEMORY, CKR.SESSION_COUNT, CKR.HOST_MEMORY],
    Verdict.CAPABILITY: [CKR.MECHANISM_INVALID, CKR.FUNCTION_NOT_SUPPORTED, CKR.KEY_SIZE_RANGE],
    Verdict.APPLICATION: [
        CKR.ARGUMENTS_BAD,
        CKR.TEMPLATE_INCONSISTENT,
        CKR.TEMPLATE_INCOMPLETE,
        CKR.ATTRIBUTE_TYPE_INVALID,
        CKR.ATTRIBUTE_VALUE_INVALID,
        CKR.ATTRIBUTE_READ_ONLY,
        CKR.ATTRIBUTE_SENSITIVE,
        CKR.DATA_INVALID,
        CKR.DATA_LEN_RANGE,
        CKR.SIGNATURE_INVALID,
        CKR.SIGNATURE_LEN_RANGE,
        CKR.KEY_FUNCTION_NOT_PERMITTED,
        CKR.ENCRYPTED_DATA_INVALID,
        CKR.PIN_INCORRECT,
        CKR.PIN_LOCKED,
    ],
}


@pytest.mark.parametrize(("verdict", "rv"), [(verdict, rv) for verdict, rvs in TABLE.items() for rv in rvs])
def test_the_table(verdict: Verdict, rv: int) -> None:
    assert classify(rv, {}) is verdict


@given(st.integers(min_value=0, max_value=2**64 - 1))
def test_what_nobody_knows_is_the_applications_error(rv: int) -> None:
    listed = {int(number) for rvs in TABLE.values() for number in rvs}
    if rv not in listed:
        assert classify(rv, {}) is Verdict.APPLICATION


def test_user_not_logged_in_is_the_applications_where_it_may_be() -> None:
    assert classify(CKR.USER_NOT_LOGGED_IN, {}, logged_in=False) is Verdict.APPLICATION
    assert classify(CKR.USER_NOT_LOGGED_IN, {}, always_authenticate=True) is Verdict.APPLICATION
    assert classify(CKR.USER_NOT_LOGGED_IN, {}, logged_in=True) is Verdict.SESSION_LOST


@given(st.sampled_from(sorted({int(rv) for rvs in TABLE.values() for rv in rvs})), st.sampled_from(Verdict))
def test_a_members_own_table_comes_first(rv: int, verdict: Verdict) -> None:
    assert classify(rv, {rv: verdict}) is verdict
    assert classify(rv, {rv: str(verdict)}) is verdict
    assert classify(rv, {rv + 1: verdict}) is classify(rv, {})
