"""Breaks a table that is too wide into narrower ones, which repeat the columns that name the rows."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from textwrap import wrap

from reports.tables import Column, Table, plain

GAP = 4
"""Characters between columns, and that tabulate adds to a header."""
SHARED = 12
"""Characters in a line of a header that columns share."""
NAMES = ("Method", "Settings", "Batch", "Measured")
"""Headers of columns that say which row it is, as do those before them."""


def panels(table: Table, width: int, widest: int) -> Iterator[Table]:
    """Tables of at most `width` characters, where cells are wrapped after `widest` of them; one with a single column
    beside the names may be wider."""
    widths = _widths(table, widest)
    names = max((index for index, column in enumerate(table.columns, start=1) if column.label in NAMES), default=1)
    panel = start = list(range(names))
    for index in range(names, len(table.columns)):
        if panel != start and sum(widths[i] for i in (*panel, index)) - GAP > width:
            yield _part(table, panel)
            panel = start
        panel = [*panel, index]
    yield _part(table, panel)


def _widths(table: Table, widest: int) -> list[int]:
    columns = [[row[index] for row in table.shown] for index in range(len(table.columns))]
    texts = ([*_header(column), *cells] for column, cells in zip(table.columns, columns, strict=True))
    return [GAP + min(widest, max(map(len, each))) for each in texts]


def _header(column: Column) -> list[str]:
    return [*shared(column.group), column.label]


def shared(group: str) -> list[str]:
    """The lines of a header that columns share."""
    return wrap(plain(group), SHARED, break_long_words=False, break_on_hyphens=False)


def _part(table: Table, panel: Sequence[int]) -> Table:
    rows = tuple(tuple(row[index] for index in panel) for row in table.rows)
    return replace(table, columns=tuple(table.columns[index] for index in panel), rows=rows)
