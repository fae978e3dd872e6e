"""How wide ToMoE leaves each layer, and how much of it all experts together still use."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.beside.structure import Layer
from reports.figures.plot import Content, Rows, column, grouped
from reports.figures.select import beside
from reports.figures.style import legend, legend_height, panels, ratio_colours, ratio_handles, whole
from reports.results import Result

PARTS = {"qk": "queries and keys", "vo": "values and outputs", "mlp": "MLP"}


def widths(results: Sequence[Result]) -> Content | None:
    """What a token uses of each layer; None without a `structure.json` of ToMoE."""
    rows = [
        {**run, "layer": layer.number, **{part: 100 * _used(layer, part) for part in PARTS}}
        for run, model in beside(results, lambda lying: lying.structure)
        for layer in model.layers
    ]
    caption = (
        "The share of the dense width that a token still uses in each layer of ToMoE's models, a line per asked ratio "
        "(first seed)."
    )
    return Content(caption=caption, rows=rows, draw=draw_widths) if rows else None


def _used(layer: Layer, part: str) -> float:
    """The share of a part's dimensions, over all heads, or of neurons that a token uses."""
    heads = 1 if part == "mlp" else layer.widths["heads"].share
    return heads * layer.widths[part].share


def unions(results: Sequence[Result]) -> Content | None:
    """What all experts of a layer use together; None without experts of ToMoE."""
    rows = [
        {**run, "layer": layer.number, "union": 100 * layer.mixture.union_share}
        for run, model in beside(results, lambda lying: lying.structure)
        for layer in model.layers
        if layer.mixture
    ]
    caption = (
        "The share of the dense MLP's neurons that are in at least one expert of a layer, a line per asked ratio "
        "(ToMoE, first seed): at 100 % the experts together keep all that the dense layer knew."
    )
    return Content(caption=caption, rows=rows, draw=draw_unions) if rows else None


def draw_widths(rows: Rows) -> Figure:
    """A panel per part of a layer."""
    return _lines(rows, PARTS)


def draw_unions(rows: Rows) -> Figure:
    """One panel."""
    return _lines(rows, {"union": "union of experts"})


def _lines(rows: Rows, parts: dict[str, str]) -> Figure:
    colours = ratio_colours([row["ratio"] for row in rows])
    figure, axes = panels(len(parts), 1.3, 0.2 + legend_height(len(colours), 4))
    for panel, (part, title) in zip(axes, parts.items(), strict=True):
        _panel(panel, rows, part, colours)
        panel.set(title=title, ylabel="of dense, %", ylim=(0, 105))
    axes[-1].set_xlabel("layer")
    legend(figure, ratio_handles(colours), 4)
    return figure


def _panel(panel: Axes, rows: Rows, part: str, colours: dict[float, str]) -> None:
    for ratio, model in grouped(rows, "ratio").items():
        panel.plot(column(model, "layer"), column(model, part), color=colours[ratio], marker=".")
    whole(panel)
