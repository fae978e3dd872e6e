"""What `--plan` prints: every cell with its predicted size, expected time and memory, and how sure the results will be.

Times are estimates, from the parameters, the tokens of the preset and one constant throughput per kind of device. They
say whether a run takes minutes, hours or days; they are no measurement.
"""

from tabulate import tabulate

from benchmarks import models, tasks
from benchmarks.checks import BYTES
from benchmarks.job import Job
from benchmarks.tasks import Task
from methods.base import Training
from methods.modeling.shape import DecoderShape

THROUGHPUT = {"cpu": 5e10, "cuda": 1e14, "mps": 2e12}
"""Floating-point operations per second, as forward passes usually reach them."""
OVERHEAD_S = 20
"""Imports, loading, saving."""
HOST_BYTES = 1e9
"""Of a process with torch and transformers but no model."""
WHOLE_TEXT, WHOLE_TASK = 350_000, 3_000
"""Tokens and documents to reckon with where a preset takes all of them."""
DOCUMENT_TOKENS = 4 * 100
"""Choices of a document times tokens of each."""
RECOVERY_PASSES = 3
"""Forward passes worth of work per sequence of fine-tuning."""


def table(jobs: list[Job]) -> str:
    """The matrix of cells, its sum, and the margins of error."""
    headers = ("model", "method", "ratio", "seed", "active", "share", "budget", "state", "time", "memory")
    rows = [_row(job) for job in jobs]
    todo = [job for job in jobs if not job.finished()]
    total = sum(filter(None, map(seconds, todo)))
    return "\n".join(
        [
            tabulate(rows, headers, disable_numparse=True),
            "",
            f"{len(jobs)} cells, {len(todo)} to do, about {duration(total)} one after the other (estimates).",
            *_margins(jobs),
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
    asked = tasks.expand(job.tasks, models.resolve(job.model), job.cell.budget)
    tokens = _work(job, shape) + sum(_tokens(task, job) for task in asked)
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


def _tokens(task: Task, job: Job) -> int:
    """Tokens that a task puts through the model, the dense one beside it included."""
    budget = job.cell.budget
    if task.kind == "ppl":
        return budget.ppl_windows * task.window if budget.ppl_windows else WHOLE_TEXT
    if task.kind == "lm_eval":
        return (budget.documents or WHOLE_TASK) * DOCUMENT_TOKENS * (1 + task.shots)
    repeats = 2 * (1 + budget.speed_repeats)
    return repeats * sum(budget.speed_batches) * (budget.speed_prompt + budget.speed_new_tokens)


def _memory(job: Job) -> str:
    """The dense and the compressed model side by side, and the program."""
    shape = models.resolve(job.model).shape
    return f"{(HOST_BYTES + 2 * shape.total * BYTES[job.cell.dtype]) / 1e9:.1f} GB" if shape else "?"


def _margins(jobs: list[Job]) -> list[str]:
    """Half the width of a 95 % interval around an accuracy of one half, the widest."""
    documents = jobs[0].cell.budget.documents
    count = documents or WHOLE_TASK
    known = f"{documents} documents per task" if documents else f"whole tasks (of, say, {WHOLE_TASK:,} documents)"
    return [f"Margin of error of an accuracy (95 %): at most ±{margin(count):.1f} percentage points with {known}."]


def margin(documents: int) -> float:
    """1.96 standard errors of a share of one half, in percentage points."""
    return 196 * (0.25 / documents) ** 0.5


def duration(seconds: float | None) -> str:
    """Seconds in the largest fitting unit."""
    if seconds is None:
        return "?"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
