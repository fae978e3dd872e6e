"""The scores behind a number, one per document or window, and whether those of two results may be paired.

Beside a record lie `samples/<task>@<shots>.jsonl.gz` and `samples/ppl-<text>@<window>.jsonl.gz`. A group such as
`mmlu` has no file of its own: its documents are those of its parts.
"""

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reports.comparison import difference, parse
from reports.records import Metric, Record, ReportError
from reports.results import Result, Settings
from reports.statistics import Numbers

Row = tuple[str, str, float, float]
"""Id, hash, score and weight of a document."""

NO_SAMPLES = "no samples"


class UnpairedError(ReportError):
    """Two results cannot be compared document by document; the message says why in a few words."""


@dataclass(frozen=True, eq=False)
class Samples:
    """One metric of one result on N documents or windows."""

    scores: Numbers
    """[N], the mean over seeds: a share of right answers, or nats per token."""
    weights: Numbers
    """[N], 1 for a document, the predicted tokens for a window."""
    documents: str
    """A digest of the ids and hashes, in the order of the scores."""
    conditions: frozenset[Settings]
    """The versions and counts of `Result.conditions`."""


def samples(result: Result, name: str) -> Samples:
    """The scores behind a metric that the result has.

    Raises:
        UnpairedError: a seed has none, they are damaged, or seeds saw other documents.
    """
    seeds = [_of_record(record, name) for record in result.records if name in record.metrics]
    if len({_digest(rows) for rows in seeds}) > 1:
        raise UnpairedError("seeds that saw different documents")
    scores = np.mean([[score for *_, score, _ in rows] for rows in seeds], axis=0)
    weights = np.array([weight for *_, weight in seeds[0]])
    return Samples(scores, weights, _digest(seeds[0]), result.conditions(name))


def check_paired(first: Samples, second: Samples) -> None:
    """Refuse what was not measured on the same documents by the same protocol.

    Raises:
        UnpairedError: task or program versions, data revisions, counts or documents differ; names both.
    """
    if told := difference(first.conditions, second.conditions):
        raise UnpairedError(told)
    counts = len(first.scores), len(second.scores)
    if first.documents != second.documents:
        raise UnpairedError(f"different documents ({counts[0]} and {counts[1]}, by id and hash)")


def _digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps([row[:2] for row in rows]).encode()).hexdigest()


def _of_record(record: Record, name: str) -> list[Row]:
    """The documents of one cell, by id; they have to give the number in its record."""
    paths = _paths(record, name)
    rows = sorted(row for path in paths for row in _read(path, parse(name).quantity))
    if len({row[0] for row in rows}) < len(rows):
        raise _damaged(paths[0], "a document stands there twice")
    _check_against(record.metrics[name], rows, paths[0].name, name)
    return rows


def _paths(record: Record, name: str) -> list[Path]:
    metric = parse(name)
    folder = record.path.parent / "samples"
    if metric.quantity == "token_ppl":
        own, parts = f"ppl-{metric.source}@{metric.protocol}.jsonl.gz", []
    else:
        own = f"{metric.source}@{metric.protocol}.jsonl.gz"
        parts = sorted(folder.glob(f"{metric.source}_*@{metric.protocol}.jsonl.gz"))
    found = [folder / own] if (folder / own).exists() else parts
    if not found:
        raise UnpairedError(NO_SAMPLES)
    return found


def _read(path: Path, quantity: str) -> Iterator[Row]:
    try:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    for number, line in enumerate(lines, start=1):
        try:
            yield _row(path.name, json.loads(line), quantity)
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, f"line {number}, {type(error).__name__} {error}") from error


def _damaged(path: Path, told: str) -> UnpairedError:
    return UnpairedError(f"damaged samples ({path.name}: {told})")


def _row(file: str, entry: Mapping[str, Any], quantity: str) -> Row:
    """A document; ids of the parts of a group are told apart by the file's name."""
    windows = quantity == "token_ppl"
    score = float(entry["nll"] if windows else entry["correct"][quantity])
    weight = float(entry["tokens"] if windows else 1)
    if not (math.isfinite(score) and math.isfinite(weight) and weight > 0):
        raise ValueError(f"score {score} with weight {weight}")
    return f"{file} {entry['id']:>9}", str(entry["hash"]), score, weight


def _check_against(metric: Metric, rows: Sequence[Row], file: str, name: str) -> None:
    """Samples of another run than the record's prove nothing about it."""
    if not rows:
        raise _mismatch(file, "no document", metric)
    mean = sum(score * weight for *_, score, weight in rows) / sum(weight for *_, weight in rows)
    value = math.exp(min(mean, 709)) if parse(name).quantity == "token_ppl" else mean
    if len(rows) != metric.n or not math.isclose(value, metric.value, rel_tol=1e-6, abs_tol=1e-9):
        raise _mismatch(file, f"{value:.6g} on {len(rows)}", metric)


def _mismatch(file: str, found: str, metric: Metric) -> UnpairedError:
    told = f"{file}: {found}, the record {metric.value:.6g} on {metric.n}"
    return UnpairedError(f"samples that do not give the record's number ({told})")
