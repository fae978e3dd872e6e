"""How training begins (`start=energy`): with the sets the dense model itself suggests. Not in the paper.

From a random start everything is on, widths fall, and the experts of a layer end up as near copies of each other. The
dense model already says what a token needs: that which writes most to the residual stream. Per layer, on calibration
tokens, with energies

    neuron j         e_tj = (h_tj |Wdown_j|)^2                         h: input of the down projection
    value dim i      e_ti = sum over heads of (v_ti |Wo_i|)^2 times the same of the attention's output
    q/k group g      e_g  = sum over heads of mean |q_g|^2 mean |k_g|^2

 1. experts and tokens take turns, as in Lloyd's k-means: a token goes to the expert that keeps most of its energy, an
    expert becomes the neurons of most energy over its tokens;
 2. the linear router learns to send each token where most of its energy is kept: max sum_t softmax(r_t) . kept_t;
 3. the mask decoders are fitted by least squares to log-energies, cut at the target width: training starts at the right
    size. The architecture is the paper's; only the initial weights differ.
"""

# Shape suffixes: T tokens, D hidden size, E embedding width, N experts, M MLP width, h head dimension, G groups.

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, one_hot

from methods.base import Calibration, Context
from methods.modeling.decoder import Decoder, DecoderLayer
from methods.tomoe.network import ToMoENetwork
from methods.tomoe.straight_through import OFFSET

TOKENS, ROUNDS, ROUTER_STEPS = 8192, 30, 300
"""Calibration tokens at most, rounds of step 1, Adam steps of step 2."""
SLOPE = 1.0
"""Mask logits per unit of log-energy."""
RIDGE = 1e-3
"""Of the least squares, relative to the features' mean square."""
HALF_ON = math.log(math.log(2)) - OFFSET
"""The mask logit of even chances."""


class _Seen(Exception):
    """Enough of a forward pass has run."""


@dataclass
class Signals:
    """What one layer computes on calibration tokens; lists by batch while it is gathered."""

    parts: dict[str, list[Tensor]] = field(default_factory=dict)

    def keep(self, name: str, tensor: Tensor) -> None:
        """Add one batch."""
        self.parts.setdefault(name, []).append(tensor.flatten(0, -2).float())

    def __getitem__(self, name: str) -> Tensor:
        """All tokens, [T, width]."""
        return torch.cat(self.parts[name])

    @property
    def tokens(self) -> int:
        """So far."""
        return sum(map(len, self.parts.get("mlp_input", [])))


@torch.no_grad()
def begin(network: ToMoENetwork, decoder: Decoder, p: float, calibration: Calibration, context: Context) -> None:
    """Set the routers and the mask decoders of all sites, in place.

    Args:
        p: share of everything that is to be on at the start.
    """
    generator = torch.Generator().manual_seed(context.seed)
    embeddings_SNE = network.hypernetwork()
    layers = context.progress.track(decoder.layers, "grouping neurons", len(decoder.layers))
    for index, layer in enumerate(layers):
        start = LayerStart(network, index, layer, gather(decoder, layer, calibration, context), p)
        start.mlp(embeddings_SNE[2 * index + 1], generator)
        start.attention(network.mean_embedding(index, embeddings_SNE))


def gather(decoder: Decoder, layer: DecoderLayer, calibration: Calibration, context: Context) -> Signals:
    """Run the dense model up to a layer's down projection."""
    signals = Signals()
    query, key, value = layer.attention_inputs

    def reads(name: str, stop: bool = False):
        def hook(module: nn.Module, args: tuple) -> None:
            signals.keep(name, args[0])
            if stop:
                raise _Seen

        return hook

    def writes(name: str):
        return lambda module, args, output: signals.keep(name, output)

    handles = [
        query.register_forward_pre_hook(reads("attention_input")),
        query.register_forward_hook(writes("query")),
        key.register_forward_hook(writes("key")),
        value.register_forward_hook(writes("value")),
        layer.attention_output.register_forward_pre_hook(reads("attended")),
        layer.mlp_inputs[0].register_forward_pre_hook(reads("mlp_input")),
        layer.mlp_output.register_forward_pre_hook(reads("neurons", stop=True)),
    ]
    try:
        for batch in calibration.batches(context.batch_size):
            try:
                decoder.model.base_model(batch.input_ids.to(decoder.model.device), use_cache=False)
            except _Seen:
                pass
            if signals.tokens >= TOKENS:
                break
    finally:
        for handle in handles:
            handle.remove()
    return signals


