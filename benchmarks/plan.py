"""What a run will do: the matrix of cells. Needs no torch.

    python run_all.py --models tiny-llama --ratios 0.8 --plan

prints it with the expected cost, and runs nothing.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Literal

import methods
from benchmarks import data, models, tasks
from benchmarks.job import Cell, Job, Source
from benchmarks.models import Model
from benchmarks.presets import PRESETS, Preset
from methods import recovery
from methods.errors import UserError, unknown

__all__ = ["PRESETS", "Preset", "Request", "jobs"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """The part of the command line that says what to measure."""

    models: tuple[str, ...]
    """Aliases, hub ids or directories."""
    methods: tuple[str, ...]
    """Registered names; `dense` is added where it is missing."""
    ratios: tuple[float, ...]
    """Shares of active parameters that stay."""
    seeds: tuple[int, ...]
    """One cell each."""
    tasks: tuple[str, ...]
    """Tasks and suites."""
    budget: str
    """Name of a preset."""
    ratio_basis: Literal["total", "block"]
    """The share of what."""
    ratio_tolerance: float | None
    """Largest accepted difference from a ratio; None: 0.01 or one step of the method's grid."""
    calibration: str | None
    """Calibration source, with `:SAMPLESxWINDOW` where the preset's numbers are not to be taken; None: each model's
    default."""
    settings: Mapping[str, Mapping[str, str]]
    """`--set`: text values by method (or kind of fine-tuning) and field."""
    recover: str | None
    """What fine-tunes every compressed model too; None: nothing."""
    out: Path
    """Folder of the records."""
    checkpoints: Path | None
    """Folder in which compressed checkpoints are kept."""
    device: str
    """`auto`, `cpu`, `mps`, `cuda` or `cuda:N`."""
    dtype: str
    """`auto` or a torch dtype."""
    offline: bool
    """Nothing is fetched."""
    force: bool
    """Do again what is finished."""
    only_evaluate: bool
    """Never compress."""
    command: str
    """The command line itself."""
    unavailable: Mapping[str, str] = field(default_factory=dict)
    """Tasks whose data cannot be had, and why; the checks before the start find them."""


def jobs(request: Request) -> list[Job]:
    """Every cell of the matrix: model by model, the dense cell of each first and once, then ratio by ratio.

    Raises:
        UserError: an unknown name, an impossible value or a ratio out of a method's reach.
    """
    _check_settings(request)
    _check_device(request.device)
    return [job for name in dict.fromkeys(request.models) for job in _jobs_of(request, name)]


def _check_settings(request: Request) -> None:
    """Each `--set` must be meant for a method of this run: one that changes nothing is a typing error."""
    known = [*request.methods, *filter(None, [request.recover])]
    for method in request.settings:
        if method not in known:
            hint = f"Add --recover {method}" if method in recovery.KINDS else "Add it to --methods"
            raise unknown("method of --set", method, known, f"{hint}, or drop the --set.")


def _check_device(name: str) -> None:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device {name} is not a device. Type --device cpu, cuda, cuda:0 or mps, or leave it out.")


def _jobs_of(request: Request, name: str) -> Iterator[Job]:
    """The cells of one model, each fine-tuned one after the one that it goes on from.

    The dense one depends on neither ratio nor seed, so it is asked for with fixed ones.
    """
    model = models.resolve(name)
    _check_tasks(request, model)
    yield _job(request, name, model, "dense", 1.0, 0)
    others = [method for method in dict.fromkeys(request.methods) if method != "dense"]
    for ratio, method, seed in product(dict.fromkeys(request.ratios), others, dict.fromkeys(request.seeds)):
        job = _job(request, name, model, method, ratio, seed)
        yield from _with_recovery(request, job) if request.recover else [job]


