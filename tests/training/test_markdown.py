"""Tables are lines of Markdown, whatever their cells hold."""

from __future__ import annotations

from training.markdown import escape, row, table


def test_a_table_has_a_head_a_rule_and_rows() -> None:
    lines = table(["name", "s"], [["a", 1.5], ["", 2]]).split("\n")
    assert lines == ["| name | s |", "| --- | --- |", "| a | 1.5 |", "|  | 2 |"]


def test_numbers_may_stand_at_the_right_below_a_tight_rule() -> None:
    lines = table([None, "s", "t"], [], align=" r", is_tight=True).split("\n")
    assert lines == ["| | s | t |", "|---|---:|---|"]


def test_what_would_end_a_cell_is_escaped() -> None:
    assert row(escape("a|b\n  c"), None) == "| a\\|b c | |"
