"""Noise that follows from a seed alone, and leaves no trace in the generators."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """The default generators seeded while open, and as they were afterwards."""
    kind = torch.device(device).type
    with torch.random.fork_rng([] if kind == "cpu" else [device], device_type=kind):
        torch.manual_seed(seed)
        yield
