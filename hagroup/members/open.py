"""Opens a connection to a member, in a process of its own or in this one."""

from __future__ import annotations

from hagroup.members.inline import InlineConnection
from hagroup.members.module import ConnectionSettings, ModuleProblem
from hagroup.members.process import ProcessConnection, tokens_in

__all__ = [
    "ConnectionSettings",
    "InlineConnection",
    "ModuleProblem",
    "ProcessConnection",
    "open_connection",
    "tokens_in",
]


def open_connection(
    settings: ConnectionSettings, *, generation: int, isolation: str, timeout: float
) -> ProcessConnection | InlineConnection:
    """Starts the member's module. ``generation`` must be higher than any that the member had in this process.

    Raises :class:`ModuleProblem` for what a person must put right, ``Ckr`` for what the module answered, and
    ``MemberGone`` (``sent=False``) where the worker did not come up within ``timeout`` seconds.
    """
    if isolation == "process":
        return ProcessConnection(settings, generation=generation, timeout=timeout)
    if isolation == "none":
        return InlineConnection(settings, generation=generation)
    raise ValueError(f"isolation {isolation!r}")
