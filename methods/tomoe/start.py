"""How training begins (`start=energy`): with the experts the dense model itself suggests. Not in the paper.

From a random start everything is on, widths fall, and the experts of a layer end up as near copies of each other. The
dense model already says which neurons a token needs: those that write most to the residual stream. Per layer, on some
training text,

    e_tj = (h_tj |Wdown_j|)^2 / sum over neurons of the same        h: input of the down projection

 1. experts and tokens take turns, as in Lloyd's k-means: a token goes to the expert that keeps most of its energy, an
    expert becomes the neurons of most energy over its tokens;
 2. the linear router learns to send each token where most of its energy is kept: max sum_t softmax(r_t) . kept_t;
 3. the mask decoder is fitted by least squares to the experts' log-energies, cut at the target width: the noise-free
    sets of the MLPs start at the right size (noise adds to them until it falls, and R_P answers for that). The
    architecture is the paper's; only the initial weights differ.

Attention starts whole, as in the paper: starting it from energies too was worse (docs/TOMOE.md).
"""

# Shape suffixes: T tokens, D hidden size, E embedding width, N experts, M MLP width.

import math
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, one_hot

from methods.base import Context
from methods.errors import overflow
from methods.modeling.decoder import Decoder, DecoderLayer
from methods.tomoe.network import ToMoENetwork
from methods.training.straight_through import OFFSET

TOKENS, ROUNDS, ROUTER_STEPS = 8192, 30, 300
"""Tokens to look at, rounds of step 1, Adam steps of step 2."""
SLOPE = 1.0
"""Mask logits per unit of log-energy."""
RIDGE = 1e-3
"""Of the least squares, relative to the features' mean square."""
HALF_ON = math.log(math.log(2)) - OFFSET
"""The mask logit of even chances."""


class _Seen(Exception):
    """Enough of a forward pass has run."""


@torch.no_grad()
def begin(network: ToMoENetwork, decoder: Decoder, p: float, windows_WT: Tensor, context: Context) -> None:
    """Set the routers and the mask decoders of all MLP sites, in place.

    Args:
        p: share of its neurons that an expert is to start with.
        windows_WT: token ids of training text, int64.
    """
    generator = torch.Generator().manual_seed(context.seed)
    embeddings_SNE = network.hypernetwork()
    layers = context.progress.track(decoder.layers, "grouping neurons", len(decoder.layers))
    for index, layer in enumerate(layers):
        site, embeddings_NE = network.mlp_sites[index], embeddings_SNE[2 * index + 1]
        x_TD, energy_TM = signals(decoder, layer, windows_WT.split(context.batch_size))
        width = max(1, round(p * energy_TM.shape[1]))
        means_NM = group(energy_TM, len(embeddings_NE), width, generator)
        site.router.weight.copy_(fit_router(x_TD, energy_TM @ highest(means_NM, width).T))
        site.decoder.weight.copy_(least_squares(gelu(site.norm(embeddings_NE)), logits_of(means_NM, p)))


def signals(decoder: Decoder, layer: DecoderLayer, batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
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
        for ids in batches:
            with suppress(_Seen):
                decoder.model.base_model(ids.to(decoder.model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    energy_TM = torch.cat(energies)
    if not energy_TM.isfinite().all():
        raise overflow()
    return torch.cat(inputs), energy_TM / energy_TM.sum(1, keepdim=True).clamp_min(1e-30)


def logits_of(energy: Tensor, p: float) -> Tensor:
    """Mask logits of energies [..., n]: linear in their logarithm, even chances at the cut that keeps p of them."""
    logs = energy.clamp_min(1e-20).log()
    count = max(1, round(p * energy.shape[-1]))
    return SLOPE * (logs - logs.topk(count, -1).values[..., -1:]) + HALF_ON


def least_squares(features: Tensor, targets: Tensor) -> Tensor:
    """The weight W [n, E] with features W^T ~ targets, for [rows, E] and [rows, n]: least squares with a ridge."""
    x, y = features.cpu().double(), targets.cpu().double()  # small; not every device has float64
    gram = x.T @ x
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, x.T @ y).T.to(features)


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
