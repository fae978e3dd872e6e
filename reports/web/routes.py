"""Example texts in the colours of their experts, one cell per model and method: that of the smallest ratio."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reports.beside.routes import Layer, Routes
from reports.coloured import COLOURS
from reports.results import Result, having


@dataclass(frozen=True)
class Coloured:
    """One model's texts."""

    title: str
    """The model, method and ratio."""
    routes: Routes
    """What its experts got of them."""


def coloured(results: Sequence[Result]) -> list[Coloured]:
    """What is shown, in the order of the results."""
    found = having(results, lambda beside: beside.routes)  # by falling ratio
    smallest = {(result.model, result.method): Coloured(result.title, routes) for result, _, routes in found}
    return list(smallest.values())


def classes(expert: int) -> str:
    """How the page's styles call the looks of an expert: a colour, and a pattern beyond the first eight."""
    return f"e{expert % len(COLOURS)} p{min(expert // len(COLOURS), 3)}"


def data(models: Sequence[Coloured]) -> list[list[list[dict[str, Any]]]]:
    """Of every model, text and layer what the page's script shows."""
    return [[[_data(layer) for layer in text.layers] for text in model.routes.texts] for model in models]


def _data(layer: Layer) -> dict[str, Any]:
    return {"layer": layer.number, "of": layer.of, "experts": layer.experts, "probabilities": layer.probabilities}
