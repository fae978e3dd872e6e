"""Energy from counters in the hardware, where there are any that can be read; it is never estimated.

CUDA device    what the device has drawn since the driver was loaded (NVML; needs the package nvidia-ml-py)
processor      what its packages have drawn (RAPL), whoever used them: of a machine that does nothing else
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
PACKAGES = "intel-rapl:[0-9]*"
"""Sockets are `intel-rapl:0`, on AMD too; what lies in them, and is part of them, is `intel-rapl:0:1`."""


@dataclass(frozen=True)
class Counter:
    """Running totals."""

    totals: Callable[[], tuple[int, ...]]
    """Reads them."""
    unit: float
    """Joules of 1."""
    wraps: tuple[int, ...] | None = None
    """The highest reading of each, after which it starts from 0; None: it never does."""

    def read(self) -> tuple[int, ...]:
        """The totals now."""
        return self.totals()

    def between(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Joules between two readings."""
        spent = [end - begin for begin, end in zip(before, after, strict=True)]
        if self.wraps is not None:
            spent = [amount % (wrap + 1) for amount, wrap in zip(spent, self.wraps, strict=True)]
        return sum(spent) * self.unit


def counter(device: torch.device) -> Counter | None:
    """The energy counter of a device; None where none can be read."""
    return {"cuda": _nvml, "cpu": _rapl}.get(device.type, lambda device: None)(device)


def _rapl(device: torch.device) -> Counter | None:
    packages = sorted(path for path in POWERCAP.glob(PACKAGES) if path.name.count(":") == 1)
    try:
        wraps = tuple(int((path / "max_energy_range_uj").read_text()) for path in packages)
        found = Counter(lambda: tuple(int((path / "energy_uj").read_text()) for path in packages), 1e-6, wraps)
        found.read()  # since 2020 only the administrator may
    except OSError:
        return None
    return found if packages else None


def _nvml(device: torch.device) -> Counter | None:
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        found = Counter(lambda: (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle),), 1e-3)
        found.read()  # older devices, and parts of devices, have none
    except pynvml.NVMLError:
        return None
    return found
