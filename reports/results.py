"""Pools the records of several seeds into results: one per model, method, ratio and settings.

results = pool(read_all(Path("results")))
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, TypeVar

from reports.beside import Beside
from reports.limits import is_possible
from reports.records import Metric, Record
from reports.settings import Settings, brief, differing, split_settings
from reports.tables import percent

T = TypeVar("T")
FINE_TUNED = " + fine-tuning"
"""What the name of a method gets whose results were fine-tuned."""


@dataclass(frozen=True)
class Pooled:
    """One metric over the seeds of a result."""

    value: float
    """The measured value; the mean where there are several seeds."""
    error: float | None
    """One seed: its standard error. Several: the standard deviation over the seeds."""
    seeds: int
    """How many seeds were measured."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """The records that differ in nothing but their seed; equal to nothing but itself."""

    model: str
    """Its name as on the command line."""
    method: str
    """Its name, followed by the settings that tell it from other runs of the same method on the same model, and by
    `FINE_TUNED` where that was done."""
    ratio: float
    """The asked share of active parameters."""
    achieved: float | None
    """The counted share, in the asked basis; the mean over seeds. None: block basis without a dense record."""
    dense: bool
    """Whether this is the uncompressed model."""
    records: tuple[Record, ...]
    """One per seed that was measured."""
    lost: tuple[Record, ...] = ()
    """Those of seeds of which nothing was."""

    @property
    def name(self) -> str:
        """The method's, as on the command line."""
        return self.records[0].cell["method"]

    @property
    def settings(self) -> Settings:
        """Those of its records."""
        return self.records[0].settings

    @property
    def fine_tuned(self) -> bool:
        """Whether the compressed model was trained further."""
        return FINE_TUNED in self.method

    @property
    def title(self) -> str:
        """How a sentence names it."""
        return f"{self.model} {self.method} at {percent(self.ratio):g} %"

    @property
    def complete(self) -> bool:
        """Whether every seed was finished."""
        return all(record.status == "done" for record in (*self.records, *self.lost))

    @property
    def on_budget(self) -> bool:
        """Whether every seed met the asked ratio within its tolerance."""
        return all(record.size["on_budget"] for record in self.records)

    def metric(self, name: str) -> Pooled | None:
        """The metric over the seeds that have it; None where none has."""
        return self.average([name])

    def average(self, names: Sequence[str]) -> Pooled | None:
        """The mean of the metrics, taken per seed, over the seeds that have all of them; None where none has."""
        return _average(self, tuple(names))

    def possible(self, names: Sequence[str]) -> bool:
        """Whether every number behind the metrics can be."""
        metrics = ((name, record.metrics.get(name)) for record in self.records for name in names)
        return all(is_possible(name, metric.value) for name, metric in metrics if metric)

    def size(self, key: str) -> float:
        """A count of the record's `size`, the mean over seeds."""
        return mean([record.size[key] for record in self.records])

    def conditions(self, name: str) -> frozenset[Settings]:
        """What the metric was measured on: documents or windows, task and data versions. Several if seeds differ."""
        return frozenset(_conditions(record, name) for record in self.records if name in record.metrics)


@lru_cache(maxsize=2**16)  # tables, tests, figures and the page ask for the same
def _average(result: Result, names: tuple[str, ...]) -> Pooled | None:
    has_all = (record for record in result.records if set(names) <= set(record.metrics))
    whole = [[record.metrics[name] for name in names] for record in has_all]
    if not whole:
        return None
    values = [mean([metric.value for metric in metrics]) for metrics in whole]
    error = _mean_stderr(whole[0]) if len(whole) == 1 else _spread(values)
    return Pooled(mean(values), error, len(whole))


@dataclass(frozen=True, kw_only=True)
class Absent:
    """What was tried, and of which nothing was measured."""

    model: str
    """As in a `Result`."""
    method: str
    """As in a `Result`."""
    name: str
    """As in a `Result`."""
    ratio: float
    """The asked share of active parameters."""
    dense: bool
    """Whether it was the uncompressed model."""
    status: str
    """`failed` or `skipped`."""
    settings: Settings
    """Its runs', as `Record.settings` has them."""
    why: str
    """The recorded reason."""

    @property
    def title(self) -> str:
        """How a sentence names it."""
        return f"{self.model} {self.method} at {percent(self.ratio):g} %"


class Results(list[Result]):
    """Results, and what they lack."""

    def __init__(self, results: Iterable[Result], absent: Iterable[Absent] = ()) -> None:
        super().__init__(results)
        self.absent = tuple(absent)
        """In the order of results."""


def pool(records: Iterable[Record]) -> Results:
    """The measured records as results: smaller models first, dense before compressed, then by falling ratio; what was
    fine-tuned right below what was not."""
    kept = list(records)
    dense = [record for record in kept if record.size and record.cell["method"] == "dense"]
    blocks = {record.cell["model"]: record.size["active_block"] for record in dense}
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    alike: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in kept:
        groups[(*(record.cell[key] for key in ("model", "method", "ratio")), record.settings)].append(record)
        alike[record.cell["model"], record.cell["method"], record.settings].append(record)
    variants = _variants(groups)
    results = [_result(key, group, variants, blocks) for key, group in groups.items() if any(r.size for r in group)]
    lost = {key: group for key, group in groups.items() if not any(r.size for r in group)}
    absent = [_absent(key, group, variants, _tokens(alike[*key[:2], key[-1]])) for key, group in lost.items()]
    return Results(
        sorted(results, key=lambda result: (*_model_order(result), not result.dense, -result.ratio, result.method)),
        sorted(absent, key=lambda one: (one.model, -one.ratio, one.method)),
    )


