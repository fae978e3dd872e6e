"""How ToMoE's loss and its parts fall while the masks are learned, at each ratio."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.figure import Figure

from reports.figures.beside import training
from reports.figures.plot import Content, Row, Rows, column, grouped
from reports.figures.select import having, identity, tomoe
from reports.figures.style import legend, legend_height, panels, ratio_colours, ratio_handles, whole
from reports.results import Result

PARTS = {
    "kd": "distillation (KD)",
    "r_p": "parameters (R_P)",
    "r_u": "union of experts (R_U)",
    "r_l": "load balance (R_L)",
}
"""The parts of the loss by their column of `training.csv`, as the paper calls them."""
POINTS = 150
"""More of a curve cannot be seen in a column."""


def build(results: Sequence[Result]) -> Content | None:
    """The parts of the loss over steps; None without a `training.csv` of ToMoE."""
    runs = having(tomoe(results), lambda result: training(result, tuple(PARTS)))
    if not runs:
        return None
    return Content(
        caption="The parts of ToMoE's loss, unweighted, over training steps, a curve per asked ratio (first seed); "
        f"of long runs each of {POINTS} points is a mean over neighbouring steps.",
        rows=[{**identity(result), **row} for result, run in runs for row in thinned(run)],
        draw=draw,
    )


def thinned(run: Sequence[Mapping[str, float]]) -> list[Row]:
    """At most `POINTS` rows: means over as many neighbours as that takes."""
    size = -(-len(run) // POINTS)
    blocks = [run[start : start + size] for start in range(0, len(run), size)]
    return [{name: fmean(row[name] for row in block) for name in block[0]} for block in blocks]


def draw(rows: Rows) -> Figure:
    """A panel per part, a line per ratio."""
    runs = grouped(rows, "ratio")
    colours = ratio_colours([row["ratio"] for row in rows])
    figure, axes = panels(len(PARTS), 1.5, legend_height(len(runs), 8))
    for panel, (part, title) in zip(axes, PARTS.items(), strict=True):
        for ratio, run in runs.items():
            panel.plot(column(run, "step"), column(run, part), color=colours[ratio], linewidth=0.8)
        panel.set(title=title, xlabel="step")
        whole(panel)
    legend(figure, ratio_handles(colours), 8)
    return figure
