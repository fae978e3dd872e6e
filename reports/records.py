"""Reads the records a run leaves behind: `RESULTS/<model>/<method>/<ratio>/<cell-id>/record.json`, one per cell."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
STATUSES = ("done", "failed", "skipped")
NUMBER = (int, float)
CELL = {
    "id": str,
    "model": str,
    "method": str,
    "ratio": NUMBER,
    "ratio_basis": str,
    "seed": int,
    "method_config": dict,
    "calibration": object,
    "budget": object,
    "dtype": object,
}
SIZE = dict.fromkeys(
    ("dense_params", "active_total", "active_block", "distinct_total", "stored_total", "stored_bytes"), NUMBER
) | {"on_budget": bool}
METRIC = {"value": NUMBER, "stderr": (*NUMBER, type(None)), "n": int}


class ReportError(ValueError):
    """The report cannot be made; the message is one paragraph for the user."""


@dataclass(frozen=True)
class Metric:
    """One measured number."""

    value: float
    """In the unit of its name: a perplexity, a share of right answers, tokens per second, bytes."""
    stderr: float | None
    """Its standard error, where one is known."""
    n: int
    """How many windows, documents or repeats it was measured on."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One cell's record; a cell that failed keeps what it measured before."""

    path: Path
    """The file it was read from."""
    status: str
    """`done`, `failed` or `skipped`."""
    cell: Mapping[str, Any]
    """Model, method, ratio, seed and settings."""
    size: Mapping[str, Any]
    """Counted parameters and bytes; empty where the cell failed before they were counted."""
    metrics: Mapping[str, Metric]
    """By name, as in `arc_easy/acc_norm@0shot`."""
    time: Mapping[str, float]
    """Seconds per phase."""
    memory: Mapping[str, int | None]
    """Peaks in bytes; None where there is no counter."""
    provenance: Mapping[str, Any]
    """Commit, versions, hardware, revisions."""
    notes: tuple[str, ...]
    """What was not as usual while the model was compressed."""
    skipped: Mapping[str, str]
    """Tasks that could not be measured, and why."""
    error: str
    """Why the cell is not done; empty where it is."""


def read_all(results: Path) -> list[Record]:
    """Every record below `results`, in the order of their paths.

    Raises:
        ReportError: there is none, one is damaged or of a newer schema, or two describe the same cell.
    """
    paths = sorted(results.rglob("record.json"))
    if not paths:
        raise ReportError(
            f"There is no record.json below {results}. Give the folder a run wrote to, or make one first: "
            f"python run_all.py --models tiny-llama --ratios 0.8 --budget demo --out {results}"
        )
    records = [read(path) for path in paths]
    _refuse_twins(records)
    return records


def read(path: Path) -> Record:
    """The record at `path`.

    Raises:
        ReportError: it is damaged or of a newer schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _check_schema(path, content)
        return _parse(path, content)
    except ReportError:
        raise
    except (OSError, ValueError) as error:
        raise ReportError(
            f"The record {path} is damaged: {error}. Restore it from a backup or from git, or delete it and repeat "
            "its run_all.py command, which measures that cell again and keeps every other."
        ) from error


def _check_schema(path: Path, content: Any) -> None:
    schema = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(schema, int):
        raise ValueError("it has no schema number")
    if schema > SCHEMA:
        raise ReportError(
            f"The record {path} has schema {schema}, and this version reads up to {SCHEMA}. "
            "Update the program (git pull), or give --results a folder without it."
        )


def _parse(path: Path, content: Mapping[str, Any]) -> Record:
    _need(content, {"status": str, "cell": dict}, "")
    _need(content["cell"], CELL, "cell.")
    _need({"skipped": {}, **content}, {"skipped": dict}, "")
    if content["status"] not in STATUSES:
        raise ValueError(f"its status is {content['status']!r}, not one of {', '.join(STATUSES)}")
    measured = content["status"] == "done" or bool(content.get("size"))
    if measured:
        _need(content, {"size": dict, "metrics": dict, "provenance": dict}, "")
        _need(content["size"], SIZE, "size.")
    return Record(
        path=path,
        status=content["status"],
        cell=content["cell"],
        size=content["size"] if measured else {},
        metrics={name: _metric(name, entry) for name, entry in content["metrics"].items()} if measured else {},
        time=content.get("time", {}) if measured else {},
        memory=content.get("memory", {}) if measured else {},
        provenance=content["provenance"] if measured else {},
        notes=tuple(map(str, content.get("notes", []))) if measured else (),
        skipped=content.get("skipped", {}),
        error=str(content.get("error") or _unmeasured(content)),
    )


def _unmeasured(content: Mapping[str, Any]) -> str:
    """Why a skipped cell is not done: its tasks, whose own reasons are the same for many cells."""
    if content["status"] != "skipped" or not content.get("skipped"):
        return ""
    return f"nothing could be measured: {', '.join(content['skipped'])}"


def _metric(name: str, entry: Any) -> Metric:
    if not isinstance(entry, dict):
        raise ValueError(f"its metrics.{name} is {entry!r}")
    _need(entry, METRIC, f"metrics.{name}.")
    return Metric(entry["value"], entry["stderr"], entry["n"])


def _need(content: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    for key, kind in kinds.items():
        if key not in content:
            raise ValueError(f"it lacks {where}{key}")
        if not isinstance(content[key], kind):
            raise ValueError(f"its {where}{key} is {content[key]!r}")


def _refuse_twins(records: list[Record]) -> None:
    seen: dict[str, Path] = {}
    for record in records:
        twin = seen.setdefault(record.cell["id"], record.path)
        if twin is not record.path:
            raise ReportError(
                f"{twin} and {record.path} describe the same cell {record.cell['id']}. "
                "Delete one of them, or give --results a folder with only one."
            )
