"""Reads the records a run leaves behind: `RESULTS/<model>/<method>/<ratio>/<cell-id>/record.json`, one per cell."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from reports.beside import Beside
from reports.beside import read as read_beside
from reports.limits import is_amount, is_possible
from reports.schema import SCHEMA, check
from reports.settings import Settings, flat

MAKE_ONE = "python run_all.py --models tiny-llama --ratios 0.8 --budget demo --out {}"
"""The command that makes the first records of a folder."""
TWINS = {
    True: "{} is left out: {} describes the same cell. Delete one of them.",
    False: "{} is left out: {} has another id but is of the same model, method, ratio, seed and settings. "
    "Delete one of them.",
}
"""What is said of the second of two records, by whether their ids are the same."""


class ReportError(ValueError):
    """What was asked cannot be made; the message is one paragraph for the user."""


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
    folder: Path
    """The folder of results that was asked for, and below which it lies."""
    status: str
    """`done`, `failed` or `skipped`."""
    cell: Mapping[str, Any]
    """Model, method, ratio, seed and settings."""
    size: Mapping[str, Any]
    """Counted parameters and bytes; empty where the cell failed before they were counted."""
    metrics: Mapping[str, Metric]
    """By name, as in `arc_easy/acc_norm@0shot`."""
    time: Mapping[str, float | None]
    """Seconds per phase; None where they were not taken."""
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
    beside: Beside
    """The files beside it; of a dense model, or where nothing was measured, none are shown or read."""

    @cached_property
    def settings(self) -> Settings:
        """Everything but the seed that makes a cell's numbers differ from another's."""
        kept = {key: self.cell[key] for key in ("ratio_basis", "calibration", "budget", "dtype", "method_config")}
        revision = self.provenance.get("model_revision")
        return flat({**kept, "model_revision": revision, "recover": self.cell.get("recover") or {}})

    @property
    def key(self) -> tuple[Any, ...]:
        """What no two cells share: model, method, ratio, seed and settings."""
        return (*(self.cell[key] for key in ("model", "method", "ratio", "seed")), self.settings)


class Records(list[Record]):
    """The records of a folder, and what is wrong with some of them."""

    def __init__(self, records: Iterable[Record], problems: Iterable[str] = ()) -> None:
        super().__init__(records)
        self.problems = tuple(problems)
        """A sentence or two each, for the top of a report."""


def read_all(results: Path) -> Records:
    """Every record below `results` that can be read, in the order of their paths; of two of one cell the first.

    Raises:
        ReportError: there is no such folder.
    """
    if not results.is_dir():
        raise ReportError(
            f"There is no folder {results}. Give the folder a run wrote to, or make one first: "
            f"{MAKE_ONE.format(results)}"
        )
    read, problems = [], []
    for path in sorted(results.rglob("record.json")):
        try:
            read.append(_read(path, results))
        except ReportError as error:
            problems.append(f"{path.relative_to(results).as_posix()} {error}")
    kept, twins = _without_twins(read, results)
    return Records(kept, [*problems, *twins, *_damaged(kept, results), *_impossible(kept)])


def _read(path: Path, folder: Path) -> Record:
    """The record at `path`.

    Raises:
        ReportError: it is damaged or of a newer schema; the message goes on after the record's name.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_int=_whole)
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair can be read, but never written
        _check_schema(content)
        return _parse(path, folder, content)
    except ReportError:
        raise
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        raise ReportError(
            f"is damaged and left out: {error}. Restore it from a backup or from git, or delete it and repeat its "
            "run_all.py command, which measures that cell again and keeps every other."
        ) from error


def _whole(digits: str) -> int:
    """Every count can be averaged.

    Raises:
        OverflowError: it is beyond the range of a float.
    """
    count = int(digits)
    float(count)
    return count


def _check_schema(content: Any) -> None:
    schema = content.get("schema") if isinstance(content, dict) else None
    if type(schema) is not int:  # true is an int too
        raise ValueError("it has no schema number")
    if schema > SCHEMA:
        raise ReportError(
            f"is left out: it has schema {schema}, and this version reads up to {SCHEMA}. "
            "Update the program (git pull)."
        )


def _parse(path: Path, folder: Path, content: Mapping[str, Any]) -> Record:
    measured = check(content)
    return Record(
        path=path,
        folder=folder,
        status=content["status"],
        cell=content["cell"],
        size=content["size"] if measured else {},
        metrics={name: Metric(**_known(entry)) for name, entry in content["metrics"].items()} if measured else {},
        time=content.get("time", {}) if measured else {},
        memory=content.get("memory", {}) if measured else {},
        provenance=content.get("provenance") or {},
        notes=tuple(map(str, content.get("notes", []))) if measured else (),
        skipped=content.get("skipped", {}),
        error="" if content["status"] == "done" else str(content.get("error") or _unmeasured(content)),
        beside=read_beside(path) if measured and content["cell"]["method"] != "dense" else Beside(),
    )


def _unmeasured(content: Mapping[str, Any]) -> str:
    """Why a skipped cell is not done: its tasks, whose own reasons are the same for many cells."""
    if content["status"] != "skipped" or not content.get("skipped"):
        return "no reason recorded"
    return f"nothing could be measured: {', '.join(content['skipped'])}"


def _known(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("value", "stderr", "n")}


def _without_twins(records: Iterable[Record], results: Path) -> tuple[list[Record], list[str]]:
    """The first record of every cell, and a sentence for every other."""
    seen: dict[object, Record] = {}
    kept, told = [], []
    for record in records:
        keys = (record.cell["id"], record.key)
        first = next((seen[key] for key in keys if key in seen), None)
        if first is None:
            seen |= dict.fromkeys(keys, record)
            kept.append(record)
        else:
            paths = (each.path.relative_to(results).as_posix() for each in (record, first))
            told.append(TWINS[first.cell["id"] == record.cell["id"]].format(*paths))
    return kept, told


def _damaged(records: Iterable[Record], results: Path) -> Iterator[str]:
    """A few sentences per damaged file beside a record."""
    for record in records:
        for problem in record.beside.problems:
            yield f"{record.path.parent.relative_to(results).as_posix()}/{problem}"


def _impossible(records: Iterable[Record]) -> Iterator[str]:
    """A sentence per record with numbers that cannot be."""
    for record in records:
        if wrong := [*_metrics_beyond(record.metrics), *_no_amounts(record)]:
            cell = "{model} {method} at {ratio}, seed {seed}".format_map(record.cell)
            yield (
                f"{cell} has numbers that cannot be: {', '.join(wrong)}. They are shown as recorded; no such value is "
                "called the best, nor tied with it."
            )


def _metrics_beyond(metrics: Mapping[str, Metric]) -> Iterator[str]:
    for name, metric in metrics.items():
        if not is_possible(name, metric.value):
            yield f"{name} {metric.value}"
        if metric.stderr is not None and not is_amount(metric.stderr):
            yield f"{name} ± {metric.stderr}"


def _no_amounts(record: Record) -> Iterator[str]:
    for part, numbers in (("time", record.time), ("memory", record.memory)):
        wrong = (key for key, value in numbers.items() if value is not None and not is_amount(value))
        yield from (f"{part}.{key} {numbers[key]}" for key in wrong)
