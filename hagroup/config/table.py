"""One table of ``hagroup.toml``, read key by key; whatever is wrong becomes one sentence with file, line and key.

Values that may be secrets by mistake (a PIN written where its source belongs) are never shown.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from hagroup.config.lines import KeyPath, Lines
from hagroup.errors import ConfigurationError

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
NAME_EXPECTED = 'made of 1 to 64 letters, digits, ".", "_" or "-"'
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SHOWN = 60
_Choice = TypeVar("_Choice", bound=str)
_Value = TypeVar("_Value")


class Source:
    """The file that tables come from."""

    def __init__(self, path: Path, lines: Lines) -> None:
        self.path = path
        self.lines = lines

    def error(self, where: KeyPath, sentence: str) -> ConfigurationError:
        return ConfigurationError(f"{self.path}, line {self.lines.line(where)}: {sentence}")


class Table:
    """``title`` stands before a key when people are told: ``[group] ``, ``[[member]] "hsm1" ``, or that and ``pin.``"""

    def __init__(self, source: Source, values: dict[str, Any], where: KeyPath, title: str, known: Collection[str]):
        self.source = source
        self.where = where
        self.title = title
        self._values = values
        for key in values:
            if key not in known:
                raise self.error(key, f"is not a known key ({suggestion(key, known)})")

    def error(self, key: str, problem: str) -> ConfigurationError:
        return self.source.error((*self.where, key), f"{self.title}{shown_key(key)} {problem}")

    def refuse(self, key: str, expected: str, *, show: bool = True) -> NoReturn:
        """The value of ``key`` is not what was ``expected``."""
        shown = f", not {shown_value(self._values[key])}" if show and key in self._values else ""
        raise self.error(key, f"must be {expected}{shown}")

    def __contains__(self, key: str) -> bool:
        return key in self._values

    @property
    def keys(self) -> list[str]:
        return list(self._values)

    def raw(self, key: str) -> Any:
        return self._values.get(key)

    def text(
        self,
        key: str,
        expected: str = "a text in quotes",
        pattern: re.Pattern[str] | None = None,
        *,
        show: bool = True,
    ) -> str | None:
        """A text that is not empty; None if the key is not there."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            self.refuse(key, "a text in quotes", show=show)
        if not value:
            raise self.error(key, "must not be empty")
        if "\0" in value or not (pattern is None or pattern.fullmatch(value)):
            self.refuse(key, expected, show=show)
        return value

    def name(self, key: str) -> str | None:
        return self.text(key, NAME_EXPECTED, NAME)

    def required(self, key: str, value: _Value | None) -> _Value:
        if value is None:
            raise self.error(key, "is missing")
        return value

    def choice(self, key: str, allowed: tuple[_Choice, ...], default: _Choice) -> _Choice:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or value not in allowed:
            self.refuse(key, " or ".join(f'"{one!s}"' for one in allowed))
        return allowed[allowed.index(value)]

    def flag(self, key: str, default: bool) -> bool:
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def number(self, key: str, default: float, expected: str, *, zero: bool = False) -> float:
        """A finite number greater than 0; ``zero``: or 0."""
        value = self._values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(key, expected)
        try:
            number = float(value)
        except OverflowError:
            self.refuse(key, expected)
        if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
            self.refuse(key, expected)
        return number

    def seconds(self, key: str, default: float) -> float:
        return self.number(key, default, "a number of seconds greater than 0")

    def whole(self, key: str, default: int, lowest: int, highest: int) -> int:
        value = self._values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            self.refuse(key, f"a whole number from {lowest} to {highest}")
        return value

    def path(self, key: str) -> Path | None:
        """An absolute path; a relative one is relative to the file's folder."""
        value = self.text(key, "a path")
        if value is None:
            return None
        if value.startswith("~") or _CONTROL.search(value):
            self.refuse(key, "a whole path (~ has no meaning here) without control characters")
        return self.source.path.parent / value

    def words(self, key: str) -> tuple[str, ...] | None:
        """A command with its arguments. Its first word is a path like others if it has a ``/``."""
        value = self._values.get(key)
        if value is None:
            return None
        good = isinstance(value, list) and all(isinstance(word, str) and "\0" not in word for word in value)
        if not good or not value or not value[0]:
            self.refuse(key, 'a list of words such as ["command", "argument"]', show=False)
        command = value[0]
        if "/" in command:
            command = str(self.source.path.parent / command)
        return (command, *value[1:])

    def table(self, key: str, known: Collection[str], expected: str) -> Table | None:
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(key, expected, show=False)
        return Table(self.source, value, (*self.where, key), f"{self.title}{key}.", known)


def suggestion(key: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(key.lower(), known, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"


def shown_key(key: str) -> str:
    return key if NAME.fullmatch(key) else shown_value(key)


def shown_value(value: object) -> str:
    """``value`` as in TOML, on one line and not too long."""
    match value:
        case bool():
            return "true" if value else "false"
        case dict():
            return "a table"
        case list():
            return "a list"
        case int() if value.bit_length() > 128:
            return "a number of that size"
        case str():
            shown = json.dumps(value, ensure_ascii=not value.isprintable())
        case _:
            shown = str(value)
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…"
