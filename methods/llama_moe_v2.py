"""LLaMA-MoE-v2: a shared part and experts cut by gradients, or plain slices, behind linear routers.

"LLaMA-MoE v2: Exploring Sparsity of LLaMA from Perspective of Mixture-of-Experts with Post-Training",
https://arxiv.org/abs/2411.15708; facts of the released code from OpenSparseLLMs/LLaMA-MoE-v2 at cfca9f7. Its MLP part,
with m neurons per part:

    residual   all but the first and last block. Router C: centroids of what the MLP reads, from k-means into clusters
               whose sizes are even up to 40 %. Token t is of kind argmax_j C_j x_t, and v_j[i] = mean over tokens of
               kind j of |h_i dL/dh_i|. Shared are the S m neurons that are in most kinds' highest m; the others go to
               the expert that scores them highest and has room. y = shared + softmax-weighted experts, s = A
    vanilla    experts are slices in the dense order, nothing is shared, the router is drawn at random, s = E / A

A token of the residual kind gets one expert, whose weight is then exactly 1 (published: S1A1E8); for larger ratios more
parts are shared. **The paper tunes all weights afterwards**, on 7 to 8.4 billion tokens; vanilla without training is no
more than a starting point.

Departs from the paper: importance comes from the run's windows, each used once (1,024 steps of supervised fine-tuning
there); centroids from its first `tokens` tokens; k-means starts once; sizes differ by a neuron where E does not divide
F. The attention experts of the paper, in which tokens see only tokens of their own experts, are absent.
"""

# Shape suffixes: S tokens of the text, T tokens, D hidden size, F MLP neurons, N experts.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from methods import modeling
from methods.base import Calibration, Context
from methods.errors import UserError
from methods.expert_plans import ExpertMethod, Structure, router_size
from methods.experts import cluster, contiguous_parts, greedy_parts, neuron_importance, windows
from methods.lazy import torch
from methods.modeling.shape import DecoderShape
from methods.registry import register

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from methods.modeling import Decoder, DecoderLayer


