"""Prefill and decode speed, bytes of weights and peak memory, the dense model timed in turn with the compressed one.

    python run_all.py --models tiny-llama --methods shortgpt --ratios 0.8 --tasks speed

Prefill is one forward pass over the prompt, decoding is greedy with a KV cache, one token of every sequence at a time.
Each repeat times both models, so that a busy machine slows both; the first repeat warms up and does not count.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks.metric import Metric

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from benchmarks.presets import Preset
    from methods.base import Progress

VERSION = "1"
"""Of the procedure above; goes into the record."""
CLEAR_PEAK, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Timing(NamedTuple):
    """Tokens per second of one repeat, over all sequences of the batch."""

    prefill: float
    decode: float


def measure(
    model: "PreTrainedModel", dense: "PreTrainedModel | None", settings: "Preset", progress: "Progress"
) -> dict[str, Metric]:
    """Time `model`, and relative to `dense` where there is one, at each of the preset's batch sizes.

    Returns:
        `speed/{prefill,decode}_tokens_per_s@bN` (medians over repeats), the same with `_vs_dense` (ratio of medians),
        `speed/weights_bytes`, and `speed/peak_bytes@bN` (weights and what running them adds) where it can be measured.
    """
    metrics = {"speed/weights_bytes": Metric(weights_bytes(model), None, 1)}
    steps = [(batch, repeat) for batch in settings.speed_batches for repeat in range(settings.speed_repeats + 1)]
    tracked = progress.track(steps, "speed")
    for batch in settings.speed_batches:
        metrics |= _measure_batch(model, dense, batch, settings, tracked)
    # Runs the iterator to its end, which is where it says that the work is done.
    assert next(tracked, None) is None
    return metrics


def _measure_batch(
    model: "PreTrainedModel", dense: "PreTrainedModel | None", batch: int, settings: "Preset", tracked: Iterator[Any]
) -> dict[str, Metric]:
    prompt = _prompt(model, batch, settings)
    before = _reset_peak(model.device)
    run(model, prompt, settings.speed_new_tokens)
    peak = _peak(model.device)
    if dense is not None:
        run(dense, prompt, settings.speed_new_tokens)
    next(tracked)
    own, other = [], []
    for _ in range(settings.speed_repeats):
        own.append(run(model, prompt, settings.speed_new_tokens))
        if dense is not None:
            other.append(run(dense, prompt, settings.speed_new_tokens))
        next(tracked)
    metrics = _rates(own, other, batch)
    if before is not None and peak is not None:
        metrics[f"speed/peak_bytes@b{batch}"] = Metric(weights_bytes(model) + max(0, peak - before), None, 1)
    return metrics


def _prompt(model: "PreTrainedModel", batch: int, settings: "Preset") -> "Tensor":
    """Random token ids [batch, tokens], short enough to leave room for the new tokens."""
    limit = getattr(model.config, "max_position_embeddings", None) or settings.speed_prompt + settings.speed_new_tokens
    tokens = min(settings.speed_prompt, limit - settings.speed_new_tokens)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)


@torch.inference_mode()
def run(model: "PreTrainedModel", prompt: "Tensor", new_tokens: int) -> Timing:
    """Prefill `prompt` [B, T], then decode `new_tokens` greedily, timing both."""
    batch, length = prompt.shape
    started = _now(model.device)
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    filled = _now(model.device)
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    decoded = _now(model.device)
    return Timing(batch * length / (filled - started), batch * new_tokens / (decoded - filled))


def _rates(own: list[Timing], dense: list[Timing], batch: int) -> dict[str, Metric]:
    metrics = {}
    for phase in Timing._fields:
        rates = [getattr(timing, phase) for timing in own]
        name = f"speed/{phase}_tokens_per_s"
        metrics[f"{name}@b{batch}"] = Metric(median(rates), median_stderr(rates), len(rates))
        if dense:
            others = [getattr(timing, phase) for timing in dense]
            ratios = [rate / other for rate, other in zip(rates, others, strict=True)]
            value = median(rates) / median(others)
            metrics[f"{name}_vs_dense@b{batch}"] = Metric(value, median_stderr(ratios), len(ratios))
    return metrics


def median_stderr(values: list[float]) -> float | None:
    """Standard error of a median, sqrt(pi/2) times that of a mean; None for fewer than three values."""
    return 1.2533 * stdev(values) / len(values) ** 0.5 if len(values) > 2 else None


def weights_bytes(model: "PreTrainedModel") -> int:
    """Bytes of the parameters, shared ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak(device: torch.device) -> int | None:
    """Forget the peak and return the bytes now in use; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        CLEAR_PEAK.write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _peak(device: torch.device) -> int | None:
    """Most bytes in use since the reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if STATUS.exists() else None


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
