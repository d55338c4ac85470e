"""Since when a member is in the state that ``status`` shows: decided from what was noticed, and by whom.

Nobody writes down the moment in which a member fails for the group: there is none (DESIGN.md 4.5). What there is: what
living processes saw of it, what the watchdog told, and when the journal last changed what it says of the member.
"""

from __future__ import annotations

from collections.abc import Collection


def failed_since(seen_to_fail: Collection[float], seen_alive: Collection[float]) -> float | None:
    """When the present failure was first noticed; None: nobody knows.

    :param seen_to_fail: when it was noticed to fail by those who did not see it alive since.
    :param seen_alive: when somebody saw it alive. Whoever had lost it before had lost the way to it, or it was back.
    """
    last = max(seen_alive, default=0.0)
    return min((one for one in seen_to_fail if one > last), default=None)


def in_service_since(admitted: float, back: float | None, failed: float | None) -> float | None:
    """Since when it serves; None: it was noticed to fail, and nobody noticed yet when it came back.

    :param admitted: when the journal admitted it, or a person resumed it.
    :param back: when the watchdog last told that it is back.
    :param failed: :func:`failed_since`.
    """
    begun = max(admitted, back or 0.0)
    return None if failed is not None and failed > begun else begun
