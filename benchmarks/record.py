"""From what a cell left in its scratch folder to its record. Needs no torch, so it also serves a cell that died.

A cell leaves `checkpoint/measured.json` (sizes and times of the compression, moved into place together with the
weights) and one `tasks/<task>.json` per finished task. A record is these, laid over the cell's previous record. Its
provenance is that of the last run; `provenance.tasks` says of each task, and of the `compression`, that another run
measured which run that was.
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.job import Job
from benchmarks.tasks import Task

PACKAGES = ("torch", "transformers", "lm_eval", "datasets", "accelerate", "tokenizers", "safetensors", "numpy")
ROOT = Path(__file__).parents[1]
STARTED = datetime.now(UTC).isoformat(timespec="seconds")
ORIGIN = ("git_commit", "git_dirty", "versions", "device", "started", "command")
"""What of the provenance tells one run from another."""


def measured_file(checkpoint: Path) -> Path:
    """Sizes and times of a compression, beside its weights."""
    return checkpoint / "measured.json"


def task_file(job: Job, task: Task) -> Path:
    """Result of one finished task."""
    return job.scratch / "tasks" / f"{task.name}.json"


def assemble(job: Job, error: str | None) -> store.Record:
    """The record of a cell as it stands: `done`, `failed` with what is measured so far, or `skipped` with nothing."""
    previous, made, results = store.read_record(job.record), _read(measured_file(job.checkpoint)), _results(job)
    parts = [part for part in (previous, made, *results) if part]
    measured = made or previous or store.EMPTY
    evaluated = previous["time"]["evaluate_s"] if previous and not job.force else 0.0
    return {
        "schema": store.SCHEMA,
        "status": "failed" if error else "done" if measured["size"] else "skipped",
        "cell": job.cell.recorded(),
        "size": measured["size"],
        "metrics": _merged(part.get("metrics", {}) for part in parts),
        "time": _time(measured["time"], evaluated, results),
        "memory": peak([part["memory"] for part in parts]),
        "provenance": _provenance(job, parts),
        "notes": _notes(made, previous or store.EMPTY, results),
        "skipped": _skipped(job, previous or store.EMPTY, results),
        "error": error,
    }


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _results(job: Job) -> list[dict[str, Any]]:
    """Finished tasks that the previous record does not hold yet."""
    settled = job.settled()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((job.scratch / "tasks").glob("*.json"))]
    return [result for result in results if result["task"] not in settled]


def _notes(made: dict[str, Any] | None, previous: store.Record, results: list[dict[str, Any]]) -> list[str]:
    """Of the compression, and of each task as it was measured last: the latter begin with the task's name."""
    tasks = set(previous["provenance"]["task_versions"])
    by_task = {task: [note for note in previous["notes"] if note.startswith(f"{task}: ")] for task in tasks}
    of_tasks = [note for notes in by_task.values() for note in notes]
    compression = made.get("notes", []) if made else [note for note in previous["notes"] if note not in of_tasks]
    by_task |= {result["task"]: result["notes"] for result in results}
    return [*compression, *(note for _, notes in sorted(by_task.items()) for note in notes)]


def _skipped(job: Job, previous: store.Record, results: list[dict[str, Any]]) -> dict[str, str]:
    """Tasks that were never measured, and why: those of earlier runs too unless they have been measured since."""
    measured, run = job.measured(), {result["task"]: result["skipped"] for result in results}
    reasons = {**previous["skipped"], **job.skipped, **run}
    return {task: reason for task, reason in reasons.items() if reason and task not in measured}


def _merged(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}


def _time(made: dict[str, float], evaluated: float, results: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds per phase. What a killed attempt spent without finishing a step is not in them."""
    phases = {key: made[key] for key in ("load_s", "compress_s", "recover_s", "save_s") if key in made}
    phases["evaluate_s"] = evaluated + sum(result["seconds"] for result in results)
    return phases | {"total_s": sum(phases.values())}


def peak(parts: list[dict[str, int | None]]) -> dict[str, int | None]:
    """The largest of the peaks; None where nothing was measured, as on a device without such a counter."""
    keys = dict.fromkeys((*store.PARTS["memory"], *(key for part in parts for key in part)))
    return {key: max((value for part in parts if (value := part.get(key)) is not None), default=None) for key in keys}


def _provenance(job: Job, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Which code, packages, machine and weights, and which revisions of the data and the tasks."""
    now = origin(job)
    return {
        "git_commit": now["git_commit"],
        "git_dirty": now["git_dirty"],
        "versions": now["versions"],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": now["device"],
        "model_revision": job.cell.fingerprint,
        "dataset_revisions": _merged(part["provenance"]["dataset_revisions"] for part in parts),
        "task_versions": _merged(part["provenance"]["task_versions"] for part in parts),
        "recovery": _merged(part["provenance"].get("recovery", {}) for part in parts),
        "started": now["started"],
        "command": now["command"],
        "tasks": {name: other for name, other in _merged(map(_origins, parts)).items() if other != now},
    }


def _origins(part: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By task: the run that measured it. A part that is no task's is a compression's, or a whole record's; that of a
    fine-tuning goes by the name of `recovery`."""
    provenance = part["provenance"]
    own = {key: provenance.get(key) for key in ORIGIN}
    names = (part.get("task", "compression"), *provenance["task_versions"])
    return dict.fromkeys(names, own) | provenance.get("tasks", {})


def origin(job: Job) -> dict[str, Any]:
    """The run of this process, as `ORIGIN` lists it."""
    commit, dirty = git_state(ROOT, (job.out, job.checkpoints))
    return dict(zip(ORIGIN, (commit, dirty, versions(), device(job.device), STARTED, job.command), strict=True))


def versions() -> dict[str, str | None]:
    """The installed versions of the packages that results depend on."""
    return {package: _version(package) for package in PACKAGES}


@cache
def git_state(root: Path, written: tuple[str | None, ...]) -> tuple[str | None, bool | None]:
    """Commit of the code, and whether files other than results differ from it; None without git or its repository.

    Args:
        written: folders that runs write to. They and `results` do not count.
    """
    git = ["git", "-C", str(root)]
    others = [f":(exclude,literal){folder}" for folder in _inside(root, written)]
    status = _output([*git, "status", "--porcelain", "--", ".", *others])
    return _output([*git, "rev-parse", "HEAD"]), None if status is None else bool(status)


def _inside(root: Path, folders: Iterable[str | None]) -> Iterator[Path]:
    """Which of the folders, and `results`, lie below `root`, seen from there."""
    for folder in (root / "results", *filter(None, folders)):
        path = Path(folder).resolve()
        if root in path.parents:
            yield path.relative_to(root)


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


@cache
def device(name: str) -> str:
    """The device with its model: the processor's, or what the driver calls that GPU."""
    if name.startswith("cuda"):
        number = name.partition(":")[2] or "0"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        chosen = visible.split(",")[int(number)] if visible else number
        return f"{name}: {_output(['nvidia-smi', '-i', chosen, '--query-gpu=name', '--format=csv,noheader'])}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{name}: {next(iter(models), platform.processor())} x {os.cpu_count()}"
