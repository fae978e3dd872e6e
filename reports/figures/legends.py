"""Legends and long labels: below a figure, which grows by what they need, in as many columns as fit."""

from collections.abc import Sequence
from textwrap import fill

from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

from reports.figures.looks import Look, Looks
from reports.figures.plot import Rows
from reports.figures.style import share
from reports.tables import plain

LETTERS = 32
"""Of this many a line fits into a column even if all are as wide as W."""
MOST = 6
"""Columns that a legend has at most."""


def wrapped(text: str, letters: int = LETTERS) -> str:
    """A text of any length and with any characters, in lines of at most so many letters."""
    return fill(plain(text), letters)


def legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """A legend below everything, where it hides nothing; the figure grows by its height."""
    sizes = ((columns, *_size(figure, handles, columns)) for columns in range(min(MOST, len(handles)), 0, -1))
    columns, _, height = next(size for size in sizes if size[0] == 1 or size[1] <= figure.get_figwidth())
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    figure.set_figheight(figure.get_figheight() + height)


def _size(figure: Figure, handles: Sequence[Artist], columns: int) -> tuple[float, float]:
    """Width and height in inches."""
    made = Legend(figure, handles, [str(handle.get_label()) for handle in handles], ncols=columns)
    box = made.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    return box.width / figure.dpi, box.height / figure.dpi


def method_legend(figure: Figure, rows: Rows, looks: Looks, **dense: str) -> None:
    """The rows' methods as points; `dense` says how else than with its marker the dense model is drawn."""
    shown = {row["method"] for row in rows}
    handles = {name: _point(looks.methods[name], name) for name in looks.methods if name in shown}
    if "dense" in handles:
        handles["dense"].set(**dense)
    legend(figure, list(handles.values()))


def _point(look: Look, name: str) -> Line2D:
    return Line2D([], [], color=look.colour, marker=look.marker, linestyle="", linewidth=0.8, label=wrapped(name))


def ratio_legend(figure: Figure, rows: Rows, looks: Looks) -> None:
    """The rows' asked ratios."""
    shown = {row["ratio"] for row in rows}
    ratios = [ratio for ratio in looks.ratios if ratio in shown]
    legend(figure, [Line2D([], [], color=looks.ratios[ratio], label=share(ratio)) for ratio in ratios])
