"""The perplexity table, like the paper's Table 1: a row per method, a column per text, window and ratio."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from reports.comparison import (
    Measured,
    MetricName,
    achieved_remark,
    metric_names,
    plus_minus,
    tried,
)
from reports.footnotes import footnotes
from reports.published import Line, beside, provenance
from reports.results import FINE_TUNED, Absent, Result, Results, by_model
from reports.settings import Settings
from reports.standings import Standings, standings
from reports.tables import OFF_BUDGET, Cell, Column, Table, percent

Slot = tuple[MetricName, float]
"""A column: a text and window, and a ratio."""
Run = tuple[str, Settings]
"""A row: a method as it is called, and its settings."""

CAPTION = (
    "Token perplexity (lower is better) by text, window in tokens and asked share of active parameters; a counted "
    "share more than half a point from the asked one is given in brackets; ± is "
)


def perplexity_table(results: Results) -> Table | None:
    """The table of every `token_ppl` metric, None where there is none. Windows are compared within a model."""
    names = texts(results)
    groups = by_model([result for result in results if any(result.metric(str(name)) for name in names)])
    if not groups:
        return None
    slots = _slots(names, groups)
    compared = [[Measured(str(name), group) for name in names] for group in groups]
    standing = perplexity_standings(results)
    measured = [result for group in groups for result in group]
    published = beside(measured, map(str, names))
    absent = [one for one in results.absent if any(one.model == group[0].model for group in groups)]
    rows = tuple(
        row
        for group, metrics in zip(groups, compared, strict=True)
        for row in _rows(tried(group, absent), metrics, slots, standing, published)
    )
    return Table(
        name="perplexity",
        title="Perplexity",
        caption=f"{CAPTION}{plus_minus(measured)}.",
        columns=(
            Column("Model", text=True),
            Column("Method", text=True),
            *(Column(f"{percent(ratio):g} %", f"{name.source} @{name.protocol}") for name, ratio in slots),
        ),
        rows=rows,
        notes=footnotes(
            rows,
            [metric for metrics in compared for metric in metrics],
            standing.notes(),
            absent,
            provenance(published, [str(name) for name in names]),
        ),
    )


def texts(results: Sequence[Result]) -> list[MetricName]:
    """Every perplexity that was measured."""
    return [name for name in metric_names(results) if name.quantity == "token_ppl"]


def perplexity_standings(results: Sequence[Result]) -> Standings:
    """Who is best on which text."""
    return standings((tuple(results),), tuple((str(name),) for name in texts(results)))


def _slots(names: Sequence[MetricName], groups: Sequence[Sequence[Result]]) -> list[Slot]:
    """The columns: by rising window and falling ratio, those that any result has."""
    results = [result for group in groups for result in group]
    found = {(name, result.ratio) for name in names for result in results if result.metric(str(name))}
    return sorted(found, key=lambda slot: (_window(slot[0]), names.index(slot[0]), -slot[1]))


def _window(name: MetricName) -> int:
    return int(name.protocol) if name.protocol.isdecimal() else 0


def _rows(
    group: Sequence[Result | Absent],
    metrics: Sequence[Measured],
    slots: Sequence[Slot],
    standing: Standings,
    published: Mapping[Result, Sequence[Line]],
) -> Iterator[tuple[Cell, ...]]:
    """One row per method of a model, and what is published of it below; `metrics` are the model's."""
    by_name = {metric.name: metric for metric in metrics}
    runs = _runs(group)
    for method, settings in _ordered(runs):
        found = runs[method, settings]
        at = ((by_name[str(name)], found.get(ratio)) for name, ratio in slots)
        yield Cell(group[0].model), Cell(method), *(_cell(metric, one, standing) for metric, one in at)
        results = (one for one in found.values() if isinstance(one, Result))
        yield from _published([line for result in results for line in published.get(result, [])], slots)


def _runs(group: Sequence[Result | Absent]) -> Mapping[Run, Mapping[float, Result | Absent]]:
    """A model's results by run and ratio; the settings are looked at too, so that none hides another of its name."""
    runs: dict[Run, dict[float, Result | Absent]] = defaultdict(dict)
    for one in group:
        runs[one.method, one.settings][one.ratio] = one
    return runs


def _published(lines: Sequence[Line], slots: Sequence[Slot]) -> Iterator[tuple[Cell, ...]]:
    """One row per name that the paper gives the method, its ratios in the columns."""
    for name in dict.fromkeys(line.method for line in lines):
        named = {line.ratio: line for line in lines if line.method == name}
        at = ((named.get(ratio), str(metric)) for metric, ratio in slots)
        cells = (line.cell(metric) if line else Cell(None) for line, metric in at)
        yield Cell(lines[0].model), Cell(name), *cells


def _ordered(runs: Iterable[Run]) -> list[Run]:
    """The runs as first met, and right below each what was fine-tuned."""
    met = list(runs)
    plain = list(dict.fromkeys(method.partition(FINE_TUNED)[0] for method, _ in met))
    return sorted(met, key=lambda run: (plain.index(run[0].partition(FINE_TUNED)[0]), run[0]))


def _cell(metric: Measured, result: Result | Absent | None, standing: Standings) -> Cell:
    if isinstance(result, Absent):
        return Cell(None, remark=result.status)
    if result is None or result.metric(metric.name) is None:
        return Cell(None)
    cell = metric.cell(result)
    remarks = [remark for remark in (achieved_remark(result), cell.remark) if remark]
    marks = cell.marks + ("" if result.on_budget else OFF_BUDGET)
    return standing.cell(replace(cell, remark=", ".join(remarks), marks=marks), result, (metric.name,))
