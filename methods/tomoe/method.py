"""ToMoE as a `Method`: its hyperparameters, its presets, and the way from a dense model to a sparse one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from methods.base import Budget, Calibration, Context, Method, Prediction
from methods.errors import UserError
from methods.modeling.shape import DecoderShape
from methods.registry import register
from methods.tomoe.accounting import Added, Kept, keep_fraction, layer_weights, prunable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LIMITS = (
    ("experts", 1, 4096),
    ("embedding", 2, 65536),
    ("steps", 1, 10**9),
    ("tau", 1e-3, 1e3),
    ("learning_rate", 1e-9, 10.0),
    ("router_rate", 1e-3, 1e3),
    ("weight_decay", 0, 1.0),
    ("ramp", 0, 0.99),
    ("kd_weight", 0, 1e6),
    ("alpha", 0, 1e6),
    ("beta", 0, 1e6),
    ("gamma", 0, 1e6),
    ("last_noise", 0.01, 1.0),
    ("width_multiple", 1, 4096),
)
"""Least and largest value of each number; neither infinity nor a number that is none is between."""
VALUES = ("vo_count", "topk", "kept_values", "attention_union")
"""Settings of how tokens choose their value dimensions."""
IDLE: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    ({"head_pruning": True}, ("vo_routing", "vo_mask", *VALUES)),
    ({"vo_routing": False}, VALUES),
    ({"experts": 1}, ("router_rate", "load_balance", "union")),
    ({"experts": 1, "vo_routing": False}, ("beta", "inference_noise")),
    ({"experts": 1, "head_pruning": True}, ("beta", "inference_noise")),
    ({"experts": 1, "attention_union": False}, ("beta",)),
    ({"loss": "lm"}, ("kd_weight",)),
    ({"beta": 0}, ("union", "attention_union")),
    ({"gamma": 0}, ("load_balance",)),
)
"""Beside settings of some values, others have no effect."""
LEAST = 0.02
"""Smallest p that is worth a try."""
PAPER = {
    "experts": 8,
    "embedding": 128,
    "tau": 0.4,
    "steps": 10_000,
    "learning_rate": 1e-3,
    "router_rate": 1.0,
    "weight_decay": 0.05,
    "schedule": "constant",
    "ramp": 0.0,
    "start": "random",
    "loss": "kd",
    "kd_weight": 1.0,
    "alpha": 16.0,
    "beta": 2.0,
    "gamma": 1.0,
    "load_balance": "paper",
    "attention_union": True,
    "union": "sampled",
    "last_noise": 1.0,
    "mask_noise": "per_token",
    "mask_grad": "single",
    "vo_mask": "v_and_o",
    "vo_routing": True,
    "local_embeddings": False,
    "head_pruning": False,
    "vo_count": "max",
    "topk": "exact",
    "kept_values": "mean",
    "expert_width": "expected",
    "width_multiple": 1,
    "inference_noise": False,
    "checkpointing": True,
}
"""What the paper says; activations are recomputed, since its noise per token fills the memory."""
RELEASED = PAPER | {
    "steps": 20_000,
    "kd_weight": 2.0,
    "beta": 1.5,
    "attention_union": False,
    "load_balance": "released",
    "mask_grad": "double",
    "vo_mask": "v_only",
    "topk": "cap",
    "kept_values": "max",
    "expert_width": "sampled",
    "inference_noise": True,
}
"""What the authors' code does, as far as docs/TOMOE.md says."""


