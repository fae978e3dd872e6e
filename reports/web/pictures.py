"""Figures as data within the page: an `img` keeps the styles and names of an SVG to itself, and runs no script."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reports.figures import Plot
from reports.figures.files import FOLDER

KINDS = {"svg": "image/svg+xml", "png": "image/png"}


@dataclass(frozen=True)
class Picture:
    """A figure."""

    plot: Plot
    """Its title and caption."""
    source: str
    """Its content, as a `data:` address."""


def pictures(plots: Sequence[Plot], files: Mapping[str, str | bytes]) -> list[Picture]:
    """The figures; of SVG and PNG whichever is smaller.

    Args:
        files: those of the report, by name.
    """
    return [Picture(plot, _source(plot, files)) for plot in plots]


def _source(plot: Plot, files: Mapping[str, str | bytes]) -> str:
    drawn = {kind: files[f"{FOLDER}/{plot.name}.{suffix}"] for suffix, kind in KINDS.items()}
    raw = {kind: content.encode() if isinstance(content, str) else content for kind, content in drawn.items()}
    kind = min(raw, key=lambda kind: len(raw[kind]))
    return f"data:{kind};base64,{b64encode(raw[kind]).decode()}"
