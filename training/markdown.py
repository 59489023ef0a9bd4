"""Markdown tables of the pages that training and its tools write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    align: str = "",
    is_tight: bool = False,
) -> str:
    """Format a table.

    Args:
        head: heading of each column.
        rows: cells of each row, as many as columns; see ``row``.
        align: a letter per column, ``r`` for right-aligned numbers.
        is_tight: whether the line below the head has no spaces.

    Returns:
        Lines of Markdown, without a trailing line break.
    """
    rules = ["---:" if letter == "r" else "---" for letter in align.ljust(len(head))]
    rule = f"|{'|'.join(rules)}|" if is_tight else row(*rules)
    return "\n".join([row(*head), rule, *(row(*cells) for cells in rows)])


def row(*cells: object) -> str:
    """Format a row of a table.

    Args:
        *cells: contents of the cells; None for a blank cell of one space.

    Returns:
        A line of Markdown.
    """
    return f"|{'|'.join(' ' if cell is None else f' {cell} ' for cell in cells)}|"


def escape(cell: object) -> str:
    """Return an untrusted text on one line, with column separators escaped."""
    return " ".join(str(cell).replace("|", "\\|").split())
