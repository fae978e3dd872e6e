"""The scores behind a number, one per document or window, and whether those of two results may be paired.

Beside a record lie `samples/<task>@<shots>.jsonl.gz` and `samples/ppl-<text>@<window>.jsonl.gz`. A group such as
`mmlu` has no file of its own: its documents are those of its parts.
"""

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from reports.comparison import difference, parse
from reports.records import Metric, Record, ReportError
from reports.results import Result
from reports.settings import Settings
from reports.statistics import Numbers

Row = tuple[str, str, float, float]
"""Id, hash, score and weight of a document."""

NO_SAMPLES = "no samples"
SEPARATOR = ",\n"


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
    documents = {seed.documents for seed in seeds}
    if len(documents) > 1:
        raise UnpairedError("seeds that saw different documents")
    scores = np.mean([seed.scores for seed in seeds], axis=0)
    return Samples(scores, seeds[0].weights, documents.pop(), result.conditions(name))


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


@dataclass(frozen=True, eq=False)
class _Seed:
    """As `Samples`, of one cell."""

    scores: Numbers
    weights: Numbers
    documents: str


def _of_record(record: Record, name: str) -> _Seed:
    """The documents of one cell, by id; they have to give the number in its record."""
    paths = _paths(record, name)
    quantity = parse(name).quantity
    rows = sorted(chain.from_iterable(_read(path, quantity) for path in paths))
    if not rows:
        raise _mismatch(paths[0].name, "no document", record.metrics[name])
    ids, hashes, scores, weights = zip(*rows, strict=True)
    if len(set(ids)) < len(ids):
        raise _damaged(paths[0], "a document stands there twice")
    documents = hashlib.sha256(repr((ids, hashes)).encode()).hexdigest()
    seed = _Seed(np.array(scores), np.array(weights), documents)
    _check_against(record.metrics[name], seed, paths[0].name, name)
    return seed


def _paths(record: Record, name: str) -> list[Path]:
    metric = parse(name)
    folder = record.path.parent / "samples"
    if metric.quantity == "token_ppl":
        own, parts = f"ppl-{metric.source}@{metric.protocol}.jsonl.gz", ""
    else:
        own, parts = (f"{metric.source}{part}@{metric.protocol}.jsonl.gz" for part in ("", "_*"))
    found = [folder / own] if (folder / own).exists() else sorted(folder.glob(parts)) if parts else []
    if not found:
        raise UnpairedError(NO_SAMPLES)
    return found


def _read(path: Path, quantity: str) -> list[Row]:
    try:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        entries = json.loads(f"[{SEPARATOR.join(lines)}]")  # half the time of one by one
    except json.JSONDecodeError as error:
        raise _damaged(path, f"line {error.lineno}, {type(error).__name__} {error}") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    file, rows = path.name, []
    try:
        for entry in entries:
            rows.append(_row(file, entry, quantity))
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"line {len(rows) + 1}, {type(error).__name__} {error}") from error
    return rows


def _damaged(path: Path, told: str) -> UnpairedError:
    return UnpairedError(f"damaged samples ({path.name}: {told})")


def _row(file: str, entry: Mapping[str, Any], quantity: str) -> Row:
    """A document; ids of the parts of a group are told apart by the file's name."""
    if quantity == "token_ppl":
        score, weight = float(entry["nll"]), float(entry["tokens"])
    else:
        score, weight = float(entry["correct"][quantity]), 1.0
    if not (-math.inf < score < math.inf and 0 < weight < math.inf):
        raise ValueError(f"score {score} with weight {weight}")
    return f"{file} {entry['id']:>9}", str(entry["hash"]), score, weight


def _check_against(metric: Metric, seed: _Seed, file: str, name: str) -> None:
    """Samples of another run than the record's prove nothing about it."""
    mean, count = float(np.average(seed.scores, weights=seed.weights)), len(seed.scores)
    value = math.exp(min(mean, 709)) if parse(name).quantity == "token_ppl" else mean
    if count != metric.n or not math.isclose(value, metric.value, rel_tol=1e-6, abs_tol=1e-9):
        raise _mismatch(file, f"{value:.6g} on {count}", metric)


def _mismatch(file: str, found: str, metric: Metric) -> UnpairedError:
    told = f"{file}: {found}, the record {metric.value:.6g} on {metric.n}"
    return UnpairedError(f"samples that do not give the record's number ({told})")
