"""Structure: attention with fewer heads, narrower queries and keys, narrower values, decided once for all tokens.

With P a set of kept dimensions of a head (for queries and keys the same for all heads of a layer, or one set per key
head) and h its width in the dense model:

    q/k:   scores = q[P] k[P]^T / sqrt(h)    rows of both projections; rotary pairs stay whole; the key cache shrinks
    v/o:   out = (A v[P]) Wo[P]              rows of the value and columns of the output projection
    heads: a key head goes together with its value head and all query heads that read it
    bias:  bo + sum over query heads of Wo bv takes the place of bo and bv: rows of the softmax sum to one

Each of the first three equals the dense layer with the dropped rows set to zero, the last the dense layer itself.
Queries that are normalised over the head (Qwen3) keep their width, since the norm needs every dimension.
"""

# Shape suffixes: J key (and value) heads, w kept query and key width, H query heads, h head width.

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.errors import UserError
from methods.modeling.decoder import Decoder, DecoderLayer
from methods.modeling.shape import DecoderShape
from methods.modeling.structures.attention import ReshapedAttention, reshape_attention
from methods.modeling.structures.linears import keep_columns, keep_rows
from methods.modeling.structures.topk_values import TopKAttention

NAME = "narrow_attention"


def narrow_heads(layer: DecoderLayer, shape: DecoderShape, kept_kv_heads: Iterable[int] | Tensor) -> None:
    """Keep some key/value heads and the query heads that read them, in place.

    Args:
        kept_kv_heads: their numbers among the present ones, at least one.
    """
    attention = reshape_attention(layer)
    kept = _checked(kept_kv_heads, attention.kv_heads, "key/value heads")
    groups = attention.num_key_value_groups
    readers = [head for j in kept for head in range(j * groups, (j + 1) * groups)]
    query, key, value = layer.attention_inputs
    qk, vo = attention.qk_width, attention.vo_width
    keep_rows(query, _positions(readers, range(qk), qk))
    keep_rows(key, _positions(kept, range(qk), qk))
    keep_rows(value, _positions(kept, range(vo), vo))
    keep_columns(layer.attention_output, _positions(readers, range(vo), vo))
    if attention.qk_index is not None and attention.qk_index.ndim == 2:
        attention.qk_index = attention.qk_index[kept]


def narrow_qk(layer: DecoderLayer, shape: DecoderShape, dims: Iterable[int] | Tensor) -> None:
    """Keep some query and key dimensions of every head, in place.

    Args:
        dims: their numbers in the dense head: whole groups of `shape.rope_groups`, at least one. A tensor [J, w] names
            those of every key head (and of the query heads that read it), with equally many rotary ones in each.

    Raises:
        UserError: a rotary pair is split, the heads are narrow already, or queries are normalised over the head.
    """
    attention = reshape_attention(layer)
    per_head = isinstance(dims, Tensor) and dims.ndim == 2
    named: list[Any] = [*dims] if per_head else [dims]
    kept = [_checked(row, shape.head_dim, "query/key dimensions") for row in named]
    for row in kept:
        _require_whole_groups(row, shape)
    if len(kept[0]) == shape.head_dim:
        return
    _require_narrowable(attention, shape, len(kept[0]))
    attention.rotary_width = _rotary_dims(kept, shape)
    rows = kept if per_head else kept * attention.kv_heads
    if len(rows) != attention.kv_heads:
        raise UserError(f"query/key dimensions of {len(rows)} heads are given, and {attention.kv_heads} are there.")
    query, key, _ = layer.attention_inputs
    keep_rows(key, _each(rows, shape.head_dim))
    keep_rows(query, _each([row for row in rows for _ in range(attention.num_key_value_groups)], shape.head_dim))
    attention.qk_width = len(kept[0])
    # Ascending: first halves of the pairs, second halves, unrotated dimensions, as in the dense head.
    index = torch.tensor(kept if per_head else kept[0], dtype=torch.int32, device=query.weight.device)
    attention.register_buffer("qk_index", index)


def narrow_vo(layer: DecoderLayer, shape: DecoderShape, dims: Iterable[int] | Tensor) -> None:
    """Keep some value dimensions of every head, and the output columns that read them, in place.

    Args:
        dims: their numbers in the dense head, at least one.

    Raises:
        UserError: the heads are narrow already.
    """
    kept = _checked(dims, shape.head_dim, "value dimensions")
    attention = reshape_attention(layer)
    if len(kept) == shape.head_dim:
        return
    _require_full(attention.vo_width, shape, "values")
    if isinstance(attention, TopKAttention):
        raise UserError("values of this layer are chosen per token already. Narrow them first, then convert.")
    heads, kv_heads = attention.heads, attention.kv_heads
    keep_rows(attention.value, _positions(range(kv_heads), kept, shape.head_dim))
    keep_columns(attention.output, _positions(range(heads), kept, shape.head_dim))
    attention.vo_width = len(kept)


