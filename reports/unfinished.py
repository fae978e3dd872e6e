"""What is missing from a matrix of cells, why, and the command that fills it."""

import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from reports.families import SEMI_STRUCTURED
from reports.records import Record
from reports.results import FINE_TUNED, Result, by_model
from reports.tables import Cell, Column, Table, percent

COLUMNS = (
    Column("Model", text=True),
    Column("Method", text=True),
    Column("Asked, %"),
    Column("Seed"),
    Column("Status", text=True),
    Column("Why", text=True),
    Column("Command", text=True),
)


def unfinished_table(records: Sequence[Record], results: Sequence[Result]) -> Table | None:
    """Cells that failed, were skipped or never started, and skipped tasks; None where everything is done."""
    rows = (*_not_done(records), *_skipped_tasks(records), *_missing(records, results))
    if not rows:
        return None
    return Table(
        name="unfinished",
        title="Failed, skipped and missing cells and tasks",
        caption="What one of them measured before it failed is in the other tables. A cell is missing where its method "
        "was measured at another ratio and its ratio with another method. To the command belongs the --out of these "
        "results, and what else theirs had (such as --set); it keeps what is finished.",
        columns=COLUMNS,
        rows=rows,
    )


def _not_done(records: Sequence[Record]) -> Iterator[tuple[Cell, ...]]:
    for record in records:
        if record.status != "done":
            cell = record.cell
            head = (cell["model"], cell["method"] + FINE_TUNED * bool(cell.get("recover")), percent(cell["ratio"]))
            why = record.error or "no reason recorded"
            yield tuple(map(Cell, (*head, cell["seed"], record.status, why, _command([cell]))))


def _skipped_tasks(records: Sequence[Record]) -> Iterator[tuple[Cell, ...]]:
    """One row per model and task, however many cells lack it."""
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        for task, why in record.skipped.items():
            found[record.cell["model"], task, str(why)].append(record.cell)
    for (model, task, why), cells in found.items():
        count = f"{len(cells)} cell{'s' if len(cells) > 1 else ''}"
        row = (
            model,
            count,
            None,
            None,
            "task skipped",
            f"{task}: {why}",
            f"{_command(cells)} --tasks {shlex.quote(task)}",
        )
        yield tuple(map(Cell, row))


def _missing(records: Sequence[Record], results: Sequence[Result]) -> Iterator[tuple[Cell, ...]]:
    """One row per model and ratio at which some of its methods were never tried."""
    tried = {(r.cell["model"], r.cell["method"], r.cell["ratio"]) for r in records}
    for group in by_model(results):
        model, cells = group[0].model, [result.records[0].cell for result in group]
        made = [cell for cell in cells if cell["method"] not in ("dense", *SEMI_STRUCTURED)]
        grid = {(1.0, "dense")} | {(a["ratio"], b["method"]) for a in made for b in made}
        lacking: dict[float, list[str]] = defaultdict(list)
        for ratio, method in sorted(grid):
            if (model, method, ratio) not in tried:
                lacking[ratio].append(method)
        for ratio, methods in sorted(lacking.items(), reverse=True):
            command = _command([{**cells[-1], "method": m, "ratio": ratio, "recover": None} for m in methods])
            row = (model, "; ".join(methods), percent(ratio), None, "missing", "never started", command)
            yield tuple(map(Cell, row))


def _command(cells: Sequence[Mapping[str, Any]]) -> str:
    """What runs these cells of one model, with the settings of the first."""
    first = cells[0]
    words = ["--models", first["model"], "--methods", *_once(cell["method"] for cell in cells)]
    words += ["--ratios", *_once(f"{cell['ratio']:g}" for cell in cells)]
    words += ["--ratio-basis", "block"] if first["ratio_basis"] == "block" else []
    words += ["--budget", first["budget"]["name"]] if isinstance(first["budget"], Mapping) else []
    words += ["--seeds", *seeds] if (seeds := _once(str(cell["seed"]) for cell in cells)) != ["0"] else []
    words += ["--recover", str(first["recover"].get("kind"))] if first.get("recover") else []
    return f"python run_all.py {shlex.join(words)}"


def _once(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))
