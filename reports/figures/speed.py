"""How fast the compressed models are: tokens per second by batch size, and quality against speed."""

from collections import Counter
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from reports.figures.legends import method_legend, wrapped
from reports.figures.looks import Looks
from reports.figures.plot import Content, Row, Rows, column, grouped
from reports.figures.scale import logarithmic
from reports.figures.select import (
    ALIKE,
    ERRORS,
    MAIN,
    busiest,
    compressed,
    drawable,
    identity,
    like_most,
    main,
    measured,
    quality,
    usual,
    value,
)
from reports.figures.style import curve, lowest, panels, share
from reports.results import Result
from reports.speed import PHASES, RATE, batches, timed_on
from reports.standings import lower_is_better
from reports.tables import percent

SPEED = f"speed/{RATE.format('decode')}_vs_dense@{{}}"
"""Of a batch size."""
MARKER = 2
"""Dots from the middle of a marker to its edge, at least."""


def throughput(results: Sequence[Result]) -> Content | None:
    """Tokens per second by batch size; None where none was measured."""
    timed = main(like_most(usual([result for result in results if _sweep(result)]), timed_on))
    shown = busiest(timed)
    if not shown:
        return None
    caption = (
        f"Tokens per second by batch size at {share(shown[0].ratio)} asked, while reading the prompt (prefill) and "
        f"while generating (decode), median of the repeats; {ERRORS}; black is the dense model. {MAIN} So "
        "is what was timed on another device than most, or with another number of threads."
    )
    rows = [row for result in timed if result.dense or result in shown for row in _sweep(result)]
    return Content(caption=caption, rows=rows, draw=draw_throughput)


def _sweep(result: Result) -> list[Row]:
    cells = ((phase, batch) for phase in PHASES for batch in batches([result]))
    found = ((phase, batch, f"speed/{RATE.format(phase)}@{batch}") for phase, batch in cells)
    rows = [
        {"phase": phase, **identity(result), "batch": int(batch[1:]), **value(result, rate, "rate")}
        for phase, batch, rate in found
        if drawable(result, rate)
    ]
    return [row for row in rows if row["rate"]]  # a logarithmic axis has no 0


def draw_throughput(looks: Looks, rows: Rows) -> Figure:
    """A panel per phase, a line per method."""
    phases = grouped(rows, "phase")
    figure, axes = panels(len(phases), 1.7)
    for panel, (phase, points) in zip(axes, phases.items(), strict=True):
        for (name, _), line in grouped(points, "method", "fine_tuned").items():
            curve(panel, looks.methods[name], line, "batch", "rate", "--" if name == "dense" else "-")
        panel.set(title=phase, ylabel="tokens/s")
        logarithmic(panel, "x")
        panel.set_xticks(sorted({*column(rows, "batch")}))
        logarithmic(panel, "y")
    for panel in lowest(axes):
        panel.set_xlabel("batch")
    method_legend(figure, rows, looks, linestyle="--")
    return figure


def pareto(results: Sequence[Result]) -> Content | None:
    """Quality against speed relative to dense; None where no compressed model has both."""
    batch = _usual_batch(results)
    timed = [result for result in results if result.dense or drawable(result, SPEED.format(batch))]
    name = quality(compressed(timed))
    shown = main(usual(measured(timed, name))) if name else []
    if not compressed(shown):
        return None
    rows = [_point(result, str(name), SPEED.format(batch)) for result in shown]
    best = front([(row["speed"], row["quality"]) for row in rows], lower_is_better((str(name),)))
    rows = [{**row, "front": int(index in best)} for index, row in enumerate(rows)]
    caption = (
        f"{name} against tokens per second while generating, relative to the dense model measured beside it, at batch "
        f"{str(batch)[1:]}; {ERRORS}. The line joins what nothing else beats in both; numbers are the asked ratios "
        f"there, in per cent, where there is room. Hollow markers are fine-tuned. {ALIKE}"
    )
    return Content(caption=caption, rows=rows, draw=draw_pareto)


def _usual_batch(results: Sequence[Result]) -> str | None:
    """The batch size that most results were timed at, of equals the smallest."""
    counts = Counter(batch for result in results for batch in batches([result]))
    return max(counts, key=lambda batch: (counts[batch], -int(batch[1:]))) if counts else None


def _point(result: Result, name: str, speed: str) -> Row:
    faster = {"speed": 1.0, "speed_error": None} if result.dense else value(result, speed, "speed")
    return {**identity(result), "metric": name, **faster, **value(result, name, "quality")}


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


def draw_pareto(looks: Looks, rows: Rows) -> Figure:
    """One panel."""
    figure, (panel,) = panels(1, 2.4)
    for (name, _), points in grouped(rows, "method", "fine_tuned").items():
        curve(panel, looks.methods[name], points, "speed", "quality", "")
    best = _front(rows)
    panel.plot(column(best, "speed"), column(best, "quality"), color="#888888", linewidth=0.8, zorder=1)
    metric = str(rows[0]["metric"])
    panel.set(xlabel="tokens/s over dense (higher is better)", ylabel=wrapped(metric))
    if lower_is_better((metric,)):
        logarithmic(panel, "y")
    method_legend(figure, rows, looks)
    figure.draw_without_rendering()  # puts everything in its place
    _label_front(panel, rows, lower_is_better((metric,)))
    return figure


def _label_front(panel: Axes, rows: Rows, lower: bool) -> None:
    """Asked ratios from slow to fast, on that side of the front where nothing is, where they hide nothing."""
    down, aligned = (-3, "top") if lower else (3, "bottom")
    points = panel.transData.transform([(row["speed"], row["quality"]) for row in rows])
    taken = [Bbox.from_bounds(x, y, 0, 0).padded(MARKER) for x, y in points]
    for row in _front(rows):
        label = panel.annotate(
            f"{percent(row['ratio']):g}",
            (row["speed"], row["quality"]),
            (3, down),
            textcoords="offset points",
            verticalalignment=aligned,
            fontsize=6,
        )
        label.set_in_layout(False)
        space = label.get_window_extent()
        if any(map(space.overlaps, taken)):
            label.remove()
        else:
            taken.append(space)


def _front(rows: Rows) -> list[Row]:
    """From slow to fast."""
    return sorted((row for row in rows if row["front"]), key=lambda row: row["speed"])
