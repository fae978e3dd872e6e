"""Metric names, and cells that say when a number must not be compared with the rest of its column."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from reports.results import Pooled, Result, Settings
from reports.tables import OFF_BUDGET, UNLIKE, Cell, Column, number, percent

SHOWN_DIFFERENCE = 0.005


@dataclass(frozen=True)
class MetricName:
    """The parts of `wikitext2/token_ppl@2048`; a source may hold slashes of its own."""

    source: str
    """The text, task or suite."""
    quantity: str
    """What was measured."""
    protocol: str
    """How: a window, a number of shots, a batch size."""

    def __str__(self) -> str:
        return f"{self.source}/{self.quantity}" + (f"@{self.protocol}" if self.protocol else "")


def parse(name: str) -> MetricName:
    """The parts of a metric's name; a part it lacks is empty."""
    path, at, protocol = name.rpartition("@")
    source, _, quantity = (path if at else protocol).rpartition("/")
    return MetricName(source, quantity, protocol if at else "")


def metric_names(results: Sequence[Result]) -> list[MetricName]:
    """Every metric that any record has, in the order first met."""
    return [parse(name) for name in dict.fromkeys(n for result in results for r in result.records for n in r.metrics)]


@dataclass(frozen=True)
class Measured:
    """One metric of comparable results, and which of them were measured under other conditions than most."""

    name: str
    """The metric."""
    results: Sequence[Result]
    """What its column holds."""

    @cached_property
    def reference(self) -> frozenset[Settings]:
        """The conditions of most results that have the metric, the first met where two are as common."""
        counts = Counter(result.conditions(self.name) for result in self.results)
        counts.pop(frozenset(), None)
        return counts.most_common(1)[0][0] if counts else frozenset()

    def unlike(self, result: Result) -> bool:
        """Whether the result's number must not be compared with the others."""
        conditions = result.conditions(self.name)
        return len(conditions) > 1 or conditions not in (frozenset(), self.reference)

    def cell(self, result: Result, scale: float = 1) -> Cell:
        """The result's number, marked where it is unlike the others."""
        return pooled_cell(result.metric(self.name), scale, UNLIKE if self.unlike(result) else "")

    def differences(self) -> list[str]:
        """A sentence for each result that is marked."""
        marked = (result for result in self.results if self.unlike(result))
        return [f"{result.title}: {self.name} {self._difference(result)}." for result in marked]

    def _difference(self, result: Result) -> str:
        own, others = _by_label(result.conditions(self.name)), _by_label(self.reference)
        parts = [
            f"{label} {_either(own[label])}, not {_either(others[label])}"
            for label in own
            if own[label] != others[label]
        ]
        mixed = [label for label, values in own.items() if len(values) > 1]
        return "; ".join(parts) or f"has seeds of different {', '.join(mixed)}"

    def count(self) -> str:
        """On how many windows, documents or repeats it was measured, as in `8 or 40`."""
        records = (record for result in self.results for record in result.records)
        counts = {record.metrics[self.name].n for record in records if self.name in record.metrics}
        return " or ".join(str(count) for count in sorted(counts))


def _by_label(conditions: frozenset[Settings]) -> defaultdict[str, set[str]]:
    """The values of each condition: several where seeds differ, none where it is unknown."""
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for label, value in sorted(pair for settings in conditions for pair in settings):
        labels[label].add(value)
    return labels


def _either(values: set[str]) -> str:
    return " or ".join(sorted(values)) or "unknown"


def pooled_cell(pooled: Pooled | None, scale: float = 1, marks: str = "") -> Cell:
    """A number times `scale`, with its number of seeds where there are several."""
    if pooled is None:
        return Cell(None)
    error = None if pooled.error is None else pooled.error * scale
    return Cell(pooled.value * scale, error, f"{pooled.seeds} seeds" if pooled.seeds > 1 else "", marks)


def achieved_remark(result: Result) -> str:
    """The counted ratio, where it differs from the asked one by more than half a per cent of the dense model."""
    if result.achieved is None or abs(result.achieved - result.ratio) <= SHOWN_DIFFERENCE:
        return ""
    return f"at {number(100 * result.achieved)} %"


IDENTITY = (Column("Model", text=True), Column("Asked, %"), Column("Counted, %"), Column("Method", text=True))
"""The first columns of every table with one result per row."""


def identity(result: Result) -> tuple[Cell, ...]:
    """What `IDENTITY` heads; the counted ratio is marked where it is off budget."""
    counted = None if result.achieved is None else percent(result.achieved)
    marks = "" if result.on_budget else OFF_BUDGET
    return Cell(result.model), Cell(percent(result.ratio)), Cell(counted, marks=marks), Cell(result.method)
