"""Uniform pruning of whole structures: every block keeps the same share of its attention heads and MLP channels.

A head group is a key head, its value head and the query heads that read it. With Hk groups of g parameters and F
channels of c parameters in each of the L blocks that are pruned (all, or a range of them), S the parameters of their
groups and channels that must stay for the model to have the asked ratio, and f = S / (L Hk g + L F c):

    groups per block     k with k / Hk nearest to f, at least one (the smaller among equals)
    channels in all      C = (S - L k g) / c, rounded: the MLPs take up what whole groups cannot
    channels per block   C // L, and one more in each of the first C mod L blocks

so that the counted size is off by half a channel at most. Of all k only those are looked at whose C is between L and
L F; where there is none, the nearest size is taken and refused if it is off budget. A method adds scores: the groups
and channels of highest score stay, the earlier one among equals.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from methods import modeling
from methods.base import Budget, Calibration, Context, Method, Prediction
from methods.lazy import torch
from methods.modeling.shape import DecoderShape

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from methods.modeling import Decoder, DecoderLayer


def group_size(shape: DecoderShape) -> int:
    """g: rows (and biases) of a key, a value and their query heads, and the columns of the output projection."""
    readers = shape.heads // shape.kv_heads
    return shape.head_dim * ((2 * readers + 2) * shape.hidden + (readers + 2) * shape.qkv_bias)


def channel_size(shape: DecoderShape) -> int:
    """c: rows (and biases) of up and, if there is one, gate, and the column of down."""
    inputs = 2 if shape.gated else 1
    return (inputs + 1) * shape.hidden + inputs * shape.mlp_bias


@dataclass(frozen=True)
class Allocation:
    """How much of the blocks stays."""

    shape: DecoderShape
    """Of the dense model."""
    blocks: range
    """The blocks that are pruned."""
    groups: int
    """k: head groups of each of them."""
    total_channels: int
    """C: MLP channels of all of them together."""

    @property
    def channels(self) -> list[int]:
        """MLP channels of each pruned block."""
        width, rest = divmod(self.total_channels, len(self.blocks))
        return [width + (index < rest) for index in range(len(self.blocks))]

    @property
    def size(self) -> int:
        """Parameters of the kept groups and channels of the pruned blocks."""
        heads = len(self.blocks) * self.groups * group_size(self.shape)
        return heads + self.total_channels * channel_size(self.shape)


def everything(shape: DecoderShape, blocks: range | None = None) -> Allocation:
    """The dense model, of which some blocks (None: all) are to be pruned."""
    blocks = range(shape.layers) if blocks is None else blocks
    return Allocation(shape, blocks, shape.kv_heads, len(blocks) * shape.mlp_width)


def allocate(shape: DecoderShape, budget: Budget, blocks: range | None = None) -> Allocation:
    """The allocation of the module's docstring: the one nearest to the budget.

    Args:
        blocks: the ones to prune, at least one; None: all.
    """
    dense = everything(shape, blocks)
    stay = dense.size - (budget.dense(shape) - round(budget.ratio * budget.dense(shape)))

    def fill(groups: int) -> Allocation:
        heads = dataclasses.replace(dense, groups=groups, total_channels=0)
        channels = round((stay - heads.size) / channel_size(shape))
        channels = min(max(channels, len(dense.blocks)), dense.total_channels)
        return dataclasses.replace(heads, total_channels=channels)

    def preference(allocation: Allocation) -> tuple[int, float]:
        missed = max(0, 2 * abs(allocation.size - stay) - channel_size(shape))
        return missed, abs(allocation.groups / shape.kv_heads - stay / dense.size)

    return min(map(fill, range(1, shape.kv_heads + 1)), key=preference)


def predict(method: str, budget: Budget, allocation: Allocation) -> Prediction:
    """The size of the model that an allocation leaves.

    Raises:
        UserError: it is not within the budget's tolerance.
    """
    shape = allocation.shape
    gone = everything(shape, allocation.blocks).size - allocation.size
    total, block = shape.total - gone, shape.block - gone
    step = channel_size(shape) / budget.dense(shape)
    prediction = Prediction(active_total=total, active_block=block, grid_step=step)
    budget.require(method, prediction, shape, [budget.achieved(total, block, shape)])
    return prediction


class Scores(NamedTuple):
    """What the structures of one block are worth."""

    groups: Tensor
    """Shape [Hk]."""
    channels: Tensor
    """Shape [F]."""


class Kept(NamedTuple):
    """The numbers of what stays of one block among what it has, ascending."""

    groups: Tensor
    """Head groups, int64 [k]."""
    channels: Tensor
    """MLP channels, int64."""


def uniform_choice(scores: Sequence[Scores], allocation: Allocation) -> list[Kept]:
    """The groups and channels of highest score of each pruned block, as many as the allocation says."""
    pairs = zip(scores, allocation.channels, strict=True)
    return [Kept(highest(s.groups, allocation.groups), highest(s.channels, width)) for s, width in pairs]


def narrow(decoder: Decoder, blocks: range, kept: Sequence[Kept]) -> None:
    """Keep some groups and channels of some blocks, in place. `rebuilt` makes a model of it."""
    shape = decoder.family.shape(decoder.model.config.to_dict())
    for block, (groups, channels) in zip(blocks, kept, strict=True):
        layer = decoder.layers[block]
        if len(groups) < layer.attention_inputs[1].out_features // shape.head_dim:
            modeling.narrow_heads(layer, shape, groups)
        modeling.narrow_mlp(layer, channels)


def rebuilt(decoder: Decoder, blocks: range) -> PreTrainedModel:
    """The model whose blocks `narrow` has changed, in the class that loads it."""
    widths = [layer.mlp_output.in_features if i in blocks else None for i, layer in enumerate(decoder.layers)]
    structures = {
        "narrow_attention": modeling.attention_record(decoder.model),
        "narrow_mlp": {"layers": widths},
    }
    return modeling.rebuild(decoder.model, structures)


class UniformPruning(Method):
    """A method that takes the same share of every block, and decides by scores which part of it."""

    @abstractmethod
    def scores(self, layer: DecoderLayer, shape: DecoderShape, generator: Generator) -> Scores:
        """The scores of a dense block; whatever is random comes from `generator`."""

    def predict(self, shape: DecoderShape, budget: Budget) -> Prediction:
        """The size nearest to the ratio, half a channel off at most."""
        return predict(self.name, budget, allocate(shape, budget))

    def compress(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        budget: Budget,
        calibration: Calibration,
        context: Context,
    ) -> PreTrainedModel:
        """Narrow every block of `model`; its tensors are used up. No calibration text is looked at."""
        if budget.ratio == 1:
            return model
        decoder = modeling.Decoder(model)
        self.predict(decoder.shape, budget)
        allocation = allocate(decoder.shape, budget)
        generator = torch.Generator().manual_seed(context.seed)
        scores = [self.scores(layer, decoder.shape, generator) for layer in decoder.layers]
        narrow(decoder, allocation.blocks, uniform_choice(scores, allocation))
        return rebuilt(decoder, allocation.blocks)


def highest(scores: Tensor, count: int) -> Tensor:
    """Places of the `count` highest scores in ascending order, int64; among equals the earlier ones."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values
