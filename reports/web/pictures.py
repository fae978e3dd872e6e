"""Figures as data within the page: an `img` keeps the styles and names of an SVG to itself, and runs no script."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reports.figures import Plot
from reports.figures.files import FOLDER

KINDS = {"svg": "image/svg+xml", "png": "image/png"}
FAR = 4
"""How many times as large as the PNG an SVG may be, which is sharp at any size."""


@dataclass(frozen=True)
class Picture:
    """A figure."""

    plot: Plot
    """Its title and caption."""
    source: str
    """Its content, as a `data:` address."""


def pictures(plots: Sequence[Plot], files: Mapping[str, str | bytes]) -> list[Picture]:
    """The figures as SVG, or PNG where that is far smaller.

    Args:
        files: those of the report, by name.
    """
    return [Picture(plot, _source(plot, files)) for plot in plots]


def _source(plot: Plot, files: Mapping[str, str | bytes]) -> str:
    svg, png = (_raw(files[f"{FOLDER}/{plot.name}.{suffix}"]) for suffix in KINDS)
    kind, raw = ("svg", svg) if len(svg) <= FAR * len(png) else ("png", png)
    return f"data:{KINDS[kind]};base64,{b64encode(raw).decode()}"


def _raw(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content
