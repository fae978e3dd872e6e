"""What ToMoE's weights add up to (paper, equation 8 and its appendix): T(w), the target p, and what conversion adds.

    T(w) = sum over layers of d (H + Hk) w_qk + d (H + Hk) w_vo + nw d w_mlp         nw: 3 gated, 2 plain

Embeddings, head, norms and biases are not in T. A budget speaks of the whole model (or of its blocks) and counts what
conversion adds, so the fraction p of T_total that may stay is

    p = (ratio * dense - (dense - T_total) - added) / T_total.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from methods.base import Budget
from methods.modeling.shape import DecoderShape


def layer_weights(qk: Any, vo: Any, mlp: Any, shape: DecoderShape) -> Any:
    """One layer's share of T for its widths; numbers or tensors."""
    heads, projections = shape.heads + shape.kv_heads, 3 if shape.gated else 2
    return shape.hidden * (heads * qk + heads * vo + projections * mlp)


def prunable(shape: DecoderShape) -> int:
    """T_total: the weights that masks act on."""
    return shape.layers * layer_weights(shape.head_dim, shape.head_dim, shape.mlp_width, shape)


@dataclass(frozen=True, kw_only=True)
class Added:
    """What conversion adds to one layer."""

    experts: int
    """Rows of the router; 1 needs no router."""
    embedding: int
    """Width of the projection that chooses values; 0 where no token chooses."""

    def count(self, shape: DecoderShape) -> int:
        """Parameters: router N d; projection e d with its bias, LayerNorm 2 e, decoder h e."""
        router = self.experts * shape.hidden if self.experts > 1 else 0
        return router + self.embedding * (shape.hidden + 1 + 2 + shape.head_dim)


def published_added(shape: DecoderShape, experts: int, embedding: int) -> int:
    """The paper's formula, which leaves out LayerNorms and biases: L (d e + e h + d N)."""
    return shape.layers * (shape.hidden * embedding + embedding * shape.head_dim + shape.hidden * experts)


def keep_fraction(shape: DecoderShape, budget: Budget, added: int = 0) -> float:
    """p, the fraction of T_total to keep so that the whole meets the budget; negative where it cannot."""
    dense, total = budget.dense(shape), prunable(shape)
    return (budget.ratio * dense - (dense - total) - added) / total


class Kept(NamedTuple):
    """What a converted layer's token uses: head dimensions, and neurons."""

    qk: float
    value: float
    output: float
    mlp: int


def active_block(shape: DecoderShape, layers: Sequence[Kept], added: Added) -> int:
    """Parameters of all blocks that a token uses once converted."""
    return sum(_active_layer(shape, kept) + added.count(shape) for kept in layers)


def _active_layer(shape: DecoderShape, kept: Kept) -> int:
    heads, kv_heads, d = shape.heads, shape.kv_heads, shape.hidden
    attention = d * ((heads + kv_heads) * kept.qk + kv_heads * kept.value + heads * kept.output)
    mlp = d * (3 if shape.gated else 2) * kept.mlp
    qkv_biases = ((heads + kv_heads) * kept.qk + kv_heads * kept.value) * shape.qkv_bias
    mlp_biases = ((2 if shape.gated else 1) * kept.mlp + d) * shape.mlp_bias
    norms = shape.layer - shape.attention - shape.mlp + shape.head_norms
    return round(attention + mlp + qkv_biases + mlp_biases + d * shape.output_bias + norms)
