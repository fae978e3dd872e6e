"""DISP-LLM: every block reads and writes its own subset of the residual stream, and keeps its own MLP channels.

Gao et al., "DISP-LLM: Dimension-Independent Structural Pruning for Large Language Models",
https://arxiv.org/abs/2410.11988; facts of the released code from ZhengaoLi/DISP-LLM-Dimension-Independent-Structural-
Pruning at 2c29bb0. No weight changes. Five masks per block are learned (`methods.dimension_masks`),

    h <- h + s2 * Attention(s1 * norm(h))
    h <- h + s5 * [(s4 * act(x Wg)) (s4 * (x Wu))] Wdown          x = s3 * norm(h)

and the block is cut to them: query, key and value keep columns s1, the output projection rows s2, gate and up rows s4
and columns s3, down rows s5 and columns s4; biases of rows go with them. Norms are over the whole stream, heads stay
whole. In a parallel block (Phi) attention and MLP read one norm through different masks; a plain MLP has one s4.

With q and kv the widths of queries and keys, n = 2 with a gate and 1 without, the size of what masks act on is

    T(s) = sum over blocks of |s1| (q + 2 kv) + |s2| q + n |s3| |s4| + |s4| |s5| + biases of the kept rows of s2, s4, s5

and training aims at p = T / T(1), the share that makes the whole model as large as asked.

After training the k highest of all mask logits stay, k being the largest number whose counted size is within the
budget: the threshold of the paper, moved so that the ratio is met, without noise. (A constant in place of the noise,
such as its mean 0.577, moves the threshold too.) A mask that would be empty keeps its highest.

Departs from the released code, which adds noise when it exports, so that its pruned model is a draw: nothing is drawn.
Its p counts decoder projections without biases, as does this for models without biases.
"""

# Shape suffixes: D hidden size, F MLP channels, M width of a mask (D or F).

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from methods import modeling
from methods.allocation import highest
from methods.base import Budget, Calibration, Context, Method, Prediction, Training
from methods.errors import UserError
from methods.lazy import torch
from methods.modeling.shape import DecoderShape
from methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from methods.modeling import DecoderLayer

LIMITS = (
    ("lam", 0, 1e6),
    ("tau", 1e-3, 1e3),
    ("learning_rate", 1e-9, 10.0),
    ("weight_decay", 0, 1.0),
    ("steps", 1, 10**9),
    ("round_to", 1, 65536),
)
"""Least and largest value of each number."""
LEAST = 0.02
"""Smallest p that is worth a try."""
PUBLISHED = {"tau": 0.4, "learning_rate": 1e-3, "weight_decay": 0.05, "steps": 10_000, "round_to": 1}
PAPER = PUBLISHED | {"estimator": "reinmax", "lam": 6.0}
RELEASED = PUBLISHED | {"estimator": "soft", "lam": 16.0}


class Kept(NamedTuple):
    """The five masks of a block, or anything per mask: numbers that are kept, tensors, widths."""

    attention_in: Any
    """s1."""
    attention_out: Any
    """s2."""
    mlp_in: Any
    """s3."""
    neurons: Any
    """s4."""
    mlp_out: Any
    """s5."""


def whole(shape: DecoderShape) -> Kept:
    """Widths of the masks."""
    return Kept(shape.hidden, shape.hidden, shape.hidden, shape.mlp_width, shape.hidden)


def masked_size(kept: Kept, shape: DecoderShape) -> Any:
    """One block's part of T, for numbers that are kept or tensors of them."""
    inputs = 2 if shape.gated else 1
    attention = kept.attention_in * (shape.attention_width + 2 * shape.kv_width)
    attention = attention + kept.attention_out * (shape.attention_width + shape.output_bias)
    middle = kept.neurons * (inputs * (kept.mlp_in + shape.mlp_bias) + kept.mlp_out)
    return attention + middle + kept.mlp_out * shape.mlp_bias


def prunable(shape: DecoderShape) -> int:
    """T(1): everything that masks act on."""
    return shape.layers * masked_size(whole(shape), shape)


def largest_step(shape: DecoderShape) -> int:
    """What one more dimension of a mask adds to the size at most."""
    full = whole(shape)
    sizes = [
        masked_size(full, shape) - masked_size(full._replace(**{name: getattr(full, name) - 1}), shape)
        for name in full._fields
    ]
    return max(sizes)


