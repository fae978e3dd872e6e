"""Uniform pruning of whole structures: every block keeps the same share of its attention heads and MLP channels.

A head group is a key head, its value head and the query heads that read it. With Hk groups of g parameters and F
channels of c parameters in each of L blocks, S the parameters of groups and channels that must stay for the model to
have the asked ratio, and f = S / (L Hk g + L F c):

    groups per block     k with k / Hk nearest to f, at least one (the smaller among equals)
    channels in all      C = (S - L k g) / c, rounded: the MLPs take up what whole groups cannot
    channels per block   C // L, and one more in each of the first C mod L blocks

so that the counted size is off by half a channel at most. Of all k only those are looked at whose C is between L and
L F; where there is none, the nearest size is taken and refused if it is off budget. A method adds scores: the groups
and channels of highest score stay, the earlier one among equals.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from methods import modeling
from methods.base import Budget, Calibration, Context, Method, Prediction
from methods.lazy import torch
from methods.modeling.shape import DecoderShape

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from methods.modeling import DecoderLayer


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
    groups: int
    """k: head groups of each block."""
    total_channels: int
    """C: MLP channels of all blocks together."""

    @property
    def channels(self) -> list[int]:
        """MLP channels of each block."""
        width, rest = divmod(self.total_channels, self.shape.layers)
        return [width + (index < rest) for index in range(self.shape.layers)]

    @property
    def size(self) -> int:
        """Parameters of the kept groups and channels."""
        return self.shape.layers * self.groups * group_size(self.shape) + self.total_channels * channel_size(self.shape)


def everything(shape: DecoderShape) -> Allocation:
    """The dense model."""
    return Allocation(shape, shape.kv_heads, shape.layers * shape.mlp_width)


def allocate(shape: DecoderShape, budget: Budget) -> Allocation:
    """The allocation of the module's docstring: the one nearest to the budget."""
    dense = everything(shape)
    stay = dense.size - (budget.dense(shape) - round(budget.ratio * budget.dense(shape)))

    def fill(groups: int) -> Allocation:
        heads = shape.layers * groups * group_size(shape)
        channels = round((stay - heads) / channel_size(shape))
        return Allocation(shape, groups, min(max(channels, shape.layers), dense.total_channels))

    def preference(allocation: Allocation) -> tuple[int, float]:
        missed = max(0, 2 * abs(allocation.size - stay) - channel_size(shape))
        return missed, abs(allocation.groups / shape.kv_heads - stay / dense.size)

    return min(map(fill, range(1, shape.kv_heads + 1)), key=preference)


class Scores(NamedTuple):
    """What the structures of one block are worth."""

    groups: Tensor
    """Shape [Hk]."""
    channels: Tensor
    """Shape [F]."""


class UniformPruning(Method):
    """A method that takes the same share of every block, and decides by scores which part of it."""

    @abstractmethod
    def scores(self, layer: DecoderLayer, shape: DecoderShape, generator: Generator) -> Scores:
        """The scores of a dense block; whatever is random comes from `generator`."""

    def predict(self, shape: DecoderShape, budget: Budget) -> Prediction:
        """The size nearest to the ratio, half a channel off at most."""
        gone = everything(shape).size - allocate(shape, budget).size
        total, block = shape.total - gone, shape.block - gone
        step = channel_size(shape) / budget.dense(shape)
        prediction = Prediction(active_total=total, active_block=block, grid_step=step)
        budget.require(self.name, prediction, shape, [budget.achieved(total, block, shape)])
        return prediction

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
        for layer, width in zip(decoder.layers, allocation.channels, strict=True):
            scores = self.scores(layer, decoder.shape, generator)
            if allocation.groups < allocation.shape.kv_heads:
                modeling.narrow_heads(layer, decoder.shape, highest(scores.groups, allocation.groups))
            modeling.narrow_mlp(layer, highest(scores.channels, width))
        structures = {
            "narrow_attention": modeling.attention_record(model),
            "narrow_mlp": {"layers": allocation.channels},
        }
        return modeling.rebuild(model, structures)


def highest(scores: Tensor, count: int) -> Tensor:
    """Places of the `count` highest scores in ascending order, int64; among equals the earlier ones."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values
