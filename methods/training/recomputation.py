"""Activation checkpointing: what a block computes is computed again in the backward pass instead of kept."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.checkpoint import checkpoint

from methods.modeling.decoder import DecoderLayer


@contextmanager
def recomputed(layers: Iterable[DecoderLayer]) -> Iterator[None]:
    """While open, these blocks keep only their input, with the noise of the first pass drawn again."""
    layers = list(layers)
    for layer in layers:
        layer.module.forward = _checkpointed(layer.module.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.module.forward


def _checkpointed(forward: Any) -> Any:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
