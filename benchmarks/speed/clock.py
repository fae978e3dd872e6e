"""The time at which a device has done what it was given."""

import time

import torch


def synchronise(device: torch.device) -> None:
    """Wait until a device is done: CUDA and Apple's MPS take work in and return at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def now(device: torch.device) -> float:
    """Seconds since some moment, when the device is done."""
    synchronise(device)
    return time.perf_counter()
