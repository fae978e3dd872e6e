"""What must be true before the first cell starts, so that nobody waits an hour for an error known at once.

Only a device other than the CPU needs torch for it.
"""

import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import data, models, plan, tasks
from benchmarks.job import Job
from benchmarks.plan import Request
from benchmarks.tasks import Task
from methods.errors import UserError
from methods.recovery import require_package

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of one parameter."""


def before_start(request: Request, jobs: list[Job], workers: int) -> dict[str, str]:
    """Check the machine first, then what may have to be fetched.

    Returns:
        The tasks whose data cannot be had, and why: they are left out.

    Raises:
        UserError: the first thing that stands in the way of all the others.
    """
    check_device(plan.device_of(request.device))
    if request.recover:
        require_package()
    for folder in filter(None, (request.out, request.checkpoints)):
        check_writable(folder)
    unavailable = find_unavailable(jobs, request.offline)
    todo = [job for job in plan.jobs(replace(request, unavailable=unavailable)) if not job.finished()]
    check_room(todo, workers)
    for name in dict.fromkeys(job.model for job in todo):
        check_inputs(request, [job for job in todo if job.model == name])
    return unavailable


def find_unavailable(jobs: list[Job], offline: bool) -> dict[str, str]:
    """The missing tasks whose data cannot be had, and why. May ask the hub unless `offline`."""
    reasons = {}
    for task in dict.fromkeys(task for job in jobs for task in job.missing()):
        try:
            tasks.check(task, offline)
            check_length(task)
        except UserError as error:
            reasons[task.name] = str(error)
    return reasons


def check_device(device: str) -> None:
    """A device that torch can use."""
    if device == "cpu":
        return
    import torch

    kind, _, number = device.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else int(torch.backends.mps.is_available())
    if int(number or 0) >= count:
        raise UserError(
            f"--device {device}: torch {torch.__version__} can use {count} {kind} devices here. Type --device cpu, or "
            "look at the driver, at CUDA_VISIBLE_DEVICES and at the build of torch; the README says how to get another."
        )


def check_writable(folder: Path) -> None:
    """A folder that exists, or can be made, and takes a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x" * 4096)
            probe.flush()
    except OSError as error:
        raise UserError(
            f"Nothing can be written to {folder}: {error.strerror}. Make room or get permission there, "
            "or give another folder (--out, --checkpoints)."
        ) from None


def check_room(jobs: list[Job], workers: int) -> None:
    """Each running cell needs room for one checkpoint in its scratch folder, a fine-tuned one also for that which it
    goes on from, and each kept checkpoint for itself."""
    sizes = [(job, shape.total * BYTES[job.cell.dtype]) for job in jobs if (shape := models.resolve(job.model).shape)]
    making = max((size * (2 if job.plain else 1) for job, size in sizes), default=0) * workers
    keeping = sum(job.cell.ratio * size for job, size in sizes if job.kept and not job.kept.is_dir())
    for job in jobs[:1]:
        _check_free(job.out, making, f"the checkpoints in the making of --workers {workers}")
        if job.checkpoints:
            _check_free(job.checkpoints, keeping, "the checkpoints to keep")


def _check_free(folder: str, needed: float, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"The disk of {folder} has {size_text(free)} free, and {what} need about {size_text(needed)}. "
            "Make room, give another --out or --checkpoints, or fewer --workers."
        )


def size_text(size: float) -> str:
    """Bytes in the largest fitting unit."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def check_checkpoints(jobs: list[Job]) -> None:
    """`--only-evaluate` needs every checkpoint to be there."""
    for job in jobs:
        if job.lacks_checkpoint():
            raise job.without_checkpoint()


def check_inputs(request: Request, jobs: list[Job]) -> None:
    """The weights and the calibration text of one model's cells can be had."""
    model = models.resolve(jobs[0].model)
    model.check(request.offline)
    for job in [job for job in jobs if job.cell.calibration][:1]:  # all have the same
        data.check(job.source, "calibration", request.offline)
        check_calibration(job)


def check_calibration(job: Job) -> None:
    """A local text has enough tokens for the windows, which start at different places."""
    source, most = job.cell.calibration, most_tokens(job.source, "calibration")
    if source and most < source.samples + source.window - 1:
        raise UserError(
            f"the calibration text {job.source} has at most {most} tokens, too few for {source.samples} different "
            f"windows of {source.window}. Use a longer text (--calibration), or a smaller --budget."
        )


def check_length(task: Task) -> None:
    """A local text has enough tokens for one perplexity window."""
    if task.kind == "ppl" and (most := most_tokens(task.source, "test")) < task.window:
        raise UserError(
            f"the test part of {task.source} has at most {most} tokens, fewer than one window of {task.window}. "
            f"Use a longer text, or a shorter window: ppl:{task.source}@{max(2, most // 2)}"
        )


def most_tokens(source: str, split: data.Split) -> float:
    """A token stands for a byte at least, but for one that starts the text. Of a named text no bound is known."""
    return math.inf if source in data.names() else len(data.load(source, split).content.encode()) + 1
