"""Random: whole heads and MLP channels go by lot. What any method that looks at the model has to beat.

Blalock et al., "What is the State of Neural Network Pruning?", https://arxiv.org/abs/2003.03033, ask for this baseline
beside every method. Sizes are those of `methods.allocation`.

The lots are drawn once per seed, whatever the ratio: what a smaller model keeps, a larger one keeps too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.allocation import Scores, UniformPruning
from methods.lazy import torch
from methods.modeling.shape import DecoderShape
from methods.registry import register

if TYPE_CHECKING:
    from torch import Generator

    from methods.modeling import DecoderLayer


@register("random", title="Random", reference="https://arxiv.org/abs/2003.03033", family="width")
@dataclass(frozen=True, kw_only=True)
class Random(UniformPruning):
    """Remove heads and channels at random, the same share of every block."""

    def scores(self, layer: DecoderLayer, shape: DecoderShape, generator: Generator) -> Scores:
        """Uniform random numbers."""
        return Scores(torch.rand(shape.kv_heads, generator=generator), torch.rand(shape.mlp_width, generator=generator))
