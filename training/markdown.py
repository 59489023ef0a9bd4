"""Markdown tables, for every page that training and its tools write."""

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
        head: of each column.
        rows: cells, as many as the head has; see ``row``.
        align: a letter per column, ``r`` for numbers that stand at the right.
        is_tight: whether the line below the head goes without spaces.

    Returns:
        Lines of Markdown, without a last line break.
    """
    rules = ["---:" if letter == "r" else "---" for letter in align.ljust(len(head))]
    rule = f"|{'|'.join(rules)}|" if is_tight else row(*rules)
    return "\n".join([row(*head), rule, *(row(*cells) for cells in rows)])


def row(*cells: object) -> str:
    """Format a line of a table.

    Args:
        *cells: anything with a text; None is a blank cell of one space.

    Returns:
        A line of Markdown.
    """
    return f"|{'|'.join(' ' if cell is None else f' {cell} ' for cell in cells)}|"


def escape(cell: object) -> str:
    """Return a text of unknown origin as one line without a column mark."""
    return " ".join(str(cell).replace("|", "\\|").split())
