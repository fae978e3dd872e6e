"""Structured magnitude: whole heads and MLP channels with the smallest weights go.

Li et al., "Pruning Filters for Efficient ConvNets", https://arxiv.org/abs/1608.08710, remove the filters of smallest
norm. The filter of a transformer is everything that goes together, so with W[j, :] rows and W[:, j] columns

    channel j      |Wgate[j, :]|^2 + |Wup[j, :]|^2 + |Wdown[:, j]|^2
    head group     |Wq[rows]|^2 + |Wk[rows]|^2 + |Wv[rows]|^2 + |Wo[:, columns]|^2

are compared within a block. Sizes are those of `methods.allocation`.

Departs from the paper: the L2 norm instead of L1; nothing is trained afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.allocation import Scores, UniformPruning
from methods.lazy import torch
from methods.modeling.shape import DecoderShape
from methods.registry import register

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from methods.modeling import DecoderLayer


@register(
    "structured-magnitude",
    title="Structured magnitude",
    reference="https://arxiv.org/abs/1608.08710",
    family="width",
)
@dataclass(frozen=True, kw_only=True)
class StructuredMagnitude(UniformPruning):
    """Remove the heads and channels of smallest norm, the same share of every block."""

    def scores(self, layer: DecoderLayer, shape: DecoderShape, generator: Generator) -> Scores:
        """Squared norms."""
        heads = energy(layer.attention_inputs, layer.attention_output, shape.kv_heads)
        return Scores(heads, energy(layer.mlp_inputs, layer.mlp_output, shape.mlp_width))


def energy(inputs: list[nn.Linear], output: nn.Linear, parts: int) -> Tensor:
    """Squared norm of each of equal parts of a sub-block: its rows of `inputs`, its columns of `output`, [parts]."""
    weights = [linear.weight for linear in inputs] + [output.weight.T]
    return torch.stack([squares(weight).reshape(parts, -1).sum(1) for weight in weights]).sum(0)


def squares(weight: Tensor) -> Tensor:
    """Squared norm of every row, in at least fp32: [rows, columns] to [rows]."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).square().sum(1)
