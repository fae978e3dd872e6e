"""How good the compressed models are at the size they were counted to have: every method, with error bars."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.accuracy import judged
from reports.comparison import MetricName, metric_names
from reports.figures.legends import method_legend, wrapped
from reports.figures.looks import Looks
from reports.figures.plot import Content, Row, Rows, grouped
from reports.figures.scale import logarithmic
from reports.figures.select import ALIKE, ERRORS, compressed, identity, main, measured, usual, value
from reports.figures.style import curve, lowest, panels
from reports.perplexity import texts
from reports.results import Result

TOTAL = "counted share of all active parameters, %"
BLOCK = "counted share of the blocks' active parameters, %"
SHOWN = (
    f"against the counted share of active parameters; {ERRORS}; the dashed line is the dense model, hollow markers are "
    f"fine-tuned. {ALIKE}"
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
    results: Sequence[Result], names: Sequence[MetricName], draw: Callable[[Looks, Rows], Figure], caption: str
) -> Content | None:
    scale = 100 if draw is draw_accuracy else 1
    shown = {str(name): measured(results, str(name)) for name in names}
    alike = set(usual([result for result in results if any(map(result.metric, shown))]))
    rows = [row for name in shown for row in _rows([r for r in shown[name] if r in alike], name, scale)]
    return Content(caption=caption, rows=rows, draw=draw) if rows else None


def _rows(results: Sequence[Result], name: str, scale: float) -> list[Row]:
    """The main settings' values; nothing where there is the dense model only."""
    counted = [result for result in results if result.achieved is not None]
    shown = main(counted) if compressed(counted) else []
    return [{"metric": name, **identity(result), **value(result, name, "value", scale)} for result in shown]


def draw_perplexity(looks: Looks, rows: Rows) -> Figure:
    """A panel per text."""
    figure, axes = _panels(rows, looks)
    for panel in axes:
        panel.set_ylabel("perplexity")
        logarithmic(panel, "y")
    return figure


def draw_accuracy(looks: Looks, rows: Rows) -> Figure:
    """A panel per task."""
    figure, axes = _panels(rows, looks)
    for panel in axes:
        panel.set_ylabel("right answers, %")
    return figure


def _panels(rows: Rows, looks: Looks) -> tuple[Figure, list[Axes]]:
    metrics = grouped(rows, "metric")
    figure, axes = panels(len(metrics), 1.9)
    for panel, (name, points) in zip(axes, metrics.items(), strict=True):
        _curves(panel, points, looks)
        panel.set_title(wrapped(str(name)))
    basis = next(row["basis"] for row in rows if row["method"] != "dense")
    for panel in lowest(axes):
        panel.set_xlabel(TOTAL if basis == "total" else BLOCK)
    method_legend(figure, rows, looks, linestyle="--", marker="")
    return figure, axes


def _curves(panel: Axes, rows: Rows, looks: Looks) -> None:
    for (name, _), line in grouped(rows, "method", "fine_tuned").items():
        if name == "dense":
            panel.axhline(line[0]["value"], color=looks.methods[name].colour, linestyle="--", linewidth=0.8)
        else:
            curve(panel, looks.methods[name], line, "counted", "value")
