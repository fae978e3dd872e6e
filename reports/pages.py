"""Breaks a table that is longer than a page of a paper into parts; its caption, headers and notes take room too."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from textwrap import wrap

from reports.tables import Table

PAGE = 36
"""Lines on a page of LaTeX's own classes, even in their largest letters."""
HEAD = 5
"""Lines that the title, the header and the rules take."""
RULE = 0.5
"""Lines that the rule above a block of rows takes."""
WRAPPED = 20
"""Characters in a line of a wrapped cell."""
CAPTION = 70
"""Characters in a line of a caption."""
NOTE = 95
"""Characters of a note, in its small letters, that take the room of a line."""
TOGETHER = 15 * NOTE
"""Characters of a note that are not parted."""


def pages(table: Table) -> Iterator[Table]:
    """The table in parts that a page holds, the first with room for the caption, the notes behind the last rows."""
    notes = tuple(piece for note in table.notes for piece in wrap(note, TOGETHER))
    heights = [*_rows(table), *(math.ceil(len(note) / NOTE) for note in notes)]
    rows = len(table.rows)
    for start, end in pairwise(_breaks(heights, HEAD + math.ceil(len(table.caption) / CAPTION))):
        below = notes[max(0, start - rows) : max(0, end - rows)]
        yield replace(table, rows=table.rows[start:end], notes=below)


def _breaks(heights: Sequence[float], used: float) -> Iterator[int]:
    """Where each page starts, and the end."""
    yield 0
    for index, height in enumerate(heights):
        if index and used + height > PAGE:
            yield index
            used = HEAD
        used += height
    yield len(heights)


def _rows(table: Table) -> Iterator[float]:
    for index, row in enumerate(table.shown):
        rule = 0 if table.continues(index) else RULE
        yield rule + max(1, *(len(wrap(text, WRAPPED)) for text in row))
