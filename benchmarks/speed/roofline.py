"""How long a pass must take at least on a device, by what that device has just been seen to do.

    bound = max(bytes / bandwidth, FLOPs / peak)

bandwidth: the sum of a tensor much larger than caches. peak: a square product in the model's dtype. Both the best of a
few, in the process and run that times the model. A model that fits into the caches of a processor can be faster.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.speed.clock import now
from benchmarks.speed.work import Work

READ = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Bytes to read, by kind of device."""
LARGEST, LONG_ENOUGH = 8192, 0.02
"""Rows of the largest product, and seconds of a product that is large enough."""
TRIES = 5


class Ceilings(NamedTuple):
    """What a device can do."""

    bandwidth: float
    """Bytes it reads per second."""
    peak: float
    """FLOPs per second."""

    def seconds(self, work: Work) -> float:
        """The least time for some work."""
        return max(work.bytes / self.bandwidth, work.flops / self.peak)


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure them."""
    return Ceilings(_bandwidth(device), _peak(device, dtype))


def _bandwidth(device: torch.device) -> float:
    content = torch.ones(READ.get(device.type, READ["cpu"]) // 4, device=device)
    return content.nbytes / _best(content.sum, device)


def _peak(device: torch.device, dtype: torch.dtype) -> float:
    size, seconds = 256, 0.0
    while seconds < LONG_ENOUGH and size < LARGEST:
        size *= 2
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        seconds = _best(partial(torch.mm, matrix, matrix), device)
    return 2 * size**3 / seconds


def _best(task: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few; the first is left out, as it fetches and chooses kernels."""
    seconds = []
    for _ in range(1 + TRIES):
        began = now(device)
        task()
        seconds.append(now(device) - began)
    return min(seconds[1:])
