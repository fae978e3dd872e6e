"""Renders a `Table` as markdown, LaTeX, CSV and HTML. Everything that comes from outside is escaped.

Each template environment escapes whatever an expression prints, so a template cannot forget to; text that is markup
already is a `Markup`.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.runtime import LoopContext
from markupsafe import Markup, escape
from tabulate import tabulate

from reports.tables import Cell, Column, Table, plain

TEMPLATES = FileSystemLoader(Path(__file__).parent / "templates")

# Commands that exist in LaTeX's default encoding; \char34 is the straight quote of the typewriter font only.
LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "[": "{[}",  # behind a row's \\\\ it would open an option, and * would be one
    "]": "{]}",
    "*": "{*}",
    "|": r"\textbar{}",
    '"': r"{\ttfamily\char34}",
    "'": r"\textquotesingle{}",
    "`": r"\textasciigrave{}",
    "†": r"\textdagger{}",
    "‡": r"\textdaggerdbl{}",
    "§": r"\textsection{}",
    "±": r"\textpm{}",
    "≈": r"\ensuremath{\approx}",
}


def escape_markdown(text: str) -> Markup:
    """`text` as GitHub-flavoured markdown shows it, in a paragraph or in a table."""
    escaped = re.sub(r"[\\`*{}\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", plain(text))
    return Markup(escaped)


def escape_latex(text: str) -> Markup:
    """`text` as LaTeX sets it; a character it has no glyph for is named, as in [U+6A21]."""
    escaped = "".join(LATEX.get(char) or (char if char.isascii() else _named(char)) for char in plain(text))
    return Markup(escaped.replace("--", "-{}-"))


def escape_html(text: str) -> Markup:
    """`text` as a page shows it."""
    return escape(plain(text))


def _named(char: str) -> str:
    return f"{LATEX['[']}U+{ord(char):04X}{LATEX[']']}"


def _finalize(escape: Callable[[str], Markup]) -> Callable[[Any], str]:
    return lambda value: value if isinstance(value, Markup) else escape(str(value))


def _environment(**options: Any) -> Environment:
    return Environment(loader=TEMPLATES, undefined=StrictUndefined, keep_trailing_newline=True, **options)


MARKDOWN = _environment(finalize=_finalize(escape_markdown), trim_blocks=True)
TEX = _environment(
    finalize=_finalize(escape_latex),
    block_start_string="<%",
    block_end_string="%>",
    variable_start_string="<<",
    variable_end_string=">>",
    comment_start_string="<#",
    comment_end_string="#>",
)
HTML = _environment(finalize=_finalize(escape_html), autoescape=True)


def markdown(table: Table) -> str:
    """A pipe table between its title and its notes."""
    return MARKDOWN.get_template("table.md").render(table=table, grid=_grid(table))


def _grid(table: Table) -> Markup:
    return Markup(
        tabulate(
            _texts(table, escape_markdown, "**{}**"),
            headers=[escape_markdown(str(column)) for column in table.columns],
            tablefmt="pipe",
            colalign=["left" if column.text else "right" for column in table.columns],
            disable_numparse=True,
        )
    )


def _texts(table: Table, escaped: Callable[[str], Markup], bold: str) -> list[list[Markup]]:
    """The shown cells as markup, the best in bold."""
    rows = zip(table.shown, table.rows, strict=True)
    return [
        [Markup(bold).format(escaped(text)) if cell.best else escaped(text) for text, cell in zip(*row, strict=True)]
        for row in rows
    ]


def latex(table: Table) -> str:
    """A document that compiles as it is, with a booktabs table to copy from."""
    rows = _texts(table, escape_latex, r"\textbf{{{}}}")
    template = TEX.get_template("table.tex")
    return template.render(table=table, rows=rows, spans=_spans(table), rules=_rules(table), end=_latex_end)


def _latex_end(loop: LoopContext) -> Markup:
    return Markup(r" \\") if loop.last else Markup(" & ")


def html(table: Table) -> str:
    """A page of its own."""
    rows = _texts(table, escape_html, "<strong>{}</strong>")
    return HTML.get_template("table.html").render(table=table, rows=rows, spans=_spans(table))


def _spans(table: Table) -> list[tuple[str, int]]:
    """The row of shared headers: each with the number of columns below it."""
    return [(group, len(list(columns))) for group, columns in groupby(table.columns, lambda column: column.group)]


def _rules(table: Table) -> Iterator[tuple[int, int]]:
    """First and last column below each shared header, counted from one."""
    last = 0
    for group, width in _spans(table):
        first, last = last + 1, last + width
        if group:
            yield first, last


def comma_separated(table: Table) -> str:
    """Numbers at full precision; a column's errors, and its remarks, marks and `best`, in columns of their own."""
    cells = zip(*table.rows, strict=True)
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


FORMATS: dict[str, Callable[[Table], str]] = {"md": markdown, "tex": latex, "csv": comma_separated, "html": html}
