"""How far the figures of the speed task are from each other when it is repeated.

    python -m benchmarks.selfcheck speed --times 5

The whole task on tiny-llama, `demo`'s settings: shortgpt at 60 % beside the dense model, and the dense model alone.
The largest distance from the median, in per cent of it; a quiet machine should keep speeds within 10, ratios within 5.
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
CALIBRATION_WINDOWS, CALIBRATION_TOKENS = 8, 128


def spread(values: Sequence[float]) -> float:
    """The largest distance from the median, as a share of it."""
    middle = median(values)
    return max(abs(value - middle) for value in values) / middle


def report(times: int, settings: Preset = PRESETS["demo"], show: Callable[[str], None] = print) -> None:
    """Print every figure that is timed: median and spread over `times` runs."""
    dense, compressed = _models()
    show(f"{device('cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__}, {times} times")
    figures: dict[str, list[float]] = {}
    for _ in range(times):
        for name, model, other in ((METHOD, compressed, dense), ("dense", dense, None)):
            for metric, found in speed.measure(model, other, settings, Silent()).items():
                figures.setdefault(f"{name} {metric.removeprefix('speed/')}", []).append(found.value)
    show(f"{'':50} {'median':>14} {'off by, %':>10}")
    for name, values in figures.items():
        if len(set(values)) > 1:  # the others are counted
            show(f"{name:50} {median(values):14.6g} {100 * spread(values):10.1f}")


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
