"""The line finder against tomllib: every key that tomllib sees has a place, and the text there means its value."""

from __future__ import annotations

import tomllib
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hagroup.config.lines import KeyPath, Lines

TRICKY = '''\
# [group] label = "no"
title = "a # [not] = a comment"   # comment
[group]
label = """
[fake]
key = 1 \\" """
"quoted.key" = 'x'
dotted.inner . "deep er" = { a = 1, b.c = [ "]", '}' ] }
list = [  # comment ]
  1,
  [2, 3], { x = 5 },
]
when = 1979-05-27 07:32:00  # a space inside

[[member]]
name = "one"
[member.env]
A = """"quoted""""
[[member]]
  name = "two"
  [member.pin]
  file = \'\'\'it\'s\'\'\'
[ watchdog . "web hook" ]
url = 'c:\\'
'''


def test_lines_of_a_tricky_text() -> None:
    lines = Lines(TRICKY)
    expected: dict[KeyPath, int] = {
        ("title",): 2,
        ("group",): 3,
        ("group", "label"): 4,
        ("group", "quoted.key"): 7,
        ("group", "dotted", "inner", "deep er", "b", "c", 1): 8,
        ("group", "list"): 9,
        ("group", "list", 1): 11,
        ("group", "list", 2, "x"): 11,
        ("group", "when"): 13,
        ("member", 0): 15,
        ("member", 0, "name"): 16,
        ("member", 0, "env"): 17,
        ("member", 0, "env", "A"): 18,
        ("member", 1): 19,
        ("member", 1, "name"): 20,
        ("member", 1, "pin", "file"): 22,
        ("watchdog", "web hook"): 23,
        ("watchdog", "web hook", "url"): 24,
    }
    assert {path: lines.line(path) for path in expected} == expected
    check_against_tomllib(TRICKY)


def test_a_key_that_is_not_there_gives_its_tables_line() -> None:
    lines = Lines(TRICKY)
    assert lines.line(("member", 1, "pin", "env")) == 21
    assert lines.line(("member", 1, "role")) == 19
    assert lines.line(("group", "serial")) == 3
    assert lines.line(("journal", "url")) == 1


def test_a_table_opened_after_its_own_subtable_has_its_own_line() -> None:
    lines = Lines("[watchdog.webhook]\nurl='x'\n[watchdog]\ninterval=1\n")
    assert lines.line(("watchdog", "retry")) == 3


def check_against_tomllib(text: str) -> None:
    lines = Lines(text)

    def check(path: KeyPath, value: Any) -> None:
        place = lines.place(path)
        assert place is not None, path
        if place.value_end:
            assert tomllib.loads(f"x = {text[place.value_start : place.value_end]}")["x"] == value
        else:
            assert isinstance(value, dict | list)  # a header, or the middle of a dotted key
        if isinstance(value, dict):
            for key, inner in value.items():
                check((*path, key), inner)
        if isinstance(value, list):
            for index, inner in enumerate(value):
                check((*path, index), inner)

    for key, value in tomllib.loads(text).items():
        check((key,), value)


# -- texts that are valid by construction: each key is used once

blank = st.sampled_from(["", " ", "\t "])
gap = st.sampled_from(["", " ", "\n", "  # ]}\"'\n", "\r\n"])
content = st.text(st.sampled_from("ab#[]{}=.,' \t"), max_size=6)
scalars = st.one_of(
    st.sampled_from(
        ["1", "-7", "0x1F", "1_000", "true", "inf", "1.5e3", "1979-05-27 07:32:00Z", "07:32:00", '""', "''"]
    ),
    content.map(lambda s: f'"{s}\\"\\\\"'),
    content.map(lambda s: "'" + s.replace("'", "") + "'"),
    content.map(lambda s: f'"""\n{s}""\n\\"{s}\\\\"""'),
    content.map(lambda s: "'''" + s.replace("'", "") + "''x\n''''"),
)


class Keys:
    """Fresh keys, some of which need quotes."""

    def __init__(self) -> None:
        self.count = 0

    def draw(self, data: st.DataObject) -> str:
        self.count += 1
        style = data.draw(st.sampled_from(["k{}", '"k.{}"', "'k \" {}'", '"\\u0041{}"', "{}", "a{} . b"]))
        return style.format(self.count)


def draw_value(data: st.DataObject, keys: Keys, depth: int = 0) -> str:
    kind = data.draw(st.sampled_from(["scalar", "array", "inline"] if depth < 3 else ["scalar"]))
    if kind == "scalar":
        return data.draw(scalars)
    items = range(data.draw(st.integers(0, 3)))
    if kind == "array":
        inner = [data.draw(gap) + draw_value(data, keys, depth + 1) + data.draw(gap) for _ in items]
        return f"[{','.join(inner)}{data.draw(gap)}{data.draw(st.sampled_from([',', ''])) if inner else ''}]"
    pairs = [f"{data.draw(blank)}{keys.draw(data)} ={draw_value(data, keys, depth + 1)}" for _ in items]
    return f"{{{','.join(pairs)}{data.draw(blank)}}}"


def draw_text(data: st.DataObject) -> str:
    keys, parts, arrays = Keys(), [], []
    for _ in range(data.draw(st.integers(1, 6))):
        kind = data.draw(st.sampled_from(["table", "array", "again", "inner", "comment"]))
        if kind == "table":
            parts.append(f"[{data.draw(blank)}{keys.draw(data)}{data.draw(blank)}]")
        elif kind == "array" or (kind in ("again", "inner") and not arrays):
            arrays.append(keys.draw(data))
            parts.append(f"[[{arrays[-1]}]]")
        elif kind == "again":
            parts.append(f"[[{data.draw(st.sampled_from(arrays))}]]")
        elif kind == "inner":
            parts.append(f"[{data.draw(st.sampled_from(arrays))}.{keys.draw(data)}]")
        else:
            parts.append("# \" [ { '''")
        for _ in range(data.draw(st.integers(0, 3))):
            if kind == "comment" and len(parts) > 1:
                break
            indent, equals = data.draw(blank), data.draw(blank)
            value = draw_value(data, keys)
            parts.append(f"{indent}{keys.draw(data)}{equals}={equals}{value}{data.draw(blank)}# end")
    return data.draw(st.sampled_from(["\n", "\r\n", "\n\n"])).join(parts)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_key_has_its_place(data: st.DataObject) -> None:
    check_against_tomllib(draw_text(data))
