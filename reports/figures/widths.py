"""How wide ToMoE leaves each layer, and how much of it all experts together still use."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.beside import Beside
from reports.beside.structure import Layer
from reports.figures.legends import ratio_legend
from reports.figures.looks import Looks
from reports.figures.plot import Content, Row, Rows, column, grouped
from reports.figures.select import beside
from reports.figures.style import panels, whole
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
    rows = [{**run, **row} for run, found in beside(results, _unions) for row in found]
    caption = (
        "The share of the dense MLP's neurons that are in at least one expert of a layer, a line per asked ratio "
        "(ToMoE, first seed): at 100 % the experts together keep all that the dense layer knew."
    )
    return Content(caption=caption, rows=rows, draw=draw_unions) if rows else None


def _unions(lying: Beside) -> list[Row] | None:
    layers = lying.structure.layers if lying.structure else ()
    mixtures = ((layer.number, layer.mixture) for layer in layers)
    return [{"layer": number, "union": 100 * mixture.union_share} for number, mixture in mixtures if mixture] or None


def draw_widths(looks: Looks, rows: Rows) -> Figure:
    """A panel per part of a layer."""
    return _lines(looks, rows, PARTS)


def draw_unions(looks: Looks, rows: Rows) -> Figure:
    """One panel."""
    return _lines(looks, rows, {"union": "union of experts"})


def _lines(looks: Looks, rows: Rows, parts: dict[str, str]) -> Figure:
    figure, axes = panels(len(parts), 1.3)
    for panel, (part, title) in zip(axes, parts.items(), strict=True):
        _panel(panel, rows, part, looks)
        panel.set(title=title, ylabel="of dense, %", ylim=(0, 105))
    axes[-1].set_xlabel("layer")
    ratio_legend(figure, rows, looks)
    return figure


def _panel(panel: Axes, rows: Rows, part: str, looks: Looks) -> None:
    for ratio, model in grouped(rows, "ratio").items():
        panel.plot(column(model, "layer"), column(model, part), color=looks.ratios[ratio], marker=".")
    whole(panel)
