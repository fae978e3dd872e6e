"""What methods that cut an MLP into experts have in common: ways to split neurons, and what is measured for that.

Neurons are numbered as in the dense MLP, and a split is a list of their numbers per part, int64. `sizes` are the
neurons of each part, larger ones first; they add up to the neurons that are split, so that none is left over.
Balanced clusters are found with k-means-constrained (minimum-cost flow), parts of graphs with METIS, as in the papers.
"""

# Shape suffixes: B batch, T tokens, S tokens of the text, D hidden size, F MLP neurons, N experts or groups, n points.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from methods import modeling
from methods.base import Batch, Calibration, Context
from methods.errors import nothing_to_measure, overflow
from methods.gradients import real_texts, visit_gradients
from methods.lazy import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn
    from transformers import PreTrainedModel

    from methods.modeling import Decoder, DecoderLayer, Signals

CHUNK = 4096
"""Tokens whose neurons are looked at together."""
LARGEST = 10
"""One of how many neurons is active at a token, where none is exactly zero."""


# --- Splits ---


def contiguous_parts(sizes: Sequence[int]) -> list[Tensor]:
    """Neurons in their order."""
    return [*torch.arange(sum(sizes)).split([*sizes])]


def random_parts(sizes: Sequence[int], generator: Generator) -> list[Tensor]:
    """Neurons by lot."""
    return [part.sort().values for part in torch.randperm(sum(sizes), generator=generator).split([*sizes])]


def parts_of(labels_n: Tensor, count: int) -> list[Tensor]:
    """The numbers of what has each label, larger parts first."""
    return sorted((torch.nonzero(labels_n == label)[:, 0] for label in range(count)), key=lambda part: -len(part))


def cluster(points_nD: Tensor, count: int, least: int, most: int, seed: int, iterations: int = 100) -> Tensor:
    """Labels [n] of k-means clusters of at least `least` and at most `most` points."""
    from k_means_constrained import KMeansConstrained

    most = min(most, len(points_nD))
    found = KMeansConstrained(count, least, most, random_state=seed, n_init=1, max_iter=iterations, copy_x=False)
    return torch.from_numpy(found.fit_predict(points_nD.float().cpu().contiguous().numpy())).long()