def _with_recovery(request: Request, job: Job) -> list[Job]:
    """A job, and the one that goes on from its checkpoint.

    Raises:
        UserError: the method prunes single weights.
    """
    if job.method.family == "semi-structured":
        raise recovery.would_fill_zeros()
    settings = recovery.configure(request.recover or "", request.settings.get(request.recover or "", {}))
    cell = replace(job.cell, recover=settings.record())
    recovered = replace(job, cell=cell, skipped={}).skipping(request.unavailable)
    return [replace(job, leaves=not recovered.finished()), recovered]


def _check_tasks(request: Request, model: Model) -> None:
    for task in tasks.expand(request.tasks, model, PRESETS[request.budget]):
        if task.kind == "ppl":
            _check_source(task.source, "test")


def _job(request: Request, name: str, model: Model, method: str, ratio: float, seed: int) -> Job:
    """One cell with all that runs it; a ratio that its method cannot reach is an error."""
    settings = request.settings.get(method, {})
    text, windows = _asked_text(request.calibration)
    source = text or model.calibration
    cell = Cell(
        model=model.name,
        fingerprint=model.fingerprint(),
        method=method,
        method_config=asdict(methods.configure(method, settings)),  # type: ignore[call-overload]
        ratio=ratio,
        ratio_basis="total" if method == "dense" else request.ratio_basis,
        seed=seed,
        calibration=None if method == "dense" else _calibration(source, windows, model, PRESETS[request.budget]),
        budget=PRESETS[request.budget],
        dtype=dtype_of(request.dtype, request.device),
    )
    job = Job(
        cell=cell,
        model=name,
        source=source,
        settings=settings,
        tasks=request.tasks,
        tolerance=request.ratio_tolerance,
        out=str(request.out),
        checkpoints=str(request.checkpoints) if request.checkpoints else None,
        device=device_of(request.device),
        force=request.force,
        only_evaluate=request.only_evaluate,
        command=request.command,
    )
    try:
        job.prediction()
    except UserError as error:
        raise UserError(f"{model.name}: {error}") from None
    return job.skipping(request.unavailable)


def _asked_text(asked: str | None) -> tuple[str, tuple[int, int] | None]:
    """`NAME`, `NAME:SAMPLESxWINDOW` or `:SAMPLESxWINDOW` as name (perhaps empty) and numbers."""
    found = re.fullmatch(r"(.*):(\d+)x(\d+)", asked or "")
    return (found[1], (int(found[2]), int(found[3]))) if found else (asked or "", None)


def _calibration(source: str, windows: tuple[int, int] | None, model: Model, preset: Preset) -> Source:
    """What identifies the calibration: of a file its content too, and windows that fit the model."""
    _check_source(source, "calibration")
    limit = model.shape.max_positions if model.shape else preset.calibration_window
    if windows is None:
        windows = preset.calibration_samples, min(preset.calibration_window, limit)
    elif not (windows[0] >= 1 and 2 <= windows[1] <= limit):
        raise UserError(
            f"--calibration asks for {windows[0]} windows of {windows[1]} tokens, and {model.name} takes at least one "
            f"of 2 to {limit} tokens. Type for example --calibration {source}:{max(windows[0], 1)}x{limit}"
        )
    return Source(name=data.label(source), samples=windows[0], window=windows[1])


def _check_source(source: str, split: data.Split) -> None:
    """What can be known of a text without fetching anything: the split of a named one, all of a file."""
    if split not in data.SPLITS.get(source, ()):
        data.check(source, split, offline=True)


def has_accelerator() -> bool:
    """Whether a CUDA device and a torch that can use it are there, found without importing torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return any(Path("/dev").glob("nvidia[0-9]*")) and not hidden and not version("torch").endswith("+cpu")


def device_of(name: str) -> str:
    """The device that `auto` means here; any other name as it is."""
    return name if name != "auto" else "cuda" if has_accelerator() else "cpu"


def dtype_of(name: str, device: str) -> str:
    """The dtype that `auto` means: float32 on a CPU, where bfloat16 is slow, else bfloat16."""
    return name if name != "auto" else "float32" if device_of(device) == "cpu" else "bfloat16"
