"""How figures look: `report.mplstyle`, one colour and marker per method everywhere, sizes, and legends.

Colours are those of Okabe and Ito, which colour-blind people tell apart. There are more methods than such colours, so
the colour is the family's and the marker tells its methods apart.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
from matplotlib import style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from reports.figures.plot import Rows, column, grouped
from reports.tables import percent, plain

STYLE = Path(__file__).parent / "report.mplstyle"
COLUMN, PAGE = 3.3, 6.9
"""Width in inches of a column of a paper, and of its page."""
COLOURS = {
    "#000000": ("dense",),
    "#d55e00": ("tomoe",),
    "#0072b2": ("shortgpt", "sleb"),
    "#009e73": ("slicegpt", "llm-pruner", "llm-surgeon", "modegpt", "disp-llm"),
    "#e69f00": ("magnitude", "wanda", "sparsegpt", "pruner-zero"),
    "#cc79a7": ("moefication", "g-moefication", "llama-moe", "llama-moe-v2", "cmoe"),
    "#888888": ("random", "structured-magnitude"),
}
OTHERS = "#56b4e9"
MARKERS = "osD^vPX*<>"


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    colour: str
    """Its family's."""
    marker: str
    """Its own within the family."""


LOOKS = {
    method: Look(colour, marker)
    for colour, methods in COLOURS.items()
    for method, marker in zip(methods, MARKERS, strict=False)
}


def look(method: str) -> Look:
    """How a method is drawn in all figures of all reports, one that comes from elsewhere included."""
    return LOOKS.get(method) or Look(OTHERS, MARKERS[zlib.crc32(method.encode()) % len(MARKERS)])


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib with its own defaults and the style file, whatever the user's settings are."""
    with matplotlib.rc_context(), style.context(["default", STYLE]):
        yield


def panels(count: int, height: float = 1.5, beneath: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels: below each other in a column up to three, else two abreast on a page.

    Args:
        height: of a panel, in inches.
        beneath: what the legend needs.
    """
    across = 1 if count <= 3 else 2
    down = -(-count // across)
    figure = Figure(figsize=(COLUMN if across == 1 else PAGE, down * height + beneath), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).flat
    for axes in grid[count:]:
        axes.remove()
    return figure, list(grid[:count])


def legend(figure: Figure, handles: Sequence[Artist], columns: int) -> None:
    """A legend below everything, where it hides nothing."""
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)))


def legend_height(count: int, columns: int) -> float:
    """What a legend of `count` entries needs, in inches."""
    return 0.14 * -(-count // columns) + 0.1


def curve(panel: Axes, rows: Rows, x: str, y: str, line: str = "-") -> None:
    """One method's points, hollow where fine-tuned, with bars for what `x_error` and `y_error` hold."""
    shown = look(str(rows[0]["method"]))
    panel.errorbar(
        column(rows, x),
        column(rows, y),
        xerr=_bars(rows, x),
        yerr=_bars(rows, y),
        color=shown.colour,
        marker=shown.marker,
        markerfacecolor="white" if rows[0]["fine_tuned"] else shown.colour,
        linestyle=line,
        linewidth=0.7,
        elinewidth=0.5,
    )


def _bars(rows: Rows, key: str) -> list[float] | None:
    found = column(rows, f"{key}_error") if f"{key}_error" in rows[0] else [math.nan]
    return None if all(map(math.isnan, found)) else found


def method_legend(figure: Figure, rows: Rows) -> None:
    """The rows' methods, three abreast."""
    legend(figure, [_method_handle(str(method)) for method in grouped(rows, "method")], 3)


def method_legend_height(rows: Rows) -> float:
    """What `method_legend` needs, with the label of the axis above it."""
    return 0.2 + legend_height(len(grouped(rows, "method")), 3)


def _method_handle(method: str) -> Line2D:
    shown, line = look(method), "--" if method == "dense" else ""
    return Line2D([], [], color=shown.colour, marker=shown.marker, linestyle=line, label=plain(method))


def ratio_colours(ratios: Sequence[float]) -> dict[float, str]:
    """A colour per asked ratio: from yellow for the largest to dark blue for the smallest, readable in grey too."""
    scale = matplotlib.colormaps["cividis"]
    ordered = sorted(ratios, reverse=True)
    places = [0.8 - 0.8 * index / max(1, len(ordered) - 1) for index in range(len(ordered))]
    return {ratio: to_hex(scale(place)) for ratio, place in zip(ordered, places, strict=True)}


def ratio_handles(colours: dict[float, str]) -> list[Line2D]:
    """The legend's entries of asked ratios."""
    return [Line2D([], [], color=colour, label=share(ratio)) for ratio, colour in colours.items()]


def share(ratio: float) -> str:
    """A ratio as labels show it."""
    return f"{percent(ratio):g} %"


def whole(axes: Axes) -> None:
    """Ticks of the horizontal axis at whole numbers only: layers, steps, experts."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))


def logarithmic(panel: Axes, which: Literal["x", "y"], steps: Sequence[int] = (1, 2, 5), base: int = 10) -> None:
    """A logarithmic axis with ordinary numbers at its ticks, which are `steps` times the powers of the base."""
    axis = panel.xaxis if which == "x" else panel.yaxis
    panel.set(**{f"{which}scale": "log"})
    axis.set_major_locator(LogLocator(base, subs=steps, numticks=8))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
