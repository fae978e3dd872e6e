"""What must be true before the first cell starts, so that nobody waits an hour for an error known at once. No torch."""

import re
import shutil
import tempfile
from pathlib import Path

from benchmarks import data, models, plan, tasks
from benchmarks.job import Job
from benchmarks.plan import Request
from methods.errors import UserError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of one parameter."""


def before_start(request: Request, jobs: list[Job], workers: int) -> None:
    """Check the machine first, then what may have to be fetched.

    Raises:
        UserError: the first thing that stands in the way.
    """
    check_device(request.device)
    for folder in filter(None, (request.out, request.checkpoints)):
        check_writable(folder)
    todo = [job for job in jobs if not job.finished()]
    check_room(request.out, todo, workers)
    if request.only_evaluate:
        check_checkpoints(todo)
    for name in dict.fromkeys(job.model for job in todo):
        check_inputs(request, [job for job in todo if job.model == name])


def check_device(device: str) -> None:
    """A name that torch knows, and a CUDA device where one is asked for."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise UserError(f"--device {device} is not a device. Type --device cpu, cuda, cuda:0 or mps, or leave it out.")
    if device.startswith("cuda") and not plan.has_accelerator():
        raise UserError(
            f"--device {device}: no CUDA device is in reach (no NVIDIA driver here, or a CPU build of torch). "
            "Type --device cpu, or leave it out; the README says how to get a CUDA build."
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


def check_room(out: Path, jobs: list[Job], workers: int) -> None:
    """Each running cell needs room for one checkpoint in its scratch folder."""
    sizes = [shape.total * BYTES[job.cell.dtype] for job in jobs if (shape := models.resolve(job.model).shape)]
    needed, free = max(sizes, default=0) * workers, shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"The disk of {out} has {free / 1e9:.1f} GB free, and --workers {workers} needs {needed / 1e9:.1f} GB for "
            "checkpoints in the making. Make room, give another --out, or fewer --workers."
        )


def check_checkpoints(jobs: list[Job]) -> None:
    """`--only-evaluate` needs every checkpoint to be there."""
    for job in jobs:
        if not job.checkpoint.is_dir():
            raise job.without_checkpoint()


def check_inputs(request: Request, jobs: list[Job]) -> None:
    """The weights and texts of one model's cells can be had."""
    model = models.resolve(jobs[0].model)
    model.check(request.offline)
    if any(job.cell.calibration for job in jobs):
        data.check(jobs[0].source, "calibration", request.offline)
    for task in {task for job in jobs for task in job.missing()}:
        tasks.check(task, request.offline)
