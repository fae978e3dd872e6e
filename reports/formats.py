"""Renders a `Table` as markdown, CSV and HTML, and lists all formats. Everything that comes from outside is escaped.

Each template environment escapes whatever an expression prints, so a template cannot forget to; text that is markup
already is a `Markup`.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence

from markupsafe import Markup, escape

from reports.latex import fragment, standalone
from reports.markup import environment, finalize, spans, texts
from reports.tables import Cell, Column, Table, plain

SIGNS = re.compile(r"[\\`*{}\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])")
"""Of markdown; an underscore is none inside a word."""
START = re.compile(r"^(\d*)(#+|[-+.)])(?= )")
"""What makes a heading or a list at the start of a text."""


def escape_markdown(text: str) -> Markup:
    """`text` as GitHub-flavoured markdown shows it, in a paragraph or in a table."""
    return Markup(START.sub(r"\1\\\2", SIGNS.sub(r"\\\g<0>", plain(text))))


def escape_html(text: str) -> Markup:
    """`text` as a page shows it."""
    return escape(plain(text))


MARKDOWN = environment(finalize=finalize(escape_markdown), trim_blocks=True)
HTML = environment(finalize=finalize(escape_html), autoescape=True)


def markdown(table: Table) -> str:
    """A pipe table between its title and its notes."""
    return MARKDOWN.get_template("table.md").render(table=table, grid=_grid(table))


def _grid(table: Table) -> Markup:
    """Padded, so that it can be read as it stands."""
    headers = [escape_markdown(str(column)) for column in table.columns]
    columns = list(zip(headers, *texts(table, escape_markdown, "**{}**"), strict=True))
    padded = (_padded(cells, column.text) for cells, column in zip(columns, table.columns, strict=True))
    return Markup("\n".join(f"| {' | '.join(line)} |" for line in zip(*padded, strict=True)))


def _padded(cells: Sequence[str], text: bool) -> list[str]:
    """A column of one width, its rule below the header."""
    width = max(3, *map(len, cells))
    header, *below = (cell.ljust(width) if text else cell.rjust(width) for cell in map(str, cells))
    return [header, f":{'-' * (width - 1)}" if text else f"{'-' * (width - 1)}:", *below]


def html(table: Table) -> str:
    """A page of its own."""
    rows = [Markup("</td><td>".join(row)) for row in texts(table, escape_html, "<strong>{}</strong>")]
    return HTML.get_template("table.html").render(table=table, rows=rows, spans=spans(table))


def comma_separated(table: Table) -> str:
    """Numbers at full precision; a column's errors, and its remarks, marks and `best`, in columns of their own."""
    cells = [[row[index] for row in table.rows] for index in range(len(table.columns))]
    columns = (part for column, below in zip(table.columns, cells, strict=True) for part in _csv_columns(column, below))
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(zip(*columns, strict=True))
    return stream.getvalue()


def _csv_columns(column: Column, cells: Sequence[Cell]) -> Iterator[list[str]]:
    label = str(column)
    yield [label, *(_exact(cell.value) for cell in cells)]
    if any(cell.error is not None for cell in cells):
        yield [f"{label} ±", *(_exact(cell.error) for cell in cells)]
    if any(cell.remark or cell.marks or cell.best for cell in cells):
        yield [f"{label} remarks", *(plain(f"{cell.remark} {'best' * cell.best} {cell.marks}") for cell in cells)]


def _exact(value: str | float | None) -> str:
    return "" if value is None else plain(value) if isinstance(value, str) else repr(value)


FORMATS: dict[str, Callable[[Table], str]] = {
    "md": markdown,
    "tex": fragment,
    "standalone.tex": standalone,
    "csv": comma_separated,
    "html": html,
}
"""How a table is written to a file, by the file's suffix."""
