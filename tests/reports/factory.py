"""Plausible records: two models, three methods, two ratios; no model was run for them."""

import copy
import gzip
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GONE = ...
"""What `spoilt` takes away."""
DENSE = {"tiny-llama": 2_872_320, "smollm2-135m-q4": 134_515_008}
PPL = {"tiny-llama": 18.3, "smollm2-135m-q4": 23.97}
SPEED = {"tiny-llama": 5210.0, "smollm2-135m-q4": 301.7}
LOSS = {"dense": 1.0, "shortgpt": 2.9, "slicegpt": 1.6}
FASTER = {"dense": 1.0, "shortgpt": 1.3, "slicegpt": 0.97}


def record(
    model: str = "tiny-llama", method: str = "dense", ratio: float = 1.0, seed: int = 0, **changes: Any
) -> dict[str, Any]:
    """A finished record as the runner writes it; `changes` replace whole top-level entries, dotted keys one field."""
    content = {
        "schema": 1,
        "status": "done",
        "cell": _cell(model, method, ratio, seed),
        "size": _size(model, method, ratio),
        "metrics": _metrics(model, method, ratio, seed),
        "time": {"load_s": 0.4, "compress_s": 5.1, "save_s": 0.2, "evaluate_s": 40.0, "total_s": 46.0},
        "memory": {
            "peak_host_bytes": 912_000_000,
            "peak_device_bytes": None,
            "compress_peak_host_bytes": 534_000_000,
            "compress_peak_device_bytes": None,
        },
        "provenance": _provenance(model),
        "notes": [],
        "error": None,
    }
    for key, value in changes.items():
        _put(content, key, value)
    return content


def failed(model: str, method: str, ratio: float, error: str, status: str = "failed") -> dict[str, Any]:
    """A record of a cell that was not finished."""
    return record(model, method, ratio, status=status, error=error, size={}, metrics={})


def sampled(
    content: dict[str, Any], scores: Mapping[str, Sequence[float]], documents: str = "documents"
) -> dict[str, Any]:
    """The record with metrics that rest on these scores (nats of a window for `token_ppl`) and with their samples.

    `documents` names the data: records that give it another name saw other documents.
    """
    files: dict[str, list[dict[str, Any]]] = {}
    metrics = {}
    for name, values in scores.items():
        path, _, protocol = name.rpartition("@")
        source, _, quantity = path.rpartition("/")
        windows, mean = quantity == "token_ppl", math.fsum(values) / len(values)
        metrics[name] = _metric(math.exp(mean) if windows else mean, 0.01, len(values))
        rows = files.setdefault(f"ppl-{source}@{protocol}" if windows else f"{source}@{protocol}", [])
        rows += [{"id": index, "hash": f"{source} {documents} {index}"} for index in range(len(rows), len(values))]
        for row, value in zip(rows, values, strict=True):
            row |= {"nll": value, "tokens": 511} if windows else {"correct": row.get("correct", {}) | {quantity: value}}
    return content | {"metrics": metrics, "samples": files}


def structure(blocks: int = 2, mixture: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """What `structure.json` holds: `changes` are kept widths that differ from the dense model's."""
    full = {"heads": 4, "kv_heads": 4, "qk": 32, "vo": 32, "mlp": 400}
    widths = {name: {"kept": changes.get(name, width), "full": width} for name, width in full.items()}
    layers = [{"layer": number, **copy.deepcopy(widths), "mixture": mixture} for number in range(blocks)]
    return {
        "compression": {"structures": {"moe_mlp": {}} if mixture else {}},
        "removed_layers": [],
        "rotated_width": None,
        "layers": layers,
        "loads": {"calibration": [[0.25, 0.75]] * blocks} if mixture else {},
    }


def mixture(**changes: Any) -> dict[str, Any]:
    """Two experts of a block of `structure`; `changes` replace entries."""
    sizes = {"experts": 2, "width": 50, "union": 300, "union_share": 0.75, "raw_widths": [40.0, 120.0]}
    return sizes | {"cosine": [[1.0, 0.25], [0.25, 1.0]]} | changes


def training(steps: int = 400) -> str:
    """What `training.csv` holds."""
    rows = (f"{step},{step / 10},0.5,0.25,1" for step in range(steps))
    return "\n".join(["step,kd,r_p,r_u,r_l", *rows, ""])


def spoilt(content: Any, place: Sequence[str | int], value: Any) -> Any:
    """The content with something else in one place, or nothing where the value is `GONE`."""
    content = part = copy.deepcopy(content)
    for key in place[:-1]:
        part = part[key]
    if value is GONE:
        del part[place[-1]]
    else:
        part[place[-1]] = value
    return content


def matrix() -> list[dict[str, Any]]:
    """Dense, shortgpt and slicegpt at two ratios on two models, one cell of them failed and one off budget."""
    records = [record(model) for model in DENSE]
    for model in DENSE:
        for ratio in (0.8, 0.6):
            records += [record(model, "shortgpt", ratio), record(model, "slicegpt", ratio)]
    records[5] = failed("tiny-llama", "slicegpt", 0.6, "LinAlgError: eigenvalues of block 7 did not converge")
    records[4]["size"] |= {"active_total": round(0.6412 * DENSE["tiny-llama"]), "on_budget": False}
    return records


def write(results: Path, records: list[dict[str, Any]]) -> Path:
    """The records as files below `results`, which is returned."""
    for content in records:
        cell = content["cell"]
        path = results / str(len(list(results.rglob("*.json")))) / cell["id"] / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({key: content[key] for key in content if key not in ("samples", "structure")}))
        if "structure" in content:
            (path.parent / "structure.json").write_text(json.dumps(content["structure"]))
        for name, rows in content.get("samples", {}).items():
            write_samples(path.parent / "samples" / f"{name}.jsonl.gz", rows)
    return results


