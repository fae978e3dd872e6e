"""What is missing from a matrix of cells, why, and the command that fills it."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from reports.commands import Options, asked, command, folded, of_cell, without
from reports.families import SEMI_STRUCTURED
from reports.records import Record
from reports.results import FINE_TUNED
from reports.tables import Cell, Column, Table, percent

COLUMNS = (
    Column("Model", text=True),
    Column("Method", text=True),
    Column("Asked, %", text=True),
    Column("Seed", text=True),
    Column("Status", text=True),
    Column("Why", text=True),
    Column("Command", text=True),
)


UNASKED = "never asked for"
DEFAULTS = {"--ratio-basis": ["total"], "--budget": ["paper"]}
"""Options of `run_all.py` that go without saying."""
OTHERS = "others have it"
REFERENCE = "the reference of all that was compressed"
OLDER = "recorded by a version with other settings, so the command makes a new cell"


def unfinished_table(records: Sequence[Record]) -> Table | None:
    """Cells that failed, were skipped or are missing, and tasks that only some have; None where there are none."""
    rows = (*_not_done(records), *_skipped_tasks(records), *_lacking_tasks(records), *_missing(records))
    if not rows:
        return None
    return Table(
        name="unfinished",
        title="Failed, skipped and missing cells and tasks",
        caption="What one of them measured before it failed is in the other tables. The commands are those of the "
        "records, or of their neighbours where a cell is missing, for these cells and tasks only; they keep what is "
        "finished. A method may not reach every ratio that others have; the command then says which it reaches.",
        columns=COLUMNS,
        rows=rows,
    )


def _row(model: str, options: Options, status: str, why: str) -> tuple[Cell, ...]:
    tuned = FINE_TUNED if "--recover" in options else ""
    settings = f" ({', '.join(options['--set'])})" if "--set" in options else ""
    methods = "; ".join(method + tuned for method in options["--methods"]) + settings
    ratios = "; ".join(f"{percent(float(ratio)):g}" for ratio in options["--ratios"])
    texts = (model, methods, ratios, "; ".join(options["--seeds"]), status, why, command(options))
    return tuple(map(Cell, texts))


def _not_done(records: Iterable[Record]) -> Iterator[tuple[Cell, ...]]:
    for record in records:
        if record.status != "done":
            yield _row(record.cell["model"], of_cell(record), record.status, record.error)


def _skipped_tasks(records: Iterable[Record]) -> Iterator[tuple[Cell, ...]]:
    skipped = ((record, task, why) for record in records for task, why in record.skipped.items())
    return _tasks(skipped, "task skipped")


def _lacking_tasks(records: Sequence[Record]) -> Iterator[tuple[Cell, ...]]:
    """Tasks that other cells of the same matrix have."""
    older = _of_older_versions(records)
    for matrix in _alike((record for record in records if record.size), "model", "budget", "dtype"):
        every = dict.fromkeys(task for record in matrix for task in _measured(record))
        lacking = ((task, r) for task in every for r in matrix if task not in (*_measured(r), *r.skipped))
        why = {True: f"{OTHERS}; {OLDER}", False: OTHERS}
        yield from _tasks(((r, task, why[r.cell["id"] in older]) for task, r in lacking), "task missing")


def _measured(record: Record) -> Iterable[str]:
    return record.provenance.get("task_versions") or {}


def _of_older_versions(records: Iterable[Record]) -> set[str]:
    """The ids of cells whose method has more settings by now."""
    older: set[str] = set()
    for group in _alike(records, "method"):
        names = {name for record in group for name in record.cell["method_config"]}
        older |= {record.cell["id"] for record in group if record.cell["method_config"].keys() < names}
    return older


def _tasks(found: Iterable[tuple[Record, str, str]], status: str) -> Iterator[tuple[Cell, ...]]:
    """One row per model, task, reason and command, however many cells it is for."""
    groups: dict[tuple[str, str], list[Options]] = defaultdict(list)
    for record, task, why in found:
        typed = f"ppl:{task.removeprefix('ppl-')}" if task.startswith("ppl-") else task
        groups[record.cell["model"], f"{task}: {why}"].append({**of_cell(record), "--tasks": [typed]})
    for (model, why), cells in groups.items():
        for options in folded(cells, "--ratios", "--seeds", "--methods"):
            yield _row(model, options, status, why)


def _missing(records: Sequence[Record]) -> Iterator[tuple[Cell, ...]]:
    """Dense models, cells that a run was asked for and left no record of, and cells that would make a matrix whole."""
    known = {_key(of_cell(record)) for record in records}
    wanted = {_key(cell): cell for record in records for cell in asked(record)}
    matrices = _alike(records, "model", "budget", "dtype", "ratio_basis", "calibration")
    holes = {_key(cell): cell for matrix in matrices for cell in _holes(matrix)}
    lost = [cell for key, cell in wanted.items() if key not in known]
    never = [cell for key, cell in holes.items() if key not in known and key not in wanted]
    for options in _without_dense(records):
        yield _row(options["--models"][0], options, "missing", REFERENCE)
    for options in folded(lost, "--ratios", "--seeds", "--methods"):
        yield _row(options["--models"][0], options, "missing", "asked for, but never started")
    for options in never:
        yield _row(options["--models"][0], options, UNASKED, OTHERS)


def _key(cell: Options) -> tuple[Any, ...]:
    """What tells one cell from another; a folder's model goes by the folder's name."""
    (model,), (method,), (ratio,), (seed,) = (cell[name] for name in ("--models", "--methods", "--ratios", "--seeds"))
    names = ("--recover", "--set", "--ratio-basis", "--budget", "--calibration")
    protocol = (tuple(sorted(cell.get(name, DEFAULTS.get(name, [])))) for name in names)
    return Path(model).name, method, float(ratio), seed, *protocol


def _alike(records: Iterable[Record], *keys: str) -> Iterable[list[Record]]:
    """The records in groups of those whose cells have the same in these fields."""
    groups: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        groups[tuple(str(record.cell[key]) for key in keys)].append(record)
    return groups.values()


def _without_dense(records: Iterable[Record]) -> Iterator[Options]:
    for group in _alike(records, "model", "budget", "dtype"):
        if not any(record.cell["method"] == "dense" for record in group):
            cell = without(of_cell(group[0]), "--recover", "--set")
            yield {**cell, "--methods": ["dense"], "--ratios": ["1.0"], "--seeds": ["0"]}


def _holes(matrix: Sequence[Record]) -> Iterator[Options]:
    """Methods at ratios where only others were tried."""
    made = [r for r in matrix if r.cell["method"] not in ("dense", *SEMI_STRUCTURED) and not r.cell.get("recover")]
    tried = {(record.cell["method"], record.cell["ratio"]) for record in made}
    first = {record.cell["method"]: record for record in reversed(made)}
    for ratio, (method, record) in product(sorted({ratio for _, ratio in tried}, reverse=True), first.items()):
        if (method, ratio) not in tried:
            yield {**of_cell(record), "--ratios": [str(ratio)], "--seeds": ["0"]}
