"""Work of a pass: FLOPs against torch's counter and the footprint, touched experts against all draws, cache bytes."""

from itertools import combinations, product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed import work
from benchmarks.speed.generation import run
from methods import modeling
from methods.modeling.decoder import Decoder
from methods.modeling.footprint import footprint
from methods.modeling.structures.moe_gates import ScaledGate
from methods.modeling.structures.moe_mlp import mixtures
from methods.modeling.structures.sparse_linears import SparseLinear
from tests.methods import test_moe_kinds as kinds
from tests.methods.test_attention_structures import SMALL, narrow
from tests.methods.test_gathered_linears import gathered
from tests.methods.test_moe_mlp import converted
from tests.methods.test_sparse_linears import sparse
from tests.methods.test_topk_values import both
from tests.methods.tiny import CONFIGS, ONE_PER_FAMILY, some_ids, tiny_model

BATCH, LENGTH = 3, 7


def mixture(case):
    return lambda name: kinds.converted(name, case)


MULTIPLIED = {
    "dense": lambda name: tiny_model(name, dtype=torch.float32),
    "removed layers": lambda name: modeling.keep_layers(tiny_model(name, dtype=torch.float32), [0, 2]),
    "narrow attention": lambda name: narrow(tiny_model(name, dtype=torch.float32, **SMALL)),
    "gathered": lambda name: gathered(name, torch.float32),
    "experts": converted,
    "shared": mixture("shared"),
    "top 2": mixture("top 2"),
    "constants": mixture("constants"),
    "scaled": mixture("scaled"),
}
"""Structures whose passes multiply with what is counted, and nothing else."""


