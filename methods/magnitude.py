"""Magnitude: of every group of weights the largest stay. What a method that looks at activations has to beat.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", https://arxiv.org/abs/1506.02626;
2:4 as in Mishra et al., https://arxiv.org/abs/2104.08378. S_ij = |W_ij|; unstructured, weights are compared within
their matrix. Nothing is trained afterwards, which departs from both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from methods import modeling
from methods.base import Budget, Calibration, Context, Training
from methods.lazy import torch
from methods.modeling.shape import DecoderShape
from methods.registry import register
from methods.sparsity import Density, WeightPruning, groups

if TYPE_CHECKING:
    from methods.modeling import Decoder


@register("magnitude", title="Magnitude", reference="https://arxiv.org/abs/1506.02626", family="semi-structured")
@dataclass(frozen=True, kw_only=True)
class Magnitude(WeightPruning):
    """Keep the weights of largest absolute value; no calibration text is looked at."""

    streams: ClassVar[bool] = True

    def work(self, shape: DecoderShape, budget: Budget, tokens: int, training: Training) -> float:
        """None."""
        return 0.0

    def prune(self, decoder: Decoder, density: Density, calibration: Calibration, context: Context) -> None:
        """One projection after the other."""
        for layer in context.progress.track(decoder.layers, "pruning", len(decoder.layers)):
            with modeling.resident(layer.module, decoder.model.device):
                for name in (name for group in groups(layer) for name in group):
                    scores_RC = torch.abs(layer.module.get_submodule(name).get_parameter("weight").detach())
                    mask_RC = density.mask(scores_RC.view(1, -1)).view(scores_RC.shape)
                    modeling.sparsify(layer, name, mask_RC, self.pattern)
