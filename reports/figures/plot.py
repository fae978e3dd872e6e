"""What a figure is: rows of data, which are its CSV file, and a function that draws them."""

import math
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from reports.results import Result

Row = Mapping[str, Any]
"""Texts, numbers, and None where there is no number."""
Rows = Sequence[Row]
NAMED = ("method", "ratio")


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
    draw: Callable[[Rows], Figure]
    """As in `Plot`."""


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


def command(results: Sequence[Result], arguments: str) -> str:
    """What to type to have `arguments` measured as the results of a model were, beside the records there are."""
    cells = [record.cell for result in results for record in result.records]
    made = [cell for cell in cells if cell["method"] != "dense"] or cells
    given = {f"{key}s": " ".join(dict.fromkeys(shlex.quote(str(cell[key])) for cell in made)) for key in NAMED}
    budget = made[0]["budget"]
    preset = f" --budget {shlex.quote(str(budget['name']))}" if isinstance(budget, Mapping) and "name" in budget else ""
    basis = f" --ratio-basis {made[0]['ratio_basis']}"
    model = shlex.quote(results[0].model)
    return f"python run_all.py --models {model} {arguments.format(**given)}{basis}{preset} --out DIR"


def grouped(rows: Rows, *keys: str) -> dict[Any, list[Row]]:
    """The rows by the values of the keys (a tuple where there are several), in the order first met."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys)].append(row)
    return dict(groups)


def column(rows: Iterable[Row], key: str) -> list[float]:
    """The numbers of a column; NaN where there is none."""
    return [math.nan if row[key] is None else row[key] for row in rows]
