"""What conversion keeps of each layer so that the counted size meets the budget.

With a the mask logits of a site and t one shift for the whole model, P(on) = 1 - exp(-exp(a + b - t)) and

    MLP      w = max over experts of sum P(on), or of the neurons that are on without noise or in one draw
             (`expert_width`), rounded up to a multiple
    q/k      the sum P(on) highest groups
    v/o      K = mean over calibration tokens of sum P(on)

t is solved by bisection: training counts samples, and a model is counted by its matrices. At least one neuron, two
query/key dimensions and one value dimension stay.
"""

# Shape suffixes: N experts, M MLP width, h head dimension, G groups.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scipy.optimize import bisect
from torch import Tensor

from methods.base import Budget
from methods.errors import UserError
from methods.modeling.shape import DecoderShape
from methods.tomoe import accounting
from methods.tomoe.scores import Scores
from methods.training.straight_through import OFFSET, probability_on

if TYPE_CHECKING:
    from methods.tomoe.method import ToMoE


@dataclass(frozen=True)
class Sizes:
    """What one layer keeps."""

    groups: int
    values: int
    neurons: int
    """Of each expert."""
    raw_neurons: list[float]
    """Of each expert, before all were made as wide as the widest."""


def solve(settings: ToMoE, shape: DecoderShape, scores: list[Scores], budget: Budget) -> list[Sizes]:
    """Sizes of all layers whose counted total meets the budget; one shift t of all logits.

    Raises:
        UserError: even one neuron and one dimension everywhere are more than the budget.
    """
    wanted = budget.ratio * budget.dense(shape)
    outside = 0 if budget.basis == "block" else shape.total - shape.block

    def excess(t: float, t_mlp: float | None = None) -> float:
        return outside + counted(settings, shape, scores, sizes_at(settings, scores, t, t_mlp)) - wanted

    if excess(HIGH) > 0:
        least = (excess(HIGH) + wanted) / budget.dense(shape)
        raise UserError(
            f"ratio {budget.ratio:g} is below the least that tomoe can make of this model, {least:.3f}: the fewest "
            f"neurons and one value dimension per layer, and what routing adds. Use "
            f"--ratios {least + 0.01:.2f} or more."
        )
    t = _largest_within(excess)
    # Attention shrinks in larger steps than MLPs: what it leaves over goes to them.
    return sizes_at(settings, scores, t, _largest_within(lambda t_mlp: excess(t, t_mlp)))


def _largest_within(excess: Callable[[float], float]) -> float:
    """The least shift whose size is within the budget."""
    if excess(LOW) <= 0:
        return LOW
    t = float(bisect(excess, LOW, HIGH, xtol=1e-9))  # pyright: ignore[reportArgumentType]
    return t if excess(t) <= 0 else t + 1e-8


LOW, HIGH = -60.0, 60.0
"""Shifts at which everything is on, and nothing."""


def sizes_at(settings: ToMoE, scores: list[Scores], t: float, t_mlp: float | None = None) -> list[Sizes]:
    """Every layer's sizes at a shift of the logits, or one for attention and one for MLPs."""
    t_mlp = t if t_mlp is None else t_mlp

    def expected(logits: Tensor) -> Tensor:
        return probability_on(logits - t, settings.last_noise).sum(-1)

    def size(s: Scores) -> Sizes:
        values = expected(s.values_Th)
        kept = values.mean() if settings.kept_values == "mean" else values.max()
        groups = 0 if s.groups_G is None else max(s.least_groups, round(float(expected(s.groups_G))))
        raw = neurons_on(settings, s, t_mlp)
        width = _at_least_one(raw.max())
        multiple = -(-width // settings.width_multiple) * settings.width_multiple
        return Sizes(groups, _at_least_one(kept), min(multiple, s.experts_NM.shape[1]), raw.tolist())

    return [size(s) for s in scores]


def neurons_on(settings: ToMoE, scores: Scores, t: float = 0.0) -> Tensor:
    """How many neurons of each expert are on at a shift of the logits, as `expert_width` counts them, [N]."""
    if settings.expert_width == "expected":
        return probability_on(scores.experts_NM - t, settings.last_noise).sum(1)
    return (scores.counted_NM - t > -OFFSET).sum(1)


def _at_least_one(count: Tensor) -> int:
    return max(1, round(float(count)))


def counted(settings: ToMoE, shape: DecoderShape, scores: list[Scores], sizes: list[Sizes]) -> int:
    """Parameters of all blocks that one token would use."""
    layers = [_kept(settings, shape, s, size) for s, size in zip(scores, sizes, strict=True)]
    return accounting.active_block(shape, layers, settings.added(shape))


def _kept(settings: ToMoE, shape: DecoderShape, scores: Scores, sizes: Sizes) -> accounting.Kept:
    """What a token of a layer uses."""
    if settings.head_pruning:  # kept heads are whole, and the count multiplies by all of them again
        share = sizes.groups * shape.head_dim / shape.kv_heads
        return accounting.Kept(share, share, share, sizes.neurons)
    qk = sum(len(shape.rope_groups[group]) for group in best(scores.groups_G, sizes.groups)) or shape.head_dim
    value = shape.head_dim if settings.masks_only("output") else sizes.values
    output = shape.head_dim if settings.masks_only("value") else sizes.values
    return accounting.Kept(qk, value, output, sizes.neurons)


def best(logits: Tensor | None, count: int) -> list[int]:
    """The places of the highest logits, ascending; ties go to the lower place."""
    if logits is None:
        return []
    return sorted(logits.argsort(descending=True, stable=True)[:count].tolist())
