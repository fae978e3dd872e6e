"""A cell's checkpoint: the dense model compressed, measured and saved, in place as a whole or not at all."""

import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import methods
from benchmarks import data, launch, models, record, routes, sharing, store
from benchmarks.job import Job
from benchmarks.progress import Tracker
from methods import modeling
from methods.base import Context, Progress, Silent, Training
from methods.errors import UserError
from methods.modeling.describe import describe, load_fractions
from methods.modeling.footprint import Footprint, footprint
from methods.recovery import adapters

ROOM = 1.2
"""Memory that a model takes on a device while it runs, in sizes of its weights and what is made of them."""
CALIBRATION_TOKENS = 2048
"""Calibration tokens per forward pass, at most, but for longer windows."""
LOAD_TOKENS = 8192
"""Calibration tokens on which the loads of experts are measured, at most."""


def make(job: Job, progress: Tracker) -> None:
    """Compress the dense model and move the saved result, with its measurements, into place at once.

    Raises:
        UserError: the calibration text is too short, or the method cannot do what is asked of it.
    """
    laps = Laps()
    tokenizer, calibration, model = _given(job)
    load_s, dense = laps.lap(), footprint(model)
    launch.announce(job)
    notes: list[str] = []
    model = _compress(job, model, tokenizer, calibration, progress, notes)
    compress_s, peak = laps.lap(), memory()
    with arriving(job.scratch / "checkpoint") as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        measured = {
            "size": size_of(job, dense, footprint(model), partial),
            "time": {"load_s": load_s, "compress_s": compress_s, "save_s": laps.lap()},
            "memory": peak | {f"compress_{key}": value for key, value in peak.items()},
            "provenance": {"dataset_revisions": _revisions(job, calibration), "task_versions": {}} | record.origin(job),
            "notes": notes,
        }
        store.write_json(record.measured_file(partial), measured)
        store.write_json(job.folder / "structure.json", structure_of(model, calibration))
        routes.write(job.folder, model, tokenizer)


def assist(job: Job) -> None:
    """The part of `make` in which the processes of a launch work together; the result is the main process's to keep."""
    tokenizer, calibration, model = _given(job)
    _compress(job, model, tokenizer, calibration, Silent(), [])


def _given(job: Job) -> tuple[PreTrainedTokenizerBase, data.TokenCalibration | None, PreTrainedModel]:
    """What a method gets. The text first: tokenising all of it takes memory that the model can then have."""
    location = models.resolve(job.model).prepare()
    tokenizer = models.load_tokenizer(location)
    return tokenizer, calibration_of(job, tokenizer), load_model(location, job, whole=not job.method.streams)


@contextmanager
def arriving(target: Path) -> Iterator[Path]:
    """A folder to fill, beside `target`, which it then becomes; after a failure nothing is left of it."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_model(location: str | Path, job: Job, whole: bool = False) -> PreTrainedModel:
    """A model in the cell's dtype on the cell's device, ready to be evaluated; its blocks in host memory where the
    device is too small for it.

    Args:
        whole: refuse instead.
    """
    model = AutoModelForCausalLM.from_pretrained(location, dtype=getattr(torch, job.cell.dtype))
    if (kept := Path(location, adapters.FOLDER)).is_dir():
        model.load_adapter(str(kept))
    made = modeling.made_bytes(model, torch.device(job.device))
    need, free = ROOM * (model.get_memory_footprint() + made), free_memory(job.device)
    if need <= free:
        model.to(job.device)  # pyright: ignore[reportArgumentType]  (transformers' decorated `to` loses its self)
    elif whole:
        raise UserError(
            f"{job.title} needs all of {job.cell.model} on {job.device}: some {need / 1e9:.0f} GB with room to "
            f"compute, and {free / 1e9:.0f} GB are free. Use --device cpu, a larger device, or a method that works "
            f"block by block ({', '.join(name for name in methods.names() if methods.get(name).streams)})."
        )
    else:
        modeling.keep_blocks_on_host(model, torch.device(job.device))
    return model.eval()


def free_memory(device: str) -> float:
    """Bytes that are free on an accelerator; no limit is known for the host."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else math.inf


