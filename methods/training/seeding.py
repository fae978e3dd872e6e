"""Noise that follows from a seed alone, and leaves no trace in the generators."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def mixed(*numbers: int) -> int:
    """A seed that each of the numbers changes, of 32 bits: a processor's generator looks at no more."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """The default generators seeded while open, and as they were afterwards."""
    kind = torch.device(device).type
    with torch.random.fork_rng([] if kind == "cpu" else [device], device_type=kind):
        torch.manual_seed(seed)
        yield
