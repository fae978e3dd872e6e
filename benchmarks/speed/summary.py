"""From timed generations to metrics, all of them named `speed/...`; `@bN` is the batch size.

| metric | what |
| --- | --- |
| `{prefill,decode}_tokens_per_s@bN` | median over generations, over all sequences of the batch |
| `{prefill,decode}_tokens_per_s_iqr@bN` | distance between the quartiles of the same |
| `{prefill,decode}_tokens_per_s_vs_dense@bN` | median of the ratios of neighbours |
| `{first,next}_token_s_{p50,p90,p99}@bN` | latency: percentiles over generations, and over all their steps |
| `{prefill,decode}_time_over_bound@bN` | median time over the least time (`roofline`) |
| `{prefill,decode}_joules_per_token@bN` | mean over generations, where there is a counter (`energy`) |
| `peak_bytes@bN`, `peak_host_bytes@bN` | memory where the model runs; of the process that feeds a device |
| `weights_bytes`, `cache_bytes_per_token` | of parameters and buffers; of the KV cache |
| `{prefill,decode}_flops_per_token` | of the prompt, and of the token after it (`work`) |
| `read_bytes_per_s`, `peak_flops_per_s` | what the device was seen to do |
| `threads` | that share the work of a pass, where the processor does it |
"""

from collections.abc import Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING

import torch

from benchmarks.metric import Metric
from benchmarks.speed import work as counted
from benchmarks.speed.generation import Generation
from benchmarks.speed.memory import weights_bytes
from benchmarks.speed.roofline import Ceilings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PHASES = ("prefill", "decode")
PERCENTILES = (50, 90, 99)
NORMAL_IQR = 1.349
"""Distance between the quartiles of a normal distribution, in its standard deviations."""


def timings(own: Sequence[Generation], dense: Sequence[Generation]) -> dict[str, Metric]:
    """Rates, their ratios to the dense model's where there are any, latencies and energies.

    Args:
        dense: the neighbours of `own` in time, in its order; or none.
    """
    metrics, batch = {}, own[0].batch
    for phase in PHASES:
        rates = [getattr(generation, phase) for generation in own]
        name = f"speed/{phase}_tokens_per_s"
        metrics[f"{name}@b{batch}"] = _median(rates)
        metrics[f"{name}_iqr@b{batch}"] = Metric(iqr(rates), None, len(rates))
        if dense:
            ratios = [rate / getattr(other, phase) for rate, other in zip(rates, dense, strict=True)]
            metrics[f"{name}_vs_dense@b{batch}"] = _median(ratios)
    return metrics | _latencies(own) | _energies(own)


def _latencies(own: Sequence[Generation]) -> dict[str, Metric]:
    seconds = {
        "first": [generation.first_s for generation in own],
        "next": [step for generation in own for step in generation.next_s],
    }
    return {
        f"speed/{which}_token_s_p{percent}@b{own[0].batch}": Metric(percentile(values, percent), None, len(values))
        for which, values in seconds.items()
        for percent in PERCENTILES
    }


def _energies(own: Sequence[Generation]) -> dict[str, Metric]:
    batch, prompt, steps = own[0].batch, own[0].prompt, len(own[0].next_s)
    spent = {
        "prefill": [generation.prefill_j / (batch * prompt) for generation in own if generation.prefill_j is not None],
        "decode": [generation.decode_j / (batch * steps) for generation in own if generation.decode_j is not None],
    }
    return {
        f"speed/{phase}_joules_per_token@b{batch}": Metric(fmean(joules), None, len(joules))
        for phase, joules in spent.items()
        if joules
    }


def work(model: "PreTrainedModel", own: Sequence[Generation], ceilings: Ceilings) -> dict[str, Metric]:
    """What the passes had to do, and how much longer than the least time they took."""
    batch, length, cache_bytes = own[0].batch, own[0].prompt, own[0].cache_bytes
    passes = {
        "prefill": (counted.prefill, batch * length, [generation.first_s for generation in own]),
        "decode": (counted.decode, batch, [fmean(generation.next_s) for generation in own]),
    }
    metrics = {"weights_bytes": weights_bytes(model), "cache_bytes_per_token": cache_bytes}
    metrics |= {"read_bytes_per_s": ceilings.bandwidth, "peak_flops_per_s": ceilings.peak}
    if model.device.type == "cpu":
        metrics["threads"] = torch.get_num_threads()
    for phase, (count, tokens, seconds) in passes.items():
        done = count(model, batch, length, cache_bytes)
        metrics[f"{phase}_flops_per_token"] = done.flops / tokens
        metrics[f"{phase}_time_over_bound@b{batch}"] = median(seconds) / ceilings.seconds(done)
    return {f"speed/{name}": Metric(value, None, 1) for name, value in metrics.items()}


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two values around it."""
    return torch.tensor(values, dtype=torch.float64).quantile(percent / 100).item()


def iqr(values: Sequence[float]) -> float:
    """Distance between the quartiles."""
    return percentile(values, 75) - percentile(values, 25)


def _median(values: Sequence[float]) -> Metric:
    return Metric(median(values), median_stderr(values), len(values))


def median_stderr(values: Sequence[float]) -> float | None:
    """Standard error of a median, sqrt(pi/2) times that of a mean, from the quartiles, as some generations are always
    disturbed; None for fewer than three values."""
    return 1.2533 * iqr(values) / NORMAL_IQR / len(values) ** 0.5 if len(values) > 2 else None
