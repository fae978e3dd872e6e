"""How good the compressed models are at the size they were counted to have: every method, with error bars."""

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.accuracy import judged
from reports.comparison import Measured, MetricName, metric_names
from reports.figures.plot import Content, Row, Rows, grouped
from reports.figures.select import MAIN, identity, main
from reports.figures.style import curve, logarithmic, look, method_legend, method_legend_height, panels
from reports.perplexity import texts
from reports.results import Result
from reports.tables import plain

ERRORS = "error bars are one standard error, or the standard deviation over seeds where there are several"
SHOWN = (
    f"against the counted share of active parameters; {ERRORS}; the dashed line is the dense model, hollow markers are "
    f"fine-tuned. {MAIN} What was measured under other conditions than most (‡ in the tables) is left out."
)


def perplexity(results: Sequence[Result]) -> Content | None:
    """Every text; None where none was measured."""
    return _content(results, texts(results), draw_perplexity, f"Token perplexity (lower is better) {SHOWN}")


def accuracy(results: Sequence[Result]) -> Content | None:
    """Every task but MMLU; None where none was measured."""
    tasks = [name for name in judged(results) if name.source != "mmlu"]
    return _content(results, tasks, draw_accuracy, f"Right answers {SHOWN}")


def mmlu(results: Sequence[Result]) -> Content | None:
    """MMLU as a whole; None where it was not measured."""
    tasks = [name for name in metric_names(results) if (name.source, name.quantity) == ("mmlu", "acc")]
    return _content(results, tasks, draw_accuracy, f"Right answers to MMLU {SHOWN}")


def _content(
    results: Sequence[Result], names: Sequence[MetricName], draw: Callable[[Rows], Figure], caption: str
) -> Content | None:
    scale = 100 if draw is draw_accuracy else 1
    rows = [row for name in names for row in _rows(results, str(name), scale)]
    return Content(caption=caption, rows=rows, draw=draw) if rows else None


def _rows(results: Sequence[Result], name: str, scale: float) -> list[Row]:
    """What can be compared of one metric; nothing where that is the dense model only."""
    measured = Measured(name, results)
    alike = [result for result in results if result.metric(name) and not measured.unlike(result)]
    rows = [row for result in main(alike) if (row := _row(result, name, scale))]
    return rows if any(row["method"] != "dense" for row in rows) else []


def _row(result: Result, name: str, scale: float) -> Row | None:
    found = result.metric(name)
    if found is None or result.achieved is None or not math.isfinite(found.value):
        return None
    return {
        "metric": name,
        **identity(result),
        "counted": 100 * result.achieved,
        "value": scale * found.value,
        "value_error": None if found.error is None else scale * found.error,
    }


def draw_perplexity(rows: Rows) -> Figure:
    """A panel per text."""
    figure, axes = _panels(rows)
    for panel in axes:
        panel.set_ylabel("perplexity")
        logarithmic(panel, "y")
    return figure


def draw_accuracy(rows: Rows) -> Figure:
    """A panel per task."""
    figure, axes = _panels(rows)
    for panel in axes:
        panel.set_ylabel("right answers, %")
    return figure


def _panels(rows: Rows) -> tuple[Figure, list[Axes]]:
    metrics = grouped(rows, "metric")
    figure, axes = panels(len(metrics), 1.9, method_legend_height(rows))
    for panel, (name, measured) in zip(axes, metrics.items(), strict=True):
        _curves(panel, measured)
        panel.set_title(plain(str(name)))
    axes[-1].set_xlabel("counted share of active parameters, %")
    method_legend(figure, rows)
    return figure, axes


def _curves(panel: Axes, rows: Rows) -> None:
    for (name, _), line in grouped(rows, "method", "fine_tuned").items():
        if name == "dense":
            panel.axhline(line[0]["value"], color=look(name).colour, linestyle="--", linewidth=0.8)
        else:
            curve(panel, line, "counted", "value")
