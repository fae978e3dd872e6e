"""Speed, latency, memory and work of a model at growing batch sizes, the dense model timed in turn with it.

    python run_all.py --models tiny-llama --methods shortgpt --ratios 0.8 --tasks speed

A generation reads a prompt and goes on greedily with a KV cache (`generation`). At each batch size the first one of
each model warms up and is not counted. A repeat is a turn of generations, one of each model after the other, as many as
a second holds (of small models one is too short to be timed alone); so a busy machine slows both alike, and every ratio
is of two neighbours. The sweep ends where memory does (`memory`): a device may run out of it, on the host the next
batch is predicted to, so that nothing is ever swapped; or else at the preset's last batch. What a pass has to do, and
the least time for it, is counted from the tensors and from what the device was just seen to do (`work`, `roofline`).
"""

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.metric import Metric
from benchmarks.speed import summary
from benchmarks.speed.energy import counter
from benchmarks.speed.generation import Generation, make_prompt, run
from benchmarks.speed.memory import Usage, fits_host, peak, reset_peak, touch, weights_bytes
from benchmarks.speed.roofline import ceilings

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from benchmarks.presets import Preset
    from methods.base import Progress

VERSION = "3"
"""Of the procedure above; goes into the record."""
TURN_S = 1.0
"""Seconds that a turn takes at least, unless `MOST` generations of a model are shorter."""
MOST = 50


def measure(
    model: "PreTrainedModel", dense: "PreTrainedModel | None", settings: "Preset", progress: "Progress"
) -> dict[str, Metric]:
    """Time `model`, and relative to `dense` where there is one, at each of the preset's batch sizes that fits.

    Returns:
        `speed/...` as `summary` names them. `speed/largest_batch` is the last that was run, `speed/batch_without_room`
        the next one where memory ended the sweep.

    Raises:
        torch.OutOfMemoryError: not even the first batch fits the device.
    """
    sweep = Sweep(model, dense, settings)
    steps = [(batch, repeat) for batch in settings.speed_batches for repeat in range(settings.speed_repeats + 1)]
    tracked = progress.track(steps, "speed")
    metrics: dict[str, Metric] = {}
    for batch in settings.speed_batches:
        found = sweep.measure(batch, tracked) if sweep.has_room(batch) else None
        if found is None:
            metrics["speed/batch_without_room"] = Metric(batch, None, 1)
            break
        metrics |= found | {"speed/largest_batch": Metric(batch, None, 1)}
    # Runs the iterator to its end, which is where it says that the work is done.
    deque(tracked, maxlen=0)
    return metrics


class Sweep:
    """One model, and the dense one beside it, at one batch size after the other."""

    def __init__(self, model: "PreTrainedModel", dense: "PreTrainedModel | None", settings: "Preset") -> None:
        self.models = [model] if dense is None else [model, dense]
        self.settings, self.device = settings, model.device
        self.ceilings, self.counter = ceilings(model.device, model.dtype), counter(model.device)
        for each in self.models:
            touch(each)
        self.at_rest = reset_peak(self.device)
        self.last: tuple[int, int] | None = None
        """The last batch, and the bytes that the process came to have for it; None: there was none, or who knows."""

    def has_room(self, batch: int) -> bool:
        """Whether a batch is predicted to fit the host, from what the last one needed; a device says so itself."""
        now = reset_peak(self.device).host
        if self.device.type == "cuda" or self.last is None or self.at_rest.host is None or now is None:
            return True
        before, most = self.last
        return fits_host(most - self.at_rest.host, now - self.at_rest.host, batch / before)

    def measure(self, batch: int, tracked: Iterator[Any]) -> dict[str, Metric] | None:
        """The metrics of one batch size; None where a device other than the host is too small for it.

        Raises:
            torch.OutOfMemoryError: there was no smaller one.
        """
        try:
            return self._measure(batch, tracked)
        except torch.OutOfMemoryError:
            if self.last is None:
                raise
        torch.cuda.empty_cache()
        return None

    def _measure(self, batch: int, tracked: Iterator[Any]) -> dict[str, Metric]:
        prompt = make_prompt(self.models[0], batch, self.settings)
        reset_peak(self.device)
        self._run(self.models[0], prompt)
        used = peak(self.device)
        for model in self.models[1:]:
            self._run(model, prompt)
        next(tracked)
        neighbours = []
        for _ in range(self.settings.speed_repeats):
            neighbours += self._turn(prompt)
            next(tracked)
        self.last = batch, peak(self.device).host or 0
        own, *others = zip(*neighbours, strict=True)
        metrics = summary.timings(own, others[0] if others else ()) | self._peaks(batch, used)
        return metrics | summary.work(self.models[0], own, self.ceilings)

    def _turn(self, prompt: "Tensor") -> list[list[Generation]]:
        """Generations of each model, one after the other, until the time is over."""
        neighbours, seconds = [], 0.0
        while not neighbours or (seconds < TURN_S and len(neighbours) < MOST):
            neighbours.append([self._run(model, prompt) for model in self.models])
            seconds += sum(generation.seconds for generation in neighbours[-1])
        return neighbours

    def _run(self, model: "PreTrainedModel", prompt: "Tensor") -> Generation:
        return run(model, prompt, self.settings.speed_new_tokens, self.counter)

    def _peaks(self, batch: int, used: Usage) -> dict[str, Metric]:
        """Of the model where it runs (weights, and what running it adds), and of the process that feeds a device.

        What is added counts from the state before the first batch: an allocator keeps what a smaller one has freed.
        """
        found, start = {}, self.at_rest.on(self.device)
        if start is not None and (most := used.on(self.device)) is not None:
            rise = max(0, most - start)
            found[f"speed/peak_bytes@b{batch}"] = Metric(weights_bytes(self.models[0]) + rise, None, 1)
        if self.device.type == "cuda" and used.host is not None:
            found[f"speed/peak_host_bytes@b{batch}"] = Metric(used.host, None, 1)
        return found
