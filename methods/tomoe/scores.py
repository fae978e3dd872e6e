"""What conversion decides from: the mask logits of a trained network, those of tokens on calibration text.

K is measured once, under masks before the shift of `sizes`. Measuring again under those of the solved sizes changed
expected K by 0.2 of 32 dimensions at most, and K in one of ten layers by one (tiny-llama after 60 steps towards ratio
0.5, converted to 0.5, 0.45 and 0.4).
"""

# Shape suffixes: B batch, T tokens, N experts, M MLP width, h head dimension, G groups.

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from methods.base import Calibration, Context
from methods.modeling.decoder import Decoder
from methods.tomoe.masking import MaskedDecoder
from methods.tomoe.network import ToMoENetwork
from methods.training.seeding import seeded
from methods.training.straight_through import gumbel

TOKENS = 8192
"""Calibration tokens whose value scores decide K, at most."""


@dataclass(frozen=True)
class Scores:
    """One layer's mask logits, without noise."""

    experts_NM: Tensor
    counted_NM: Tensor
    """What widths are counted from: the same, or one draw of them (`expert_width=sampled`)."""
    groups_G: Tensor | None
    """Query/key groups, or key/value heads (ablation "head pruning"); None where query and key keep their width."""
    values_Th: Tensor
    """Of calibration tokens; one row where no token chooses."""
    least_groups: int
    """So many groups stay, whatever happens: queries and keys keep two dimensions."""


def measure(network: ToMoENetwork, decoder: Decoder, calibration: Calibration, context: Context) -> list[Scores]:
    """Mask logits of all layers; those of tokens from a masked, noise-free pass over the calibration text."""
    embeddings_SNE = network.hypernetwork()
    means = [network.mean_embedding(layer, embeddings_SNE) for layer in range(network.shape.layers)]
    if network.settings.dynamic_values:
        values = _value_logits(network, decoder, calibration, context, means)
    else:
        pairs = zip(network.attention_sites, means, strict=True)
        values = [site.static_value_logits(mean)[None] for site, mean in pairs]
    least = 1 if network.settings.head_pruning else 2 // min(map(len, network.shape.rope_groups))
    scores = []
    for layer, mean_E in enumerate(means):
        mlp, attention = network.mlp_sites[layer], network.attention_sites[layer]
        groups = None if network.shape.qk_norm and not network.settings.head_pruning else attention.group_logits(mean_E)
        experts_NM = mlp.expert_logits(embeddings_SNE[2 * layer + 1])
        scores.append(Scores(experts_NM, experts_NM, groups, values[layer], least))
    return drawn(scores, network.settings.last_noise, context) if network.settings.expert_width == "sampled" else scores


def drawn(scores: list[Scores], noise: float, context: Context) -> list[Scores]:
    """The same, with widths to be counted from one draw of noise that follows from the run's seed."""
    with seeded(context.seed, context.device):
        return [replace(s, counted_NM=s.experts_NM + noise * gumbel(s.experts_NM)) for s in scores]


def _value_logits(
    network: ToMoENetwork, decoder: Decoder, calibration: Calibration, context: Context, means: list[Tensor]
) -> list[Tensor]:
    """Value scores of real calibration tokens, [tokens, h] per layer."""
    seen: list[list[Tensor]] = [[] for _ in means]
    masked = MaskedDecoder(decoder, network, noise=0.0)

    def see(index: int) -> Any:
        site = network.attention_sites[index]

        def hook(module: nn.Module, args: tuple) -> None:
            logits_BTh = site.value_logits(args[0], means[index])
            seen[index].append(logits_BTh.flatten(0, -2) if mask_BT is None else logits_BTh[mask_BT])

        return hook

    handles = [layer.attention_inputs[0].register_forward_pre_hook(see(i)) for i, layer in enumerate(decoder.layers)]
    try:
        with masked.attached():
            for batch in calibration.batches(context.batch_size):
                masked.masks = network.draw(noise=0.0)
                input_ids = batch.input_ids.to(decoder.model.device)
                mask_BT = None if batch.mask is None else batch.mask.bool().to(decoder.model.device)
                decoder.model.base_model(input_ids, attention_mask=mask_BT, use_cache=False)
                if sum(map(len, seen[0])) >= TOKENS:
                    break
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in seen]
