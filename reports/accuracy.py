"""The zero-shot table, like the paper's Table 3, and its few-shot sibling: a row per model, ratio and method."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from reports.comparison import (
    IDENTITY,
    Measured,
    MetricName,
    identity,
    metric_names,
    plus_minus,
    pooled_cell,
    tried,
)
from reports.footnotes import footnotes
from reports.published import Line, average_of, beside, provenance
from reports.records import Record
from reports.results import Absent, Result, Results, by_model
from reports.standings import Names, Standings, standings
from reports.tables import LEGEND, Cell, Column, Table

QUANTITIES = ("acc_norm", "acc")
"""What a task is judged by: the first that it has."""

CAPTION = (
    "Right answers in per cent by task and its metric; asked and counted share of active parameters in per cent; ± is "
)


def zero_shot_table(results: Results) -> Table | None:
    """Tasks without examples in the prompt; None where none was measured."""
    return _table(results, zero_shot(results), "zero-shot", "Zero-shot tasks")


def few_shot_table(results: Results) -> Table | None:
    """Tasks with examples in the prompt; None where none was measured."""
    return _table(results, few_shot(results), "few-shot", "Few-shot tasks")


def zero_shot(results: Sequence[Result]) -> list[MetricName]:
    """The columns of the zero-shot table."""
    return [name for name in judged(results) if name.protocol == "0shot"]


def few_shot(results: Sequence[Result]) -> list[MetricName]:
    """The columns of the few-shot table."""
    return [name for name in judged(results) if name.protocol != "0shot"]


def task_standings(results: Sequence[Result], names: Sequence[MetricName]) -> Standings:
    """Who is best at which task, and on the average."""
    return standings((tuple(results),), contested(map(str, names)))


def contested(names: Iterable[str]) -> tuple[Names, ...]:
    """What there is to be best in: each task, and the average of several."""
    every = tuple(names)
    return *((name,) for name in every), *([every] if len(every) > 1 else [])


def judged(results: Sequence[Result]) -> list[MetricName]:
    """The metric each task is judged by; parts of a group, like `mmlu_anatomy` of `mmlu`, stay in the records."""
    names = {name for name in metric_names(results) if name.quantity in QUANTITIES and name.protocol.endswith("shot")}
    best = {name for name in names if not any(_preferred(other, name) for other in names)}
    for group in sorted(best, key=lambda name: -len(name.source)):
        best -= _parts(group, best, results)
    return sorted(best, key=str)


def _parts(group: MetricName, names: set[MetricName], results: Sequence[Result]) -> set[MetricName]:
    """What `group` is the mean of: the tasks named after it, and its subgroups, if they hold its very documents.

    Records do not say what belongs to a group, but a task named like one, as `mmlu_pro`, changes the sum of documents.
    """
    records = [record for result in results for record in result.records if str(group) in record.metrics]
    tasks = {source for record in records for source in record.provenance.get("dataset_revisions") or {}}
    alike = {name for name in names if name.protocol == group.protocol and name.source.startswith(f"{group.source}_")}
    kinds = [{name for name in alike if (name.source in tasks) == task} for task in (True, False)]
    return {name for kind in kinds if all(_adds_up(record, group, kind) for record in records) for name in kind}


def _adds_up(record: Record, group: MetricName, parts: set[MetricName]) -> bool:
    counts = (record.metrics[str(part)].n for part in parts if str(part) in record.metrics)
    return sum(counts) == record.metrics[str(group)].n


def _preferred(other: MetricName, name: MetricName) -> bool:
    same_task = (other.source, other.protocol) == (name.source, name.protocol)
    return same_task and QUANTITIES.index(other.quantity) < QUANTITIES.index(name.quantity)


def _table(results: Results, names: Sequence[MetricName], file_name: str, title: str) -> Table | None:
    measured = [result for result in results if any(result.metric(str(name)) for name in names)]
    if not measured:
        return None
    tasks = [Measured(str(name), measured) for name in names]
    standing = task_standings(results, names)
    metrics = published_names(names)
    published = beside(measured, metrics)
    groups = by_model(measured)
    absent = [one for one in results.absent if any(one.model == group[0].model for group in groups)]
    rows = tuple(
        row
        for group in groups
        for one in tried(group, absent)
        for row in (
            (*identity(one), *marked(one, tasks, standing)),
            *published_rows(published, one, metrics),
        )
    )
    return Table(
        name=file_name,
        title=title,
        caption=f"{CAPTION}{plus_minus(measured)}.",
        columns=(*IDENTITY, *task_columns(names)),
        rows=rows,
        notes=footnotes(rows, tasks, standing.notes(), absent, provenance(published, metrics)),
    )


def published_names(names: Sequence[MetricName]) -> list[str]:
    """What the columns of these tasks are called among the published numbers."""
    every = [str(name) for name in names]
    return [*every, average_of(every)] if len(every) > 1 else every


def published_rows(
    published: Mapping[Result, Sequence[Line]], result: Result | Absent, metrics: Sequence[str]
) -> Iterator[tuple[Cell, ...]]:
    """The published rows below a result's."""
    for line in published.get(result, []) if isinstance(result, Result) else []:
        yield *line.identity(), *map(line.cell, metrics)


def marked(result: Result | Absent, tasks: Sequence[Measured], standing: Standings) -> Iterable[Cell]:
    """What `task_columns` heads, the best and what is tied with it marked."""
    columns = contested(task.name for task in tasks)
    if isinstance(result, Absent):
        return [Cell(None)] * len(columns)
    cells = zip(task_cells(result, tasks), columns, strict=True)
    return [standing.cell(cell, result, column) for cell, column in cells]


def task_columns(names: Sequence[MetricName]) -> tuple[Column, ...]:
    """A column per task, and one for the average of several."""
    average = [Column("Average")] if len(names) > 1 else []
    return *(Column(_label(name), name.source) for name in names), *average


def _label(name: MetricName) -> str:
    shots = name.protocol.removesuffix("shot")
    return name.quantity if shots == "0" else f"{name.quantity}, {shots} shots"


def task_cells(result: Result, tasks: Sequence[Measured]) -> tuple[Cell, ...]:
    """What `task_columns` heads, in per cent."""
    cells = tuple(task.cell(result, 100) for task in tasks)
    if len(tasks) < 2:
        return cells
    found = {mark for task in tasks for mark in task.marks(result)}
    marks = "".join(mark for mark in LEGEND if mark in found)
    return *cells, pooled_cell(result.average([task.name for task in tasks]), 100, marks)
