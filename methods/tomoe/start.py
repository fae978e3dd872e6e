"""How routers and experts begin (`start=energy`): tokens grouped by the neurons they excite. Not in the paper.

From a random start the experts of a layer end up as near copies of each other. The dense model already says which
neurons a token needs: those that write most to the residual stream,

    e_tj = (h_tj |Wdown_j|)^2      h the input of the down projection.

Per layer, on calibration tokens:

 1. experts and tokens take turns, as in Lloyd's k-means: a token goes to the expert that keeps most of its energy, an
    expert becomes the neurons of most energy over its tokens;
 2. the linear router learns to send each token where most of its energy is kept: max sum_t softmax(r_t) . kept_t;
 3. the log-energies become fixed priors of the mask logits, on which training builds. An expert's cut lies at the
    target width, so that training starts from the right size.
"""

# Shape suffixes: T tokens, D hidden size, N experts, M MLP width.

import math

import torch
from torch import Tensor, nn

from methods.base import Calibration, Context
from methods.modeling.decoder import Decoder, DecoderLayer
from methods.tomoe.network import ToMoENetwork
from methods.tomoe.sites import MLPSite
from methods.tomoe.straight_through import OFFSET

TOKENS, ROUNDS, ROUTER_STEPS = 8192, 30, 300
"""Calibration tokens at most, rounds of step 1, Adam steps of step 2."""
SLOPE = 1.0
"""Mask logits per unit of log-energy."""
HALF_ON = math.log(math.log(2)) - OFFSET
"""The mask logit of even chances."""


class _Seen(Exception):
    """Enough of a forward pass has run."""


def begin(network: ToMoENetwork, decoder: Decoder, p: float, calibration: Calibration, context: Context) -> None:
    """Set the routers and the priors of all MLP sites, in place.

    Args:
        p: share of its neurons that an expert is to start with.
    """
    generator = torch.Generator().manual_seed(context.seed)
    layers = context.progress.track(decoder.layers, "grouping neurons", len(decoder.layers))
    for layer, site in zip(layers, network.mlp_sites, strict=True):
        x_TD, energy_TM = signals(decoder, layer, calibration, context)
        width = max(1, round(p * energy_TM.shape[1]))
        experts_NM = group(energy_TM, network.settings.experts, width, generator)
        _set(site, x_TD, energy_TM, experts_NM, width)


@torch.no_grad()
def signals(decoder: Decoder, layer: DecoderLayer, calibration: Calibration, context: Context) -> tuple[Tensor, Tensor]:
    """What a layer's MLP reads [T, D], and its neurons' energies as shares of each token's [T, M]; fp32."""
    inputs: list[Tensor] = []
    energies: list[Tensor] = []
    norms_M = layer.mlp_output.weight.float().norm(dim=0)

    def read(module: nn.Module, args: tuple) -> None:
        inputs.append(args[0].flatten(0, -2).float())

    def write(module: nn.Module, args: tuple) -> None:
        energies.append((args[0].flatten(0, -2).float() * norms_M).square())
        raise _Seen

    handles = [
        layer.mlp_inputs[0].register_forward_pre_hook(read),
        layer.mlp_output.register_forward_pre_hook(write),
    ]
    try:
        for batch in calibration.batches(context.batch_size):
            try:
                decoder.model.base_model(batch.input_ids.to(decoder.model.device), use_cache=False)
            except _Seen:
                pass
            if sum(map(len, inputs)) >= TOKENS:
                break
    finally:
        for handle in handles:
            handle.remove()
    energy_TM = torch.cat(energies)
    return torch.cat(inputs), energy_TM / energy_TM.sum(1, keepdim=True).clamp_min(1e-30)


def widest(scores_NM: Tensor, width: int) -> Tensor:
    """1 on each row's `width` highest scores, [N, M]."""
    return torch.zeros_like(scores_NM).scatter_(1, scores_NM.topk(width, 1).indices, 1.0)


def group(energy_TM: Tensor, experts: int, width: int, generator: torch.Generator) -> Tensor:
    """Step 1: the mean energies of each expert's tokens, [N, M]."""
    seeds = torch.randperm(len(energy_TM), generator=generator)[:experts].to(energy_TM.device)
    means_NM = energy_TM.mean(0) + energy_TM[seeds] / 2
    for _ in range(ROUNDS):
        choice_T = (energy_TM @ widest(means_NM, width).T).argmax(1)
        members_NT = nn.functional.one_hot(choice_T, experts).T.to(energy_TM)
        counts_N1 = members_NT.sum(1, keepdim=True)
        # An expert nobody chose stays as it is.
        means_NM = torch.where(counts_N1 > 0, members_NT @ energy_TM / counts_N1.clamp_min(1), means_NM)
    return means_NM


def _set(site: MLPSite, x_TD: Tensor, energy_TM: Tensor, means_NM: Tensor, width: int) -> None:
    """Steps 2 and 3."""
    kept_TN = energy_TM @ widest(means_NM, width).T
    with torch.no_grad():
        site.router.weight.copy_(fit_router(x_TD, kept_TN))
        logs_NM = means_NM.clamp_min(1e-12).log()
        cut_N1 = logs_NM.topk(width, 1).values[:, -1:]
        site.prior_NM.copy_(SLOPE * (logs_NM - cut_N1) + HALF_ON)


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
