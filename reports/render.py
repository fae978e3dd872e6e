"""Writes the report: `report.md`, every table in every format beside it, and the figures in a folder of their own."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from reports.accuracy import few_shot_table, zero_shot_table
from reports.comparison import plus_minus
from reports.compression import compression_table
from reports.cost import cost_table, size_table
from reports.families import constructions_table, semi_structured_table
from reports.figures import FAMILIES, figures
from reports.figures.files import FOLDER, SUFFIXES, render
from reports.formats import FORMATS, MARKDOWN, markdown
from reports.perplexity import perplexity_table
from reports.records import Record, ReportError
from reports.results import FINE_TUNED, pool
from reports.significance import intervals_table, significance_table
from reports.speed import latency_table, speed_table, work_table
from reports.summary import cautions, facts
from reports.tables import UNLIKE, Cell, Column, Table, percent
from reports.web import page

BUILDERS = (
    perplexity_table,
    semi_structured_table,
    constructions_table,
    zero_shot_table,
    few_shot_table,
    significance_table,
    intervals_table,
    size_table,
    compression_table,
    speed_table,
    latency_table,
    work_table,
)
TABLES = (
    "perplexity",
    "semi-structured",
    "constructions",
    "zero-shot",
    "few-shot",
    "significance",
    "intervals",
    "size",
    "compression",
    "speed",
    "latency",
    "work",
    "cost",
    "unfinished",
)
"""The name of every table there can be."""


def files(records: Sequence[Record], usd_per_hour: float | None = None) -> dict[str, str | bytes]:
    """The content of every file of the report, by name.

    Args:
        usd_per_hour: what the device costs; None: nothing is said of money.
    """
    results = pool(records)
    built = [build(results) for build in BUILDERS]
    built += [cost_table(results, usd_per_hour)] if usd_per_hour else []
    tables = [table for table in (*built, unfinished_table(records)) if table]
    plots, gaps = figures(results)
    report = MARKDOWN.get_template("report.md").render(
        facts=facts(results),
        cautions=list(cautions(results)),
        tables=[(table, Markup(markdown(table))) for table in tables],
        formats=list(FORMATS),
        plots=plots,
        gaps=gaps,
        folder=FOLDER,
        suffixes=SUFFIXES,
        plus_minus=plus_minus(results),
        best=any(cell.best for table in tables for row in table.rows for cell in row),
        tested=next((table.title for table in tables if table.name == "significance"), ""),
        alike=not any(UNLIKE in cell.marks for table in tables for row in table.rows for cell in row),
        fine_tuned=any(result.fine_tuned for result in results),
        done=sum(record.status == "done" for record in records),
    )
    contents = {f"{table.name}.{suffix}": render(table) for table in tables for suffix, render in FORMATS.items()}
    contents |= render(plots)
    return {"report.md": report, "index.html": page(records, plots, contents)} | contents


def unfinished_table(records: Sequence[Record]) -> Table | None:
    """The cells that failed or were skipped and the skipped tasks, and why; None where everything is done."""
    rows = (*(_unfinished_row(record) for record in records if record.status != "done"), *_skipped_rows(records))
    if not rows:
        return None
    labels = ("Model", "Method", "Asked, %", "Seed", "Status", "Why")
    return Table(
        name="unfinished",
        title="Failed and skipped cells and tasks",
        caption="What one of them measured before it failed is in the other tables. The command that started them "
        "tries them again and keeps what is finished.",
        columns=tuple(Column(label, text=label not in ("Asked, %", "Seed")) for label in labels),
        rows=rows,
    )


def _unfinished_row(record: Record) -> tuple[Cell, ...]:
    cell = record.cell
    ratio, why = Cell(percent(cell["ratio"])), Cell(record.error or "no reason recorded")
    method = Cell(cell["method"] + (FINE_TUNED if cell.get("recover") else ""))
    return Cell(cell["model"]), method, ratio, Cell(cell["seed"]), Cell(record.status), why


def _skipped_rows(records: Sequence[Record]) -> Iterator[tuple[Cell, ...]]:
    """One row per model and task, however many cells lack it."""
    found = Counter((record.cell["model"], task, why) for record in records for task, why in record.skipped.items())
    for (model, task, why), count in found.items():
        cells = Cell(f"{count} cell{'s' if count > 1 else ''}")
        yield Cell(model), cells, Cell(None), Cell(None), Cell("task skipped"), Cell(f"{task}: {why}")


def write(contents: Mapping[str, str | bytes], out: Path) -> None:
    """Write each file under a temporary name and rename it, so that none is ever half there.

    Tables and figures of an earlier report that this one does not have are removed, and nothing else.

    Raises:
        ReportError: `out` cannot be written to.
    """
    try:
        for name, content in contents.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            _replace(out / name, content)
        for name in {f"{table}.{suffix}" for table in TABLES for suffix in FORMATS} - set(contents):
            (out / name).unlink(missing_ok=True)
        for pattern in (f"{FOLDER}/{family.name}.*" for family in FAMILIES):
            for path in out.glob(pattern):
                if path.relative_to(out).as_posix() not in contents:
                    path.unlink()
    except OSError as error:
        raise ReportError(f"The report cannot be written to {out}: {error}. Give --out another folder.") from error


def _replace(path: Path, content: str | bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
