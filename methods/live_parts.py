"""Which rows and columns of every projection of a block are alive, what dies with them, and how the rest is stored.

A dead row (its bias with it) and a dead column are zero. Some others do nothing then, and die without any change:

    MLP neuron           dead in gate, up or down is dead in all three       (activations are 0 at 0)
    value dimension      a dead row of the value, and the columns that read it, of every query head of its key head;
                         and the row where all those columns are dead
    head                 queries of a head whose output columns are all dead
    query, key           dimensions that rotate together, dead in a key, and those of all query heads that read it; and
                         the other way round. Under a norm over the head (Qwen3) the whole head takes their place.

What is left is packed: neurons with `narrow_mlp`, the rest with `gathered_linears`.
"""

# Shape suffixes: J key (and value) heads, R query heads that read one, h head width, P groups of dimensions.

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from methods import modeling
from methods.lazy import torch
from methods.modeling.shape import DecoderShape

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from methods.modeling import DecoderLayer

ROLES = ("query", "key", "value", "output", "gate", "up", "down")
"""Projections of a block, by the names of `Family`'s fields; a plain MLP has no gate."""


class Part(NamedTuple):
    """Something about every row and every column of one projection."""

    rows: Tensor
    """Shape [out]."""
    columns: Tensor
    """Shape [in]; the bias is no column."""


Block = dict[str, Part]
"""By role. Of booleans: what is alive. Of numbers: what it is worth."""


def projections(layer: DecoderLayer) -> dict[str, nn.Linear]:
    """Those of a dense block, by role."""
    names = {role: getattr(layer.family, role) for role in ROLES}
    return {role: layer.module.get_submodule(name) for role, name in names.items() if name}  # type: ignore[misc]


def whole(layer: DecoderLayer) -> Block:
    """Everything alive, on the CPU."""
    return {
        role: Part(*(torch.ones(size, dtype=torch.bool) for size in linear.weight.shape))
        for role, linear in projections(layer).items()
    }


def stored(block: Block, biased: Iterable[str]) -> int:
    """Parameters of the projections of a block, packed; `biased`: the roles that have a bias."""
    areas = {role: int(part.rows.sum()) * int(part.columns.sum()) for role, part in block.items()}
    return sum(areas.values()) + sum(int(block[role].rows.sum()) for role in biased)


def least(shape: DecoderShape) -> int:
    """`stored` of all blocks where each projection has one row and one column left."""
    biases = 3 * shape.qkv_bias + shape.output_bias + (3 if shape.gated else 2) * shape.mlp_bias
    return shape.layers * (4 + (3 if shape.gated else 2) + biases)


def propagated(block: Block, shape: DecoderShape) -> Block:
    """What is alive once everything has died that does nothing."""
    output_JRh = block["output"].columns.view(shape.kv_heads, -1, shape.head_dim)
    value_Jh = block["value"].rows.view(shape.kv_heads, -1) & output_JRh.any(1)
    output_JRh = output_JRh & value_Jh[:, None]
    heads_JR = output_JRh.any(2)
    query_JRh = block["query"].rows.view_as(output_JRh) & heads_JR[..., None]
    key_Jh = block["key"].rows.view_as(value_Jh)
    dims_Jh = _whole_groups(query_JRh.any(1), shape) & _whole_groups(key_Jh, shape)
    inputs = [role for role in ("gate", "up") if role in block]
    neurons = torch.stack([block["down"].columns, *(block[role].rows for role in inputs)]).all(0)
    changed = {
        "query": block["query"]._replace(rows=(query_JRh & dims_Jh[:, None]).flatten()),
        "key": block["key"]._replace(rows=(key_Jh & dims_Jh).flatten()),
        "value": block["value"]._replace(rows=value_Jh.flatten()),
        "output": block["output"]._replace(columns=output_JRh.flatten()),
        "down": block["down"]._replace(columns=neurons),
    }
    # A copy for each role: sharing one tensor, they could not be saved.
    return block | changed | {role: block[role]._replace(rows=neurons.clone()) for role in inputs}


def dimension_groups(shape: DecoderShape) -> Tensor:
    """The group of every query and key dimension of a head: those of one are of no use without each other's partners
    in the key or the query. Int64 [h]."""
    groups = [tuple(range(shape.head_dim))] if shape.qk_norm else shape.rope_groups
    number = {dim: place for place, group in enumerate(groups) for dim in group}
    return torch.tensor([number[dim] for dim in range(shape.head_dim)])


def _whole_groups(alive_Jh: Tensor, shape: DecoderShape) -> Tensor:
    """The dimensions whose group has one that is alive."""
    group_h = dimension_groups(shape)
    member_hP = group_h[:, None] == group_h.unique()
    alive_JP = (alive_Jh[..., None] & member_hP).any(1)
    return alive_JP[:, group_h]


