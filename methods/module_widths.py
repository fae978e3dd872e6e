"""Widths of the modules of every block, for methods that give every block a share of its own (MoDeGPT).

A block has three modules: query and key (w dimensions per head), value and output (v per head), MLP (channels). Blocks
lose different shares s_l of all three. With BI_l a block's influence and s the mean share that the ratio asks for,

    s_l = L s softmax_l(-BI_l / epsilon)        none above a maximum: the excess goes to the others in proportion
    w_l = h (1 - s_l), v_l = h (1 - s_l)        nearest number of rotary pairs (of dimensions where some do not rotate)
    channels of all blocks = what makes the total right, rounded; they are removed from blocks in proportion to s_l

so that the counted size is off by half a channel at most, however coarse the heads are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from methods.allocation import channel_size
from methods.base import Budget
from methods.modeling.shape import DecoderShape


class Widths(NamedTuple):
    """What one block keeps."""

    qk: int
    """Query and key dimensions per head."""
    vo: int
    """Value dimensions per head."""
    mlp: int
    """MLP channels."""


def block_size(shape: DecoderShape, widths: Widths) -> int:
    """Parameters of a block. Narrower values have no bias: the output projection has it, even if it had none."""
    query_key, value = (shape.heads + shape.kv_heads) * widths.qk, shape.kv_heads * widths.vo
    folded = shape.qkv_bias and widths.vo < shape.head_dim
    biases = query_key * shape.qkv_bias + value * (shape.qkv_bias and not folded)
    biases += shape.hidden * (shape.output_bias or folded)
    attention = (query_key + value + shape.heads * widths.vo) * shape.hidden + biases + shape.head_norms
    return shape.layer - shape.attention + attention - (shape.mlp_width - widths.mlp) * channel_size(shape)


def model_size(shape: DecoderShape, widths: Sequence[Widths]) -> tuple[int, int]:
    """(total, block) parameters of the whole model."""
    block = sum(block_size(shape, one) for one in widths)
    return shape.total - shape.block + block, block


def removable(shape: DecoderShape) -> int:
    """Parameters of a block that scale with its share; queries that are normalised over the head stay."""
    kept = 0 if not shape.qk_norm else (shape.heads + shape.kv_heads) * shape.head_dim * shape.hidden
    fixed = kept + shape.head_norms + shape.hidden * (shape.output_bias + shape.mlp_bias)
    return shape.attention + shape.mlp - fixed


def mean_sparsity(shape: DecoderShape, budget: Budget) -> float:
    """s: the share of every block that has to go on average; above 1 where the ratio cannot be reached."""
    return (1 - budget.ratio) * budget.dense(shape) / (shape.layers * removable(shape))


def spread(weights: Sequence[float], total: float, most: float) -> list[float]:
    """A total in proportion to positive weights, none above `most`; the excess goes to the others in proportion."""
    capped: set[int] = set()
    while len(capped) < len(weights):
        free = [0.0 if i in capped else weight for i, weight in enumerate(weights)]
        unit = (total - most * len(capped)) / sum(free)
        shares = [most if i in capped else unit * weight for i, weight in enumerate(free)]
        over = {i for i, share in enumerate(shares) if share > most}
        if not over:
            return shares
        capped |= over
    return [most] * len(weights)


def sparsities(influence: Sequence[float], mean: float, epsilon: float, most: float) -> list[float]:
    """s_l of every block; their mean is `mean`, which is at most `most`."""
    lowest = min(influence)
    weights = [max(math.exp((lowest - one) / epsilon), 1e-300) for one in influence]  # positive, as `spread` needs
    return spread(weights, len(influence) * mean, most)


def widths(shape: DecoderShape, budget: Budget, shares: Sequence[float]) -> list[Widths]:
    """The widths nearest to the budget for given shares s_l to remove."""
    heads = [_head_widths(shape, 1 - share) for share in shares]
    empty = sum(block_size(shape, Widths(*pair, 0)) for pair in heads)
    stay = shape.block - budget.dense(shape) + round(budget.ratio * budget.dense(shape))
    channels = round((stay - empty) / channel_size(shape))
    channels = min(max(channels, shape.layers), shape.layers * shape.mlp_width)
    gone = shape.layers * shape.mlp_width - channels
    removed = whole(spread([max(share, 1e-300) for share in shares], gone, shape.mlp_width - 1), gone)
    return [Widths(*pair, shape.mlp_width - one) for pair, one in zip(heads, removed, strict=True)]


def _head_widths(shape: DecoderShape, share: float) -> tuple[int, int]:
    """Query/key and value dimensions nearest to a share of the head, at least one group or dimension."""
    step = len(shape.rope_groups[-1])
    qk = shape.head_dim if shape.qk_norm else step * max(1, round(share * shape.head_dim / step))
    return qk, max(1, round(share * shape.head_dim))


def whole(numbers: Sequence[float], total: int) -> list[int]:
    """The numbers rounded to a given sum: down, and up where the remainders are largest, earlier ones first."""
    down = [math.floor(number + 1e-9) for number in numbers]
    order = sorted(range(len(numbers)), key=lambda i: down[i] - numbers[i])
    for i in order[: total - sum(down)]:
        down[i] += 1
    return down
