"""Memory of a generation: the most that it used, what its KV cache holds, and whether a larger batch will fit."""

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

CLEAR_PEAK, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup")
MARGIN = 0.9
"""Share of the free memory that a batch may be predicted to need."""


class Usage(NamedTuple):
    """Bytes in use; None where the system does not tell."""

    host: int | None
    """By the whole process."""
    device: int | None
    """By tensors on the CUDA device; None also where the model is elsewhere."""

    def on(self, device: torch.device) -> int | None:
        """Where a model on this device runs."""
        return self.device if device.type == "cuda" else self.host


def weights_bytes(model: "PreTrainedModel") -> int:
    """Bytes of the parameters and of the buffers (masks, lists of what is kept), shared ones once."""
    return sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))


@torch.no_grad()
def touch(model: "PreTrainedModel") -> None:
    """Read all of a model once: loaded in its file's dtype it is only mapped, and takes memory when first used."""
    for tensor in chain(model.parameters(), model.buffers()):
        tensor.sum()


def cache_bytes(cache: "Cache") -> int:
    """Bytes of the tensors in a cache, in whatever form its layers hold keys and values."""
    held = (tensor for layer in cache.layers for tensor in vars(layer).values() if isinstance(tensor, torch.Tensor))
    return sum(tensor.nbytes for tensor in held)


def reset_peak(device: torch.device) -> Usage:
    """Forget the peak; what is in use now."""
    on_device = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        on_device = torch.cuda.memory_allocated(device)
    try:
        CLEAR_PEAK.write_text("5")
        return Usage(_status("VmRSS"), on_device)
    except OSError:
        return Usage(None, on_device)


def peak(device: torch.device) -> Usage:
    """The most in use since the reset."""
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Usage(_status("VmHWM") if STATUS.exists() else None, on_device)


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def fits_host(needed: int, held: int, growth: float) -> bool:
    """Whether a batch `growth` times as large fits into the host's memory, without swapping.

    Args:
        needed: bytes that the last batch needed at its peak, beyond the weights.
        held: bytes of that which the process has not given back.
    """
    return needed * growth - held <= MARGIN * available()


def available() -> int:
    """Bytes that this process can still take: what is free in the system, or in the control group it is confined to."""
    free = psutil.virtual_memory().available
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used) + int(stat["inactive_file"]))
