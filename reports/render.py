"""Makes the content of every file of the report: `report.md`, every table in every format, the figures in a folder of
their own, and the web page."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch

from markupsafe import Markup

from reports.accuracy import few_shot_table, zero_shot_table
from reports.comparison import plus_minus
from reports.compression import compression_table
from reports.cost import cost_table, size_table
from reports.families import constructions_table, semi_structured_table
from reports.figures import FAMILIES, Gap, Plot, figures
from reports.figures.files import FOLDER, SUFFIXES, drawing
from reports.formats import FORMATS, MARKDOWN
from reports.modules import modules_table, published_modules_table
from reports.perplexity import perplexity_table
from reports.records import MAKE_ONE, Records
from reports.results import Results, pool
from reports.significance import intervals_table, significance_table
from reports.speed import latency_table, speed_table, work_table
from reports.summary import cautions, facts
from reports.tables import UNLIKE, Table
from reports.throughput import throughput_table
from reports.unfinished import unfinished_table
from reports.variants import ablations_table, settings_table
from reports.web import page

BUILDERS: dict[str, Callable[[Results], Table | None]] = {
    "perplexity": perplexity_table,
    "semi-structured": semi_structured_table,
    "constructions": constructions_table,
    "zero-shot": zero_shot_table,
    "few-shot": few_shot_table,
    "settings": settings_table,
    "ablations": ablations_table,
    "significance": significance_table,
    "intervals": intervals_table,
    "size": size_table,
    "modules": modules_table,
    "modules-published": published_modules_table,
    "compression": compression_table,
    "speed": speed_table,
    "throughput": throughput_table,
    "latency": latency_table,
    "work": work_table,
}
"""By name, in the order of the report, what makes the tables that need nothing but results."""
TABLES = (*BUILDERS, "cost", "unfinished")
"""The name of every table there can be."""


def build(records: Records, results: Results, usd_per_hour: float | None = None) -> list[Table]:
    """Every table that the records fill, in the order of the report.

    Args:
        results: the records, pooled; who asks for several things passes the same, and they are tested once.
        usd_per_hour: what the device costs; None: nothing is said of money.
    """
    built = [builder(results) for builder in BUILDERS.values()]
    built += [cost_table(results, usd_per_hour)] if usd_per_hour else []
    return [table for table in (*built, unfinished_table(records)) if table]


def files(records: Records, usd_per_hour: float | None = None) -> dict[str, str | bytes]:
    """The content of every file of the report, by name; `usd_per_hour` as for `build`."""
    results = pool(records)
    plots, gaps = figures(results)
    with drawing(plots) as drawn:
        tables = build(records, results, usd_per_hour)
        rendered = {f"{table.name}.{suffix}": render(table) for table in tables for suffix, render in FORMATS.items()}
        report = _report(records, results, tables, rendered, plots, gaps)
        contents = rendered | drawn()
    unfinished = next((table for table in tables if table.name == "unfinished"), None)
    html = page(records, results, plots, contents, gaps, unfinished)
    return {"report.md": report, "index.html": html} | contents


def _report(
    records: Records,
    results: Results,
    tables: Sequence[Table],
    rendered: Mapping[str, str],
    plots: Sequence[Plot],
    gaps: Sequence[Gap],
) -> str:
    return MARKDOWN.get_template("report.md").render(
        problems=records.problems,
        make_one="" if any(record.status == "done" for record in records) else MAKE_ONE.format("results"),
        unfinished=any(table.name == "unfinished" for table in tables),
        facts=facts(results),
        cautions=list(cautions(results)),
        tables=[(table, Markup(rendered[f"{table.name}.md"])) for table in tables],
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


def is_ours(name: str) -> bool:
    """Whether a report has had a file of this name: a table or figure that there can be."""
    figures = any(fnmatch(name, f"{FOLDER}/{family.name}.*") for family in FAMILIES)
    return figures or name in {f"{table}.{suffix}" for table in TABLES for suffix in FORMATS}