@dataclass(frozen=True)
class LayerStart:
    """The start of one layer's sites."""

    network: ToMoENetwork
    index: int
    layer: DecoderLayer
    signals: Signals
    p: float

    def mlp(self, embeddings_NE: Tensor, generator: torch.Generator) -> None:
        """Router and experts."""
        site = self.network.mlp_sites[self.index]
        energy_TM = (self.signals["neurons"] * self.layer.mlp_output.weight.float().norm(dim=0)).square()
        energy_TM /= energy_TM.sum(1, keepdim=True).clamp_min(1e-30)
        width = max(1, round(self.p * energy_TM.shape[1]))
        means_NM = group(energy_TM, len(embeddings_NE), width, generator)
        site.router.weight.copy_(fit_router(self.signals["mlp_input"], energy_TM @ highest(means_NM, width).T))
        site.decoder.weight.copy_(least_squares(gelu(site.norm(embeddings_NE)), logits_of(means_NM, self.p)))

    def attention(self, mean_E: Tensor) -> None:
        """Query/key groups and value dimensions."""
        site, settings = self.network.attention_sites[self.index], self.network.settings
        features_1E = gelu(site.norm(mean_E))[None]
        if settings.head_pruning:
            heads = self.value_energy().mean(0).sum(-1)
            site.static.weight.copy_(least_squares(features_1E, logits_of(heads[None], self.p)))
            return
        site.static.weight.copy_(least_squares(features_1E, logits_of(self.group_energy()[None], self.p)))
        energy_Th = self.value_energy().sum(1)
        if settings.vo_routing:
            features_TE = gelu(site.norm(site.project(self.signals["attention_input"]) + mean_E))
            site.dynamic.weight.copy_(least_squares(features_TE, logits_of(energy_Th, self.p)))
        else:
            site.dynamic.weight.copy_(least_squares(features_1E, logits_of(energy_Th.mean(0)[None], self.p)))

    def value_energy(self) -> Tensor:
        """Of values and of what attention makes of them, per key/value head, [T, Hk, h]."""
        shape = self.network.shape
        columns = self.layer.attention_output.weight.float().square().sum(0).view(shape.kv_heads, -1, shape.head_dim)
        value = self.signals["value"].unflatten(1, (shape.kv_heads, 1, shape.head_dim)).square() * columns
        attended = self.signals["attended"].unflatten(1, (shape.kv_heads, -1, shape.head_dim)).square() * columns
        return (value.sum(2) * attended.sum(2)).sqrt()

    def group_energy(self) -> Tensor:
        """Of query times key, [G]."""
        shape = self.network.shape
        query = self.signals["query"].square().mean(0).view(shape.kv_heads, -1, shape.head_dim).sum(1)
        key = self.signals["key"].square().mean(0).view(shape.kv_heads, shape.head_dim)
        groups = [list(dims) for dims in shape.rope_groups]
        return torch.stack([(query[:, dims].sum(1) * key[:, dims].sum(1)).sum() for dims in groups]).sqrt()


def logits_of(energy: Tensor, p: float) -> Tensor:
    """Mask logits of energies [..., n]: linear in their logarithm, even chances at the cut that keeps p of them."""
    logs = energy.clamp_min(1e-20).log()
    count = max(1, round(p * energy.shape[-1]))
    return SLOPE * (logs - logs.topk(count, -1).values[..., -1:]) + HALF_ON


def least_squares(features: Tensor, targets: Tensor) -> Tensor:
    """The weight W [n, E] with features W^T ~ targets, for [rows, E] and [rows, n]: least squares with a ridge."""
    gram = features.T.double() @ features.double()
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge, features.T.double() @ targets.double()).T.to(features.dtype)


def highest(scores_NM: Tensor, width: int) -> Tensor:
    """1 on each row's `width` highest scores, [N, M]."""
    return torch.zeros_like(scores_NM).scatter_(1, scores_NM.topk(width, 1).indices, 1.0)


def group(energy_TM: Tensor, experts: int, width: int, generator: torch.Generator) -> Tensor:
    """Step 1: the mean energies of each expert's tokens, [N, M]."""
    means_NM = _seeds(energy_TM, experts, width, generator)
    for _ in range(ROUNDS):
        kept_TN = energy_TM @ highest(means_NM, width).T
        members_NT = one_hot(kept_TN.argmax(1), experts).T.to(energy_TM)
        counts_N1 = members_NT.sum(1, keepdim=True)
        # An expert nobody chose becomes what the worst served token needs.
        worst_M = energy_TM[kept_TN.max(1).values.argmin()]
        means_NM = torch.where(counts_N1 > 0, members_NT @ energy_TM / counts_N1.clamp_min(1), worst_M)
    return means_NM


def _seeds(energy_TM: Tensor, experts: int, width: int, generator: torch.Generator) -> Tensor:
    """Tokens to begin with, each drawn with the chance of the energy that the ones before lose (as in k-means++)."""
    lost_T = torch.ones(len(energy_TM), device=energy_TM.device)
    chosen: list[Tensor] = []
    for _ in range(experts):
        token = torch.multinomial(lost_T.cpu().clamp_min(1e-9), 1, generator=generator).to(energy_TM.device)
        # Which neurons a single token leaves out is chance; those that are strong on the whole break ties.
        chosen.append(energy_TM[token] + 0.1 * energy_TM.mean(0))
        lost_T = torch.minimum(lost_T, 1 - energy_TM @ highest(chosen[-1], width)[0])
    return torch.cat(chosen)


@torch.enable_grad()
def fit_router(x_TD: Tensor, kept_TN: Tensor) -> Tensor:
    """Step 2: the rows [N, D] whose softmax keeps most energy."""
    weight_ND = torch.zeros(kept_TN.shape[1], x_TD.shape[1], device=x_TD.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight_ND], lr=0.02)
    for _ in range(ROUTER_STEPS):
        optimizer.zero_grad()
        (-((x_TD @ weight_ND.T).softmax(1) * kept_TN).sum(1).mean()).backward()
        optimizer.step()
    return weight_ND.detach()
