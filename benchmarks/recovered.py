"""The checkpoint of a fine-tuned cell: that of the plain cell, trained further, in place as a whole or not at all.

The plain one is taken from where `--checkpoints`, or the plain cell of the same run, has left it. Where it is gone it is
made again.
"""

import json
import shutil
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import checkpoint, launch, models, record, store
from benchmarks.checkpoint import Laps
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
    before = _plain(job, progress)
    laps = Laps()
    model, tokenizer = _load(job)
    load_s = laps.lap()
    launch.announce(job)
    spent = _recover(job, model, tokenizer, progress)
    recover_s, counted = laps.lap(), footprint(model)
    with checkpoint.arriving(job.scratch / "checkpoint") as partial:
        if adapters.present(model):
            adapters.save(model, partial / adapters.FOLDER)
            adapters.detach(model)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        own = {"load_s": load_s, "recover_s": recover_s, "save_s": laps.lap()}
        store.write_json(record.measured_file(partial), _measured(job, before, own, spent, counted, partial))
        store.write_json(job.folder / "structure.json", checkpoint.structure_of(model, None))
    _sweep(job)
