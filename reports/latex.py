"""Renders a `Table` as LaTeX: a fragment for a paper, and a document around it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from jinja2.runtime import LoopContext
from markupsafe import Markup

from reports.markup import environment, finalize, spans, texts
from reports.pages import pages
from reports.panels import panels
from reports.tables import Column, Table, plain

LINE = 130
"""Characters of a row that are still readable when shrunk to the width of a page."""
WIDEST = 28
"""Characters after which a cell is wrapped."""
BREAK = "\u200b"
"""Where a line may end; no visible text holds it."""
LONG = re.compile(r"\S{21,}")
"""A word that may be wider than a wrapped cell."""
PIECE = re.compile(r"[^\W_]{6}|[\W_]")
"""After what such a word may be broken."""
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
    BREAK: r"\allowbreak{}",
}
COMMANDS = str.maketrans(LATEX)


@lru_cache(maxsize=2**16)  # pages begin with the same header, panels with the same columns
def escape_latex(text: str) -> Markup:
    """`text` as LaTeX sets it; a character it has no glyph for is named, as in [U+6A21]."""
    escaped = LONG.sub(_breakable, plain(text)).translate(COMMANDS)
    if not escaped.isascii():
        escaped = "".join(char if char.isascii() else _named(char) for char in escaped)
    return Markup(escaped.replace("--", "-{}-"))


def _breakable(word: re.Match[str]) -> str:
    return PIECE.sub(rf"\g<0>{BREAK}", word[0])


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
    parts = [_part(part) for part in _parts(table)]
    return TEX.get_template("table.tex").render(name=table.name, title=table.title, parts=parts, end=_end)


def standalone(table: Table) -> str:
    """A document that compiles beside the fragment."""
    return TEX.get_template("standalone.tex").render(name=table.name)


def _parts(table: Table) -> Iterator[Table]:
    """What a page holds; only the last panel has the notes."""
    *before, last = panels(table, LINE, WIDEST)
    for panel in (*(replace(panel, notes=()) for panel in before), last):
        yield from pages(panel)


def _part(table: Table) -> dict[str, Any]:
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
        return r">{\raggedright\arraybackslash}p{12em}"
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
