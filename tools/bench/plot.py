"""A file of results as a plot (SVG): calls per second over the number of threads, as T's figures 4.1 and 4.2."""

from __future__ import annotations

import argparse
import math
import sys
from html import escape
from pathlib import Path

from results import Row, read

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 80, 210, 50, 60
COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8e5ea2", "#b8860b", "#444444", "#d1478c", "#2aa198")
Line = list[tuple[float, float]]


def step(largest: float) -> float:
    """A round distance between about five grid lines."""
    rough = largest / 5 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)


def lines(rows: list[Row]) -> dict[str, Line]:
    """Points (threads in all, calls per second) of each line."""
    found: dict[str, Line] = {}
    for row in rows:
        name = row["kind"] if row["kind"] == "plain" else f"{row['kind']}, {row['members']} members"
        name += "" if row["cached"] else ", not cached"
        name += f", {row['processes']} processes" if row["processes"] > 1 else ""
        points = found.setdefault(name, [])
        point = (float(row["threads"] * row["processes"]), float(row["rate"]))
        if point[0] not in [threads for threads, _ in points]:  # plain is measured again beside each group
            points.append(point)
    return {name: sorted(points) for name, points in found.items()}


def text(x: float, y: float, content: str, *, anchor: str = "middle", size: int = 12, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{more}>{escape(content)}</text>'


def draw(title: str, machine: str, drawn: dict[str, Line]) -> str:
    most = max(threads for points in drawn.values() for threads, _ in points)
    top = max(rate for points in drawn.values() for _, rate in points) or 1.0
    distance, across = step(top), step(most)
    top = math.ceil(top / distance) * distance
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(threads: float, rate: float) -> tuple[float, float]:
        return LEFT + wide * threads / most, TOP + high * (1 - rate / top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(WIDTH / 2, 24, title, size=16),
        text(WIDTH / 2, HEIGHT - 8, machine, size=9),
        text(LEFT + wide / 2, HEIGHT - 26, "threads"),
        text(20, TOP + high / 2, "per second", more=f' transform="rotate(-90 20 {TOP + high / 2})"'),
    ]
    for number in range(round(top / distance) + 1):
        x, y = at(0, number * distance)
        parts.append(f'<path d="M{x:.1f} {y:.1f}h{wide}" stroke="#ddd"/>')
        parts.append(text(x - 8, y + 4, f"{number * distance:g}", anchor="end"))
    for number in range(int(most / across) + 1):
        x, y = at(number * across, 0)
        parts.append(text(x, y + 18, f"{number * across:g}"))
    for number, (name, points) in enumerate(drawn.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [at(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        y = TOP + 16 * number
        parts.append(f'<path d="M{WIDTH - RIGHT + 14} {y}h18" stroke="{colour}" stroke-width="3"/>')
        parts.append(text(WIDTH - RIGHT + 38, y + 4, name, anchor="start", size=11))
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/bench/plot", description=__doc__)
    parser.add_argument("results", type=Path, help="what run --json wrote")
    parser.add_argument("svg", type=Path, help="the file to write")
    parser.add_argument("--operation", help="which one (default: the first of the file)")
    options = parser.parse_args()
    machine, rows = read(options.results)
    names = list(dict.fromkeys(row["operation"] for row in rows))
    operation = options.operation or (names[0] if names else "")
    chosen = [row for row in rows if row["operation"] == operation]
    if not chosen:
        sys.exit(f"{options.results} has no {operation!r}; it has: {', '.join(names)}")
    options.svg.write_text(draw(operation, machine, lines(chosen)))


if __name__ == "__main__":
    main()
