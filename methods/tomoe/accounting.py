"""What ToMoE's weights add up to (paper, equation 8 and its appendix): T(w), the target p, and what conversion adds.

    T(w) = sum over layers of d (H + Hk) w_qk + d Hk w_v + d H w_o + nw d w_mlp         nw: 3 gated, 2 plain

The paper has one w_vo for values and outputs; where only one of them is masked (`vo_mask`), the other counts whole.
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


class Kept(NamedTuple):
    """What a token of one layer uses: dimensions per head, and neurons. Numbers, or tensors while training."""

    qk: Any
    value: Any
    output: Any
    mlp: Any


def layer_weights(kept: Kept, shape: DecoderShape) -> Any:
    """One layer's share of T."""
    heads, kv_heads, projections = shape.heads, shape.kv_heads, 3 if shape.gated else 2
    attention = (heads + kv_heads) * kept.qk + kv_heads * kept.value + heads * kept.output
    return shape.hidden * (attention + projections * kept.mlp)


def whole(shape: DecoderShape, mlp: float = 1.0) -> Kept:
    """A layer with nothing masked, or with a share of its neurons."""
    return Kept(shape.head_dim, shape.head_dim, shape.head_dim, mlp * shape.mlp_width)


def prunable(shape: DecoderShape) -> int:
    """T_total: the weights that masks act on."""
    return round(shape.layers * layer_weights(whole(shape), shape))


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


def keep_fraction(shape: DecoderShape, budget: Budget, added: int = 0) -> float:
    """p, the fraction of T_total to keep so that the whole meets the budget; negative where it cannot."""
    dense, total = budget.dense(shape), prunable(shape)
    return (budget.ratio * dense - (dense - total) - added) / total


def active_block(shape: DecoderShape, layers: Sequence[Kept], added: Added) -> int:
    """Parameters of all blocks that a token uses once converted."""
    return sum(_active_layer(shape, kept) + added.count(shape) for kept in layers)


def _active_layer(shape: DecoderShape, kept: Kept) -> int:
    heads, kv_heads, d = shape.heads, shape.kv_heads, shape.hidden
    qkv_biases = ((heads + kv_heads) * kept.qk + kv_heads * kept.value) * shape.qkv_bias
    mlp_biases = ((2 if shape.gated else 1) * kept.mlp + d) * shape.mlp_bias
    norms = shape.layer - shape.attention - shape.mlp + shape.head_norms
    return round(layer_weights(kept, shape) + qkv_biases + mlp_biases + d * shape.output_bias + norms)