def balanced_parts(points_FD: Tensor, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Clusters of as equal a size as can be, of points that are to be normalised by the caller if at all."""
    return parts_of(cluster(points_FD, len(sizes), min(sizes), max(sizes), seed), len(sizes))


def graph_parts(weights_FF: Tensor, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Parts of a graph of neurons between which edges weigh little: METIS's, brought to the exact sizes.

    Of a part that is too large, the neurons least tied to it go where there is room and they are tied to most.

    Args:
        weights_FF: of the edges, symmetric, whole numbers; 0: there is none. On the CPU.
    """
    from pymetis import CSRAdjacency, Options, part_graph
    from scipy.sparse import csr_array

    edges = csr_array(weights_FF.long().fill_diagonal_(0).numpy())
    graph = CSRAdjacency(edges.indptr, edges.indices)  # pyright: ignore[reportArgumentType]
    options = Options(seed=seed, ufactor=1)  # as even as METIS can
    found = part_graph(len(sizes), graph, eweights=edges.data, options=options)
    parts = parts_of(torch.tensor(found.vertex_part), len(sizes))
    ties_NF = torch.stack([weights_FF[part].double().sum(0) for part in parts])
    home = ties_NF.max() + 1
    for ties_F, part in zip(ties_NF, parts, strict=True):
        ties_F[part] += home
    return greedy_parts(ties_NF, torch.arange(len(weights_FF)), sizes)


def greedy_parts(scores_NF: Tensor, neurons: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Each neuron to the part that scores it highest and has room, highest scores first; the lower ones among equals.

    Args:
        scores_NF: of all neurons.
        neurons: the ones to hand out, ascending.
    """
    order = scores_NF[:, neurons].flatten().argsort(descending=True, stable=True).tolist()
    owner, room = [-1] * len(neurons), [*sizes]
    for place in order:
        part, neuron = divmod(place, len(neurons))
        if owner[neuron] < 0 and room[part]:
            owner[neuron], room[part] = part, room[part] - 1
    owners = torch.tensor(owner)
    return [neurons[owners == part] for part in range(len(sizes))]


def best_parts(scores_NF: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Each part its own highest neurons: parts may overlap, and neurons be in none."""
    order_NF = scores_NF.argsort(dim=1, descending=True, stable=True)
    return [order_F[:size].sort().values for order_F, size in zip(order_NF, sizes, strict=True)]


# --- Measurements ---


def hidden(layer: DecoderLayer, x_TD: Tensor) -> Tensor:
    """What goes into down, [T, F]."""
    first, *others = (linear(x_TD) for linear in layer.mlp_inputs)
    h_TF = layer.mlp_activation(first)
    for other in others:
        h_TF = h_TF * other
    return h_TF


def input_rows(layer: DecoderLayer) -> Tensor:
    """What neurons read with, gate (if there is one) and up normalised and side by side, fp32 [F, D or 2 D]."""
    rows = [linear.weight.detach().float() for linear in layer.mlp_inputs]
    return torch.cat([torch.nn.functional.normalize(weight, dim=1) for weight in rows], 1)


def largest(h_TF: Tensor, count: int) -> Tensor:
    """Whether a neuron is among the `count` of its token with the largest |h|, bool [T, F]."""
    places = h_TF.float().abs().topk(min(count, h_TF.shape[1])).indices
    return torch.zeros_like(h_TF, dtype=torch.bool).scatter_(1, places, True)


def coactivations(layer: DecoderLayer, x_SD: Tensor) -> Tensor:
    """At how many tokens two neurons are active together, fp32 [F, F] on the CPU; each with itself: active at all.

    Active is what is not zero behind ReLU, and behind others a `LARGEST`-th of a token's neurons, of largest |h|.
    """
    counts_FF, width = torch.zeros((), device=x_SD.device), layer.mlp_output.in_features
    for x_TD in x_SD.split(CHUNK):
        h_TF = hidden(layer, x_TD)
        sparse = isinstance(layer.mlp_activation, torch.nn.ReLU)
        active_TF = (h_TF != 0 if sparse else largest(h_TF, -(-width // LARGEST))).float()
        counts_FF = counts_FF + active_TF.T @ active_TF
    return counts_FF.cpu()


def thinned(counts_FF: Tensor) -> Tensor:
    """The counts without the lowest: 0 where they are below 0.99 times the first decile that is not 0 (none: all)."""
    below_n = counts_FF.int().flatten().bincount().cumsum(0)
    ranks = torch.arange(1, 10) * counts_FF.numel() / 10
    threshold = next((decile for decile in torch.searchsorted(below_n, ranks.ceil().long()).tolist() if decile), 0)
    return counts_FF.where(counts_FF >= 0.99 * threshold, 0)


def mlp_inputs(
    decoder: Decoder, calibration: Calibration, context: Context, tokens: int, *, sequential: bool = False
) -> Iterator[tuple[DecoderLayer, Tensor]]:
    """Each block, on the device, with what its MLP reads at the first real tokens of the text, [S, D].

    Args:
        tokens: how many at most.
        sequential: whether the next block is to be shown behind what has been made of this one; else behind the dense
            one.

    Raises:
        UserError: there is no text, or the model overflows on it.
    """
    signals = modeling.Signals.at_entrance(decoder, beginning(calibration, tokens, context.batch_size))
    for layer in context.progress.track(decoder.layers, "cutting experts", len(decoder.layers)):
        with modeling.resident(layer.module, signals.device):
            x_SD, after = _watched(layer, signals)
            yield layer, x_SD[:tokens]
            if sequential:
                after = [_run(layer, *call).cpu() for call in signals.calls()]
        signals.batches[:] = after


def beginning(calibration: Calibration, tokens: int, batch_size: int) -> Iterator[Batch]:
    """Batches until there are so many real tokens."""
    for batch in calibration.batches(batch_size):
        yield batch
        tokens -= batch.input_ids.numel() if batch.mask is None else int(batch.mask.sum())
        if tokens <= 0:
            return


def _watched(layer: DecoderLayer, signals: Signals) -> tuple[Tensor, list[Tensor]]:
    """What a block's MLP reads at real tokens, and what the block makes of every batch; both are finite."""
    reads: list[Tensor] = []
    handle = layer.mlp_inputs[0].register_forward_pre_hook(lambda module, args: reads.append(args[0]))
    seen, after = [], []
    try:
        for x_BTD, keywords, mask_BT in signals.calls():
            y_BTD = _run(layer, x_BTD, keywords, mask_BT)
            finite(modeling.real_tokens(y_BTD, mask_BT))  # else what goes into down, or comes out of it, is not
            after.append(y_BTD.cpu())
            seen.append(finite(modeling.real_tokens(reads.pop().view(*x_BTD.shape[:2], -1), mask_BT)))
    finally:
        handle.remove()
    if not sum(map(len, seen)):
        raise nothing_to_measure()
    return torch.cat(seen), after


def finite(numbers: Tensor) -> Tensor:
    """The numbers.

    Raises:
        UserError: one of them is none.
    """
    if not numbers.isfinite().all():
        raise overflow()
    return numbers


def _run(layer: DecoderLayer, x_BTD: Tensor, keywords: dict[str, Any], mask_BT: Tensor | None) -> Tensor:
    with torch.no_grad():
        output = layer.module(x_BTD, **keywords)
    return output[0] if isinstance(output, tuple) else output


def windows(calibration: Calibration, context: Context, count: int) -> list[Tensor]:
    """The first calibration windows of at least two tokens, without padding: token ids, int64 [T] each.

    Raises:
        UserError: there is none.
    """
    return real_texts(calibration, context.batch_size)[:count]


Group = Callable[[int, int, "Tensor"], "Tensor"]
"""From the place of a block, the number of a sample and what the block's MLP reads [T, D] to its tokens' groups [T]."""


def neuron_importance(
    model: PreTrainedModel,
    layers: Sequence[DecoderLayer],
    samples: Sequence[Tensor],
    group: Group,
    groups: int,
    context: Context,
) -> tuple[Tensor, Tensor]:
    """v_j[i] = mean over the tokens of group j of |h_i dL/dh_i|, L the mean next-token cross-entropy of a sample.

    Args:
        samples: token ids [T] each; one at a time goes through the model, which is in fp32 meanwhile.

    Returns:
        v [layers, groups, F], zero for groups without tokens, and the tokens of each group, [layers, groups]; fp64.

    Raises:
        UserError: a loss is not a number.
    """
    width = layers[0].mlp_output.in_features
    sums_LNF = torch.zeros(len(layers), groups, width, dtype=torch.float64)
    counts_LN = torch.zeros(len(layers), groups, dtype=torch.float64)
    number = -1

    def begin(module: nn.Module, args: tuple) -> None:
        nonlocal number
        number += 1

    def add(place: int, x_TD: Tensor, scores_TF: Tensor) -> None:
        groups_T = group(place, number, x_TD).cpu()
        sums_LNF[place].index_add_(0, groups_T, scores_TF.double().cpu())
        counts_LN[place] += groups_T.bincount(minlength=groups)

    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(begin).remove)
        for place, layer in enumerate(layers):
            hooks.enter_context(_scored(layer, partial(add, place)))
        visit_gradients(model, [], samples, context.progress, lambda parameter, gradient: None)
    return sums_LNF / counts_LN.clamp_min(1)[..., None], counts_LN


@contextmanager
def _scored(layer: DecoderLayer, see: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """While open, gradients of a loss also make `see` be called with what the MLP reads, and with |h dL/dh|."""
    reads: list[Tensor] = []

    def keep(module: nn.Module, args: tuple) -> None:
        reads.append(args[0].detach().flatten(0, -2))

    def watch(module: nn.Module, args: tuple) -> tuple[Tensor]:
        h = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        x_TD, value_TF = reads.pop(), h.detach().flatten(0, -2)
        h.register_hook(lambda gradient: see(x_TD, (value_TF * gradient.flatten(0, -2)).abs()))
        return (h,)

    handles = [
        layer.mlp_inputs[0].register_forward_pre_hook(keep),
        layer.mlp_output.register_forward_pre_hook(watch),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
