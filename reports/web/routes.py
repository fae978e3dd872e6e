"""Example texts in the colours of their experts, one cell per model and method: that of the smallest ratio."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reports.coloured import COLOURS, Layer, Routes, read
from reports.records import ReportError
from reports.results import Result


@dataclass(frozen=True)
class Coloured:
    """One model's texts, or why they cannot be shown."""

    title: str
    """The model, method and ratio."""
    routes: Routes | None
    """None where the file is damaged."""
    error: str = ""
    """What is wrong with it."""


def coloured(results: Sequence[Result]) -> list[Coloured]:
    """What is shown, in the order of the results."""
    found: dict[tuple[str, str], Coloured] = {}
    for result in results:  # by falling ratio
        if shown := _coloured(result):
            found[result.model, result.method] = shown
    return list(found.values())


def _coloured(result: Result) -> Coloured | None:
    try:
        routes = read(result.records[0].path)
    except ReportError as error:
        return Coloured(result.title, None, str(error))
    return Coloured(result.title, routes) if routes else None


def classes(expert: int) -> str:
    """How the page's styles call the looks of an expert: a colour, and a pattern beyond the first eight."""
    return f"e{expert % len(COLOURS)} p{min(expert // len(COLOURS), 3)}"


def data(models: Sequence[Coloured]) -> list[list[list[dict[str, Any]]]]:
    """Of every model, text and layer what the page's script shows."""
    return [
        [[_data(layer) for layer in text.layers] for text in model.routes.texts] if model.routes else []
        for model in models
    ]


def _data(layer: Layer) -> dict[str, Any]:
    return {"layer": layer.number, "of": layer.of, "experts": layer.experts, "probabilities": layer.probabilities}
