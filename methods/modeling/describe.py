"""Looking at a compressed model: how wide each block still is, what its experts share, and where tokens go."""

# Shape suffixes: B batch, T tokens.

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from methods.base import Batch
from methods.modeling.decoder import Decoder, DecoderLayer
from methods.modeling.record import structures_of
from methods.modeling.shape import DecoderShape
from methods.modeling.structures import gathered_linears, moe_mlp, narrow_residual, removed_layers, rotated_residual
from methods.modeling.structures.attention import ReshapedAttention
from methods.modeling.structures.moe_inspect import describe_experts, expert_choices
from methods.modeling.structures.sparse_linears import sparse_parts
from methods.modeling.structures.topk_values import TopKAttention


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """The make of a model, as JSON.

    Returns:
        `removed_layers`, numbers in the dense model; `rotated_width`, of the residual stream, None where it is not
        rotated; `narrow_width`, of the residual stream where the same channels are removed everywhere, else None;
        `layers`, per block: `layer`, its number in the dense model; `kept` and `full` of `heads`, `kv_heads`, `qk` and
        `vo` (dimensions per head; a token uses so many) and `mlp` (neurons, likewise); `gathered`, of projections that
        read or write a part by name: `rows` and `columns` that are left, None where all are; `density`, of projections
        that keep some of their weights by name, the share of them; `mixture`, None or what `describe_experts` says with
        `union_share` and `raw_widths`, those of the experts before they were made equal (None where the record does not
        say).
    """
    decoder, structures = Decoder(model), structures_of(model.config)
    shape = decoder.family.shape(model.config.to_dict())
    everything = list(range(len(decoder.layers)))
    blocks = structures.get(removed_layers.NAME, {"kept": everything, "of": len(everything)})
    gathered = gathered_linears.gathered_record(model)["layers"]
    density = [{name: part.density for name, part in sparse_parts(layer).items()} for layer in decoder.layers]
    parts = zip(blocks["kept"], decoder.layers, gathered, density, _mixtures(model, shape), strict=True)
    return {
        "removed_layers": sorted({*range(blocks["of"])} - {*blocks["kept"]}),
        "rotated_width": structures.get(rotated_residual.NAME, {}).get("width"),
        "narrow_width": structures.get(narrow_residual.NAME, {}).get("width"),
        "layers": [
            {"layer": n, **_widths(layer, shape, mixture), "gathered": gathered, "density": density, "mixture": mixture}
            for n, layer, gathered, density, mixture in parts
        ],
    }


def _widths(layer: DecoderLayer, shape: DecoderShape, mixture: dict[str, Any] | None) -> dict[str, dict[str, int]]:
    full = {"heads": shape.heads, "kv_heads": shape.kv_heads, "qk": shape.head_dim, "vo": shape.head_dim}
    attention = layer.attention
    kept = dict(full)
    if isinstance(attention, ReshapedAttention):
        values = attention.kept if isinstance(attention, TopKAttention) else attention.vo_width
        sizes = (attention.heads, attention.kv_heads, attention.qk_width, values)
        kept = dict(zip(full, sizes, strict=True))
    kept["mlp"] = mixture["used"] if mixture else layer.mlp_output.in_features
    full["mlp"] = shape.mlp_width
    return {name: {"kept": kept[name], "full": full[name]} for name in full}


def _mixtures(model: PreTrainedModel, shape: DecoderShape) -> list[dict[str, Any] | None]:
    found = describe_experts(model)
    records = structures_of(model.config).get(moe_mlp.NAME, {"layers": [None] * len(found)})["layers"]
    for mixture, record in zip(found, records, strict=True):
        if mixture is not None:
            mixture["union_share"] = mixture["union"] / shape.mlp_width
            mixture["raw_widths"] = record.get("raw_widths")
    return found


def load_fractions(model: PreTrainedModel, batches: Iterable[Batch]) -> list[list[float] | None]:
    """The share of a text's tokens that each expert of each block meets, L x N; None where the MLP is dense.

    Args:
        batches: at least one; padding does not count.
    """
    found = moe_mlp.mixtures(model)
    counts: list[Any] = [None if moe is None else 0 for moe in found]
    tokens = 0
    for batch in batches:
        mask_BT = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.mask is None else batch.mask.bool()
        input_ids, mask_BT = batch.input_ids.to(model.device), mask_BT.to(model.device)
        tokens += int(mask_BT.sum())
        for i, (moe, choice) in enumerate(zip(found, expert_choices(model, input_ids, mask_BT), strict=True)):
            if moe is not None and choice is not None:
                counts[i] += choice[mask_BT].flatten().bincount(minlength=moe.layout.experts).double()
    return [None if count is None else (count / tokens).tolist() for count in counts]