def mean(values: Sequence[float]) -> float:
    """As exact as can be; of infinities of both signs there is none, nor of numbers whose sum is beyond a float."""
    try:
        return statistics.fmean(values)
    except (ValueError, OverflowError):
        return math.nan


def _spread(values: Sequence[float]) -> float | None:
    """The standard deviation, where there is one that a float can hold."""
    try:
        return statistics.stdev(values) if all(map(math.isfinite, values)) else None
    except OverflowError:
        return None


def _mean_stderr(metrics: Sequence[Metric]) -> float | None:
    """The standard error of a mean of independent metrics."""
    known = [metric.stderr for metric in metrics if metric.stderr is not None]
    return math.hypot(*known) / len(known) if len(known) == len(metrics) else None


def by_model(results: Iterable[Result]) -> list[list[Result]]:
    """The results of each model, in the order given."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.model].append(result)
    return list(groups.values())


def having(results: Iterable[Result], what: Callable[[Beside], T | None]) -> Iterator[tuple[Result, Record, T]]:
    """The results beside one of whose records there is something, each with its first such record and that."""
    for result in results:
        lying = ((record, found) for record in result.records if (found := what(record.beside)) is not None)
        yield from ((result, *first) for first in islice(lying, 1))


def _result(
    key: tuple[Any, ...], group: list[Record], variants: Mapping[tuple[str, str], set[str]], blocks: Mapping[str, int]
) -> Result:
    model, method, ratio, settings = key
    measured = [record for record in group if record.size]
    achieved = [_achieved(record, blocks) for record in measured]
    return Result(
        model=model,
        method=_title(method, settings, variants[model, method], _tokens(group)),
        ratio=ratio,
        achieved=None if None in achieved else mean([share for share in achieved if share is not None]),
        dense=method == "dense",
        records=tuple(measured),
        lost=tuple(record for record in group if not record.size),
    )


def _absent(
    key: tuple[Any, ...], group: list[Record], variants: Mapping[tuple[str, str], set[str]], tokens: Sequence[str]
) -> Absent:
    """Called as the same runs at other ratios are, which may have got as far as their `tokens`."""
    model, method, ratio, settings = key
    title = _title(method, settings, variants[model, method], tokens)
    status, why = group[0].status, group[0].error
    told = {"model": model, "method": title, "name": method, "ratio": ratio, "dense": method == "dense"}
    return Absent(**told, settings=settings, status=status, why=why)


def _model_order(result: Result) -> tuple[float, str]:
    return result.size("dense_params"), result.model


def _achieved(record: Record, blocks: Mapping[str, int]) -> float | None:
    if record.cell["ratio_basis"] == "total":
        return record.size["active_total"] / record.size["dense_params"]
    dense = blocks.get(record.cell["model"])
    return record.size["active_block"] / dense if dense else None


def _title(method: str, settings: Settings, names: set[str], tokens: Sequence[str]) -> str:
    """A method's name, with the settings of some names; behind it the fine-tuning, with its tokens and settings."""
    before, after = split_settings(settings)
    parts = [(method, [brief(before, names)]), *([(FINE_TUNED, [*tokens, brief(after, names)])] if after else [])]
    told_apart_by = (", ".join(filter(None, texts)) for _, texts in parts)
    return "".join(f"{name} ({text})" if text else name for (name, _), text in zip(parts, told_apart_by, strict=True))


def _tokens(records: Iterable[Record]) -> list[str]:
    """What records were fine-tuned on."""
    spent = {(record.provenance.get("recovery") or {}).get("tokens") for record in records}
    return [f"{tokens:,} tokens" for tokens in sorted(filter(None, spent))]


def _variants(groups: Mapping[tuple[Any, ...], list[Record]]) -> dict[tuple[str, str], set[str]]:
    """Per model and method, the names of the settings in which its runs differ, or those of its fine-tuned runs."""
    runs: dict[tuple[str, str], list[tuple[Settings, Settings]]] = defaultdict(list)
    for model, method, _, settings in groups:
        runs[model, method].append(split_settings(settings))
    return {
        run: differing(before for before, _ in parts) | differing(after for _, after in parts if after)
        for run, parts in runs.items()
    }


def _conditions(record: Record, name: str) -> Settings:
    """`n` and the versions behind one metric, filed under `arc_easy`, `arc_easy@0shot` or `ppl-wikitext2@2048`."""
    path, _, protocol = name.rpartition("@")
    source = path.rpartition("/")[0]
    keys = {source, f"{source}@{protocol}", f"ppl-{source}@{protocol}"}
    found = {("n", str(record.metrics[name].n))}
    for label, kind in (("task version", "task_versions"), ("data revision", "dataset_revisions")):
        filed = record.provenance.get(kind) or {}
        found |= {(label, str(filed[key])) for key in keys & set(filed)}
    if name.endswith("shot"):
        found.add(("lm_eval", str((record.provenance.get("versions") or {}).get("lm_eval"))))
    return tuple(sorted(found))
