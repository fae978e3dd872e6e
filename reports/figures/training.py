"""How ToMoE's loss and its parts fall while the masks are learned, at each ratio."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from reports.beside.training import PARTS, Curves
from reports.figures.legends import ratio_legend
from reports.figures.looks import Looks
from reports.figures.plot import Content, Row, Rows, column, grouped
from reports.figures.select import beside
from reports.figures.style import panels, whole
from reports.results import Result, mean

POINTS = 150
"""More of a curve cannot be seen in a column."""


def build(results: Sequence[Result]) -> Content | None:
    """The parts of the loss over steps; None without a `training.csv` of ToMoE."""
    rows = [{**run, **row} for run, curves in beside(results, lambda lying: lying.training) for row in thinned(curves)]
    if not rows:
        return None
    return Content(
        caption="The parts of ToMoE's loss, unweighted, over training steps, a curve per asked ratio (first seed); "
        f"of long runs each of {POINTS} points is a mean over neighbouring steps.",
        rows=rows,
        draw=draw,
    )


def thinned(run: Curves) -> list[Row]:
    """At most `POINTS` rows: means over as many neighbours as that takes."""
    size = -(-len(run) // POINTS)
    blocks = [run[start : start + size] for start in range(0, len(run), size)]
    return [{name: mean([row[name] for row in block]) for name in block[0]} for block in blocks]


def draw(looks: Looks, rows: Rows) -> Figure:
    """A panel per part, a line per ratio."""
    runs = grouped(rows, "ratio")
    figure, axes = panels(len(PARTS), 1.5)
    for panel, (part, title) in zip(axes, PARTS.items(), strict=True):
        for ratio, run in runs.items():
            panel.plot(column(run, "step"), column(run, part), color=looks.ratios[ratio], linewidth=0.8)
        panel.set(title=title, xlabel="step")
        whole(panel)
    ratio_legend(figure, rows, looks)
    return figure
