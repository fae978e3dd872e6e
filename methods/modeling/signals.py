"""What enters one block after another, for methods that calibrate block by block (SliceGPT, MoDeGPT).

One batch is on the device at a time, the others wait in the host's memory: 4 bytes x tokens x D for an fp32 model.
"""

# Shape suffixes: B batch, T tokens, D hidden size.

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from methods.base import Batch, Calibration
from methods.modeling.decoder import Decoder, layer_calls


@dataclass(frozen=True)
class Signals:
    """The residual stream at one point of the network, for all calibration batches, kept on the CPU."""

    batches: list[Tensor]
    """Per batch: the signal, shape [B, T, D]."""
    keywords: list[dict[str, Any]]
    """Per batch: what every block is called with beside the signal."""
    masks: list[Tensor | None]
    """Per batch: True where a token is real, shape [B, T]; None when all are."""
    device: torch.device

    @classmethod
    def of(cls, decoder: Decoder, calibration: Calibration, batch_size: int) -> Signals:
        """What enters the first block."""
        return cls.at_entrance(decoder, calibration.batches(batch_size))

    @classmethod
    def at_entrance(cls, decoder: Decoder, batches: Iterable[Batch]) -> Signals:
        """What enters the first block, for some batches."""
        batches = list(batches)
        signals = cls([], [], [batch.mask for batch in batches], decoder.model.device)
        for x_BTD, keywords in layer_calls(decoder, batches):
            signals.batches.append(x_BTD.cpu())
            signals.keywords.append(keywords)
        return signals

    def update(self, function: Callable[[Tensor, dict[str, Any], Tensor | None], Tensor]) -> None:
        """Replace each batch's signal x by function(x, keywords, mask), one batch at a time."""
        for index, call in enumerate(self.calls()):
            self.batches[index] = function(*call).cpu()

    def calls(self) -> Iterator[tuple[Tensor, dict[str, Any], Tensor | None]]:
        """Per batch: the signal on the device, the keywords and the mask."""
        for x_BTD, keywords, mask_BT in zip(self.batches, self.keywords, self.masks, strict=True):
            yield x_BTD.to(self.device), keywords, mask_BT

    def rows(self) -> Iterator[Tensor]:
        """Per batch, the signal of the real tokens in fp64, shape [tokens, D]."""
        for x_BTD, mask_BT in zip(self.batches, self.masks, strict=True):
            yield real_tokens(x_BTD, mask_BT).to(self.device).double()


def real_tokens(x_BTW: Tensor, mask_BT: Tensor | None) -> Tensor:
    """What belongs to tokens that are no padding: [B, T, W] to [tokens, W]."""
    return x_BTW.flatten(0, 1) if mask_BT is None else x_BTW[mask_BT.bool().to(x_BTW.device)]