def calibration_of(job: Job, tokenizer: PreTrainedTokenizerBase) -> data.TokenCalibration | None:
    """The calibration windows; the dense cell needs none."""
    if (source := job.cell.calibration) is None:
        return None
    text = data.load(job.source, "calibration")
    return data.sample_calibration(text, tokenizer, source.samples, source.window, job.cell.seed)


def _revisions(job: Job, calibration: data.TokenCalibration | None) -> dict[str, str]:
    """Which text the calibration windows are from, and their hash, for the record."""
    if (source := job.cell.calibration) is None or calibration is None:
        return {}
    return {f"calibration:{source.name}": calibration.text.revision, "calibration:sha256": calibration.sha256}


def _compress(
    job: Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: data.TokenCalibration | None,
    progress: Progress,
    notes: list[str],
) -> PreTrainedModel:
    """The compressed model; without calibration the dense one. What the method has to say is added to `notes`."""
    if calibration is None:
        return model
    context = context_of(job, model, calibration, progress, notes)
    torch.manual_seed(job.cell.seed)
    with sharing.used(job):
        return job.method.compress(model, tokenizer, job.budget, calibration, context)


def context_of(
    job: Job, model: PreTrainedModel, calibration: data.TokenCalibration, progress: Progress, notes: list[str]
) -> Context:
    """Where and how to work on a model, and what the preset grants to training, windows capped at the model's limit."""
    preset, scratch = job.cell.budget, job.scratch / "method"
    window = min(preset.training_window, model.config.max_position_embeddings)
    if scratch.is_dir() and any(scratch.iterdir()):
        notes.append("went on from what an interrupted attempt had left, whose time is not counted")
    return Context(
        device=job.device,
        seed=job.cell.seed,
        batch_size=max(1, CALIBRATION_TOKENS // calibration.window),
        scratch=scratch,
        shared=job.shared,
        training=Training(steps=preset.training_steps, sequences=preset.training_sequences, window=window),
        artifacts=job.folder,
        progress=progress,
        notes=notes,
    )


def size_of(job: Job, dense: Footprint, compressed: Footprint, folder: Path) -> dict[str, Any]:
    """Counts from the tensors, bytes from the files."""
    prediction = job.prediction()
    share = compressed.active_total / dense.active_total
    if job.cell.ratio_basis == "block":
        share = compressed.active_block / dense.active_block
    return {
        "dense_params": dense.active_total,
        "requested": job.cell.ratio,
        **asdict(compressed),
        "stored_bytes": sum(path.stat().st_size for path in folder.rglob("*.safetensors")),
        "on_budget": job.budget.accepts(share, prediction.grid_step if prediction else 0.0),
    }


def structure_of(model: PreTrainedModel, calibration: data.TokenCalibration | None) -> dict[str, Any]:
    """What the compressed decoder is made of, per layer, and how many calibration tokens each expert meets."""
    config, made = model.config.to_dict(), describe(model)
    loads = {}
    if calibration and any(layer["mixture"] for layer in made["layers"]):
        size = max(1, LOAD_TOKENS // calibration.window)
        loads["calibration"] = load_fractions(model, islice(calibration.batches(size), 1))
    return (
        {key: config.get(key) for key in ("model_type", "num_hidden_layers", "compression")} | made | {"loads": loads}
    )


def keep(job: Job) -> None:
    """Move the checkpoint to where `--checkpoints` wants it, whole or not at all, across file systems too."""
    made = job.scratch / "checkpoint"
    if job.kept is None or job.kept.is_dir() or not made.is_dir():
        return
    with arriving(job.kept) as partial:
        shutil.copytree(made, partial)
    shutil.rmtree(made)


def memory() -> dict[str, int | None]:
    """Largest memory of this process so far, in bytes; on a device without such a counter None."""
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


class Laps:
    """A stopwatch."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call, or since the start."""
        before, self._since = self._since, time.perf_counter()
        return self._since - before
