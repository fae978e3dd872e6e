"""From learned masks to a sparse model (ToMoE, section "Conversion" and appendix): nothing is drawn, nothing is
retrained.

With a the mask logits of a site and t one shift for the whole model, P(on) = 1 - exp(-exp(a + b - t)) and

    MLP      w = max over experts of sum P(on); each expert keeps its w highest neurons
    q/k      the sum P(on) highest groups
    v/o      K = mean over calibration tokens of sum P(on); each token keeps its K highest dimensions

t is solved by bisection so that the counted size meets the budget: training counts samples, and a model is counted by
its matrices. At least one neuron, two query/key dimensions and one value dimension stay.

Departs from the released code: equal widths, K from calibration text (theirs is the test set), and no noise but with
`inference_noise`.
"""

# Shape suffixes: B batch, T tokens, D hidden size, N experts, M MLP width, w neurons of an expert, h head dimension,
# G groups.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from scipy.optimize import bisect
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods import modeling
from methods.base import Budget, Calibration, Context
from methods.errors import UserError
from methods.modeling.decoder import Decoder, DecoderLayer
from methods.modeling.shape import DecoderShape
from methods.tomoe import accounting
from methods.tomoe.masking import MaskedDecoder
from methods.tomoe.network import ToMoENetwork
from methods.tomoe.objective import equalised
from methods.tomoe.straight_through import OFFSET, probability_on

if TYPE_CHECKING:
    from methods.tomoe.method import ToMoE

TOKENS = 8192
"""Calibration tokens whose value scores decide K, at most."""


@dataclass(frozen=True)
class Scores:
    """One layer's mask logits, without noise."""

    experts_NM: Tensor
    groups_G: Tensor | None
    """Query/key groups, or key/value heads (ablation "head pruning"); None where query and key keep their width."""
    values_Th: Tensor
    """Of calibration tokens; one row where no token chooses."""
    least_groups: int
    """So many groups stay, whatever happens: queries and keys keep two dimensions."""


@dataclass(frozen=True)
class Sizes:
    """What one layer keeps."""

    groups: int
    values: int
    neurons: int


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
        raw = [probability_on(s.experts_NM, settings.last_noise).sum(1).tolist() for s in scores]
        for index, layer in enumerate(decoder.layers):
            LayerConversion(settings, decoder.shape, network, index).apply(layer, scores[index], sizes[index])
    return modeling.rebuild(model, _records(settings, model, raw))


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
        scores.append(Scores(mlp.expert_logits(embeddings_SNE[2 * layer + 1]), groups, values[layer], least))
    return scores


def _value_logits(
    network: ToMoENetwork, decoder: Decoder, calibration: Calibration, context: Context, means: list[Tensor]
) -> list[Tensor]:
    """Value scores of calibration tokens, [tokens, h] per layer."""
    seen: list[list[Tensor]] = [[] for _ in means]
    masked = MaskedDecoder(decoder, network, noise=0.0)

    def see(index: int) -> Any:
        site = network.attention_sites[index]

        def hook(module: nn.Module, args: tuple) -> None:
            seen[index].append(site.value_logits(args[0], means[index]).flatten(0, -2))

        return hook

    handles = [layer.attention_inputs[0].register_forward_pre_hook(see(i)) for i, layer in enumerate(decoder.layers)]
    try:
        with masked.attached():
            for batch in calibration.batches(context.batch_size):
                masked.masks = network.draw(noise=0.0)
                decoder.model.base_model(batch.input_ids.to(decoder.model.device), use_cache=False)
                if sum(map(len, seen[0])) >= TOKENS:
                    break
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in seen]


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
            f"ratio {budget.ratio:g} is below the least that tomoe can make of this model, {least:.3f}: one neuron and "
            f"one value dimension per layer, and what routing adds. Use --ratios {least + 0.01:.2f} or more."
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

    def expected(logits: Tensor, shift: float = t) -> Tensor:
        return probability_on(logits - shift, settings.last_noise).sum(-1)

    def size(s: Scores) -> Sizes:
        values = expected(s.values_Th)
        kept = values.mean() if settings.kept_values == "mean" else values.max()
        groups = 0 if s.groups_G is None else max(s.least_groups, round(float(expected(s.groups_G))))
        return Sizes(groups, _at_least_one(kept), _at_least_one(expected(s.experts_NM, t_mlp).max()))

    return [size(s) for s in scores]


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
