"""The one table model: what every format renders, and how a number is shown.

Builders make a `Table`; `reports.formats` turns it into markdown, LaTeX, CSV and HTML, `reports.terminal` into lines of
a terminal. `Table.shown` holds the texts that all made for reading have in common; CSV keeps the numbers as they were
measured.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

OFF_BUDGET = "†"
UNLIKE = "‡"
CUT = "§"
DOUBTED = "¶"
TIED = "≈"
HUGE = 1e7
"""Numbers from here on are shown with an exponent,"""
MOST_DECIMALS = 6
"""and those that need more decimals."""
LEGEND = {
    OFF_BUDGET: "off budget: the counted share of active parameters misses the asked ratio by more than its tolerance.",
    TIED: "not significantly worse than the best of those it competes with (bold), see the table significance.",
    UNLIKE: "measured under other conditions than the rest of its column, so not to be compared with it:",
    CUT: "measured on prompts that were cut at their start to fit the model's limit of tokens, as counted below.",
    DOUBTED: "published so, but to be read with care:",
}


@dataclass(frozen=True)
class Cell:
    """A text, or a number with its uncertainty; `Cell(None)` was not measured."""

    value: str | float | None
    """An `int` is shown whole, a `float` with as many digits as its error warrants."""
    error: float | None = None
    """In the unit of the value, shown after ±."""
    remark: str = ""
    """Shown in brackets behind the number."""
    marks: str = ""
    """Keys of `LEGEND`."""
    best: bool = False
    """Whether it is set in bold."""
    digits: str = ""
    """How the number is written for readers, where two decimals would not do."""

    def __str__(self) -> str:
        return self._shown

    @cached_property
    def _shown(self) -> str:
        """Kept, because every format asks for it."""
        value = self.digits or self.value
        shown = plain(value) if isinstance(value, str) else number(value, self.error)
        return f"{shown}{f' ({plain(self.remark)})' if self.remark else ''}{self.marks}"


@dataclass(frozen=True)
class Column:
    """A column's header."""

    label: str
    """What the column holds, with its unit."""
    group: str = ""
    """A header that neighbouring columns share, above their labels."""
    text: bool = False
    """Whether it holds text, to be set flush left."""

    def __str__(self) -> str:
        return plain(f"{self.group}: {self.label}" if self.group else self.label)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of any format; the first column names the block a row belongs to."""

    name: str
    """Its file name without the suffix."""
    title: str
    """A few words."""
    caption: str
    """What is shown, in a sentence or two."""
    columns: tuple[Column, ...]
    """One per cell of a row."""
    rows: tuple[tuple[Cell, ...], ...]
    """Whole rows: the first cell is repeated throughout its block."""
    notes: tuple[str, ...] = ()
    """Sentences below the table."""

    @cached_property
    def shown(self) -> list[list[str]]:
        """The cells as texts, a block's name in its first row only."""
        texts = [[str(cell) for cell in row] for row in self.rows]
        return [["" if self.continues(index) else row[0], *row[1:]] for index, row in enumerate(texts)]

    def continues(self, index: int) -> bool:
        """Whether row `index` belongs to the same block as the row above it."""
        return index > 0 and self.rows[index][0] == self.rows[index - 1][0]


@lru_cache(maxsize=2**16)  # every format asks for the same cells
def plain(text: str) -> str:
    """`text` on one line, without control characters."""
    visible = text if text.isprintable() else "".join(char if char.isprintable() else " " for char in text)
    return " ".join(visible.split())


def number(value: float | None, error: float | None = None) -> str:
    """The value to two digits of its error, or else to four of its own; two decimals are enough where they show one.

    >>> number(12.3456, 0.234), number(42.5, 7.906), number(1234.5), number(8), number(None)
    ('12.35 ± 0.23', '42.5 ± 7.9', '1234', '8', '-')
    >>> number(5.12, 0.001), number(0.00412), number(1e300, 2e298)
    ('5.1200 ± 0.0010', '0.0041', '1.000e+300 ± 2.000e+298')
    """
    if value is None:
        return "-"
    if isinstance(value, int) and error is None:
        return str(value)
    parts = [value] if error is None else [value, error]
    places = _decimals(error, 2) if error else _decimals(value, 4)
    lengthy = places > MOST_DECIMALS or any(HUGE <= abs(part) < math.inf for part in parts)
    return " ± ".join(f"{part:.3e}" if lengthy else f"{part:z.{places}f}" for part in parts)


def _decimals(value: float, digits: int) -> int:
    if value == 0 or not math.isfinite(value):
        return 2
    exponent = math.floor(math.log10(abs(value)))
    return min(2, max(0, digits - 1 - exponent)) if exponent >= -2 else 1 - exponent


def percent(share: float) -> float:
    """A share in per cent; an `int` where it is whole, so that an asked 0.6 is shown as 60."""
    value = round(100.0 * share, 9)
    return int(value) if value.is_integer() else value


def legend(rows: Iterable[Iterable[Cell]]) -> list[str]:
    """The meaning of every mark the rows carry."""
    used = {mark for row in rows for cell in row for mark in cell.marks}
    return [f"{mark} {meaning}" for mark, meaning in LEGEND.items() if mark in used]
