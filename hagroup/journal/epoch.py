"""Epochs: each time that a journal begins anew (made, moved, restored, cleared) everybody has to look again."""

from __future__ import annotations

import secrets


def new_epoch(before: str | None) -> str:
    """Greater than all before it, and no other journal's: ``00000002-1f6a09…``."""
    number = 0 if before is None else int(before.partition("-")[0], 16)
    return f"{number + 1:08x}-{secrets.token_hex(8)}"