def write_samples(path: Path, rows: list[dict[str, Any]]) -> None:
    """One line per document."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    parent, _, field = key.replace("__", ".").partition(".")
    if field:
        content[parent][field] = value
    else:
        content[parent] = value


def _cell(model: str, method: str, ratio: float, seed: int) -> dict[str, Any]:
    dense = method == "dense"
    return {
        "id": hashlib.sha256(f"{model} {method} {ratio} {seed}".encode()).hexdigest()[:12],
        "model": model,
        "method": method,
        "ratio": ratio,
        "ratio_basis": "total",
        "seed": seed,
        "method_config": {} if dense else {"angular": False},
        "calibration": None if dense else {"name": "wikileads", "samples": 16, "window": 256},
        "budget": {"name": "demo", "ppl_windows": 8, "ppl_lengths": [512], "documents": 40},
        "dtype": "float32",
    }


def _size(model: str, method: str, ratio: float) -> dict[str, Any]:
    total = DENSE.get(model, 1_000_000)
    active = total if method == "dense" else round((ratio - 0.0021) * total)
    return {
        "dense_params": total,
        "requested": ratio,
        "active_total": active,
        "active_block": round(0.8 * active),
        "distinct_total": active,
        "stored_total": active,
        "stored_bytes": 4 * active + 2048,
        "on_budget": True,
    }


def _metrics(model: str, method: str, ratio: float, seed: int) -> dict[str, Any]:
    worse = 1 + (LOSS.get(method, 2) - 1) * (1 - ratio) * 4 + 0.01 * seed
    faster = 1 + (FASTER.get(method, 1) - 1) * (1 - ratio) * 2
    speed = SPEED.get(model, 100.0) * faster
    metrics = {
        "wikileads/token_ppl@512": _metric(PPL.get(model, 20) * worse, 0.61 * worse, 8),
        "moby-dick/token_ppl@512": _metric(3.1 * PPL.get(model, 20) * worse, 2.2 * worse, 8),
        "wikileads_mc/acc@0shot": _metric(0.25 + 0.4 / worse, 0.0771, 40),
        "arc_easy/acc@0shot": _metric(0.26 + 0.3 / worse, 0.0101, 2376),
        "arc_easy/acc_norm@0shot": _metric(0.25 + 0.3 / worse, 0.00987654321, 2376),
    }
    metrics["speed/weights_bytes"] = _metric(4.0 * DENSE.get(model, 1_000_000) * ratio, None, 1)
    for batch in (1, 4):
        metrics |= _speeds(batch, speed * batch**0.5, faster, dense=method == "dense")
    return metrics


def _speeds(batch: int, speed: float, faster: float, dense: bool) -> dict[str, Any]:
    found = {f"speed/peak_bytes@b{batch}": _metric(41_230_000.0 * batch, None, 1)}
    for phase, share in (("prefill", 4.0), ("decode", 0.3)):
        found[f"speed/{phase}_tokens_per_s@b{batch}"] = _metric(share * speed, share * 9.1, 3)
        if not dense:
            found[f"speed/{phase}_tokens_per_s_vs_dense@b{batch}"] = _metric(faster, 0.021, 3)
    return found


def _metric(value: float, stderr: float | None, n: int) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "n": n}


def _provenance(model: str) -> Mapping[str, Any]:
    return {
        "git_commit": "4f2a9c1",
        "git_dirty": True,
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "lm_eval": "0.4.13"},
        "python": "3.11.9",
        "platform": "Linux-6.1 x86_64",
        "device": "cpu: 2 cores",
        "model_revision": f"{model}-9b1c",
        "dataset_revisions": {"wikileads": "0.0.7", "moby-dick": "0.2.3"},
        "task_versions": {"ppl-wikileads@512": "1", "wikileads_mc@0shot": "1.0", "arc_easy@0shot": "1.0"},
        "started": "2026-11-22T10:00:00+00:00",
        "command": "python run_all.py --models tiny-llama smollm2-135m-q4 --ratios 0.8 0.6 --budget demo",
    }
