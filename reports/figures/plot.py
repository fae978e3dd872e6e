"""What a figure is: rows of data, which are its CSV file, and a function that draws them."""

import math
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from reports.commands import CELL, command, of_cell, once, parsed, without
from reports.figures.looks import Looks
from reports.results import Result

Row = Mapping[str, Any]
"""Texts, numbers, and None where there is no number."""
Rows = Sequence[Row]
ANY_RATIO = 0.8


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure before it is drawn."""

    name: str
    """Its file name without the suffix: the family and the model."""
    title: str
    """A few words."""
    caption: str
    """What is to be seen, and from which records."""
    rows: Rows
    """What is drawn, all of it; every row has the same keys."""
    draw: Callable[[Rows], Figure]
    """Draws the rows and reads nothing else."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a family found for one model."""

    caption: str
    """A sentence or two."""
    rows: Rows
    """At least one."""
    draw: Callable[[Looks, Rows], Figure]
    """Draws the rows with the looks of the report, and reads nothing else."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of figure, drawn once per model."""

    name: str
    """Its file names begin with it."""
    title: str
    """A few words."""
    build: Callable[[Sequence[Result]], Content | None]
    """From the results of one model to what is shown; None where there is nothing to show."""
    needs: str
    """What must have been measured."""
    arguments: str
    """What makes `run_all.py` measure it; `{methods}` and `{ratios}` stand for those the model has records of."""


@dataclass(frozen=True)
class Gap:
    """A figure that could not be made."""

    title: str
    """That of its family."""
    model: str
    """Of which model."""
    why: str
    """What is missing."""
    command: str
    """What to type to have it next time."""


def file_name(family: str, model: str) -> str:
    """A name that any file system and link takes, another one for every model."""
    return family + "." + re.sub(r"[^A-Za-z0-9.-]", lambda char: f"_{ord(char[0]):x}_", model)


def remedy(results: Sequence[Result], arguments: str) -> str:
    """What to type to have `arguments` measured at the ratio that most of a model's results have, as they were."""
    made = [result for result in results if not result.dense]
    at = Counter(result.ratio for result in made).most_common(1)
    there = [of_cell(result.records[0]) for result in made if result.ratio == at[0][0]]
    first = {cell["--methods"][0]: cell for cell in reversed(there)}
    needed = parsed(arguments.format(methods=shlex.join(sorted(first)), ratios=at[0][0] if at else ANY_RATIO))
    asked = {name: words for name, words in needed.items() if words}
    settings = once(first[method].get("--set", []) for method in asked.get("--methods", []) if method in first)
    cell = there[0] if there else of_cell(results[0].records[0])
    chosen = {"--models": cell["--models"]} | ({"--set": settings} if settings else {})
    return command(chosen | without(cell, *CELL) | asked)


def grouped(rows: Rows, *keys: str) -> dict[Any, list[Row]]:
    """The rows by the values of the keys (a tuple where there are several), in the order first met."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys)].append(row)
    return dict(groups)


def column(rows: Iterable[Row], key: str) -> list[float]:
    """The numbers of a column; NaN where there is none."""
    return [math.nan if row[key] is None else row[key] for row in rows]
