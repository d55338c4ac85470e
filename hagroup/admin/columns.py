"""Lines under headers, for a terminal of any width: nothing is cut, and what people have to copy stays in one piece."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Sequence
from itertools import zip_longest
from typing import NamedTuple

from rich.cells import cell_len

_GAP = 2
_LEAST = 8
"""Characters that a column keeps, however narrow the terminal is."""
_INDENT_MOST = 10


class Line(NamedTuple):
    text: str
    row: int | None
    """Which of the lines it belongs to; None: the headers."""


def lay_out(
    columns: Sequence[str],
    lines: Iterable[Sequence[str]],
    width: int,
    *,
    whole: Collection[str] = (),
    under: Collection[str] = (),
    named: bool = False,
) -> list[Line]:
    """Text for a terminal that is ``width`` characters wide.

    :param whole: columns that are never folded. A line is longer than the terminal only if these alone are.
    :param under: columns that go below their line, as running text, where the line would be too long for the terminal.
    :param named: there each is named. (Of several each is anyway.)
    """
    rows = [[_printable(cell) for cell in line] for line in lines]
    shown = list(range(len(columns)))
    widths = _natural(columns, rows)
    texts = [""] * len(rows)
    if under and _total(widths) > width:
        shown = [place for place in shown if columns[place] not in under]
        widths = [widths[place] for place in shown]
        texts = [_running(columns, row, under, named or len(under) > 1) for row in rows]
    _narrow(widths, width, [columns[place] not in whole for place in shown])
    found = [Line(text, None) for text in _folded([columns[place] for place in shown], widths)]
    indent = min(widths[0] + _GAP, _INDENT_MOST)
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        found += [Line(one, number) for one in _folded([row[place] for place in shown], widths)]
        found += [Line(" " * indent + one, number) for one in fold(text, width - indent)]
    return found


def without_empty(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The columns in which some line says something, and a dash where another says nothing."""
    rows = list(lines)
    places = [place for place in range(len(columns)) if any(row[place] for row in rows)]
    return [columns[place] for place in places], [[row[place] or "-" for place in places] for row in rows]


def fold(text: str, width: int) -> list[str]:
    """Running text, between words where that can be."""
    return textwrap.wrap(text, max(width, _LEAST), break_on_hyphens=False)


def _printable(text: str) -> str:
    """Labels come from anywhere: none of them moves the cursor or colours the screen."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _natural(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(cell_len, (column, *(row[place] for row in rows)))) for place, column in enumerate(columns)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def _running(columns: Sequence[str], row: Sequence[str], under: Collection[str], named: bool) -> str:
    said = [(column, cell) for column, cell in zip(columns, row, strict=True) if column in under and cell]
    return ", ".join(f"{column} {cell}" if named else cell for column, cell in said)


def _narrow(widths: list[int], width: int, gives_way: Sequence[bool]) -> None:
    """The widest column that gives way becomes narrower, until all fits or none is left."""
    while (over := _total(widths) - width) > 0:
        places = [place for place, may in enumerate(gives_way) if may and widths[place] > _LEAST]
        if not places:
            return
        widest = max(places, key=widths.__getitem__)
        others = [widths[place] for place in places if place != widest]
        widths[widest] = max(_LEAST, widths[widest] - over, min(widths[widest] - 1, max(others, default=0)))


def _folded(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    parts = [fold(cell, width) if cell_len(cell) > width else [cell] for cell, width in zip(cells, widths, strict=True)]
    lines = []
    for line in zip_longest(*parts, fillvalue=""):
        padded = [part + " " * (width - cell_len(part)) for part, width in zip(line, widths, strict=True)]
        lines.append((" " * _GAP).join(padded).rstrip())
    return lines
