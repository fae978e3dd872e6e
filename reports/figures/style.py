"""How figures look: `report.mplstyle`, sizes, panels and curves."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reports.figures.looks import Look
from reports.figures.plot import Rows, column
from reports.tables import percent

STYLE = Path(__file__).parent / "report.mplstyle"
COLUMN, PAGE = 3.3, 6.9
"""Width in inches of a column of a paper, and of its page."""


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib with its own defaults and the style file, whatever the user's settings are."""
    with matplotlib.rc_context(), style.context(["default", STYLE]):
        yield


def panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels: below each other in a column up to three, else two abreast on a page.

    Args:
        height: of a panel, in inches; the label of the axis below the last has its own.
    """
    across = 1 if count <= 3 else 2
    down = -(-count // across)
    figure = Figure(figsize=(COLUMN if across == 1 else PAGE, down * height + 0.2), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).flat
    for axes in grid[count:]:
        axes.remove()
    return figure, list(grid[:count])


def lowest(axes: Sequence[Axes]) -> Sequence[Axes]:
    """Those of `panels` with none below them, which get the label of the horizontal axis."""
    return axes[-1:] if len(axes) <= 3 else axes[-2:]


def curve(panel: Axes, look: Look, rows: Rows, x: str, y: str, line: str = "-") -> None:
    """One method's points, hollow where fine-tuned, with bars for what `x_error` and `y_error` hold."""
    panel.errorbar(
        column(rows, x),
        column(rows, y),
        xerr=_bars(rows, x),
        yerr=_bars(rows, y),
        color=look.colour,
        marker=look.marker,
        markerfacecolor="white" if rows[0]["fine_tuned"] else look.colour,
        linestyle=line,
        linewidth=0.7,
        elinewidth=0.5,
    )


def _bars(rows: Rows, key: str) -> list[float] | None:
    found = column(rows, f"{key}_error") if f"{key}_error" in rows[0] else [math.nan]
    return None if all(map(math.isnan, found)) else found


def share(ratio: float) -> str:
    """A ratio as labels show it."""
    return f"{percent(ratio):g} %"


def whole(axes: Axes) -> None:
    """Ticks of the horizontal axis at whole numbers only: layers, steps, experts."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
