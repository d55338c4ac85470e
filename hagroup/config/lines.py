"""Where in a TOML text each key stands: ``tomllib`` tells only the values.

The text was accepted by ``tomllib`` before it comes here, so this needs no error handling of its own: it only follows
the grammar far enough to know which key a position belongs to.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_left
from typing import NamedTuple, TypeAlias

KeyPath: TypeAlias = "tuple[str | int, ...]"
"""Keys from the top; a number is the index in an array, of tables or of values."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRINGS = (
    re.compile(r'"""(?:\\.|[^\\])*?"""(?:"{0,2})', re.DOTALL),
    re.compile(r"'''.*?'''(?:'{0,2})", re.DOTALL),
    re.compile(r'"(?:\\.|[^"\\])*"'),
    re.compile(r"'[^']*'"),
)
_OTHER_VALUE = re.compile(r"[^,\]}#\r\n]*")
_BLANK = re.compile(r"[ \t]*")
_BLANK_LINES = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")


class Place(NamedTuple):
    """Positions of one key in the text; a header's value is empty."""

    line: int
    key_start: int
    value_start: int
    value_end: int


class Lines:
    """The places of all keys of a valid TOML text."""

    def __init__(self, text: str) -> None:
        self._places = _Scanner(text).document()

    def place(self, path: KeyPath) -> Place | None:
        return self._places.get(path)

    def line(self, path: KeyPath) -> int:
        """Line of the key, or of what it would stand in: its table's header, else the first line."""
        for length in range(len(path), 0, -1):
            if place := self._places.get(path[:length]):
                return place.line
        return 1


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._newlines = [match.start() for match in re.finditer("\n", text)]
        self._places: dict[KeyPath, Place] = {}
        self._last_index: dict[KeyPath, int] = {}  # of each array of tables

    def document(self) -> dict[KeyPath, Place]:
        table: KeyPath = ()
        while True:
            self._skip(_BLANK_LINES)
            if self._at >= len(self._text):
                return self._places
            if self._text[self._at] == "[":
                table = self._header()
            else:
                self._assignment(table)

    def _header(self) -> KeyPath:
        start = self._at
        brackets = 2 if self._text.startswith("[[", start) else 1
        self._at += brackets
        keys = self._key()
        self._at += brackets
        path: KeyPath = ()
        for position, key in enumerate(keys, start=1):
            path += (key,)
            self._note(path, start)
            if position == len(keys) and brackets == 2:
                self._last_index[path] = self._last_index.get(path, -1) + 1
            if path in self._last_index:
                path += (self._last_index[path],)
                self._note(path, start)
        # A header after its own sub-table's ([a.b] before [a]) is where a missing key of [a] belongs.
        self._places[path] = self._place(start)
        return path

    def _assignment(self, table: KeyPath) -> None:
        start = self._at
        path = table
        for key in self._key():
            path += (key,)
            self._note(path, start)
        self._at += 1  # the "="
        self._skip(_BLANK)
        value_start = self._at
        self._value(path)
        self._places[path] = self._place(start, value_start, self._at)

    def _key(self) -> list[str]:
        keys = []
        while True:
            self._skip(_BLANK)
            if self._text[self._at] in "\"'":
                raw = self._skip_string()
                keys.append(str(tomllib.loads(f"key = {raw}")["key"]))
            else:
                keys.append(self._skip(_BARE_KEY))
            self._skip(_BLANK)
            if self._text[self._at] != ".":
                return keys
            self._at += 1

    def _value(self, path: KeyPath) -> None:
        first = self._text[self._at]
        if first in "\"'":
            self._skip_string()
        elif first in "[{":
            self._container(path, array=first == "[")
        else:
            self._at += len(self._matched(_OTHER_VALUE).rstrip())

    def _container(self, path: KeyPath, *, array: bool) -> None:
        self._at += 1
        count = 0
        while True:
            self._skip(_BLANK_LINES)
            following = self._text[self._at]
            if following == ",":
                self._at += 1
            elif following in "]}":
                self._at += 1
                return
            elif array:
                start = self._at
                self._value((*path, count))
                self._places[(*path, count)] = self._place(start, start, self._at)
                count += 1
            else:
                self._assignment(path)

    def _skip_string(self) -> str:
        for pattern in _STRINGS:
            if match := pattern.match(self._text, self._at):
                self._at = match.end()
                return match.group()
        raise AssertionError("tomllib accepted a string that does not end")

    def _matched(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        return match.group() if match else ""

    def _skip(self, pattern: re.Pattern[str]) -> str:
        skipped = self._matched(pattern)
        self._at += len(skipped)
        return skipped

    def _note(self, path: KeyPath, start: int) -> None:
        self._places.setdefault(path, self._place(start))

    def _place(self, start: int, value_start: int = 0, value_end: int = 0) -> Place:
        return Place(bisect_left(self._newlines, start) + 1, start, value_start, value_end)
