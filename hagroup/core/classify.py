"""What a member's return value means for the member and for the call (DESIGN.md 3, "Classifying")."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from hagroup.core.ckr import CKR


class Verdict(StrEnum):
    """What to do about a return value. The values are the words of ``[[member]] errors`` in the configuration."""

    MEMBER_FAILED = "member-failed"  # fail it, go on elsewhere
    QUARANTINE = "quarantine"  # other or broken token: a person acts
    SESSION_LOST = "session-lost"  # new connection, log in, find handles again, once; then failed
    LIBRARY_RESET = "library-reset"  # the module forgot us: restart the worker
    STALE_HANDLE = "stale-handle"  # find again by identity
    AMBIGUOUS = "ambiguous"  # ask one other member: the same answer is the application's error
    OVERLOAD = "overload"  # elsewhere or wait; nobody fails
    CAPABILITY = "capability"  # route elsewhere, else the application's error
    APPLICATION = "application"  # return it


_TABLE: dict[int, Verdict] = {
    CKR.DEVICE_ERROR: Verdict.MEMBER_FAILED,
    CKR.DEVICE_REMOVED: Verdict.MEMBER_FAILED,
    CKR.TOKEN_NOT_PRESENT: Verdict.MEMBER_FAILED,
    CKR.TOKEN_NOT_RECOGNIZED: Verdict.QUARANTINE,
    CKR.FIPS_SELF_TEST_FAILED: Verdict.QUARANTINE,
    CKR.SESSION_HANDLE_INVALID: Verdict.SESSION_LOST,
    CKR.SESSION_CLOSED: Verdict.SESSION_LOST,
    CKR.USER_NOT_LOGGED_IN: Verdict.SESSION_LOST,
    CKR.CRYPTOKI_NOT_INITIALIZED: Verdict.LIBRARY_RESET,
    CKR.OBJECT_HANDLE_INVALID: Verdict.STALE_HANDLE,
    CKR.KEY_HANDLE_INVALID: Verdict.STALE_HANDLE,
    CKR.WRAPPING_KEY_HANDLE_INVALID: Verdict.STALE_HANDLE,
    CKR.UNWRAPPING_KEY_HANDLE_INVALID: Verdict.STALE_HANDLE,
    CKR.GENERAL_ERROR: Verdict.AMBIGUOUS,
    CKR.FUNCTION_FAILED: Verdict.AMBIGUOUS,
    CKR.DEVICE_MEMORY: Verdict.OVERLOAD,
    CKR.SESSION_COUNT: Verdict.OVERLOAD,
    CKR.HOST_MEMORY: Verdict.OVERLOAD,
    CKR.MECHANISM_INVALID: Verdict.CAPABILITY,
    CKR.FUNCTION_NOT_SUPPORTED: Verdict.CAPABILITY,
    CKR.KEY_SIZE_RANGE: Verdict.CAPABILITY,
}


def classify(
    rv: int, overrides: Mapping[int, str], *, logged_in: bool = True, always_authenticate: bool = False
) -> Verdict:
    """Verdict on ``rv``.

    :param overrides: the member's own table from the configuration, because vendors disagree.
    :param logged_in: whether the virtual session is logged in; without it USER_NOT_LOGGED_IN is the application's.
    :param always_authenticate: whether the key wants a context-specific login; then USER_NOT_LOGGED_IN is, too.
    """
    if rv in overrides:
        return Verdict(overrides[rv])
    if rv == CKR.USER_NOT_LOGGED_IN and (always_authenticate or not logged_in):
        return Verdict.APPLICATION
    return _TABLE.get(rv, Verdict.APPLICATION)
