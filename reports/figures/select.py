"""Which results a figure shows: few enough to be told apart, by rules that its caption states."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from reports.accuracy import judged
from reports.beside import Beside
from reports.families import RIVAL as TOMOE
from reports.perplexity import texts
from reports.results import Result, having

T = TypeVar("T")
MAIN = "Of a method that ran with several settings, those measured at most ratios are shown."


def method(result: Result) -> str:
    """The name of a result's method, without settings."""
    return result.records[0].cell["method"]


def main(results: Sequence[Result]) -> list[Result]:
    """Of each method, fine-tuned or not, the settings that were measured at most ratios; of equals those first met."""
    ratios = Counter(result.method for result in results)
    chosen: dict[tuple[str, bool], str] = {}
    for result in results:
        kind = method(result), result.fine_tuned
        best = chosen.setdefault(kind, result.method)
        if ratios[result.method] > ratios[best]:
            chosen[kind] = result.method
    return [result for result in results if chosen[method(result), result.fine_tuned] == result.method]


def tomoe(results: Sequence[Result]) -> list[Result]:
    """ToMoE's results at its main settings, not fine-tuned, by falling ratio."""
    return [result for result in main(results) if method(result) == TOMOE and not result.fine_tuned]


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
    """The metric by which models are set against cost and speed: the first perplexity, or else the first task."""
    return next((str(name) for name in (*texts(results), *judged(results))), None)


def identity(result: Result) -> dict[str, Any]:
    """The first columns of every row that stands for a result."""
    return {
        "method": method(result),
        "settings": result.method,
        "fine_tuned": int(result.fine_tuned),
        "ratio": result.ratio,
        "cells": " ".join(record.cell["id"] for record in result.records),
    }


def beside(results: Sequence[Result], what: Callable[[Beside], T | None]) -> Iterator[tuple[dict[str, Any], T]]:
    """What lies beside ToMoE's records, of several seeds the first, with its `identity`."""
    for result, record, found in having(tomoe(results), what):
        yield identity(result) | {"cells": record.cell["id"]}, found
