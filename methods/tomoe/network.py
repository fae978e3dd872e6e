"""The trained part of ToMoE as a whole: the hypernetwork, the sites, and one draw of masks for a training step."""

# Shape suffixes: B batch, T tokens, S sites (2L), N experts, E embedding width, M MLP width, h head dimension.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from methods.modeling.shape import DecoderShape
from methods.tomoe.sites import AttentionSite, MLPSite, spread
from methods.training.hypernetwork import HyperNetwork
from methods.training.straight_through import st_gumbel_sigmoid

if TYPE_CHECKING:
    from methods.tomoe.method import ToMoE


@dataclass
class LayerMasks:
    """The masks of one layer in one training step; the lower part is filled while the layer runs."""

    embeddings_NE: Tensor
    """Of the MLP's experts."""
    mean_E: Tensor
    """Mean embedding of the attention site."""
    experts_NM: Tensor
    """S: one 0/1 mask per expert."""
    qk_h: Tensor | None
    """s_0, or None where query and key keep their width."""
    heads_H: Tensor | None
    """One bit per key/value head (ablation "head pruning"), or None."""
    routes_BTN: Tensor | None = None
    """G: one-hot rows, who computes which token."""
    shares_BTN: Tensor | None = None
    """The probabilities behind G."""
    values_BTh: Tensor | None = None
    """s_t; [h] where it does not depend on the token."""


class ToMoENetwork(nn.Module):
    """Everything that is trained. In fp32 on the device of the model."""

    def __init__(self, shape: DecoderShape, settings: ToMoE, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.settings, self.shape = settings, shape
        self.hypernetwork = HyperNetwork(2 * shape.layers, settings.experts, width, generator)
        values = shape.head_dim
        groups = shape.kv_heads if settings.head_pruning else len(shape.rope_groups)
        self.attention = nn.ModuleList(
            AttentionSite(shape.hidden, width, values, groups, local=settings.local_embeddings)
            for _ in range(shape.layers)
        )
        self.mlp = nn.ModuleList(
            MLPSite(shape.hidden, settings.experts, width, shape.mlp_width) for _ in range(shape.layers)
        )

    @property
    def attention_sites(self) -> list[AttentionSite]:
        """Of every layer."""
        return [cast(AttentionSite, site) for site in self.attention]

    @property
    def mlp_sites(self) -> list[MLPSite]:
        """Of every layer."""
        return [cast(MLPSite, site) for site in self.mlp]

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimiser sees, by name; z is a buffer and not among them."""
        return dict(self.named_parameters())

    def draw(self, *, noise: float = 1.0) -> list[LayerMasks]:
        """One draw of the masks that do not depend on tokens, for all layers."""
        embeddings_SNE = self.hypernetwork()
        return [self._draw_layer(layer, embeddings_SNE, noise) for layer in range(self.shape.layers)]

    def mean_embedding(self, layer: int, embeddings_SNE: Tensor) -> Tensor:
        """What the attention site of a layer adds to its projection, [E]."""
        local = self.attention_sites[layer].local
        return embeddings_SNE[2 * layer].mean(0) if local is None else local

    def _draw_layer(self, layer: int, embeddings_SNE: Tensor, noise: float) -> LayerMasks:
        tau = self.settings.tau
        attention, mlp = self.attention_sites[layer], self.mlp_sites[layer]
        embeddings_NE, mean_E = embeddings_SNE[2 * layer + 1], self.mean_embedding(layer, embeddings_SNE)
        masks = LayerMasks(
            embeddings_NE=embeddings_NE,
            mean_E=mean_E,
            experts_NM=st_gumbel_sigmoid(mlp.expert_logits(embeddings_NE), tau, noise=noise),
            qk_h=None,
            heads_H=None,
        )
        if self.settings.head_pruning:
            masks.heads_H = st_gumbel_sigmoid(attention.group_logits(mean_E), tau, noise=noise)
        elif not self.shape.qk_norm:
            groups = st_gumbel_sigmoid(attention.group_logits(mean_E), tau, noise=noise)
            masks.qk_h = spread(groups, self.shape.rope_groups)
        if not self.settings.vo_routing:
            masks.values_BTh = st_gumbel_sigmoid(attention.static_value_logits(mean_E), tau, noise=noise)
        return masks
