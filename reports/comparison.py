"""Metric names, and cells that say when a number must not be compared with the rest of its column."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from reports.results import Absent, Pooled, Result, by_model
from reports.settings import Settings, differing
from reports.tables import CUT, OFF_BUDGET, UNLIKE, Cell, Column, number, percent

SHOWN_DIFFERENCE = 0.005
UNEVEN = 0.02
"""Counted ratios further apart than this are not the same size: twice the usual tolerance."""


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
    every = dict.fromkeys(chain.from_iterable(record.metrics for result in results for record in result.records))
    return [parse(name) for name in every]


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

    @property
    def cut(self) -> str:
        """The metric that counts the prompts cut for this one; recorded only where there are any."""
        name = parse(self.name)
        return str(MetricName(name.source, "truncated_requests", name.protocol))

    def marks(self, result: Result) -> str:
        """What a reader of the result's number must know."""
        return (UNLIKE if self.unlike(result) else "") + (CUT if result.metric(self.cut) else "")

    def unlike(self, result: Result) -> bool:
        """Whether the result's number must not be compared with the others."""
        conditions = result.conditions(self.name)
        return len(conditions) > 1 or conditions not in (frozenset(), self.reference)

    def cell(self, result: Result, scale: float = 1) -> Cell:
        """The result's number with its marks."""
        return pooled_cell(result.metric(self.name), scale, self.marks(result))

    def differences(self) -> list[str]:
        """A sentence for each mark."""
        unlike = (result for result in self.results if self.unlike(result))
        cut = ((result, self._cut(result)) for result in self.results if result.metric(self.cut))
        return [
            *(f"{result.title}: {self.name} {self._difference(result)}." for result in unlike),
            *(f"{result.title}: {self.name}, {count} prompts cut." for result, count in cut),
        ]

    def _cut(self, result: Result) -> str:
        counts = [record.metrics[self.cut] for record in result.records if self.cut in record.metrics]
        return " or ".join(dict.fromkeys(f"{count.value:g} of {count.n}" for count in counts))

    def _difference(self, result: Result) -> str:
        conditions = result.conditions(self.name)
        mixed = sorted(differing(conditions))
        return difference(conditions, self.reference) or f"has seeds of different {', '.join(mixed)}"

    def count(self) -> str:
        """On how many windows, documents or repeats it was measured, as in `8 or 40`."""
        records = (record for result in self.results for record in result.records)
        counts = {record.metrics[self.name].n for record in records if self.name in record.metrics}
        return " or ".join(str(count) for count in sorted(counts))


def difference(own: frozenset[Settings], others: frozenset[Settings]) -> str:
    """In which conditions two measurements differ, as in `task version 2.0, not 1.0`; empty where in none."""
    mine, theirs = _by_label(own), _by_label(others)
    labels = (label for label in sorted({*mine, *theirs}) if mine[label] != theirs[label])
    return "; ".join(f"{label} {_either(mine[label])}, not {_either(theirs[label])}" for label in labels)


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


def remarks(results: Sequence[Result]) -> Iterator[str]:
    """Sentences below a table on what its shares are of, and on rows that are incomplete or too unlike in size."""
    yield from basis(results)
    if incomplete := [result.title for result in results if not result.complete]:
        yield f"Incomplete, see the failed and skipped cells: {'; '.join(incomplete)}."
    yield from uncounted(results)
    yield from uneven(results)


def uncounted(results: Iterable[Result]) -> Iterator[str]:
    """Why some counted shares are not known."""
    if titles := dict.fromkeys(result.title for result in results if result.achieved is None):
        told = "; ".join(titles)
        yield f"Counted share unknown, as the dense model's record is missing, whose blocks are the basis: {told}."


def basis(results: Sequence[Result]) -> Iterator[str]:
    """What the asked and counted shares are shares of."""
    made = [result for result in results if not result.dense]
    blocks = [result for result in made if result.records[0].cell["ratio_basis"] == "block"]
    if blocks and len(blocks) == len(made):
        yield "Shares are of the parameters of the blocks, without embeddings and output head."
    elif made:
        others = f"; of those of the blocks only for {'; '.join(result.title for result in blocks)}" if blocks else ""
        yield f"Shares are of all parameters, embeddings and output head included{others}."


def uneven(results: Sequence[Result]) -> Iterator[str]:
    """A sentence per model and asked ratio for which the methods' counted ratios clearly differ."""
    for group in by_model([result for result in results if not result.fine_tuned]):
        for ratio in dict.fromkeys(result.ratio for result in group if not result.dense):
            counted = {r.method: r.achieved for r in group if r.ratio == ratio and not r.dense and r.achieved}
            if counted and max(counted.values()) - min(counted.values()) > UNEVEN:
                sizes = ", ".join(f"{method} {number(100 * share)} %" for method, share in counted.items())
                asked = f"Not of one size: on {group[0].model} at {percent(ratio):g} % asked, counted are {sizes}"
                yield f"{asked}, so part of the difference between these methods is one of size."


def tried(group: Sequence[Result], absent: Iterable[Absent]) -> list[Result | Absent]:
    """The results of a model, and in their order what was tried there in vain."""
    every: list[Result | Absent] = [*group, *(one for one in absent if one.model == group[0].model)]
    return sorted(every, key=lambda one: (not one.dense, -one.ratio, one.method))


def plus_minus(results: Sequence[Result]) -> str:
    """What ± stands for in numbers of these results."""
    seeds = ", or the standard deviation over the seeds where a number says seeds"
    return "one standard error" + (seeds if any(len(result.records) > 1 for result in results) else "")


IDENTITY = (Column("Model", text=True), Column("Asked, %"), Column("Counted, %"), Column("Method", text=True))
"""The first columns of every table with one result per row."""


def identity(result: Result | Absent) -> tuple[Cell, ...]:
    """What `IDENTITY` heads; the counted ratio is marked where it is off budget."""
    if isinstance(result, Absent):
        counted = Cell(None, remark=result.status)
        return Cell(result.model), Cell(percent(result.ratio)), counted, Cell(result.method)
    counted = None if result.achieved is None else percent(result.achieved)
    marks = "" if result.on_budget else OFF_BUDGET
    return Cell(result.model), Cell(percent(result.ratio)), Cell(counted, marks=marks), Cell(result.method)