@register("disp-llm", title="DISP-LLM", reference="https://arxiv.org/abs/2410.11988", family="width")
@dataclass(frozen=True, kw_only=True)
class DispLLM(Method):
    """Learn which dimensions of the stream every block reads and writes, and which MLP channels it keeps."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": PAPER, "released": RELEASED}
    idle = (({"estimator": "reinmax"}, ("tau",)),)

    estimator: Literal["soft", "st", "reinmax"] = "soft"
    """The masks of the training pass: soft gates (released code), 0/1 with the gradient of the soft gates, or 0/1 with
    ReinMax's gradient (paper)."""
    lam: float = 6.0
    """lambda, of the regulariser |log(r / p)| (paper; released code: 16)."""
    tau: float = 0.4
    """Temperature of the gates."""
    learning_rate: float = 1e-3
    """Of AdamW, constant."""
    weight_decay: float = 0.05
    """Of AdamW, on everything trained."""
    steps: int | None = None
    """Training steps; None: what `--budget` grants."""
    round_to: int = 1
    """Round the width of every mask up to a multiple, for matrix kernels; others become narrower for it."""
    checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, one more forward pass."""
    tensorboard: bool = False
    """Write TensorBoard events beside training.csv."""

    def __post_init__(self) -> None:
        for name, low, high in LIMITS:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(
                    f"disp-llm.{name} is {value:g}, which is not between {low:g} and {high:g}. "
                    f"Use --set disp-llm.{name}=VALUE."
                )

    def target(self, shape: DecoderShape, budget: Budget) -> float:
        """p, the fraction of T(1) that may stay.

        Raises:
            UserError: (almost) nothing may stay.
        """
        dense, maskable = budget.dense(shape), prunable(shape)
        p = (budget.ratio * dense - (dense - maskable)) / maskable
        smallest = Kept(*(min(self.round_to, width) for width in whole(shape)))
        least = max(LEAST, shape.layers * masked_size(smallest, shape) / maskable)
        if p < least:
            hint = math.ceil(1e4 * (budget.ratio + (least - p) * maskable / dense)) / 1e4
            raise UserError(
                f"ratio {budget.ratio:g} leaves {self.name} only {p:.3f} of the weights it chooses from; the least is "
                f"{least:.3g}. Use --ratios {hint:g} or more."
            )
        return p

    def predict(self, shape: DecoderShape, budget: Budget) -> Prediction:
        """The size asked for, or at most one step of a mask below."""
        if budget.ratio == 1:
            return Prediction(active_total=shape.total, active_block=shape.block)
        self.target(shape, budget)
        gone = round((1 - budget.ratio) * budget.dense(shape))
        step = self.round_to * largest_step(shape) / budget.dense(shape)
        return Prediction(active_total=shape.total - gone, active_block=shape.block - gone, grid_step=step)

    def work(self, shape: DecoderShape, budget: Budget, tokens: int, training: Training) -> float:
        """A gradient in every step."""
        return 3.0 * (self.steps or training.steps) * training.sequences * training.window

    def compress(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        budget: Budget,
        calibration: Calibration,
        context: Context,
    ) -> PreTrainedModel:
        """Train the masks of `model`, then cut it to what they keep."""
        from methods.dimension_masks import train  # needs torch, and listing methods must not

        if budget.ratio == 1:
            return model
        network = train(self, model, tokenizer, budget, calibration, context)
        with torch.no_grad():
            logits = [Kept(*(mask_M.cpu() for mask_M in block)) for block in network.logits()]
        return cut(model, choose(logits, modeling.Decoder(model).shape, budget, self.round_to))


def choose(logits: Sequence[Kept], shape: DecoderShape, budget: Budget, round_to: int = 1) -> list[Kept]:
    """What every block keeps: the numbers of the highest of all logits, ascending, so many as the budget allows.

    Args:
        logits: per block, of every mask [M].
    """
    flat = torch.cat([mask_M for block in logits for mask_M in block])
    ranks = flat.argsort(descending=True, stable=True).argsort()
    split = iter(ranks.split([len(mask_M) for block in logits for mask_M in block]))
    ranks_of = [Kept(*(next(split).sort().values for _ in block)) for block in logits]

    def widths(k: int) -> list[Kept]:
        """With the k highest."""
        return [Kept(*(_width(rank_M, k, round_to) for rank_M in block)) for block in ranks_of]

    def size(k: int) -> int:
        return shape.block - prunable(shape) + sum(masked_size(kept, shape) for kept in widths(k))

    outside = 0 if budget.basis == "block" else shape.total - shape.block
    wanted = budget.ratio * budget.dense(shape) - outside
    k = bisect_right(range(len(flat) + 1), wanted, key=size) - 1
    pairs = zip(logits, widths(max(k, 0)), strict=True)
    return [Kept(*(highest(m, width) for m, width in zip(block, kept, strict=True))) for block, kept in pairs]


def _width(ascending_M: Tensor, k: int, round_to: int) -> int:
    """How many of a mask's ranks are below k, at least one, rounded up."""
    below = int(torch.searchsorted(ascending_M, k))
    return min(-(-max(below, 1) // round_to) * round_to, len(ascending_M))


def cut(model: PreTrainedModel, kept: Sequence[Kept]) -> PreTrainedModel:
    """The model with nothing but what is kept; the tensors of `model` are used up."""
    layers = modeling.Decoder(model).layers
    with torch.no_grad():
        for layer, numbers in zip(layers, kept, strict=True):
            _cut_layer(layer, numbers)
    structures = {
        "narrow_mlp": {"layers": [len(numbers.neurons) for numbers in kept]},
        "gathered_linears": modeling.gathered_record(model),
    }
    return modeling.rebuild(model, structures)


def _cut_layer(layer: DecoderLayer, kept: Kept) -> None:
    family = layer.family
    modeling.narrow_mlp(layer, kept.neurons)
    for name in (family.query, family.key, family.value):
        modeling.gather_linear(layer, name, None, kept.attention_in)
    modeling.gather_linear(layer, family.output, kept.attention_out, None)
    for name in (family.gate, family.up):
        if name is not None:
            modeling.gather_linear(layer, name, None, kept.mlp_in)
    modeling.gather_linear(layer, family.down, kept.mlp_out, None)
