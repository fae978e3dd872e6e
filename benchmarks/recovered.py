"""The checkpoint of a fine-tuned cell: that of the plain cell, trained further, in place as a whole or not at all.

The plain one lies where `--checkpoints`, or the plain cell of the same run, has left it. Where it is gone it is made
again.
"""

import json
import shutil
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import checkpoint, data, launch, models, record, routes, store
from benchmarks.job import Job
from benchmarks.progress import Tracker
from methods.base import Progress, Silent
from methods.modeling.footprint import Footprint, footprint
from methods.recovery import adapters
from methods.recovery.fine_tuning import recover


def make(job: Job, progress: Tracker) -> None:
    """Fine-tune the plain cell's checkpoint and move the saved result, with its measurements, into place at once.

    Raises:
        UserError: the plain checkpoint cannot be made, another run is making it, or the training fails.
    """
    before, laps = _plain(job, progress), checkpoint.Laps()
    model, tokenizer = _load(job)
    load_s = laps.lap()
    launch.announce(job)
    calibration = checkpoint.calibration_of(job, tokenizer)
    notes: list[str] = [*before["notes"]]
    spent = _recover(job, model, tokenizer, calibration, progress, notes)
    recover_s, counted, structure = laps.lap(), footprint(model), checkpoint.structure_of(model, calibration)
    routes.write(job.folder, model, tokenizer)
    with checkpoint.arriving(job.scratch / "checkpoint") as partial:
        adapters.save(model, partial)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        own = {"load_s": load_s, "compress_s": 0.0, "recover_s": recover_s, "save_s": laps.lap()}
        measured = {
            "task": "recovery",
            "size": checkpoint.size_of(job, _dense(job), counted, partial),
            "time": {key: seconds + before["time"].get(key, 0.0) for key, seconds in own.items()},
            "memory": record.peak([before["memory"], checkpoint.memory()]),
            "provenance": _provenance(job, before["provenance"], spent),
            "notes": notes,
        }
        store.write_json(record.measured_file(partial), measured)
        store.write_json(job.folder / "structure.json", structure)
    _sweep(job)


def assist(job: Job) -> None:
    """The part of `make` in which the processes of a launch work together; the result is the main process's to keep."""
    model, tokenizer = _load(job)
    _recover(job, model, tokenizer, checkpoint.calibration_of(job, tokenizer), Silent(), [])


def _plain(job: Job, progress: Tracker) -> dict[str, Any]:
    """What was measured when the plain checkpoint was made, perhaps just now."""
    assert job.plain
    with job.plain.locked():
        if not job.plain.checkpoint.is_dir():
            checkpoint.make(job.plain, progress)
        return {"notes": []} | json.loads(record.measured_file(job.plain.checkpoint).read_text(encoding="utf-8"))


def _load(job: Job) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    assert job.plain
    folder = job.plain.checkpoint
    return checkpoint.load_model(folder, job, whole=True), models.load_tokenizer(folder)


def _recover(
    job: Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: data.TokenCalibration | None,
    progress: Progress,
    notes: list[str],
) -> dict[str, int]:
    assert calibration and job.recovery
    return recover(
        job.recovery, model, tokenizer, calibration, checkpoint.context_of(job, model, calibration, progress, notes)
    )


def _dense(job: Job) -> Footprint:
    """The dense model counted, from its config alone."""
    config = AutoConfig.from_pretrained(models.resolve(job.model).prepare())
    with torch.device("meta"):
        return footprint(AutoModelForCausalLM.from_config(config))


def _provenance(job: Job, before: dict[str, Any], spent: dict[str, int]) -> dict[str, Any]:
    """Of the fine-tuning, with the run that compressed named beside it."""
    kept = {key: before[key] for key in ("dataset_revisions", "task_versions")}
    compression = {key: before[key] for key in record.ORIGIN}
    return (
        kept
        | {"recovery": spent | {"peft": version("peft")}, "tasks": {"compression": compression}}
        | record.origin(job)
    )


def _sweep(job: Job) -> None:
    """Remove the plain checkpoint, unless it is to be kept or its own cell still needs it."""
    assert job.plain
    with job.plain.locked():
        if job.plain.finished():
            shutil.rmtree(job.plain.scratch, ignore_errors=True)
