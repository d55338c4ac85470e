"""A journal in which nothing is changed: it is being moved, was moved, or is not complete yet (DESIGN.md 4.6)."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from hagroup.errors import HAError, JournalMismatch, JournalUnavailable


class Moved(JournalMismatch):
    """Another journal has taken this one's place, for good."""

    def __init__(self, text: str, to: str) -> None:
        super().__init__(text)
        self.to = to


class Incomplete(JournalUnavailable):
    """A move, or the making of a journal, was cut off; the text says what completes it."""


class Why(StrEnum):
    MOVING = "moving"
    """Its content is being copied: changes wait, all else goes on."""
    MOVED = "moved"
    """Another journal has taken its place, for good."""
    MAKING = "making"
    """It is being filled, and opens for nobody."""


class Sealed(msgspec.Struct, frozen=True):
    """Kept in the journal; no transaction but those of the one who moves it commits."""

    why: Why
    other: str
    """URL of the journal that takes its place; of one that is being filled: the command that completes it."""
    epoch: str
    """Epoch that the journal begins which takes its place, or that this one will have."""

    def refusal(self, url: object) -> HAError:
        """For a running program: to it the journal cannot be reached, and what that means is settled."""
        return JournalUnavailable(self._text(url))

    def refusal_to_open(self, url: object) -> HAError:
        if self.why is Why.MOVED:
            return Moved(self._text(url), self.other)
        return Incomplete(self._text(url))

    def _text(self, url: object) -> str:
        if self.why is Why.MOVED:
            return (
                f"the journal {url} was moved to {self.other}: nothing was changed here; write that into [journal] url "
                "and start this program again"
            )
        if self.why is Why.MOVING:
            return (
                f"the journal {url} is being moved to {self.other}: nothing was changed; if that was interrupted, run "
                "`ha-admin journal move` again, or give it --cancel"
            )
        return f"the journal {url} is not complete: run `{self.other}` again"