@register("tomoe", title="ToMoE", reference="https://arxiv.org/abs/2501.15316", family="moe")
@dataclass(frozen=True, kw_only=True)
class ToMoE(Method):
    """Learn which neurons and head dimensions each token needs; no weight is touched."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": PAPER, "released": RELEASED}
    idle = IDLE

    experts: int = 8
    """N, experts per MLP; 1 is a static pruner: one set of neurons and no router."""
    embedding: int | None = None
    """Width of expert embeddings and of the attention's projection; None: hidden size / 32, between 16 and 128."""
    tau: float = 0.4
    """Temperature of both straight-through functions."""
    steps: int | None = None
    """Training steps; None: what `--budget` grants."""
    learning_rate: float | None = None
    """Of AdamW; None: 4.096 / hidden size, at most 0.01. Adam moves a logit in proportion to the number of its inputs,
    and the paper's 1e-3 was for 4,096 of them."""
    router_rate: float = 1.0
    """Learning rate of the routers, as a multiple of the others'."""
    weight_decay: float = 0.05
    """Of AdamW, on everything trained."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Of the learning rate; `cosine` ends at a tenth."""
    ramp: float = 0.3
    """Share of the steps in which the target p falls from 1 to its value."""
    loss: Literal["kd", "lm"] = "kd"
    """Distil from the dense model, or predict the next token (ablation)."""
    kd_weight: float = 1.0
    """w, of that term."""
    alpha: float = 16.0
    """Of R_P, the parameter term."""
    beta: float = 2.0
    """Of R_U, the union term; 0 leaves it out."""
    gamma: float = 1.0
    """Of R_L, the load-balance term."""
    load_balance: Literal["paper", "released"] = "paper"
    """R_L = N sum F P with probabilities, or sum F P with one-hot rows."""
    attention_union: bool = True
    """Whether attention sites are in R_U."""
    union: Literal["sampled", "converted"] = "converted"
    """R_U looks at sampled masks, or at the noise-free sets that conversion will make."""
    last_noise: float = 0.1
    """Scale of the noise at the last step; it falls linearly from 1. Conversion counts with this scale."""
    mask_noise: Literal["per_expert", "per_token"] = "per_expert"
    """One draw of noise per expert and step, or one per token (a [tokens, MLP width] fp32 mask per layer)."""
    mask_grad: Literal["single", "double"] = "single"
    """A mask enters each product once (dropped dimensions get a gradient) or on both factors (they get none)."""
    vo_mask: Literal["v_and_o", "v_only", "o_only"] = "v_and_o"
    """Which of value and attention output a token masks."""
    vo_routing: bool = True
    """Whether each token chooses its value dimensions; false: one static choice per layer."""
    vo_count: Literal["mean", "max"] = "mean"
    """R_P counts the mean token's value dimensions, or the widest token's."""
    local_embeddings: bool = False
    """Ablation: attention sites learn an embedding of their own instead of the experts' mean."""
    head_pruning: bool = False
    """Ablation: attention drops whole key/value heads with their query heads, and nothing else."""
    start: Literal["random", "energy"] = "energy"
    """How routers and experts begin."""
    topk: Literal["exact", "cap"] = "exact"
    """A converted token keeps exactly K value dimensions, or those above the threshold and at most K."""
    kept_values: Literal["mean", "max"] = "mean"
    """K is the mean token's number of value dimensions on the calibration text, or the widest token's."""
    expert_width: Literal["expected", "threshold", "sampled"] = "expected"
    """Experts are as wide as the widest is under noise on average, without noise, or in one draw of it."""
    width_multiple: int = 1
    """Round that width up to a multiple, for matrix kernels; what is added counts, so others become narrower."""
    inference_noise: bool = False
    """Keep drawing noise in the converted model's routers and value choices."""
    checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, one more forward pass."""
    tensorboard: bool = False
    """Write TensorBoard events beside training.csv."""

    def __post_init__(self) -> None:
        for name, low, high in LIMITS:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(
                    f"tomoe.{name} is {value:g}, which is not between {low:g} and {high:g}. "
                    f"Use --set tomoe.{name}=VALUE."
                )
        if self.embedding and self.embedding % 2:
            raise UserError(
                f"tomoe.embedding is {self.embedding}, and each direction of the GRU gives half of it. "
                f"Use an even number: --set tomoe.embedding={self.embedding + 1}."
            )

    @property
    def dynamic_values(self) -> bool:
        """Whether each token chooses its value dimensions."""
        return self.vo_routing and not self.head_pruning

    def masks_only(self, side: Literal["value", "output"]) -> bool:
        """Whether tokens choose what they write (value) or what they read (output), and not the other."""
        return self.dynamic_values and self.vo_mask == ("v_only" if side == "value" else "o_only")

    def rate(self, shape: DecoderShape) -> float:
        """The learning rate that training starts with."""
        return self.learning_rate or min(0.01, 4.096 / shape.hidden)

    def width(self, shape: DecoderShape) -> int:
        """E, even: each direction of the GRU gives half."""
        return self.embedding or max(16, min(128, shape.hidden // 64 * 2))

    def added(self, shape: DecoderShape) -> Added:
        """What conversion adds to each layer."""
        return Added(experts=self.experts, embedding=self.width(shape) if self.dynamic_values else 0)

    def target(self, shape: DecoderShape, budget: Budget) -> float:
        """p, the fraction of T_total that may stay.

        Raises:
            UserError: nothing may stay.
        """
        p = keep_fraction(shape, budget, shape.layers * self.added(shape).count(shape))
        unasked = Kept(0, 0, 0, min(self.width_multiple, shape.mlp_width) - 1)  # neurons that come with the first
        fewest = LEAST + shape.layers * layer_weights(unasked, shape) / prunable(shape)
        if p < fewest:
            least = budget.ratio + (fewest - p) * prunable(shape) / budget.dense(shape) + 0.005
            raise UserError(
                f"ratio {budget.ratio:g} leaves tomoe only {p:.3f} of the weights it chooses from, too few for an "
                f"expert and a query of any use: the least is {fewest:.3g}. "
                f"Use --ratios {least:.2f} or more."
            )
        return p

    def predict(self, shape: DecoderShape, budget: Budget) -> Prediction:
        """The size asked for, or at most one step of a layer's width below."""
        if budget.ratio == 1:
            return Prediction(active_total=shape.total, active_block=shape.block)
        self.target(shape, budget)
        gone = round((1 - budget.ratio) * budget.dense(shape))
        step = layer_weights(Kept(0, 0, 0, self.width_multiple), shape) / budget.dense(shape)
        return Prediction(active_total=shape.total - gone, active_block=shape.block - gone, grid_step=step)

    def compress(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        budget: Budget,
        calibration: Calibration,
        context: Context,
    ) -> PreTrainedModel:
        """Train the masks of `model`, then cut it to what they keep."""
        from methods.tomoe.conversion import convert  # these need torch, and listing methods must not
        from methods.tomoe.training import train

        if budget.ratio == 1:
            return model
        network = train(self, model, tokenizer, budget, calibration, context)
        return convert(self, model, network, budget, calibration, context)
