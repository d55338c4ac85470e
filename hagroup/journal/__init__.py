"""The journal: the one place that orders changes (DESIGN.md 4)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hagroup.core.clock import Clock
from hagroup.errors import ConfigurationError
from hagroup.journal.api import Journal
from hagroup.journal.clock import SystemClock
from hagroup.journal.sqlite import SqliteJournal

__all__ = ["Journal", "SqliteJournal", "SystemClock", "open_journal"]


def _open_sqlite(place: str, clock: Clock) -> Journal:
    path = Path(place)
    if not path.is_absolute():
        raise ConfigurationError(f'[journal] url "sqlite:{place}": the path must be absolute here')
    return SqliteJournal.open(path, clock=clock)


_SCHEMES: dict[str, Callable[[str, Clock], Journal]] = {"sqlite": _open_sqlite}


def open_journal(url: str, *, clock: Clock | None = None) -> Journal:
    """Open the journal that ``url`` names (``sqlite:/absolute/path``).

    :raises ConfigurationError: no backend has this scheme.
    :raises JournalUnavailable, JournalMismatch: see :meth:`SqliteJournal.open`.
    """
    scheme, colon, place = url.partition(":")
    opener = _SCHEMES.get(scheme)
    if not colon or opener is None:
        known = ", ".join(f"{name}:" for name in _SCHEMES)
        raise ConfigurationError(f'[journal] url "{url}": no journal of this kind; there are: {known}')
    return opener(place, clock or SystemClock())
