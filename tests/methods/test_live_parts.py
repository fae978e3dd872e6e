"""What dies with dead rows and columns, by loops and by logits of every family; packing; choosing the cheapest."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from methods import modeling
from methods.live_parts import (
    Block,
    Part,
    alive_without,
    bury,
    cheapest,
    least,
    pack,
    projections,
    propagated,
    protected,
    stored,
    whole,
)
from methods.modeling.footprint import footprint
from methods.modeling.shape import DecoderShape
from tests.methods.test_floor import dense_shape
from tests.methods.tiny import CONFIGS, assert_cache_changes_nothing, logits, tiny_model


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lots(blocks: list[Block], draw: torch.Generator) -> list[Block]:
    """A number for every row and column."""
    return [
        {role: Part(*(torch.rand(len(s), generator=draw) for s in part)) for role, part in b.items()} for b in blocks
    ]


def removal(alive: list[Block], shape: DecoderShape, share: float, draw: torch.Generator) -> list[Block]:
    """A random choice of about that share, of what need not stay."""
    stay = [protected(worth, block, shape) for worth, block in zip(lots(alive, draw), alive, strict=True)]
    return [
        {role: Part(*((n < share) & ~k for n, k in zip(part, kept[role], strict=True))) for role, part in b.items()}
        for b, kept in zip(lots(alive, draw), stay, strict=True)
    ]


def flags_only(alive: list[Block], gone: list[Block]) -> list[Block]:
    """What is alive if nothing died with anything."""
    return [
        {role: Part(*(a & ~g for a, g in zip(part, lost[role], strict=True))) for role, part in block.items()}
        for block, lost in zip(alive, gone, strict=True)
    ]


def naive(block: Block, shape: DecoderShape) -> Block:
    """One rule after the other, place by place, until nothing more dies."""
    alive = {role: Part(*(side.tolist() for side in part)) for role, part in block.items()}
    h, readers = shape.head_dim, shape.heads // shape.kv_heads
    groups = [range(h)] if shape.qk_norm else shape.rope_groups
    while True:
        before = {role: Part([*part.rows], [*part.columns]) for role, part in alive.items()}
        for n in range(shape.mlp_width):
            sides = [alive[role].rows for role in ("gate", "up") if role in alive] + [alive["down"].columns]
            for side in sides:
                side[n] = all(each[n] for each in sides)
        for j in range(shape.kv_heads):
            heads = range(j * readers, (j + 1) * readers)
            for d in range(h):
                if not alive["value"].rows[j * h + d]:
                    for q in heads:
                        alive["output"].columns[q * h + d] = False
                alive["value"].rows[j * h + d] &= any(alive["output"].columns[q * h + d] for q in heads)
            for q in heads:
                if not any(alive["output"].columns[q * h : (q + 1) * h]):
                    alive["query"].rows[q * h : (q + 1) * h] = [False] * h
            if not any(any(alive["output"].columns[q * h : (q + 1) * h]) for q in heads):
                alive["key"].rows[j * h : (j + 1) * h] = [False] * h
            for group in groups:
                keys = [j * h + d for d in group]
                queries = [q * h + d for q in heads for d in group]
                if not (any(alive["key"].rows[p] for p in keys) and any(alive["query"].rows[p] for p in queries)):
                    for p in keys:
                        alive["key"].rows[p] = False
                    for p in queries:
                        alive["query"].rows[p] = False
        if alive == before:
            return {role: Part(*map(torch.tensor, part)) for role, part in alive.items()}


def same(mine: Block, its: Block) -> bool:
    return all(a.equal(b) for role in mine for a, b in zip(mine[role], its[role], strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_dies_is_what_the_rules_say(name: str) -> None:
    shape, (block, *_) = dense_shape(name), [whole(layer) for layer in modeling.Decoder(tiny_model(name)).layers]
    assert same(propagated(block, shape), block)
    for seed, share in enumerate((0.1, 0.3, 0.5, 0.7, 0.9, 0.97) * 3):
        some = flags_only([block], removal([block], shape, share, generator(seed)))[0]
        found = propagated(some, shape)
        assert same(found, naive(some, shape)) and same(propagated(found, shape), found)


def killed(name: str, share: float, seed: int = 0) -> tuple[PreTrainedModel, list[Block], list[Block]]:
    """A model some of whose rows and columns are zero, what is alive by the choice, and by what follows from it."""
    model = tiny_model(name)
    decoder = modeling.Decoder(model)
    blocks = [whole(layer) for layer in decoder.layers]
    gone = removal(blocks, decoder.shape, share, generator(seed))
    with torch.no_grad():
        bury([projections(layer) for layer in decoder.layers], flags_only(blocks, gone))
    return model, flags_only(blocks, gone), alive_without(blocks, gone, decoder.shape)


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_dies_did_nothing_and_is_not_stored(name: str, share: float, tmp_path: Path) -> None:
    model, chosen, alive = killed(name, share)
    expected, dense = logits(model), footprint(model)
    assert not all(map(same, alive, chosen))
    linears = [projections(layer) for layer in modeling.Decoder(model).layers]
    biased = [[role for role, linear in block.items() if linear.bias is not None] for block in linears]
    with torch.no_grad():
        bury(linears, alive)
    torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)
    packed = pack(model, alive)
    torch.testing.assert_close(logits(packed), expected, rtol=1e-10, atol=1e-10)
    whole_size = sum(linear.weight.numel() for block in linears for linear in block.values())
    shape = dense_shape(name)
    whole_size = shape.layers * (shape.attention - shape.head_norms + shape.mlp)
    assert dense.active_total - footprint(packed).active_total == whole_size - sum(map(stored, alive, biased))
    packed = packed.float()
    packed.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits(loaded).equal(logits(packed))
    assert_cache_changes_nothing(loaded)


@pytest.mark.parametrize("name", CONFIGS)
def test_something_of_every_projection_stays_alive(name: str) -> None:
    decoder, draw = modeling.Decoder(tiny_model(name)), generator(0)
    alive = [whole(layer) for layer in decoder.layers]
    for share in (0.3, 0.5, 0.8, 0.9, 1.1):
        alive = alive_without(alive, removal(alive, decoder.shape, share, draw), decoder.shape)
        assert all(side.any() for block in alive for part in block.values() for side in part)
    assert all(side.sum() == 1 for block in alive for part in block.values() for side in part)
    biased = [role for role, linear in projections(decoder.layers[0]).items() if linear.bias is not None]
    assert sum(stored(block, biased) for block in alive) == least(decoder.shape)


@given(data=st.data())
def test_the_cheapest_go_and_no_other_number_of_them_is_nearer(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4))
    draw = generator(data.draw(st.integers(0, 99)))
    blocks = [{"up": Part(torch.ones(r, dtype=torch.bool), torch.ones(c, dtype=torch.bool))} for r, c in sizes]
    costs, stay = lots(blocks, draw), [{"up": Part(*(n < 0.2 for n in b["up"]))} for b in lots(blocks, draw)]
    costs[0]["up"].rows[0] = torch.inf  # dead

    def left(gone: list[Block]) -> int:
        return sum(stored(block, []) for block in flags_only(blocks, gone))

    goal = data.draw(st.integers(0, left([{"up": Part(~b["up"].rows, ~b["up"].columns)} for b in blocks])))
    gone, threshold = cheapest(costs, stay, left, goal)
    flat = [
        float(n)
        for b, k in zip(costs, stay, strict=True)
        for side, s in zip(b["up"], k["up"], strict=True)
        for n, held in zip(side, s, strict=True)
        if not held and n < torch.inf
    ]
    sizes_by_count = []
    for count in range(len(flat) + 1):
        limit = sorted(flat)[count - 1] if count else -1.0
        choice = [
            {"up": Part(*((n <= limit) & ~s for n, s in zip(b["up"], k["up"], strict=True)))}
            for b, k in zip(costs, stay, strict=True)
        ]
        sizes_by_count.append(left(choice))
    assert abs(left(gone) - goal) == min(abs(size - goal) for size in sizes_by_count)
    taken = [
        float(n)
        for b, g in zip(costs, gone, strict=True)
        for side, f in zip(b["up"], g["up"], strict=True)
        for n in side[f]
    ]
    assert sorted(taken) == sorted(flat)[: len(taken)] and threshold == max(taken, default=0.0)
