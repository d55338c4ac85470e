"""One member: a vendor's module in a process of its own or in this one, and the connection to it.

The names are loaded when first used: a worker process enters this package too, and needs none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hagroup.members.inline import InlineConnection
    from hagroup.members.module import ConnectionSettings, ModuleProblem
    from hagroup.members.open import open_connection
    from hagroup.members.process import ProcessConnection, tokens_in

__all__ = [
    "ConnectionSettings",
    "InlineConnection",
    "ModuleProblem",
    "ProcessConnection",
    "open_connection",
    "tokens_in",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    from hagroup.members import open as opening

    return getattr(opening, name)
