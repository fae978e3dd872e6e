"""One run in several processes (torchrun, `accelerate launch`): the main one does everything, the others help compress.

    accelerate launch --multi_gpu --num_processes 4 run_all.py --methods tomoe --ratios 0.6 --executor inline
    accelerate launch --multi_gpu --num_processes 2 run_all.py --methods tomoe --ratios 0.6 --executor inline \\
        --device cpu

Each process computes on a device of its own: on cuda the one with its number. Helpers plan nothing and write nothing.
They wait for the job that the main process is about to compress (or to fine-tune), do the same (whatever trains meets
the other processes there), drop the result and wait again. After a failure of one process nobody knows what the others
wait for, so the run ends and the launcher stops the rest.
"""

import math
import os
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

from benchmarks import plan
from benchmarks.job import Job
from methods.errors import UserError

PATIENCE = timedelta(days=30)
"""How long helpers wait while the main process evaluates."""


def processes() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1


def is_helper() -> bool:
    """Whether this process is not the main one."""
    return processes() > 1 and os.environ["RANK"] != "0"


def check(executor: str) -> None:
    """Raises UserError where cells would run in processes that the launcher does not know."""
    if processes() > 1 and executor != "inline":
        raise UserError(
            f"{processes()} processes were launched for one run, and that works with --executor inline only. "
            "Add it, or start run_all.py without a launcher."
        )


def own_device(device: str) -> str:
    """Meet the other processes; the device that this one takes of the asked one. Without a launcher that itself.

    Raises:
        UserError: there is none for this process.
    """
    if processes() == 1:
        return device
    import torch
    from accelerate import PartialState

    device = plan.device_of(device)
    count = {"cpu": math.inf, "cuda": torch.cuda.device_count()}.get(device, 0)
    if int(os.environ["LOCAL_RANK"]) >= count:
        raise UserError(
            f"--device {device}: {processes()} processes were launched, each takes a device of its own, and of these "
            f"there are {count}. Launch fewer processes, or type --device cuda or --device cpu."
        )
    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    return device if device == "cpu" else str(state.device)


def announce(job: Job | None) -> None:
    """Have the helpers take part in compressing a job, or in fine-tuning it; None lets them end."""
    if processes() > 1:
        _from_main(job and job.to_json())


def help_out(device: str) -> int:
    """Take part, on some device, in whatever the main process announces; the exit status."""
    from transformers.utils import logging

    from benchmarks import checkpoint, recovered

    logging.disable_progress_bar()
    while text := _from_main(None):
        with suppress(UserError):  # all processes meet it alike, and the main one reports it
            job = replace(Job.from_json(text), device=device)
            (recovered if job.plain else checkpoint).assist(job)
    return 0


def _from_main(text: str | None) -> str | None:
    """What the main process passes here, in every process."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([text])[0]