@torch.no_grad()
def fold_value_bias(layer: DecoderLayer) -> None:
    """Move the bias of the values into the bias of the output projection, which gets one if it has none, in place.

    Exact but for rounding (in fp64, once). No effect where values have no bias.

    Raises:
        UserError: values are chosen per token, so that they do not all arrive.
    """
    attention = reshape_attention(layer)
    if attention.value.bias is None:
        return
    if isinstance(attention, TopKAttention):
        raise UserError("values of this layer are chosen per token already. Fold their bias first, then convert.")
    value, output = attention.value, attention.output
    bias_Hv = value.bias.view(attention.kv_heads, -1).repeat_interleave(attention.num_key_value_groups, 0)
    moved = output.weight.double() @ bias_Hv.flatten().double()
    if output.bias is not None:
        moved += output.bias.double()
    output.bias = nn.Parameter(moved.to(output.weight.dtype))
    value.register_parameter("bias", None)


def attention_record(model: PreTrainedModel) -> dict[str, Any]:
    """The shape record of a model's attention as it is: per layer its sizes, None where it is the stock module."""
    return {"layers": [_sizes(layer.attention) for layer in Decoder(model).layers]}


def _sizes(attention: Any) -> dict[str, Any] | None:
    if not isinstance(attention, ReshapedAttention):
        return None
    query = cast(nn.Linear, attention.part(attention.family.query))
    return {
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "qk": attention.qk_width,
        "rotary": attention.rotary_width,
        "vo": attention.vo_width,
        "per_head": attention.qk_index is not None and attention.qk_index.ndim == 2,
        "folded": query.bias is not None and attention.value.bias is None,  # every family has both or neither
    }


def apply(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Give a dense model this structure's modules and shapes, in place; the values are to be loaded afterwards.

    Args:
        record: `{"layers": [{"heads": H, "kv_heads": J, "qk": w, "rotary": r, "vo": v, "per_head": bool, "folded":
            bool} | None, ...]}`: per layer how many heads it has, how wide queries and keys are, how many dimensions
            of them rotate, how wide values are; whether every key head has its own query and key dimensions, and
            whether the values' bias has moved into the output's (older records lack these two: neither).
    """
    decoder = Decoder(model)
    shape = decoder.family.shape(model.config.to_dict())
    for layer, sizes in zip(decoder.layers, record["layers"], strict=True):
        if sizes is not None:
            narrow_heads(layer, shape, range(sizes["kv_heads"]))
            dims = _some_dims(shape, sizes["rotary"], sizes["qk"])
            own = torch.tensor([dims] * sizes["kv_heads"], device="cpu")  # models are loaded on the meta device
            narrow_qk(layer, shape, own if sizes.get("per_head") else dims)
            if sizes.get("folded"):
                fold_value_bias(layer)
            narrow_vo(layer, shape, range(sizes["vo"]))


def _some_dims(shape: DecoderShape, rotary: int, width: int) -> list[int]:
    """Any kept dimensions of the given numbers; which ones is said by the `qk_index` that is loaded."""
    pairs = [dim for group in shape.rope_groups[: rotary // 2] for dim in group] if rotary else []
    return [*pairs, *range(shape.rotary, shape.rotary + width - rotary)]


def _positions(heads: Iterable[int], dims: Iterable[int], width: int) -> Tensor:
    """Indices of some dimensions of some heads where heads of a width lie one after the other."""
    return torch.tensor([head * width + dim for head in heads for dim in dims])


def _each(dims: list[list[int]], width: int) -> Tensor:
    """Indices of every head's own dimensions."""
    return torch.tensor([head * width + dim for head, row in enumerate(dims) for dim in row])


def _checked(numbers: Iterable[int] | Tensor, limit: int, what: str) -> list[int]:
    """The numbers to keep, ascending."""
    kept = sorted(int(number) for number in numbers)
    if not kept or kept[0] < 0 or kept[-1] >= limit or len(set(kept)) < len(kept):
        raise UserError(f"cannot keep the {what} {kept}: name at least one, each once, between 0 and {limit - 1}.")
    return kept


def _require_whole_groups(kept: list[int], shape: DecoderShape) -> None:
    for group in shape.rope_groups:
        if 0 < len(present := sorted({*kept} & {*group})) < len(group):
            raise UserError(
                f"dimensions {group} of a head rotate together and only {present} is to be kept. Keep or drop whole "
                "groups of `shape.rope_groups`."
            )


def _require_narrowable(attention: ReshapedAttention, shape: DecoderShape, asked: int) -> None:
    if attention.family.query_norm:
        raise UserError(
            f"this {attention.family.model_type} model normalises queries and keys over all {shape.head_dim} "
            f"dimensions of a head, so that none can be removed (asked: {asked}). Keep the full query/key width."
        )
    _require_full(attention.qk_width, shape, "queries and keys")


def _rotary_dims(kept: list[list[int]], shape: DecoderShape) -> int:
    """How many of the kept dimensions rotate: equally many in every head, of equally many dimensions."""
    counts = {(sum(dim < shape.rotary for dim in row), len(row)) for row in kept}
    if len(counts) > 1:
        raise UserError(
            "the heads of a layer keep different numbers of rotary dimensions (or of others). Keep equally many in "
            "each, of the dimensions that rotate and of those that do not."
        )
    return counts.pop()[0]


def _require_full(width: int, shape: DecoderShape, what: str) -> None:
    if width != shape.head_dim:
        raise UserError(
            f"{what} of this layer are {width} wide already, of {shape.head_dim} in the dense head. Narrow a dense "
            "layer, once."
        )
