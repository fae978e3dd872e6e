"""The leaderboard: the numbers and marks of the tables, a row per result and one per cell that measured nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from reports.accuracy import few_shot, marked, task_columns, task_standings, zero_shot
from reports.comparison import (
    IDENTITY,
    Measured,
    MetricName,
    identity,
    metric_names,
    plus_minus,
    pooled_cell,
    remarks,
)
from reports.perplexity import perplexity_standings, texts
from reports.records import Record
from reports.results import FINE_TUNED, Result, by_model
from reports.tables import Cell, Column, legend, percent

FASTER = "decode_tokens_per_s_vs_dense"


@dataclass(frozen=True)
class Row:
    """A result, or a cell without any."""

    model: str
    """What the row is filtered by."""
    method: str
    """Likewise: the name without settings."""
    ratio: str
    """Likewise: the asked share in per cent."""
    cells: tuple[Cell, ...]
    """One per column."""
    records: tuple[Record, ...]
    """What it rests on."""

    @property
    def where(self) -> str:
        """Its model and ratios in a line, where there is no room for columns of them."""
        _, model, asked, counted, *_ = self.cells
        return f"{model}: {asked}\N{NO-BREAK SPACE}%{'' if counted.value is None else f', counted {counted}'}"


@dataclass(frozen=True)
class Board:
    """The leaderboard."""

    columns: tuple[Column, ...]
    """Identity, the numbers, then status."""
    rows: tuple[Row, ...]
    """In the order of the tables; what measured nothing comes last."""
    notes: tuple[str, ...]
    """Sentences below it."""

    @property
    def numbers(self) -> tuple[Column, ...]:
        """The columns of numbers."""
        return self.columns[len(HEAD) : -1]

    @property
    def tasks(self) -> list[str]:
        """What the numbers are of."""
        return list(dict.fromkeys(column.group or column.label for column in self.numbers))

    def values(self, name: str) -> list[str]:
        """What rows can be filtered by: every `model`, `method` or `ratio`."""
        return list(dict.fromkeys(getattr(row, name) for row in self.rows))


HEAD = (IDENTITY[-1], *IDENTITY[:-1])
STATUS = Column("Status", text=True)


def board(results: Sequence[Result], records: Sequence[Record]) -> Board:
    """The leaderboard of all records."""
    tasks = [_tasks(results, zero_shot(results), "Zero-shot"), _tasks(results, few_shot(results), "Few-shot")]
    columns, cells = zip(_perplexities(results), *tasks, _speed(results), strict=True)
    flat = tuple(column for part in columns for column in part)
    rows = [_row(result, tuple(c for part in cells for c in part[i])) for i, result in enumerate(results)]
    empty = [_empty(record, len(flat)) for record in records if not record.size]
    shown = (*rows, *empty)
    notes = (f"± is {plus_minus(results)}.", *legend(row.cells for row in shown), *remarks(results))
    return Board((*HEAD, *flat, STATUS), shown, notes)


Part = tuple[Sequence[Column], list[tuple[Cell, ...]]]
"""Some columns, and their cells for each result."""


def _perplexities(results: Sequence[Result]) -> Part:
    names, standing = texts(results), perplexity_standings(results)
    metrics = {group[0].model: [Measured(str(name), group) for name in names] for group in by_model(results)}

    def cells(result: Result) -> tuple[Cell, ...]:
        found = ((metric.cell(result), metric) for metric in metrics[result.model])
        return tuple(standing.cell(cell, result, (metric.name,)) for cell, metric in found)

    return [Column(f"ppl @{name.protocol}", name.source) for name in names], [cells(result) for result in results]


def _tasks(results: Sequence[Result], names: Sequence[MetricName], kind: str) -> Part:
    measured = [result for result in results if any(result.metric(str(name)) for name in names)]
    tasks, standing = [Measured(str(name), measured) for name in names], task_standings(results, names)
    columns = [replace(column, group=column.group or kind) for column in task_columns(names)]  # one average per kind
    return columns, [tuple(marked(result, tasks, standing)) for result in results]


def _speed(results: Sequence[Result]) -> Part:
    names = [name for name in metric_names(results) if name.quantity == FASTER]
    cells = [tuple(pooled_cell(result.metric(str(name))) for name in names) for result in results]
    return [Column(f"decoding against dense @{name.protocol}", name.source) for name in names], cells


def _row(result: Result, numbers: tuple[Cell, ...]) -> Row:
    states = (f"{record.status}: {record.error}" for record in result.records if record.status != "done")
    status = Cell("; ".join(dict.fromkeys(states)) or "done")
    ratio, (*own, method) = f"{percent(result.ratio):g}", identity(result)
    return Row(result.model, result.name, ratio, (method, *own, *numbers, status), result.records)


def _empty(record: Record, count: int) -> Row:
    cell = record.cell
    method = cell["method"] + (FINE_TUNED if cell.get("recover") else "")
    status = Cell(f"{record.status}: {record.error or 'no reason recorded'}")
    head = (Cell(method), Cell(cell["model"]), Cell(percent(cell["ratio"])))
    cells = (*head, *[Cell(None)] * (count + 1), status)
    return Row(cell["model"], cell["method"], f"{percent(cell['ratio']):g}", cells, (record,))
