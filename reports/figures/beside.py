"""Reads the files beside a record: `training.csv` and `structure.json`."""

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports.records import ReportError
from reports.results import Result


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What is left of one layer of the dense model."""

    number: int
    """In the dense model."""
    kept: Mapping[str, float]
    """The shares of `qk`, `vo` and `mlp` that a token uses; of heads too."""
    full: int
    """Neurons of the dense MLP."""
    union: float | None
    """The share of them in any expert; None where there are none."""
    raw_widths: list[float] | None
    """Neurons of each expert before they were made equal, where recorded."""
    cosine: list[list[float]] | None
    """Cosine similarities of experts as sets of neurons."""
    loads: list[float] | None
    """The share of calibration tokens that each expert meets."""


def layers(result: Result) -> list[Layer] | None:
    """The layers of the first seed that has a `structure.json`; None where none has.

    Raises:
        ReportError: it is damaged.
    """
    path = _beside(result, "structure.json")
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = content["layers"]
        loads = content["loads"].get("calibration") or [None] * len(entries)
        return [_layer(entry, load) for entry, load in zip(entries, loads, strict=True)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path, error) from error


def _layer(entry: Mapping[str, Any], loads: list[float] | None) -> Layer:
    mixture = entry["mixture"] or {}
    heads = _share(entry["heads"])
    return Layer(
        number=entry["layer"],
        kept={"qk": heads * _share(entry["qk"]), "vo": heads * _share(entry["vo"]), "mlp": _share(entry["mlp"])},
        full=entry["mlp"]["full"],
        union=mixture.get("union_share"),
        raw_widths=mixture.get("raw_widths"),
        cosine=mixture.get("cosine"),
        loads=loads,
    )


def _share(width: Mapping[str, float]) -> float:
    return width["kept"] / width["full"]


def training(result: Result, names: tuple[str, ...]) -> list[dict[str, float]] | None:
    """The named columns, and `step`, of the first seed's `training.csv`; None where none has it with them.

    Raises:
        ReportError: it is damaged.
    """
    path = _beside(result, "training.csv")
    if path is None:
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not set(names) <= set(reader.fieldnames or ()):
                return None
            return [{name: float(row[name] or math.nan) for name in ("step", *names)} for row in reader] or None
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise _damaged(path, error) from error


def _beside(result: Result, name: str) -> Path | None:
    paths = (record.path.with_name(name) for record in result.records)
    return next((path for path in paths if path.exists()), None)


def _damaged(path: Path, error: Exception) -> ReportError:
    reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
    return ReportError(f"{path.name} of {path.parent} is damaged: {reason}. Restore it, or measure the cell again.")
