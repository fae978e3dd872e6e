"""From what a cell left in its scratch folder to its record. Needs no torch, so it also serves a cell that died.

A cell leaves `checkpoint/measured.json` (sizes and times of the compression, moved into place together with the
weights) and one `tasks/<task>.json` per finished task. A record is these, laid over the cell's previous record.
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.job import Job
from benchmarks.tasks import Task

PACKAGES = ("torch", "transformers", "lm_eval", "datasets", "accelerate", "tokenizers", "safetensors", "numpy")
ROOT = Path(__file__).parents[1]
STARTED = datetime.now(UTC).isoformat(timespec="seconds")


def measured_file(checkpoint: Path) -> Path:
    """Sizes and times of a compression, beside its weights."""
    return checkpoint / "measured.json"


def task_file(job: Job, task: Task) -> Path:
    """Result of one finished task."""
    return job.scratch / "tasks" / f"{task.name}.json"


def assemble(job: Job, error: str | None) -> store.Record:
    """The record of a cell as it stands: `done`, or `failed` with what is measured so far."""
    previous = job.previous() or store.EMPTY
    measured = _read(measured_file(job.checkpoint)) or previous
    results = _results(job, previous)
    parts = [previous, measured, *results]
    return {
        "schema": store.SCHEMA,
        "status": "failed" if error else "done",
        "cell": job.cell.recorded(),
        "size": measured["size"],
        "metrics": _merged([part["metrics"] for part in (previous, *results)]),
        "time": _time(measured["time"], previous["time"]["evaluate_s"], results),
        "memory": _peak([part["memory"] for part in parts]),
        "provenance": _provenance(job, [part["provenance"] for part in parts]),
        "error": error,
    }


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _results(job: Job, previous: store.Record) -> list[dict[str, Any]]:
    """Finished tasks that the previous record does not hold yet."""
    present = previous["provenance"]["task_versions"]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((job.scratch / "tasks").glob("*.json"))]
    return [result for result in results if result["task"] not in present]


def _merged(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}


def _time(made: dict[str, float], evaluated: float, results: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds per phase. What a killed attempt spent without finishing a step is not in them."""
    phases = {key: made[key] for key in ("load_s", "compress_s", "save_s")}
    phases["evaluate_s"] = evaluated + sum(result["seconds"] for result in results)
    return phases | {"total_s": sum(phases.values())}


def _peak(parts: list[dict[str, int | None]]) -> dict[str, int | None]:
    """The largest of the peaks; None where nothing was measured, as on a device without such a counter."""
    keys = ("peak_host_bytes", "peak_device_bytes")
    return {key: max((value for part in parts if (value := part[key]) is not None), default=None) for key in keys}


def _provenance(job: Job, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Which code, packages, machine and weights, and which revisions of the data and the tasks."""
    return {
        "git_commit": _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]),
        "git_dirty": bool(_output(["git", "-C", str(ROOT), "status", "--porcelain"])),
        "versions": {package: _version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device(job.device),
        "model_revision": job.cell.fingerprint,
        "dataset_revisions": _merged(part["dataset_revisions"] for part in parts),
        "task_versions": _merged(part["task_versions"] for part in parts),
        "started": STARTED,
        "command": job.command,
    }


def _output(command: list[str]) -> str | None:
    """What a command prints; None if it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device(name: str) -> str:
    """The device with its model: the processor's, or what the driver lists."""
    if name.startswith("cuda"):
        return f"{name}: {_output(['nvidia-smi', '--query-gpu=name', '--format=csv,noheader'])}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{name}: {next(iter(models), platform.processor())} x {os.cpu_count()}"
