"""What `--plan` prints: every cell with its predicted size, expected time and memory; every task, and how sure its
results will be.

Times are estimates, from the parameters, the tokens of the preset and one constant throughput per kind of device. They
say whether a run takes minutes, hours or days; they are no measurement.
"""

from collections.abc import Sequence
from itertools import product

from tabulate import tabulate

from benchmarks import models, suites, tasks
from benchmarks.checks import BYTES, find_unavailable
from benchmarks.job import Job
from benchmarks.presets import Preset
from benchmarks.tasks import Task
from methods.base import Training
from methods.modeling.shape import DecoderShape

THROUGHPUT = {"cpu": 5e10, "cuda": 1e14, "mps": 2e12}
"""Floating-point operations per second, as forward passes usually reach them."""
OVERHEAD_S = 20
"""Imports, loading, saving."""
HOST_BYTES = 1e9
"""Of a process with torch and transformers but no model."""
WHOLE_TEXT = 350_000
"""Tokens to reckon with where a preset takes all of them."""
RECOVERY_PASSES = 3
"""Forward passes worth of work per sequence of fine-tuning."""


def table(jobs: list[Job]) -> str:
    """The matrix of cells and its sum; the tasks and their margins of error; what may have to be skipped."""
    headers = ("model", "method", "ratio", "seed", "active", "share", "budget", "state", "time", "memory")
    rows = [_row(job) for job in jobs]
    todo = [job for job in jobs if not job.finished()]
    total = sum(filter(None, map(seconds, todo)))
    return "\n".join(
        [
            tabulate(rows, headers, disable_numparse=True),
            "",
            f"{len(jobs)} cells, {len(todo)} to do, about {duration(total)} one after the other (estimates).",
            "",
            _tasks(jobs),
            "",
            *_margins(jobs),
            *_unavailable(jobs),
        ]
    )


def _row(job: Job) -> tuple[str, ...]:
    cell, prediction, shape = job.cell, job.prediction(), models.resolve(job.model).shape
    identity = (cell.model, job.title, f"{cell.ratio:g}", str(cell.seed))
    if prediction is None or shape is None:
        return (*identity, "?", "?", "?", _state(job), duration(seconds(job)), _memory(job))
    share = job.budget.achieved(prediction.active_total, prediction.active_block, shape)
    on_budget = "on" if job.budget.accepts(share, prediction.grid_step) else "off"
    size = (f"{prediction.active_total:,}", f"{share:.4f}", on_budget)
    return (*identity, *size, _state(job), duration(seconds(job)), _memory(job))


def _state(job: Job) -> str:
    if job.finished():
        return "done"
    return "started" if job.scratch.is_dir() or job.record.exists() else "to do"


def seconds(job: Job) -> float | None:
    """Expected time of a whole cell; None where the model's size is not known."""
    shape = models.resolve(job.model).shape
    if shape is None:
        return None
    tokens = _work(job, shape) + sum(_tokens(task, job.cell.budget) for task in job.asked())
    return OVERHEAD_S + 2 * shape.total * tokens / THROUGHPUT[job.device.partition(":")[0]]


def _work(job: Job, shape: DecoderShape) -> float:
    """Tokens that compressing and fine-tuning put through the model."""
    if (source := job.cell.calibration) is None:
        return 0
    preset, recovery = job.cell.budget, job.recovery
    window = min(preset.training_window, shape.max_positions)
    granted = Training(steps=preset.training_steps, sequences=preset.training_sequences, window=window)
    tuned = (recovery.steps or granted.steps) * granted.sequences * window if recovery else 0
    return job.method.work(shape, job.budget, source.samples * source.window, granted) + RECOVERY_PASSES * tuned


def _tokens(task: Task, budget: Preset) -> int:
    """Tokens that a task puts through the model, the dense one beside it included; a question's choices share it."""
    if task.kind == "ppl":
        return budget.ppl_windows * task.window if budget.ppl_windows else WHOLE_TEXT
    if task.kind == "lm_eval":
        extent = suites.extent(task.source, budget.documents)
        return extent.documents * ((1 + task.shots) * extent.question + extent.answers)
    repeats = 2 * (1 + budget.speed_repeats)
    return repeats * sum(budget.speed_batches) * (budget.speed_prompt + budget.speed_new_tokens)


def _memory(job: Job) -> str:
    """The dense and the compressed model side by side, and the program."""
    shape = models.resolve(job.model).shape
    return f"{(HOST_BYTES + 2 * shape.total * BYTES[job.cell.dtype]) / 1e9:.1f} GB" if shape else "?"


def _tasks(jobs: list[Job]) -> str:
    """Every asked task, with the tokens that it puts through each model."""
    headers = ("task", "documents", "tokens", "margin of error")
    rows = {task.name: _task_row(task, job.cell.budget) for job in jobs for task in job.asked()}
    return tabulate(list(rows.values()), headers, disable_numparse=True)


def _task_row(task: Task, budget: Preset) -> tuple[str, ...]:
    tokens = f"{_tokens(task, budget):,}"
    if task.kind != "lm_eval":
        return task.name, "", tokens, ""
    documents = _documents(task, budget)
    return task.name, f"{documents:,}", tokens, f"±{margin([documents]):.1f}"


def _documents(task: Task, budget: Preset) -> int:
    return suites.extent(task.source, budget.documents).documents


def _margins(jobs: list[Job]) -> list[str]:
    """What a document limit buys, suite by suite: the uncertainty of the average over its tasks."""
    lines = {"Margin of error of an accuracy (95 %): at most ± so many percentage points.": None}
    for job, suite in product(jobs, suites.SUITES):
        asked = job.asked()
        found = tasks.expand([suite], models.resolve(job.model), job.cell.budget)
        documents = [_documents(task, job.cell.budget) for task in found if task.kind == "lm_eval"]
        if len(documents) > 1 and all(task in asked for task in found):
            lines[f"Average of the {len(documents)} tasks of {suite}: ±{margin(documents):.1f}."] = None
    return list(lines)


def _unavailable(jobs: list[Job]) -> list[str]:
    """The tasks whose data are not on this machine."""
    reasons = find_unavailable(jobs, offline=True)
    return [f"Skipped unless the run can fetch its data: {task}: {reason}" for task, reason in reasons.items()]


def margin(documents: Sequence[int]) -> float:
    """1.96 standard errors, in percentage points, of the average of shares of one half, the least certain ones.

    Args:
        documents: how many each share is taken of.
    """
    return 98 * sum(1 / count for count in documents) ** 0.5 / len(documents)


def duration(seconds: float | None) -> str:
    """Seconds in the largest fitting unit."""
    if seconds is None:
        return "?"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