@register("llama-moe-v2", title="LLaMA-MoE-v2", reference="https://arxiv.org/abs/2411.15708", family="moe")
@dataclass(frozen=True, kw_only=True)
class LLaMAMoEv2(ExpertMethod):
    """A shared part beside experts for kinds of tokens, or slices."""

    with_shared: ClassVar[bool] = True
    idle = (({"mode": "vanilla"}, ("dense_ends", "jitter", "tokens", "samples")),)

    mode: Literal["residual", "vanilla"] = "residual"
    """Which of the two constructions."""
    dense_ends: int = 1
    """Blocks at the beginning, and at the end, that `residual` leaves dense."""
    jitter: float = 0.4
    """How far the clusters of `residual` may be from equally large, as a share."""
    tokens: int = 16384
    """Of the calibration text, at most, that are clustered."""
    samples: int = 1024
    """Windows of the text, at most, of which gradients are taken."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.tokens, self.samples) < 1 or self.dense_ends < 0 or not 0 <= self.jitter < 1:
            raise UserError(
                f"llama-moe-v2 has tokens={self.tokens}, samples={self.samples}, dense_ends={self.dense_ends} and "
                f"jitter={self.jitter}: at least 1, 1 and 0, and from 0 to below 1. Published are 1 and 0.4."
            )
        _, structure = self.asked
        if self.mode == "vanilla" and structure is not None and structure.shared:
            raise UserError(
                f"llama-moe-v2.experts is {self.experts!r}, and mode=vanilla shares no expert. "
                f"Use --set llama-moe-v2.experts=A{structure.active}E{structure.experts}, or mode=residual."
            )

    def default_experts(self, shape: DecoderShape) -> int:
        """As in the released models."""
        return 8

    def divided(self, parts: int, experts: int) -> Structure:
        """One expert per token beside shared parts, or none of these."""
        return Structure(0, parts, experts) if self.mode == "vanilla" else Structure(parts - 1, 1, experts)

    def told_apart(self, tokens: int) -> int:
        """As many as get one each where clusters are as small as they may be."""
        return math.floor(tokens * (1 - self.jitter))

    def blocks(self, shape: DecoderShape) -> range:
        """All but the ends, or all."""
        ends = self.dense_ends if self.mode == "residual" else 0
        return range(ends, shape.layers - ends)

    def added(self, shape: DecoderShape, structure: Structure) -> int:
        """The router."""
        return router_size(shape, structure, mlp=False)

    def convert(
        self, decoder: Decoder, structure: Structure, blocks: range, calibration: Calibration, context: Context
    ) -> None:
        """Cut the blocks by gradients, or in slices."""
        layers = decoder.layers[blocks.start : blocks.stop]
        if self.mode == "vanilla":
            slices(layers, structure, torch.Generator().manual_seed(context.seed))
            return
        routers = self.centroids(decoder, layers, structure, calibration, context)

        def kind(place: int, number: int, x_TD: Tensor) -> Tensor:
            return (x_TD.float() @ routers[place].T).argmax(1)

        texts = windows(calibration, context, self.samples)
        scores_LNF, counts_LN = neuron_importance(decoder.model, layers, texts, kind, structure.routed, context)
        if not counts_LN.all():
            context.note("some experts were cut without a token of their kind in the text")
        for layer, router, scores_NF in zip(layers, routers, scores_LNF, strict=True):
            shared, experts = residual_split(scores_NF, structure)
            modeling.convert_mlp(
                layer, router, experts, shared=shared, active=structure.active, gate="softmax", scale=structure.active
            )

    def centroids(
        self,
        decoder: Decoder,
        layers: Sequence[DecoderLayer],
        structure: Structure,
        calibration: Calibration,
        context: Context,
    ) -> list[Tensor]:
        """C of each of some blocks, fp32 [N, D]."""
        wanted, found = {layer.module for layer in layers}, []
        for layer, x_SD in self.inputs(decoder, structure, calibration, context, self.tokens):
            if layer.module in wanted:
                even = len(x_SD) / structure.routed
                least, most = max(1, math.floor(even * (1 - self.jitter))), math.ceil(even * (1 + self.jitter))
                labels_S = cluster(x_SD, structure.routed, least, most, context.seed)
                rows = x_SD.float()
                found.append(torch.stack([rows[labels_S == j].mean(0) for j in range(structure.routed)]))
        return found


def slices(layers: Sequence[DecoderLayer], structure: Structure, generator: Generator) -> None:
    """The vanilla construction, in place."""
    for layer in layers:
        hidden, width = layer.mlp_inputs[0].in_features, layer.mlp_output.in_features
        router = (2 * torch.rand(structure.experts, hidden, generator=generator) - 1) * hidden**-0.5
        parts, scale = contiguous_parts(structure.sizes(width)), structure.experts / structure.active
        modeling.convert_mlp(layer, router, parts, active=structure.active, gate="softmax", scale=scale)


def residual_split(scores_NF: Tensor, structure: Structure) -> tuple[Tensor, list[Tensor]]:
    """Shared neurons, and those of every expert.

    Among neurons that are in equally many experts' highest, those of higher total score are shared.
    """
    width = scores_NF.shape[1]
    sizes, count = structure.sizes(width), structure.shared_neurons(width)
    highest_Nm = scores_NF.argsort(dim=1, descending=True, stable=True)[:, : sizes[0]]
    lists_F = highest_Nm.flatten().bincount(minlength=width)
    order = scores_NF.sum(0).argsort(descending=True, stable=True)
    order = order[lists_F[order].argsort(descending=True, stable=True)]
    rest = order[count:].sort().values
    return order[:count], greedy_parts(scores_NF, rest, sizes[structure.shared :])