def flops_of(model, *prompts):
    """FLOPs that torch counts in one pass after another over the same cache, but for the angles of the positions."""
    model.set_attn_implementation("eager")
    if any(mixtures(model)):
        modeling.set_experts(model, "materialised", "sorted")
    cache, found = None, []
    with torch.no_grad():
        for prompt in prompts:
            with FlopCounterMode(display=False) as counter:
                cache = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            angles = [flops for name, flops in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
            found.append(counter.get_total_flops() - sum(sum(ops.values()) for ops in angles))
    return found


CASES = [("dense", name) for name in CONFIGS]
UNEVEN = {"top 2", "constants"}
"""Six experts of Phi and OPT would be unequal, and counted by their mean."""
CASES += [(kind, "llama-gqa") for kind in MULTIPLIED if kind != "dense"]
CASES += [(kind, name) for kind in MULTIPLIED if kind not in {"dense", *UNEVEN} for name in ("phi", "opt")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_flops_are_those_that_torch_counts(kind, name):
    model, ids = MULTIPLIED[kind](name), some_ids(BATCH, LENGTH + 1)
    prompt, token = flops_of(model, ids[:, :-1], ids[:, -1:])
    assert work.decode(model, BATCH, LENGTH, 0).flops == pytest.approx(token, rel=1e-12)
    hidden_from = BATCH * LENGTH * (LENGTH - 1) // 2  # pairs that eager attention computes and then masks
    masked = 2 * hidden_from * sum(map(work.attention_width, Decoder(model).layers))
    assert work.prefill(model, BATCH, LENGTH, 0).flops + masked == pytest.approx(prompt, rel=1e-12)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_attention_of_dense_models(name):
    model = tiny_model(name)
    shape = Decoder(model).shape
    assert {work.attention_width(layer) for layer in Decoder(model).layers} == {2 * shape.attention_width}


PARTLY_USED = {
    **MULTIPLIED,
    "sparse": lambda name: sparse(name, torch.float32),
    "chosen values": lambda name: both(name, torch.float32),
    "values read": lambda name: both(name, torch.float32, mask="o_only"),
    "values written": lambda name: both(name, torch.float32, mask="v_only"),
    "oracle": mixture("oracle of deviation"),
}


@pytest.mark.parametrize("kind", PARTLY_USED)
def test_matrices_of_a_token_are_the_active_parameters(kind):
    """But for vectors, of which this family has norms and, in selectors, biases; and but for the constants."""
    model = PARTLY_USED[kind]("llama-gqa")
    blocks = Decoder(model).module_list
    others = sum(
        parameter.numel()
        for name, parameter in blocks.named_parameters()
        if parameter.ndim == 1 and "values" not in name
    )
    for moe in mixtures(model):
        others += (moe.layout.active + 1) * 32 if moe is not None and moe.constants is not None else 0
    assert work.elements(blocks, 1) == pytest.approx(footprint(model).active_block - others, rel=1e-12)


def test_a_rotated_stream_has_shortcuts():
    model = tiny_model("llama-gqa", dtype=torch.float32)
    for layer in Decoder(model).layers:
        modeling.convert_layer(layer, 32)
    dense = tiny_model("llama-gqa", dtype=torch.float32)
    added = work.elements(Decoder(model).module_list, 1) - work.elements(Decoder(dense).module_list, 1)
    assert added == 4 * 2 * 32 * 32


def test_chosen_values_are_multiplied_only_where_chosen():
    model = both("llama-gqa", torch.float32)
    first, *others = Decoder(model).layers
    attention = first.attention
    assert work.attention_width(first) == attention.heads * (attention.qk_width + attention.vo_width)
    assert {work.attention_width(layer) for layer in others} == {attention.heads * (attention.qk_width + 3)}


@pytest.mark.parametrize("case", ["top 2", "shared", "unequal", "overlapping", "overlapping, equal", "all"])
@pytest.mark.parametrize("tokens", [1, 2])
def test_touched_neurons_are_the_mean_over_all_draws(case, tokens):
    moe, _ = kinds.make("llama-gqa", case)
    always = set() if moe.shared is None else set(moe.shared.tolist())
    sets = [set(positions.tolist()) for positions in moe.sets]
    tuples = [set().union(*chosen) for chosen in combinations(sets, moe.layout.active)]
    unions = [len(always.union(*drawn)) for drawn in product(tuples, repeat=tokens)]
    assert work.touched_neurons(moe, tokens) == pytest.approx(sum(unions) / len(unions), rel=1e-12)


def test_bytes_grow_with_the_experts_that_a_batch_touches():
    model = kinds.converted("llama-gqa", "top 2")
    per_neuron, experts, size, active = 3 * 32, 6, 8, 2
    small, large = (work.decode(model, batch, LENGTH, 5).bytes for batch in (1, 4))
    missed = (1 - active / experts) ** 1 - (1 - active / experts) ** 4
    converted_blocks = sum(moe is not None for moe in mixtures(model))
    grown = 4 * per_neuron * experts * size * missed * converted_blocks + 3 * LENGTH * 5
    assert large - small == pytest.approx(grown)


def test_bytes_grow_with_the_values_that_a_batch_touches():
    model = both("llama-gqa", torch.float32)
    attention = Decoder(model).layers[1].attention
    width, kept = attention.vo_width, attention.kept
    draws = list(combinations(range(width), kept))
    mean = sum(len({*a, *b}) for a in draws for b in draws) / len(draws) ** 2
    per_value = (attention.heads + attention.kv_heads) * 32
    grown = work.elements(attention, 2) - work.elements(attention, 1)
    assert grown == pytest.approx((mean - kept) * per_value)


def test_all_is_read_by_many_tokens():
    for kind in ("experts", "chosen values", "scaled"):
        blocks = Decoder(PARTLY_USED[kind]("llama-gqa")).module_list
        matrices = sum(parameter.numel() for parameter in blocks.parameters() if parameter.ndim == 2)
        assert work.elements(blocks, 10_000) == pytest.approx(matrices)


def test_half_precision_reads_half():
    single, half = (tiny_model("llama-gqa", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert work.decode(single, 1, LENGTH, 0).bytes == 2 * work.decode(half, 1, LENGTH, 0).bytes


def test_masks_are_read():
    """A bit per weight; of a 2:4 model in half precision an eighth of the kept values."""
    model, tables = sparse("llama-gqa", torch.bfloat16), 0
    for part in model.modules():
        if isinstance(part, SparseLinear):
            tables += part.out_features * part.in_features // 8
    assert tables > 0 and work.table_bytes(Decoder(model).module_list, 5) == tables
    matrices = work.elements(Decoder(model).module_list, 1) + Decoder(model).head.weight.numel()
    assert work.decode(model, 1, LENGTH, 3).bytes == 2 * matrices + tables + 3 * LENGTH


def test_lists_of_kept_rows_and_columns_are_read():
    model = gathered("llama-gqa", torch.float32)
    lists = [list_ for name, list_ in model.named_buffers() if name.endswith(("column_index", "row_index"))]
    assert lists and work.table_bytes(Decoder(model).module_list, 5) == sum(4 * len(list_) for list_ in lists)


def test_lists_of_kept_dimensions_are_read():
    model = narrow(tiny_model("llama-gqa", dtype=torch.float32, **SMALL))
    lists = [list_ for name, list_ in model.named_buffers() if name.endswith("qk_index")]
    assert lists and work.table_bytes(Decoder(model).module_list, 1) == sum(4 * list_.numel() for list_ in lists)


@pytest.mark.parametrize("tokens", [1, 2])
def test_lists_of_overlapping_experts_are_read_where_touched(tokens):
    moe, _ = kinds.make("llama-gqa", "overlapping")
    sizes = [0 if positions.diff().eq(1).all() else 4 * len(positions) for positions in moe.sets]
    draws = [
        set().union(*drawn) for drawn in product(combinations(range(len(sizes)), moe.layout.active), repeat=tokens)
    ]
    mean = sum(sizes[expert] for drawn in draws for expert in drawn) / len(draws)
    assert sum(sizes) > 0 and work.table_bytes(moe, tokens) == pytest.approx(mean, rel=1e-12)


def test_a_list_of_what_every_token_gets_is_read():
    moe, _ = kinds.make("llama-gqa", "overlapping")
    without = work.table_bytes(moe, 1)
    moe.shared = torch.tensor([0, 2, 3], dtype=torch.int32)
    assert work.table_bytes(moe, 1) == without + 3 * 4


def test_vectors_are_no_lists():
    assert work.table_bytes(ScaledGate(6, torch.zeros(1)), 1) == 0


def test_experts_that_lie_in_a_row_need_no_list():
    assert work.table_bytes(Decoder(kinds.converted("llama-gqa", "top 2")).module_list, 1) == 0


def cache_of(model):
    return run(model, some_ids(BATCH, LENGTH), 2).cache_bytes


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_of_dense_models(name, dtype):
    model = tiny_model(name, dtype=dtype)
    assert cache_of(model) == 4 * 2 * Decoder(model).shape.kv_width * dtype.itemsize


def test_cache_of_narrow_and_missing_heads():
    model = narrow(tiny_model("llama-gqa", dtype=torch.float32, **SMALL))
    attentions = [layer.attention for layer in Decoder(model).layers]
    widths = [attention.kv_heads * (attention.qk_width + attention.vo_width) for attention in attentions]
    assert cache_of(model) == 4 * sum(widths)
    assert sum(widths) < 4 * 2 * tiny_model("llama-gqa", **SMALL).config.hidden_size
    removed = modeling.keep_layers(tiny_model("llama-gqa", dtype=torch.float32), [0, 2])
    assert cache_of(removed) == 2 * 2 * 16 * 4


def test_cache_of_chosen_values_is_smaller_where_it_is_compact():
    model = both("llama-gqa", torch.float32)
    zeros = cache_of(model)
    modeling.set_value_cache(model, "compact")
    attentions = [layer.attention for layer in Decoder(model).layers[1:]]
    bits = 1  # an element of fp32 per head: room for the choice among 32 dimensions per head
    saved = sum(attention.kv_heads * (attention.vo_width - attention.kept - bits) for attention in attentions)
    assert saved > 0 and zeros - cache_of(model) == 4 * saved
