"""Renders a `Table` for a terminal: columns that do not fit its width go on below, the names of the rows repeated."""

import textwrap

from tabulate import tabulate

from reports.panels import panels, shared
from reports.tables import Table, plain

WIDEST = 36
"""Characters after which a cell is wrapped."""
BEST = "*"
"""Behind what other formats set in bold."""


def terminal(table: Table, width: int) -> str:
    """The table between its title and its notes, in lines of at most `width` characters."""
    grids = (_grid(panel) for panel in panels(table, width, WIDEST))
    best = [f"{BEST} the best"] if any(cell.best for row in table.rows for cell in row) else []
    filled = (textwrap.fill(plain(note), width) for note in (*best, *table.notes))
    return "\n\n".join([plain(table.title), textwrap.fill(plain(table.caption), width), *grids, *filled]) + "\n"


def _grid(table: Table) -> str:
    rows = [
        [_wrapped(f"{text}{BEST * cell.best}") for text, cell in zip(*row, strict=True)]
        for row in zip(table.shown, table.rows, strict=True)
    ]
    headers = ["\n".join(map(_wrapped, [*shared(column.group), column.label])) for column in table.columns]
    aligned = ["left" if column.text else "right" for column in table.columns]
    return tabulate(rows, headers=headers, tablefmt="simple", colalign=aligned, disable_numparse=True)


def _wrapped(text: str) -> str:
    return textwrap.fill(plain(text), WIDEST, break_on_hyphens=False)
