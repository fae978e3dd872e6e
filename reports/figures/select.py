"""Which results a figure shows: few enough to be told apart, by rules that its caption states."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from reports.accuracy import judged
from reports.beside import Beside
from reports.comparison import Measured
from reports.families import RIVAL as TOMOE
from reports.perplexity import texts
from reports.results import Result, having

T = TypeVar("T")
FAR = 1e30
"""Beyond it nothing is drawn, nor below one over it: one such number takes the whole axis, or more than it can hold."""
TOO_FAR = f"numbers beyond {FAR:.0e} or below {1 / FAR:.0e}".replace("+", "")
MAIN = (
    "Of a method that ran with several settings, those measured at most ratios are shown. Left out are ratios of "
    f"another basis, or another data type, than most have, and {TOO_FAR}."
)
ALIKE = f"{MAIN} What was measured under other conditions than most (‡ in the tables) is left out."
ERRORS = "error bars are one standard error, or the standard deviation over seeds where there are several"


def main(results: Sequence[Result]) -> list[Result]:
    """Of each method, fine-tuned or not, the settings that were measured at most ratios; of equals those first met."""
    ratios = Counter(result.method for result in results)
    chosen: dict[tuple[str, bool], str] = {}
    for result in results:
        kind = result.name, result.fine_tuned
        best = chosen.setdefault(kind, result.method)
        if ratios[result.method] > ratios[best]:
            chosen[kind] = result.method
    return [result for result in results if chosen[result.name, result.fine_tuned] == result.method]


def measured(results: Sequence[Result], name: str) -> list[Result]:
    """Those that have a number that can be drawn, and that can be compared with most others."""
    column = Measured(name, results)
    return [result for result in results if drawable(result, name) and not column.unlike(result)]


def drawable(result: Result, name: str) -> bool:
    """Whether there is a number that can be, and an axis that can hold it."""
    found = result.metric(name)
    return found is not None and result.possible([name]) and is_near(found.value) and (found.error or 0) <= FAR


def is_near(number: float) -> bool:
    """Whether an axis can hold the number."""
    return number == 0 or 1 / FAR <= abs(number) <= FAR


def usual(results: Sequence[Result]) -> list[Result]:
    """The dense ones, and the compressed ones of the ratio basis and the data type that most of these have."""
    most = _most(map(_kind, compressed(results)))
    return [result for result in results if result.dense or _kind(result) == most]


def _kind(result: Result) -> tuple[str, str]:
    cell = result.records[0].cell
    return cell["ratio_basis"], str(cell["dtype"])


def like_most(results: Sequence[Result], what: Callable[[Result], Hashable]) -> list[Result]:
    """Those, dense ones too, of which `what` says the same as of most compressed ones."""
    most = _most(map(what, compressed(results)))
    return [result for result in results if what(result) == most]


def _most(values: Iterable[Hashable]) -> Hashable:
    """The value that is met most often; of equals the first."""
    return next((value for value, _ in Counter(values).most_common(1)), None)


def tomoe(results: Sequence[Result]) -> list[Result]:
    """ToMoE's results at any settings, not fine-tuned."""
    return [result for result in results if result.name == TOMOE and not result.fine_tuned]


def compressed(results: Sequence[Result]) -> list[Result]:
    """All but the dense ones."""
    return [result for result in results if not result.dense]


def busiest(results: Sequence[Result]) -> list[Result]:
    """The compressed results at the asked ratio that most methods share; of equals the smallest."""
    made = compressed(results)
    counts = Counter(result.ratio for result in made)
    return [result for result in made if result.ratio == min(counts, key=lambda ratio: (-counts[ratio], ratio))]


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, first and last among them, the others evenly between."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def quality(results: Sequence[Result]) -> str | None:
    """The metric by which models are set against cost and speed: the perplexity that most have, or else the task."""
    names = list(map(str, texts(results) or judged(results)))
    return max(names, key=lambda name: sum(result.metric(name) is not None for result in results), default=None)


def identity(result: Result) -> dict[str, Any]:
    """The first columns of every row that stands for a result."""
    return {
        "method": result.name,
        "settings": result.method,
        "fine_tuned": int(result.fine_tuned),
        "ratio": result.ratio,
        "basis": result.records[0].cell["ratio_basis"],
        "counted": None if result.achieved is None else 100 * result.achieved,
        "cells": " ".join(record.cell["id"] for record in result.records),
    }


def value(result: Result, name: str, key: str, scale: float = 1) -> dict[str, float | None]:
    """A metric and its error as the columns `key` and `key_error`, times `scale`; None where there is none."""
    found = result.metric(name)
    number, error = (found.value, found.error) if found else (None, None)
    return {key: number and scale * number, f"{key}_error": error and scale * error}


def beside(results: Sequence[Result], what: Callable[[Beside], T | None]) -> Iterator[tuple[dict[str, Any], T]]:
    """What lies beside ToMoE's records at its main settings, of several seeds the first, with its `identity`."""
    found = {result: (record, content) for result, record, content in having(tomoe(results), what)}
    for result in main(list(found)):
        record, content = found[result]
        yield identity(result) | {"cells": record.cell["id"]}, content
