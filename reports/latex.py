"""Renders a `Table` as LaTeX: a fragment for a paper, and a document around it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from jinja2.runtime import LoopContext
from markupsafe import Markup

from reports.markup import environment, finalize, spans, texts
from reports.panels import WIDEST, panels
from reports.tables import Column, Table, plain

PAGE = 45
"""Lines that fit on a page."""
WRAPPED = 30
"""Characters in a line of a wrapped cell."""
LINE = 150
"""Characters of a row that are still readable when shrunk to the width of a page."""
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
    "¶": r"\textparagraph{}",
}
COMMANDS = str.maketrans(LATEX)


@lru_cache(maxsize=2**16)  # pages begin with the same header, panels with the same columns
def escape_latex(text: str) -> Markup:
    """`text` as LaTeX sets it; a character it has no glyph for is named, as in [U+6A21]."""
    escaped = plain(text).translate(COMMANDS)
    if not escaped.isascii():
        escaped = "".join(char if char.isascii() else _named(char) for char in escaped)
    return Markup(escaped.replace("--", "-{}-"))


def _named(char: str) -> str:
    return f"{LATEX['[']}U+{ord(char):04X}{LATEX[']']}"


TEX = environment(
    finalize=finalize(escape_latex),
    block_start_string="<%",
    block_end_string="%>",
    variable_start_string="<<",
    variable_end_string=">>",
    comment_start_string="<#",
    comment_end_string="#>",
)


def fragment(table: Table) -> str:
    """A booktabs table to be `\\input` into a paper; one that is long or wide goes on in further ones."""
    pages = [_page(page) for panel in panels(table, LINE) for page in _pages(panel)]
    return TEX.get_template("table.tex").render(table=table, pages=pages, end=_end)


def standalone(table: Table) -> str:
    """A document that compiles beside the fragment."""
    return TEX.get_template("standalone.tex").render(name=table.name)


def _pages(table: Table) -> Iterator[Table]:
    """The table in parts that a page holds."""
    start, used = 0, 0
    for index, row in enumerate(table.shown):
        lines = max(1, *(math.ceil(len(text) / WRAPPED) for text in row))
        if index > start and used + lines > PAGE:
            yield replace(table, rows=table.rows[start:index])
            start, used = index, 0
        used += lines
    yield replace(table, rows=table.rows[start:])


def _page(table: Table) -> dict[str, Any]:
    rows = [Markup(" & ".join(row) + r" \\") for row in texts(table, escape_latex, r"\textbf{{{}}}")]
    columns = [[row[index] for row in table.shown] for index in range(len(table.columns))]
    kinds = Markup("".join(map(_kind, table.columns, columns)))
    return {
        "table": table,
        "kinds": kinds,
        "rows": rows,
        "spans": spans(table),
        "rules": list(_rules(table)),
    }


def _kind(column: Column, cells: Sequence[str]) -> str:
    """How a column is set: wrapped where a text is long."""
    if max(map(len, cells), default=0) > WIDEST:
        return r">{\raggedright\arraybackslash}p{5.5cm}"
    return "l" if column.text else "r"


def _end(loop: LoopContext) -> Markup:
    return Markup(r" \\") if loop.last else Markup(" & ")


def _rules(table: Table) -> Iterator[tuple[int, int]]:
    """First and last column below each shared header, counted from one."""
    last = 0
    for group, width in spans(table):
        first, last = last + 1, last + width
        if group:
            yield first, last
