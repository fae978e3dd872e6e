"""One cell: compress, save, load back, evaluate task by task, write the record.

Whatever is finished lies under its final name in the scratch folder (the checkpoint as a whole, each task's result),
so a cell killed at any moment goes on from there.
"""

import errno
import gc
import math
import re
import shutil
import traceback
from dataclasses import asdict
from typing import Any

import torch
from transformers.utils import logging

from benchmarks import checkpoint, models, record, recovered, store, tasks
from benchmarks.job import Job
from benchmarks.metric import Evaluation, Metric
from benchmarks.progress import Tracker
from benchmarks.tasks import Task
from methods.errors import UserError

DISK_FULL = re.compile(rf"\b(Errno|os error) ({errno.ENOSPC}|{errno.EDQUOT})\b")
"""How the system, shutil and safetensors say so."""


def run(job: Job, progress: Tracker) -> str | None:
    """Bring a cell to its record; return the error in one line, or None. Never raises but to end the process."""
    logging.disable_progress_bar()
    try:
        with job.locked():
            return None if job.finished() else _run(job, progress)
    except Exception as error:  # the record itself could not be written
        traceback.print_exc()
        return one_line(error, job)


def _run(job: Job, progress: Tracker) -> str | None:
    if job.force:
        _forget(job)
    try:
        error = "; ".join(_work(job, progress)) or None
    except Exception as failure:  # one failing cell must not stop the others
        traceback.print_exc()
        error = one_line(failure, job)
    store.write_record(job.record, record.assemble(job, error))
    if error is None and not job.leaves:
        shutil.rmtree(job.scratch, ignore_errors=True)
    return error


def _forget(job: Job) -> None:
    """Remove what earlier runs left but for the record, and the checkpoint where only evaluation is asked for."""
    if job.only_evaluate:
        shutil.rmtree(job.scratch / "tasks", ignore_errors=True)
        return
    for folder in (job.scratch, job.kept):
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def one_line(error: Exception, job: Job) -> str:
    """An error for the record and the last lines of the run; its traceback is in the log."""
    if DISK_FULL.search(str(error)):
        folders = " or ".join(filter(None, (job.out, job.checkpoints)))
        return f"The disk is full below {folders}. Make room and repeat the command: it goes on where it stopped."
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"The memory of {job.device} is full. Use --device cpu, a larger device, or settings that take less: "
            "docs/MEMORY.md says what each method holds (for example --set llm-surgeon.factors=host)."
        )
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _work(job: Job, progress: Tracker) -> list[str]:
    """Whatever of the cell is not done yet; the errors of the tasks that failed."""
    if job.lacks_checkpoint():
        if job.only_evaluate:
            raise job.without_checkpoint()
        (recovered if job.plain else checkpoint).make(job, progress)
    checkpoint.keep(job)
    todo = [task for task in job.missing() if not record.task_file(job, task).exists()]
    return _evaluate(job, todo, progress) if todo else []


def _evaluate(job: Job, todo: list[Task], progress: Tracker) -> list[str]:
    """Evaluate tasks on the checkpoint as a user would load it; the dense model beside it only where speed is timed.

    A failing task does not stop the others. Returns the errors.
    """
    gc.collect()
    model, tokenizer = checkpoint.load_model(job.checkpoint, job), models.load_tokenizer(job.checkpoint)
    needs_dense = job.cell.method != "dense" and any(task.kind == "speed" for task in todo)
    dense = checkpoint.load_model(models.resolve(job.model).prepare(), job) if needs_dense else None
    errors = []
    for task in todo:
        try:
            result = _measure(job, task, model, tokenizer, dense, progress)
            store.write_json(record.task_file(job, task), result)
        except Exception as failure:
            traceback.print_exc()
            errors.append(f"{task.name}: {one_line(failure, job)}")
    return errors


def _measure(job: Job, task: Task, model: Any, tokenizer: Any, dense: Any, progress: Tracker) -> dict[str, Any]:
    """One task: what becomes its file in the scratch folder."""
    torch.manual_seed(job.cell.seed)
    laps = checkpoint.Laps()
    found = tasks.evaluate(
        task,
        model,
        tokenizer,
        dense=dense,
        settings=job.cell.budget,
        samples_dir=job.folder / "samples",
        progress=progress,
    )
    return {
        "task": task.name,
        "metrics": {name: _finite(name, metric) for name, metric in found.metrics.items()},
        "seconds": laps.lap(),
        "memory": checkpoint.memory(),
        "provenance": _versions(found) | record.origin(job),
        "notes": found.notes,
        "skipped": found.skipped,
    }


def _versions(found: Evaluation) -> dict[str, Any]:
    return {"dataset_revisions": found.dataset_revisions, "task_versions": found.task_versions}


def _finite(name: str, metric: Metric) -> dict[str, Any]:
    """A metric's JSON; a number that is none (a broken model gives such) must not pass for a result."""
    if not math.isfinite(metric.value):
        raise ArithmeticError(f"{name} is {metric.value}")
    return asdict(metric)
