"""What the marks in the tables rest on: every test against the best, and the intervals of single accuracies."""

import math
from collections.abc import Iterator, Sequence

from reports.accuracy import few_shot, task_standings, zero_shot
from reports.comparison import IDENTITY, MetricName, identity
from reports.families import CONSTRUCTIONS, SEMI_STRUCTURED, family_standings
from reports.perplexity import perplexity_standings
from reports.results import Result
from reports.standings import Race, lower_is_better
from reports.statistics import Estimate, wilson
from reports.tables import HUGE, Cell, Column, Table, legend, percent
from reports.variants import ablation_standings, settings_standings

CAPTION = (
    "Each method against the best of those it competes with in a column of the named table, in the rows below it; what "
    "could not be tested is named below that table. The difference is the method's number minus the best's, in points "
    "(per cent of right answers), or divided by it, for perplexity; with "
    "its 95 % interval, not corrected for the number of comparisons and computed in another way than p, so the two can "
    "disagree near 5 %. p is two-sided; p (Holm) is corrected over all tests of the named table and decides the "
    "verdict, at a level of 5 %."
)
TESTED = (
    Column("from", "95 % interval"),
    Column("to", "95 % interval"),
    Column("p"),
    Column("p (Holm)"),
    Column("Verdict", text=True),
)
"""Behind the difference, the columns of every test."""
COLUMNS = (
    Column("Table", text=True),
    Column("Model", text=True),
    Column("Measured", text=True),
    Column("Method", text=True),
    Column("Difference"),
    *TESTED,
)
UNTESTED = (Cell(None),) * 5


def significance_table(results: Sequence[Result]) -> Table | None:
    """Every comparison with the best; None where none could be tested."""
    tested = {
        "perplexity": perplexity_standings(results),
        "semi-structured": family_standings(results, SEMI_STRUCTURED),
        "constructions": family_standings(results, CONSTRUCTIONS),
        "zero-shot": task_standings(results, zero_shot(results)),
        "few-shot": task_standings(results, few_shot(results)),
        "settings": settings_standings(results),
        "ablations": ablation_standings(results),
    }
    races = ((name, race) for name, standing in tested.items() for race in standing.races)
    rows = tuple(row for name, race in races for row in _rows(name, race))
    if not rows:
        return None
    return Table(name="significance", title="Significance of differences", caption=CAPTION, columns=COLUMNS, rows=rows)


def _rows(table: str, race: Race) -> Iterator[tuple[Cell, ...]]:
    """The best, and below it each method that was tested against it; nothing where none was."""
    best, tested = race.best, [rival for rival in race.rivals if rival.found]
    measured = race.names[0] if len(race.names) == 1 else f"average of {len(race.names)} tasks"
    head = (*map(Cell, (table, f"{best.model} at {percent(best.ratio):g} %", measured)),)
    if tested:
        yield *head, Cell(best.method, best=True), *UNTESTED, Cell("best")
    for rival in tested:
        cells = tested_cells(rival.found, rival.adjusted, lower_is_better(race.names))
        yield *head, Cell(rival.result.method), *cells, Cell("tied" if rival.tied else "worse")


def tested_cells(found: Estimate | None, adjusted: float, ratio: bool) -> tuple[Cell, ...]:
    """A difference, the ends of its interval, p and the adjusted p; empty where nothing was tested.

    Args:
        ratio: whether it is one of nats per token, shown as the ratio of the perplexities.
    """
    if found is None:
        return UNTESTED
    ends = (found.value, found.low, found.high)
    return (
        *(_ratio(value) if ratio else _points(value) for value in ends),
        *(Cell(p, digits=probability(p)) for p in (found.p, adjusted)),
    )


def _ratio(nats: float) -> Cell:
    ratio = math.exp(nats) if nats < 700 else math.inf
    return Cell(ratio, digits=f"{ratio:.3f}" if 0.01 <= ratio < HUGE else "")


def _points(share: float) -> Cell:
    """A difference of shares in points; an interval of few documents may reach further than there is."""
    return Cell(100 * max(-1.0, min(1.0, share)))


def probability(p: float) -> str:
    """A p-value as papers print it."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def intervals_table(results: Sequence[Result]) -> Table | None:
    """95 % intervals of every accuracy of the task tables; None without tasks."""
    names = [*zero_shot(results), *few_shot(results)]
    measured = [result for result in results if any(result.metric(str(name)) for name in names)]
    if not measured:
        return None
    intervals = ((cell for name in names for cell in _interval(result, name)) for result in measured)
    rows = tuple((*identity(result), *cells) for result, cells in zip(measured, intervals, strict=True))
    return Table(
        name="intervals",
        title="Intervals of accuracies",
        caption="95 % Wilson intervals of the right answers in per cent, by task and metric: where the accuracy on "
        "ever more such documents would lie. Results of several seeds have none. Differences between methods on the "
        "same documents are surer than these intervals suggest, see the table significance.",
        columns=(*IDENTITY, *(Column(end, str(name)) for name in names for end in ("from", "to"))),
        rows=rows,
        notes=tuple(legend(rows)),
    )


def _interval(result: Result, name: MetricName) -> tuple[Cell, Cell]:
    metrics = [record.metrics[str(name)] for record in result.records if str(name) in record.metrics]
    if len(metrics) != 1 or not 0 <= metrics[0].value <= 1:
        return Cell(None), Cell(None)
    low, high = wilson(metrics[0].value, metrics[0].n)
    return Cell(100 * low), Cell(100 * high)
