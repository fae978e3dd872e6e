"""One cell: compress, save, load back, evaluate task by task, write the record.

    python -m benchmarks.cell OUT/.../scratch/job.json      # what the process executor starts; standard output: events

Whatever is finished lies under its final name in the scratch folder (the checkpoint as a whole, each task's result),
so a cell killed at any moment goes on from there.
"""

import errno
import gc
import json
import math
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from benchmarks import checkpoint, models, record, store, tasks
from benchmarks.job import Job
from benchmarks.metric import Metric
from benchmarks.progress import Tracker, sender
from benchmarks.tasks import Task
from methods.errors import UserError

LOCK_SECONDS = 60
"""How long a cell waits for the process of a run that was just killed to end."""

PROTOCOL = "1"
"""Version of the tasks that are defined here (perplexity, speed); a change of their numbers raises it."""


def run(job: Job, progress: Tracker) -> str | None:
    """Bring a cell to its record; return the error in one line, or None. Never raises but to end the process."""
    try:
        with _only_process(job):
            return None if job.finished() else _run(job, progress)
    except Exception as error:  # the record itself could not be written
        traceback.print_exc()
        return one_line(error, job)


@contextmanager
def _only_process(job: Job) -> Iterator[None]:
    """Hold the cell's lock, so that two runs never write into one folder."""
    job.lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(job.lock, timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise UserError(
            f"Another run is working on {job.label} in {job.folder}. Let it finish and repeat the command: "
            "what it finished will be skipped. Or give another --out."
        ) from None


def _run(job: Job, progress: Tracker) -> str | None:
    if job.force:
        _forget(job)
    try:
        _work(job, progress)
        error = None
    except Exception as failure:  # one failing cell must not stop the others
        traceback.print_exc()
        error = one_line(failure, job)
    store.write_record(job.record, record.assemble(job, error))
    if error is None:
        shutil.rmtree(job.scratch, ignore_errors=True)
    return error


def _forget(job: Job) -> None:
    """Remove what earlier runs left, but for the checkpoint where only evaluation is asked for."""
    if job.only_evaluate:
        shutil.rmtree(job.scratch / "tasks", ignore_errors=True)
        return
    for folder in (job.scratch, job.kept):
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def one_line(error: Exception, job: Job) -> str:
    """An error for the record and the last lines of the run; its traceback is in the log."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full below {job.out}. Make room and repeat the command: it goes on where it stopped."
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _work(job: Job, progress: Tracker) -> None:
    """Whatever of the cell is not done yet."""
    missing = job.missing()
    if (missing or job.kept) and not job.checkpoint.is_dir():
        if job.only_evaluate:
            raise job.without_checkpoint()
        checkpoint.make(job, progress)
    checkpoint.keep(job)
    todo = [task for task in missing if not record.task_file(job, task).exists()]
    if todo:
        _evaluate(job, todo, progress)


def _evaluate(job: Job, todo: list[Task], progress: Tracker) -> None:
    """Evaluate tasks on the checkpoint as a user would load it; the dense model beside it only where speed is timed."""
    gc.collect()
    model, tokenizer = checkpoint.load(job.checkpoint, job)
    needs_dense = job.cell.method != "dense" and any(task.kind == "speed" for task in todo)
    dense = checkpoint.load(models.resolve(job.model).prepare(), job)[0] if needs_dense else None
    for task in todo:
        torch.manual_seed(job.cell.seed)
        laps = checkpoint.Laps()
        metrics, info = tasks.evaluate(
            task,
            model,
            tokenizer,
            dense=dense,
            settings=job.cell.budget,
            samples_dir=job.folder / "samples",
            progress=progress,
        )
        result = {
            "task": task.name,
            "metrics": {name: _finite(name, metric) for name, metric in metrics.items()},
            "seconds": laps.lap(),
            "memory": checkpoint.memory(),
            "provenance": _versions(task, info),
        }
        store.write_json(record.task_file(job, task), result)


def _finite(name: str, metric: Metric) -> dict[str, Any]:
    """A metric's JSON; a number that is none (a broken model gives such) must not pass for a result."""
    if not math.isfinite(metric.value):
        raise ArithmeticError(f"{name} is {metric.value}")
    return asdict(metric)


def _versions(task: Task, info: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Revisions and versions; every task has an entry under its own name, by which a record shows it finished."""
    versions = info.get("task_versions", {})
    own = {task.name: versions.get(task.source, PROTOCOL)}
    return {"dataset_revisions": info.get("dataset_revisions", {}), "task_versions": versions | own}


def _end_with_parent() -> None:
    """End this process once the executor's end of our standard input is gone, however the executor died."""
    while os.read(0, 1024):
        pass
    os._exit(1)


def main() -> int:
    """Run the job in the named file; events and the outcome go to standard output, everything printed to the log."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = Job.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    error = run(job, Tracker(sender(events)))
    events.write(json.dumps({"error": error}) + "\n")
    events.flush()
    return 1 if error else 0


if __name__ == "__main__":
    sys.exit(main())
