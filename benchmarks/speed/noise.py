"""How far the figures of the speed task are from each other when it is repeated.

    python -m benchmarks.selfcheck speed --times 5

The whole task on tiny-llama, `demo`'s settings: shortgpt at 60 % beside the dense model, and the dense model alone.
The largest distance from the median, in per cent of it, and the limit that a quiet machine should keep: ratios to the
dense model 5, other medians 10. Tails (p90, p99) and quartile distances are exempt, and marked so: they are made of the
few generations that something disturbed, which no number of repeats takes out. Cores that other programs use as well
take away more than the limits, most of all where threads wait for each other: OMP_NUM_THREADS=1 repeats better there.
Where what the device does by itself (read_bytes_per_s, peak_flops_per_s) is off by more, the machine was not quiet.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import methods
from benchmarks import data, models, speed
from benchmarks.presets import PRESETS, Preset
from benchmarks.record import device
from methods.base import Budget, Context, Silent

MODEL, METHOD, RATIO = "tiny-llama", "shortgpt", 0.6
MEDIANS, RATIOS = 10, 5
"""Limits, in per cent."""
TAILS = ("_p90@", "_p99@", "_iqr@")
"""What has no limit."""
CALIBRATION_WINDOWS, CALIBRATION_TOKENS = 8, 128


def spread(values: Sequence[float]) -> float:
    """The largest distance from the median, as a share of it."""
    middle = median(values)
    return max(abs(value - middle) for value in values) / middle


def limit(figure: str) -> int | None:
    """What `spread` should stay within on a quiet machine, in per cent; None: exempt."""
    if "_vs_dense@" in figure:
        return RATIOS
    return None if any(tail in figure for tail in TAILS) else MEDIANS


def report(times: int, settings: Preset = PRESETS["demo"], show: Callable[[str], None] = print) -> None:
    """Print every figure that is timed: median and spread over `times` runs."""
    dense, compressed = _models()
    show(f"{device('cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__}, {times} times")
    figures: dict[str, list[float]] = {}
    for _ in range(times):
        for name, model, other in ((METHOD, compressed, dense), ("dense", dense, None)):
            for metric, found in speed.measure(model, other, settings, Silent()).items():
                figures.setdefault(f"{name} {metric.removeprefix('speed/')}", []).append(found.value)
    show(f"{'':50} {'median':>14} {'off by, %':>10} {'limit, %':>10}")
    for name, values in figures.items():
        if len(set(values)) > 1:  # the others are counted
            show(f"{name:50} {median(values):14.6g} {100 * spread(values):10.1f} {limit(name) or 'exempt':>10}")


def _models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Dense and compressed."""
    path = models.resolve(MODEL).prepare()
    tokenizer = models.load_tokenizer(path)
    dense, model = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for _ in range(2))
    text = data.load("wikileads", "calibration")
    calibration = data.sample_calibration(
        text, tokenizer, samples=CALIBRATION_WINDOWS, window=CALIBRATION_TOKENS, seed=0
    )
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(scratch=Path(scratch))
        return dense, methods.configure(METHOD, {}).compress(
            model, tokenizer, Budget(ratio=RATIO), calibration, context
        )
