"""How fast the compressed models are: tokens per second by batch size, and quality against speed."""

import math
from collections import Counter
from collections.abc import Sequence

from matplotlib.figure import Figure

from reports.figures.plot import Content, Row, Rows, column, grouped
from reports.figures.select import MAIN, busiest, identity, main, quality
from reports.figures.style import curve, logarithmic, method_legend, method_legend_height, panels, share
from reports.results import Result
from reports.speed import PHASES, RATE, batches
from reports.standings import lower_is_better
from reports.tables import percent, plain


def throughput(results: Sequence[Result]) -> Content | None:
    """Tokens per second by batch size; None where none was measured."""
    dense = [result for result in results if result.dense]
    timed = [result for result in main(results) if _sweep(result)]
    shown = [*(result for result in dense if _sweep(result)), *busiest(timed)]
    rows = [row for result in shown for row in _sweep(result)]
    if all(result.dense for result in shown):
        return None
    caption = (
        f"Tokens per second by batch size at {share(shown[-1].ratio)} asked, while reading the prompt (prefill) and "
        f"while generating (decode), median of the repeats; black is the dense model. {MAIN}"
    )
    return Content(caption=caption, rows=rows, draw=draw_throughput)


def _sweep(result: Result) -> list[Row]:
    cells = ((phase, batch) for phase in PHASES for batch in batches([result]))
    found = ((phase, batch, result.metric(f"speed/{RATE.format(phase)}@{batch}")) for phase, batch in cells)
    return [
        {
            "phase": phase,
            **identity(result),
            "batch": int(batch[1:]),
            "rate": rate.value,
            "rate_error": rate.error,
        }
        for phase, batch, rate in found
        if rate
    ]


def draw_throughput(rows: Rows) -> Figure:
    """A panel per phase, a line per method."""
    phases = grouped(rows, "phase")
    figure, axes = panels(len(phases), 1.7, method_legend_height(rows))
    for panel, (phase, measured) in zip(axes, phases.items(), strict=True):
        for (name, _), line in grouped(measured, "method", "fine_tuned").items():
            curve(panel, line, "batch", "rate", "--" if name == "dense" else "-")
        panel.set(title=phase, ylabel="tokens/s")
        logarithmic(panel, "x", (1,), 2)
        logarithmic(panel, "y")
    axes[-1].set_xlabel("batch")
    method_legend(figure, rows)
    return figure


def pareto(results: Sequence[Result]) -> Content | None:
    """Quality against speed relative to dense; None where no compressed model has both."""
    name = quality(results)
    batch = _usual_batch(results)
    if name is None or batch is None:
        return None
    rows = [row for result in main(results) if (row := _point(result, name, batch))]
    if all(row["method"] == "dense" for row in rows):
        return None
    best = front([(row["speed"], row["quality"]) for row in rows], lower_is_better((name,)))
    rows = [{**row, "front": int(index in best)} for index, row in enumerate(rows)]
    caption = (
        f"{name} against tokens per second while generating, relative to the dense model measured beside it, at batch "
        f"{batch[1:]}. The line joins what nothing else beats in both; numbers are the asked ratios there, in per "
        f"cent. Hollow markers are fine-tuned. {MAIN}"
    )
    return Content(caption=caption, rows=rows, draw=draw_pareto)


def _usual_batch(results: Sequence[Result]) -> str | None:
    """The batch size that most results were timed at, of equals the smallest."""
    counts = Counter(batch for result in results for batch in batches([result]))
    return max(counts, key=lambda batch: (counts[batch], -int(batch[1:]))) if counts else None


def _point(result: Result, name: str, batch: str) -> Row | None:
    speed = result.metric(f"speed/{RATE.format('decode')}_vs_dense@{batch}")
    found = result.metric(name)
    if found is None or not math.isfinite(found.value) or not (speed or result.dense):
        return None
    return {
        **identity(result),
        "metric": name,
        "speed": speed.value if speed else 1.0,
        "speed_error": speed.error if speed else None,
        "quality": found.value,
        "quality_error": found.error,
    }


def front(points: Sequence[tuple[float, float]], lower: bool) -> set[int]:
    """Which points `(speed, quality)` no other beats in one without being worse in the other.

    Args:
        lower: whether a lower quality is better.
    """
    signed = [(speed, -quality if lower else quality) for speed, quality in points]
    return {
        index
        for index, (speed, quality) in enumerate(signed)
        if not any((a >= speed and b >= quality) and (a, b) != (speed, quality) for a, b in signed)
    }


def draw_pareto(rows: Rows) -> Figure:
    """One panel."""
    figure, (panel,) = panels(1, 2.4, method_legend_height(rows))
    for points in grouped(rows, "method", "fine_tuned").values():
        curve(panel, points, "speed", "quality", "")
    best = sorted((row for row in rows if row["front"]), key=lambda row: row["speed"])
    panel.plot(column(best, "speed"), column(best, "quality"), color="#888888", linewidth=0.8, zorder=1)
    for row in best:
        at = row["speed"], row["quality"]
        panel.annotate(f"{percent(row['ratio']):g}", at, (3, 3), textcoords="offset points", fontsize=6)
    metric = str(rows[0]["metric"])
    panel.set(xlabel="tokens/s over dense (higher is better)", ylabel=plain(metric))
    if lower_is_better((metric,)):
        logarithmic(panel, "y")
    method_legend(figure, rows)
    return figure
