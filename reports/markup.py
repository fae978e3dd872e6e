"""What the formats made of markup share: templates that escape what they print, and a table's parts as markup."""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reports.tables import Table

TEMPLATES = FileSystemLoader(Path(__file__).parent / "templates")


def finalize(escape: Callable[[str], Markup]) -> Callable[[Any], str]:
    """Escapes what an expression prints, unless it is markup already."""
    return lambda value: value if isinstance(value, Markup) else escape(str(value))


def environment(**options: Any) -> Environment:
    """Where templates are found; an undefined name is an error."""
    return Environment(loader=TEMPLATES, undefined=StrictUndefined, keep_trailing_newline=True, **options)


def texts(table: Table, escaped: Callable[[str], Markup], bold: str) -> list[list[Markup]]:
    """The shown cells as markup, the best in bold."""
    rows = ([escaped(text) for text in row] for row in table.shown)
    return [
        [Markup(bold).format(text) if cell.best else text for text, cell in zip(row, cells, strict=True)]
        for row, cells in zip(rows, table.rows, strict=True)
    ]


def spans(table: Table) -> list[tuple[str, int]]:
    """The row of shared headers: each with the number of columns below it."""
    return [(group, len(list(columns))) for group, columns in groupby(table.columns, lambda column: column.group)]
