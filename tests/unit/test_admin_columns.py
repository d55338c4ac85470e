"""Tables of ha-admin on terminals of any width (admin/columns.py)."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from hagroup.admin.columns import Line, lay_out, without_empty

COLUMNS = ("member", "uid", "label", "why")
UID = "43e20ad613f4aafa0da15a0ce1dd96f7"
TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)


def texts(lines: list[Line]) -> list[str]:
    return [line.text for line in lines]


def test_wide_enough() -> None:
    found = lay_out(COLUMNS, [("hsm1", UID, "a key", "it is gone")], 80, whole={"uid"}, under={"why"})
    assert texts(found) == [
        "member  uid                               label  why",
        f"hsm1    {UID}  a key  it is gone",
    ]
    assert [line.row for line in found] == [None, 0]


def test_what_goes_below() -> None:
    found = lay_out(COLUMNS, [("hsm1", UID, "a key", "it is gone from the token")], 60, whole={"uid"}, under={"why"})
    assert texts(found) == [
        "member  uid                               label",
        f"hsm1    {UID}  a key",
        "        it is gone from the token",
    ]
    both = lay_out(COLUMNS, [("hsm1", UID, "a key", "gone"), ("hsm2", "", "", "")], 40, under={"why", "label"})
    assert "        label a key, why gone" in texts(both)
    assert texts(both)[-1] == "hsm2"


def test_the_widest_gives_way_and_is_folded_between_words() -> None:
    found = lay_out(COLUMNS[:3], [("hsm1", UID, "a key with a long label")], 52, whole={"uid", "member"})
    assert texts(found)[1:] == [f"hsm1    {UID}  a key with", " " * 42 + "a long", " " * 42 + "label"]


def test_a_label_does_not_move_the_cursor() -> None:
    (_, line) = lay_out(("label",), [("\x1b[2Jx\r\n[red]",)], 80)
    assert line.text == "\N{REPLACEMENT CHARACTER}[2Jx" + 2 * "\N{REPLACEMENT CHARACTER}" + "[red]"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TEXTS, st.just(UID), TEXTS, TEXTS), max_size=3), st.integers(52, 130))
def test_nothing_is_cut(rows: list[tuple[str, str, str, str]], width: int) -> None:
    found = lay_out(("member", "uid", "label", "why"), rows, width, whole={"uid"}, under={"why"})
    for number, row in enumerate(rows):
        said = "".join(line.text for line in found if line.row == number)
        kept = Counter(c for c in "".join(row) if c.isprintable() and not c.isspace())
        assert not kept - Counter(said)
        assert UID in said
    if all(cell.isascii() for row in rows for cell in row):
        assert all(len(line.text) <= width for line in found)


def test_columns_in_which_nothing_is_said_are_left_out() -> None:
    columns, lines = without_empty(("number", "action", "done"), [("", "make it", "yes"), ("", "look", "")])
    assert columns == ["action", "done"]
    assert lines == [["make it", "yes"], ["look", "-"]]


def test_a_single_column_below_is_named_where_it_does_not_speak_for_itself() -> None:
    found = lay_out(("member", "ms"), [("hsm1" * 4, "0.3")], 16, under={"ms"}, named=True)
    assert texts(found)[-1].strip() == "ms 0.3"
