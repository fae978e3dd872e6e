"""From learned masks to a sparse model (ToMoE, section "Conversion" and appendix): nothing is drawn, nothing is
retrained.

    MLP      each expert keeps its w highest neurons
    q/k      the highest groups stay
    v/o      each token keeps its K highest dimensions

`scores` says what is high, `sizes` how many stay.

Departs from the released code: equal widths (with ragged ones the size a token uses would depend on the text), K from
calibration text (theirs is the test set), and no noise but with `expert_width=sampled` and `inference_noise`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from methods import modeling
from methods.base import Budget, Calibration, Context
from methods.modeling.decoder import Decoder, DecoderLayer
from methods.modeling.shape import DecoderShape
from methods.tomoe.network import ToMoENetwork
from methods.tomoe.objective import equalised
from methods.tomoe.scores import Scores, measure
from methods.tomoe.sizes import Sizes, best, solve
from methods.training.straight_through import OFFSET

if TYPE_CHECKING:
    from methods.tomoe.method import ToMoE


def convert(
    settings: ToMoE,
    model: PreTrainedModel,
    network: ToMoENetwork,
    budget: Budget,
    calibration: Calibration,
    context: Context,
) -> PreTrainedModel:
    """The sparse model; the tensors of `model` are used up.

    Raises:
        UserError: the budget is below the smallest model that conversion can make.
    """
    decoder = Decoder(model)
    with torch.no_grad():
        scores = measure(network, decoder, calibration, context)
        sizes = solve(settings, decoder.shape, scores, budget)
        for index, layer in enumerate(decoder.layers):
            LayerConversion(settings, decoder.shape, network, index).apply(layer, scores[index], sizes[index])
    return modeling.rebuild(model, _records(settings, model, [size.raw_neurons for size in sizes]))


@dataclass(frozen=True)
class LayerConversion:
    """Cuts one layer to what was decided."""

    settings: ToMoE
    shape: DecoderShape
    network: ToMoENetwork
    index: int

    def apply(self, layer: DecoderLayer, scores: Scores, sizes: Sizes) -> None:
        """In place."""
        experts = equalised(scores.experts_NM, sizes.neurons).nonzero()[:, 1].view(-1, sizes.neurons)
        if len(experts) == 1:
            modeling.narrow_mlp(layer, experts[0])
        else:
            modeling.convert_mlp(layer, self.network.mlp_sites[self.index].router.weight, experts)
        chosen = best(scores.groups_G, sizes.groups)
        if self.settings.head_pruning:
            modeling.narrow_heads(layer, self.shape, chosen)
            return
        if chosen:
            modeling.narrow_qk(layer, self.shape, [dim for g in chosen for dim in self.shape.rope_groups[g]])
        if self.settings.vo_routing:
            rule = modeling.ValueRule(rule=self.settings.topk, threshold=-OFFSET, mask=self.settings.vo_mask)
            modeling.convert_values(layer, self._selector(), sizes.values, rule)
        else:
            modeling.narrow_vo(layer, self.shape, best(scores.values_Th[0], sizes.values))

    def _selector(self) -> Any:
        """The attention site as the structure has it, the mean embedding being the projection's bias."""
        site = self.network.attention_sites[self.index]
        selector = modeling.ValueSelector(self.shape.hidden, len(site.norm.weight), self.shape.head_dim)
        selector.project.weight.copy_(site.project.weight)
        selector.project.bias.copy_(self.network.mean_embedding(self.index, self.network.hypernetwork()))
        selector.norm.load_state_dict(site.norm.state_dict())
        selector.score.weight.copy_(site.dynamic.weight)
        return selector


def _records(settings: ToMoE, model: PreTrainedModel, raw: list[list[float]]) -> dict[str, dict[str, Any]]:
    """The shape records of what was done, with the experts' widths before they were made equal."""
    records: dict[str, dict[str, Any]] = {"narrow_attention": modeling.attention_record(model)}
    if values := modeling.value_record(model):
        records["topk_values"] = values
    if settings.experts == 1:
        records["narrow_mlp"] = {"layers": [layer.mlp_output.in_features for layer in Decoder(model).layers]}
    else:
        experts = modeling.expert_record(model)
        for layer, widths in zip(experts["layers"], raw, strict=True):
            layer["raw_widths"] = widths
        records["moe_mlp"] = experts
    if settings.inference_noise:
        records["choice_noise"] = {"scale": settings.last_noise}
    return records
