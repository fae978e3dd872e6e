"""Draws plots into files: SVG, PDF and PNG, and the data as CSV; the same bytes every time."""

import csv
import io
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from reports.figures.plot import Plot, Rows
from reports.figures.style import styled

FOLDER = "figures"
WORTH_A_PROCESS = 8
SUFFIXES = ("svg", "pdf", "png", "csv")


@contextmanager
def drawing(plots: Sequence[Plot]) -> Iterator[Callable[[], dict[str, str | bytes]]]:
    """What gives the content of every file, by its name below the report.

    Many are drawn in several processes, each of which takes a second to start, beside what is done within the context.
    """
    workers = min(os.cpu_count() or 1, len(plots) // WORTH_A_PROCESS)
    if workers < 2:
        yield lambda: _gathered(map(_drawn, plots))
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        parts = pool.map(_drawn, plots)
        yield lambda: _gathered(parts)


def _gathered(parts: Iterable[Mapping[str, str | bytes]]) -> dict[str, str | bytes]:
    return {f"{FOLDER}/{name}": content for part in parts for name, content in part.items()}


def _drawn(plot: Plot) -> dict[str, str | bytes]:
    with styled(), warnings.catch_warnings():
        # Names may hold characters that the font lacks; they are shown as boxes.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        figure = plot.draw(plot.rows)
        _lay_out(figure)
        # PNG first: the others set the figure to 72 dots per inch.
        pictures = {"png": _png(figure), "svg": _svg(figure), "pdf": _pdf(figure)}
    contents = pictures | {"csv": comma_separated(plot.rows)}
    return {f"{plot.name}.{suffix}": content for suffix, content in contents.items()}


def _lay_out(figure: Figure) -> None:
    """Finds room for everything once rather than for each format."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)
    figure.set_layout_engine("none")


# The canvases print straight away; `savefig` would draw everything twice.


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
    return stream.getvalue()


def _pdf(figure: Figure) -> bytes:
    stream = io.BytesIO()
    FigureCanvasPdf(figure).print_pdf(stream, metadata={"CreationDate": None})
    return stream.getvalue()


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    return stream.getvalue()


def comma_separated(rows: Rows) -> str:
    """The rows below their keys, numbers at full precision; empty where there is none."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows([_exact(value) for value in row.values()] for row in rows)
    return stream.getvalue()


def _exact(value: str | float | None) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else value if isinstance(value, str) else repr(value)
