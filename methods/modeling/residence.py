"""Models larger than the device: blocks wait in host memory, and come to the device one at a time, to be run or cut.

Everything else (embeddings, final norm, head) is on the device, so that `model.device` is where things are computed.
Gradients do not survive the journey: only methods that run a model without them can work on such a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from methods.modeling.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HOST = torch.device("cpu")


@contextmanager
def resident(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A module on the device while open, and then back where it was, with whatever was done to it meanwhile.

    Args:
        module: with at least one parameter, all of them in one place.
    """
    home = next(module.parameters()).device
    if home == device:
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


def keep_blocks_on_host(model: PreTrainedModel, device: torch.device) -> None:
    """Put everything but the blocks of a model in host memory on the device, in place; it can then be run there."""
    decoder = Decoder(model)
    blocks = decoder.module_list
    decoder.replace(decoder.family.layers, nn.ModuleList())
    model.to(device)  # pyright: ignore[reportArgumentType]
    decoder.replace(decoder.family.layers, blocks)
    for block in blocks:
        _visiting(block, device)


def _visiting(block: nn.Module, device: torch.device) -> None:
    """Bring a block to the device whenever it is called, and back, unless it is `resident` there."""
    visits: list[Any] = []

    def arrive(module: nn.Module, args: Any, kwargs: Any) -> None:
        visits.append(resident(module, device))
        visits[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        visits.pop().__exit__(None, None, None)

    block.register_forward_pre_hook(arrive, with_kwargs=True)
    block.register_forward_hook(leave, always_call=True)
