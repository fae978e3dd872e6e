"""ToMoE's experts: how wide they want to be, how much they share, and how many tokens each gets."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from reports.beside import Beside
from reports.beside.structure import Layer, Mixture
from reports.figures.looks import Looks
from reports.figures.plot import Content, Row, Rows, column, grouped
from reports.figures.select import beside, spread
from reports.figures.style import COLUMN, panels, share, whole
from reports.results import Result

PANELS = 3
"""Ratios, and layers, that a figure has room for."""
SOME = f"of the first seed at no more than {PANELS} asked ratios"


def widths(results: Sequence[Result]) -> Content | None:
    """Experts' widths before they are made equal; None where none are recorded."""
    caption = (
        f"Widths of each layer's experts before they are made equal, in per cent of the dense MLP, {SOME} (ToMoE): "
        "boxes from quartile to quartile with the median, whiskers from least to most."
    )
    return _content(results, _raw_widths, caption, draw_widths)


def similarity(results: Sequence[Result]) -> Content | None:
    """Cosine similarities of experts; None where there are none."""
    caption = (
        f"How alike the experts of a layer are: cosine of the sets of neurons they keep, in at most {PANELS} layers "
        f"{SOME} (ToMoE). 1: the same neurons, 0: none in common."
    )
    return _content(results, _similarities, caption, draw_similarity)


def loads(results: Sequence[Result]) -> Content | None:
    """Tokens per expert; None where they were not counted."""
    caption = (
        "The share of the calibration's tokens that each expert of each layer gets, over the share it would get if all "
        f"got as many, {SOME} (ToMoE)."
    )
    return _content(results, _loads, caption, draw_loads)


def _content(
    results: Sequence[Result],
    rows_of: Callable[[Sequence[Layer]], Iterator[Row]],
    caption: str,
    draw: Callable[[Looks, Rows], Figure],
) -> Content | None:
    def read(lying: Beside) -> list[Row] | None:
        return list(rows_of(lying.structure.layers)) or None if lying.structure else None

    shown = spread(list(beside(results, read)), PANELS)
    rows = [{**run, **row} for run, found in shown for row in found]
    return Content(caption=caption, rows=rows, draw=draw) if rows else None


def _raw_widths(layers: Sequence[Layer]) -> Iterator[Row]:
    for layer, mixture in _mixtures(layers):
        for expert, width in enumerate(mixture.raw_widths):
            yield {"layer": layer.number, "expert": expert, "width": 100 * width / layer.widths["mlp"].full}


def _similarities(layers: Sequence[Layer]) -> Iterator[Row]:
    for layer, mixture in spread(_mixtures(layers), PANELS):
        for one, line in enumerate(mixture.cosine):
            for other, cosine in enumerate(line):
                yield {"layer": layer.number, "expert": one, "other": other, "cosine": cosine}


def _loads(layers: Sequence[Layer]) -> Iterator[Row]:
    for layer, mixture in _mixtures(layers):
        for expert, load in enumerate(mixture.loads):
            even = sum(mixture.loads) / len(mixture.loads)
            yield {"layer": layer.number, "expert": expert, "tokens": load, "over_even": load / even}


def _mixtures(layers: Sequence[Layer]) -> list[tuple[Layer, Mixture]]:
    return [(layer, layer.mixture) for layer in layers if layer.mixture]


def draw_widths(looks: Looks, rows: Rows) -> Figure:
    """A panel per ratio, a box per layer."""
    ratios = grouped(rows, "ratio")
    figure, axes = panels(len(ratios), 1.3)
    for panel, (ratio, model) in zip(axes, ratios.items(), strict=True):
        boxes = grouped(model, "layer")
        _boxes(panel, [column(box, "width") for box in boxes.values()], list(boxes))
        panel.set(title=share(ratio), ylabel="width, %", ylim=(0, 105))
        whole(panel)
    axes[-1].set_xlabel("layer")
    return figure


def _boxes(panel: Axes, values: list[list[float]], places: list[float]) -> None:
    line = {"color": "#0072b2", "linewidth": 0.8}
    panel.boxplot(
        values,
        positions=places,
        widths=0.5,
        whis=(0, 100),
        manage_ticks=False,
        boxprops=line,
        whiskerprops=line,
        capprops=line,
        medianprops={"color": "#d55e00", "linewidth": 1.2},
    )


def draw_similarity(looks: Looks, rows: Rows) -> Figure:
    """A row of panels per ratio, a panel per layer."""
    cells = grouped(rows, "ratio", "layer")
    down = len(grouped(rows, "ratio"))
    across = -(-len(cells) // down)
    figure = Figure(figsize=(COLUMN, 0.3 + down * 3.1 / across), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    colours = ScalarMappable(Normalize(0, 1), "cividis")
    for panel, ((ratio, layer), cell) in zip(grid.flat, cells.items(), strict=True):
        _map(panel, cell, ("expert", "other"), "cosine", colours)
        panel.set(title=f"layer {layer}, {share(ratio)}", xticks=(), yticks=())
    figure.colorbar(colours, ax=list(grid.flat), label="cosine", shrink=0.8, aspect=30)
    figure.supxlabel("experts", fontsize=7)
    figure.supylabel("experts", fontsize=7)
    return figure


def draw_loads(looks: Looks, rows: Rows) -> Figure:
    """A panel per ratio: layers across, experts upwards."""
    ratios = grouped(rows, "ratio")
    colours = ScalarMappable(TwoSlopeNorm(1, 0, max(2, *column(rows, "over_even"))), "PuOr_r")
    figure, axes = panels(len(ratios), 1.2)
    for panel, (ratio, model) in zip(axes, ratios.items(), strict=True):
        _map(panel, model, ("layer", "expert"), "over_even", colours)
        panel.set(title=share(ratio), ylabel="expert")
    axes[-1].set_xlabel("layer")
    figure.colorbar(colours, ax=axes, label="tokens / even share")
    return figure


def _map(panel: Axes, rows: Rows, axes: tuple[str, str], value: str, colours: ScalarMappable) -> None:
    """A square per row, at whole numbers; nothing where there is no row."""
    x, y = (np.array(column(rows, key), int) for key in axes)
    grid = np.full((y.max() + 1, x.max() + 1), np.nan)
    grid[y, x] = column(rows, value)
    image = panel.imshow(grid, origin="lower", aspect="auto", cmap=colours.cmap, interpolation="nearest")
    image.set_norm(colours.norm)
    panel.grid(False)
    whole(panel)
