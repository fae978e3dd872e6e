"""What a forward pass has to do, counted from the tensors: FLOPs, and bytes that it has to read.

    FLOPs = 2 (tokens x blocks + sequences x head + pairs x attention)

    blocks       elements of the matrices in the blocks that a token is multiplied with: of experts those that it gets,
                 of chosen values the chosen, of sparse projections the kept, routers and selectors whole
    head         elements of the head, which only the last token of a sequence needs
    attention    per pair of a query and a position it sees: heads x (query width + values that the token uses)
    pairs        B T (T + 1) / 2 for B prompts of T tokens, B (T + 1) for the token that comes after them

    bytes = (blocks that `tokens` tokens are expected to touch + head) x bytes per element + tables + KV cache

Tables say which elements are there: masks of sparse projections, lists of kept rows, columns and dimensions, lists of
the experts' neurons unless these lie in a row. The cache is written by the prompt and read by the token after it. Of n
tokens that choose k of N experts by chance a neuron of c experts is touched by one or more with probability
1 - (C(N - c, k) / C(N, k))^n; unequal experts therefore count by their mean. Not counted: looking up embeddings, norms,
activations, biases, the choosing itself, and what an implementation does besides (masked experts, zeros of sparse
projections).
"""

# Shape suffixes: U neurons of all experts.

from collections.abc import Iterable, Iterator
from math import comb
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from methods.modeling.decoder import Decoder, DecoderLayer
from methods.modeling.structures.moe_mlp import MoEMLP
from methods.modeling.structures.moe_neurons import run_of
from methods.modeling.structures.sparse_linears import SparseLinear
from methods.modeling.structures.topk_values import TopKAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Work(NamedTuple):
    """Of one forward pass."""

    flops: float
    bytes: float


def prefill(model: "PreTrainedModel", batch: int, length: int, cache_bytes: float) -> Work:
    """Of `batch` prompts of `length` tokens; the cache has `cache_bytes` per token."""
    return _work(model, batch, batch * length, batch * length * (length + 1) // 2, batch * length * cache_bytes)


def decode(model: "PreTrainedModel", batch: int, length: int, cache_bytes: float) -> Work:
    """Of the token that comes after each of those prompts."""
    return _work(model, batch, batch, batch * (length + 1), batch * length * cache_bytes)


def _work(model: "PreTrainedModel", sequences: int, tokens: int, pairs: int, cached: float) -> Work:
    decoder = Decoder(model)
    head, attention = decoder.head.weight.numel(), sum(map(attention_width, decoder.layers))
    flops = 2 * (tokens * elements(decoder.module_list, 1) + sequences * head + pairs * attention)
    matrices = (elements(decoder.module_list, tokens) + head) * model.dtype.itemsize
    return Work(flops, matrices + table_bytes(decoder.module_list, tokens) + cached)


def attention_width(layer: DecoderLayer) -> int:
    """Multiplications of a query with one position, over all heads."""
    attention, values = layer.attention, layer.attention_output.in_features
    if isinstance(attention, TopKAttention):
        values = values // attention.vo_width * attention.kept
    return layer.attention_inputs[0].out_features + values


def elements(module: nn.Module, tokens: int) -> float:
    """Elements of the matrices in a module that some tokens are expected to be multiplied with."""
    return sum(
        sum(matrix.numel() for matrix in _matrices(part)) - _untouched(part, tokens) for part in module.modules()
    )


def _matrices(part: nn.Module) -> Iterator[nn.Parameter]:
    """A module's own parameters that tokens are multiplied with."""
    if isinstance(part, SparseLinear):
        yield part.values
    elif not isinstance(part, MoEMLP):  # whose own are the constants, which are only added
        yield from (parameter for parameter in part.parameters(recurse=False) if parameter.ndim == 2)


def table_bytes(module: nn.Module, tokens: int) -> float:
    """Bytes of the masks and lists in a module that some tokens are expected to need."""
    return sum(_tables(part, tokens) for part in module.modules())


def _tables(part: nn.Module, tokens: int) -> float:
    """Of a module's own. Whole numbers say what is kept; others (a gate's bias) are vectors."""
    if isinstance(part, MoEMLP):
        always = _scattered([] if part.shared is None else [part.shared])
        return always + _scattered(part.sets) * (1 - (1 - part.layout.active / part.layout.experts) ** tokens)
    return sum(buffer.nbytes for buffer in part.buffers(recurse=False) if not buffer.is_floating_point())


def _scattered(lists: Iterable[Tensor]) -> int:
    return sum(positions.nbytes for positions in lists if run_of(positions) is None)


def _untouched(part: nn.Module, tokens: int) -> float:
    """Elements of matrices within a module that some tokens are expected to leave alone, all of them."""
    if isinstance(part, MoEMLP):
        inputs = sum(weight.shape[1] for weight, _ in part.union.inputs) * (not part.layout.oracular)
        return (part.layout.neurons - touched_neurons(part, tokens)) * (inputs + part.union.down_wD.shape[1])
    if isinstance(part, TopKAttention):
        read = part.rule.on_value * part.kv_heads * part.value.in_features
        written = part.rule.on_output * part.heads * part.output.out_features
        return part.vo_width * (1 - part.kept / part.vo_width) ** tokens * (read + written)
    return 0


def touched_neurons(moe: MoEMLP, tokens: int) -> float:
    """Neurons of a mixture that some tokens, choosing by chance, are expected to need."""
    layout = moe.layout
    missed = [comb(layout.experts - owners, layout.active) for owners in range(layout.experts + 1)]
    missed_U = torch.tensor(missed, dtype=torch.float64) / comb(layout.experts, layout.active)
    owners_U = moe.index[moe.index >= 0].long().cpu().bincount(minlength=layout.neurons)
    untouched_U = missed_U[owners_U] ** tokens
    if moe.shared is not None:
        untouched_U[moe.shared.long().cpu()] = 0
    return layout.neurons - untouched_U.sum().item()
