"""Figures as data within the page: an `img` keeps the styles and names of an SVG to itself, and runs no script."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reports.figures import Plot
from reports.figures.files import FOLDER


@dataclass(frozen=True)
class Picture:
    """A figure."""

    plot: Plot
    """Its title and caption."""
    source: str
    """Its content, as a `data:` address."""


def pictures(plots: Sequence[Plot], files: Mapping[str, str | bytes]) -> list[Picture]:
    """The figures as SVG, which is sharp at any size.

    Args:
        files: those of the report, by name.
    """
    return [Picture(plot, _source(str(files[f"{FOLDER}/{plot.name}.svg"]))) for plot in plots]


def _source(svg: str) -> str:
    return f"data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}"