def protected(worth: Block, alive: Block, shape: DecoderShape) -> Block:
    """What must stay for the block to have one living row and column of every projection: the worthiest, True."""

    def best(values: Tensor, among: Tensor) -> int:
        return int(values.where(among, -torch.inf).argmax())

    kept = {role: Part(*(torch.zeros_like(side) for side in part)) for role, part in alive.items()}
    for role in kept.keys() - {"output", "down"}:
        kept[role].columns[best(worth[role].columns, alive[role].columns)] = True
    for role in ("output", "down"):
        kept[role].rows[best(worth[role].rows, alive[role].rows)] = True
    _protect_neuron(kept, worth, alive, best)
    _protect_head(kept, worth, alive, shape, best)
    return kept


def _protect_neuron(kept: Block, worth: Block, alive: Block, best: Callable[[Tensor, Tensor], int]) -> None:
    sides = [("down", "columns"), *((role, "rows") for role in ("gate", "up") if role in alive)]
    values = torch.stack([getattr(worth[role], side) for role, side in sides]).sum(0)
    neuron = best(values, alive["down"].columns)
    for role, side in sides:
        getattr(kept[role], side)[neuron] = True


def _protect_head(
    kept: Block, worth: Block, alive: Block, shape: DecoderShape, best: Callable[[Tensor, Tensor], int]
) -> None:
    """A query, a key of its head and group, an output column of that head, and the value that it reads."""
    h = shape.head_dim
    query = best(worth["query"].rows, alive["query"].rows)
    head, dim = divmod(query, h)
    key_head = head // (shape.heads // shape.kv_heads)
    group_h, place = dimension_groups(shape), torch.arange(len(alive["key"].rows))
    partners = (place // h == key_head) & (group_h[place % h] == group_h[dim])
    key = best(worth["key"].rows, alive["key"].rows & partners)
    own = torch.arange(len(alive["output"].columns)) // h == head
    column = best(worth["output"].columns, alive["output"].columns & own)
    kept["query"].rows[query] = kept["key"].rows[key] = kept["output"].columns[column] = True
    kept["value"].rows[key_head * h + column % h] = True


def alive_without(alive: Sequence[Block], gone: Sequence[Block], shape: DecoderShape) -> list[Block]:
    """What is alive of every block after some rows and columns have been removed, and what died with them."""
    return [
        propagated(
            {role: Part(*(a & ~g for a, g in zip(part, lost[role], strict=True))) for role, part in block.items()},
            shape,
        )
        for block, lost in zip(alive, gone, strict=True)
    ]


def bury(projections: Sequence[dict[str, nn.Linear]], alive: Sequence[Block]) -> None:
    """Set what is dead to zero, in place."""
    for linears, block in zip(projections, alive, strict=True):
        for role, part in block.items():
            linear = linears[role]
            linear.weight[~part.rows.to(linear.weight.device)] = 0
            linear.weight[:, ~part.columns.to(linear.weight.device)] = 0
            if linear.bias is not None:
                linear.bias[~part.rows.to(linear.weight.device)] = 0


def cheapest(
    costs: Sequence[Block], last: Sequence[Block], size: Callable[[list[Block]], int], goal: int
) -> tuple[list[Block], float]:
    """The rows and columns to remove, cheapest of all first, for the size nearest to the goal; and the dearest's cost.

    Args:
        costs: infinite for what is dead.
        last: what must stay.
        size: parameters that are left without some rows and columns.
    """
    values = torch.cat([side for block in costs for part in block.values() for side in part])
    stays = torch.cat([side for block in last for part in block.values() for side in part])
    values = values.where(~stays, torch.inf)
    order = values.argsort(stable=True)[: int(values.isfinite().sum())]

    def first(count: int) -> list[Block]:
        flags = torch.zeros(len(values), dtype=torch.bool).index_fill_(0, order[:count], True)
        return _like(costs, flags)

    def left(count: int) -> int:
        return size(first(count))

    enough = bisect.bisect_left(range(len(order)), True, key=lambda count: left(count) <= goal)
    count = min((max(enough - 1, 0), enough), key=lambda count: abs(left(count) - goal))
    return first(count), values[order[count - 1]].item() if count else 0.0


def _like(blocks: Sequence[Block], values: Tensor) -> list[Block]:
    """One vector's entries as rows and columns, block by block."""
    sides = iter(values.split([len(side) for block in blocks for part in block.values() for side in part]))
    return [{role: Part(next(sides), next(sides)) for role in block} for block in blocks]


def pack(model: PreTrainedModel, alive: list[Block]) -> PreTrainedModel:
    """The model without its dead rows and columns, which are zero; its tensors are used up.

    Args:
        alive: per block, `propagated`, with one row and column of every projection at least.
    """
    layers, widths = modeling.Decoder(model).layers, []
    for layer, block in zip(layers, alive, strict=True):
        neurons = block["down"].columns
        widths.append(None if neurons.all() else int(neurons.sum()))
        if not neurons.all():
            modeling.narrow_mlp(layer, neurons.nonzero()[:, 0].to(layer.mlp_output.weight.device))
        for role, part in block.items():
            rows, columns = (side.nonzero()[:, 0] for side in part)
            if role == "down":
                columns = None
            elif role in ("gate", "up"):
                rows = None
            modeling.gather_linear(layer, getattr(layer.family, role), rows, columns)
    structures = {"narrow_mlp": {"layers": widths}, "gathered_linears": modeling.gathered_record(model)}
    return modeling.rebuild(model, structures)
