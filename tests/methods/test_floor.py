"""The sanity floor, `random` and `structured-magnitude`: sizes by brute force, kept sets by naive loops, contracts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

import methods
from methods import modeling
from methods.allocation import UniformPruning, allocate, channel_size, group_size, highest
from methods.base import Budget, Context
from methods.errors import UserError
from methods.modeling.footprint import footprint
from methods.modeling.shape import DecoderShape
from methods.random_structures import Random
from tests.methods.test_slicegpt import LLAMA_2_7B
from tests.methods.tiny import (
    CONFIGS,
    ONE_PER_FAMILY,
    RandomCalibration,
    assert_cache_changes_nothing,
    logits,
    tiny_config,
    tiny_model,
)

BOTH = ["random", "structured-magnitude"]
bases = st.sampled_from(["total", "block"])


def compressed(method: str | UniformPruning, name: str, ratio: float, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A tiny model made small."""
    model = tiny_model(name, dtype=torch.float32)
    configured = methods.configure(method, {}) if isinstance(method, str) else method
    budget = Budget(ratio=ratio, **options)
    return configured.compress(model, None, budget, RandomCalibration(), Context(scratch=Path(), seed=seed))  # type: ignore[arg-type]


def dense_shape(name: str) -> DecoderShape:
    return DecoderShape.from_config(tiny_config(name).to_dict())


@st.composite
def shapes(draw: st.DrawFn) -> DecoderShape:
    """Small shapes of any family."""
    kv_heads, readers, head_dim = (draw(st.integers(1, top)) for top in (4, 3, 4))
    booleans = {
        name: draw(st.booleans()) for name in ("gated", "parallel", "layer_norm", "tied", "qkv_bias", "mlp_bias")
    }
    return DecoderShape(
        vocabulary=draw(st.integers(1, 50)),
        hidden=draw(st.integers(2, 12)),
        layers=draw(st.integers(1, 4)),
        attention_width=kv_heads * readers * head_dim,
        kv_width=kv_heads * head_dim,
        head_dim=head_dim,
        rotary=0,
        mlp_width=draw(st.integers(1, 12)),
        max_positions=8,
        **booleans,
    )


@given(shape=shapes(), ratio=st.floats(0.05, 1), basis=bases)
def test_no_allocation_is_nearer_by_more_than_half_a_channel(shape: DecoderShape, ratio: float, basis: Any) -> None:
    budget = Budget(ratio=ratio, basis=basis)
    found = allocate(shape, budget)

    def size(groups: int, channels: int) -> int:
        heads_gone = shape.layers * (shape.kv_heads - groups) * group_size(shape)
        return budget.dense(shape) - heads_gone - (shape.layers * shape.mlp_width - channels) * channel_size(shape)

    target = round(ratio * budget.dense(shape))
    missed = {
        (k, c): abs(size(k, c) - target)
        for k in range(1, shape.kv_heads + 1)
        for c in range(shape.layers, shape.layers * shape.mlp_width + 1)
    }
    mine = missed[found.groups, found.total_channels]
    assert mine <= max(min(missed.values()), channel_size(shape) / 2)
    on_target = {k for (k, _), distance in missed.items() if distance <= channel_size(shape) / 2}
    removable = shape.layers * (shape.kv_heads * group_size(shape) + shape.mlp_width * channel_size(shape))
    share = 1 - (budget.dense(shape) - target) / removable
    for other in on_target:
        assert abs(found.groups / shape.kv_heads - share) <= abs(other / shape.kv_heads - share) + 1e-12
    assert sum(found.channels) == found.total_channels and max(found.channels) - min(found.channels) <= 1
    assert found.channels == sorted(found.channels, reverse=True)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=6, deadline=None)
@given(ratio=st.floats(0.65, 1), basis=bases, method=st.sampled_from(BOTH))
def test_prediction_equals_the_count_of_the_tensors(name: str, ratio: float, basis: Any, method: str) -> None:
    shape, budget = dense_shape(name), Budget(ratio=ratio, basis=basis)
    predicted: Any = methods.configure(method, {}).predict(shape, budget)
    counted = footprint(compressed(method, name, ratio, basis=basis))
    assert (predicted.active_total, predicted.active_block) == (counted.active_total, counted.active_block)
    achieved = budget.achieved(counted.active_total, counted.active_block, shape)
    assert abs(achieved - ratio) <= predicted.grid_step / 2 + 0.5 / budget.dense(shape)


@pytest.mark.parametrize(("ratio", "groups"), [(0.7, 22), (0.5, 15)])
def test_llama_2_7b(ratio: float, groups: int) -> None:
    """The shares that stay of what can go are 0.688 and 0.480 (6.476 of 6.738 billion can)."""
    shape, budget = DecoderShape.from_config(LLAMA_2_7B), Budget(ratio=ratio)
    allocation, prediction = allocate(shape, budget), Random().predict(shape, budget)
    assert allocation.groups == groups
    assert abs(prediction.active_total - ratio * 6_738_415_616) <= 3 * 4096 / 2
    assert Random().predict(shape, Budget(ratio=1)).active_total == shape.total


@pytest.mark.parametrize("method", BOTH)
def test_ratio_one_is_the_model_itself(method: str) -> None:
    model = tiny_model("phi")
    one, context = Budget(ratio=1), Context(scratch=Path())
    assert methods.configure(method, {}).compress(model, None, one, RandomCalibration(), context) is model  # type: ignore[arg-type]


@pytest.mark.parametrize("basis", ["total", "block"])
@pytest.mark.parametrize("method", BOTH)
def test_a_ratio_at_which_everything_would_vanish_is_refused(method: str, basis: Any) -> None:
    shape = dense_shape("llama-gqa")
    with pytest.raises(UserError, match=rf"ratio 0.1 is not reachable for {method}.*--ratios 0\.\d+") as error:
        methods.configure(method, {}).predict(shape, Budget(ratio=0.1, basis=basis))
    hint = float(str(error.value).partition("--ratios ")[2].partition(",")[0])
    methods.configure(method, {}).predict(shape, Budget(ratio=hint, basis=basis))


def naive_kept(parts: list[torch.Tensor], count: int) -> list[int]:
    """Places of the largest norms, each part being all weights that go together."""
    norms = [part.norm().item() for part in parts]
    return sorted(sorted(range(len(parts)), key=lambda place: -norms[place])[:count])


def silenced(name: str, ratio: float) -> PreTrainedModel:
    """The dense model in which heads and channels of smallest norm write nothing: magnitude pruning by loops."""
    model = tiny_model(name, dtype=torch.float32)
    decoder = modeling.Decoder(model)
    shape, kept = decoder.shape, allocate(decoder.shape, Budget(ratio=ratio))
    h, readers = shape.head_dim, shape.heads // shape.kv_heads
    for layer, width in zip(decoder.layers, kept.channels, strict=True):
        q, k, v = (linear.weight.data for linear in layer.attention_inputs)
        o, down = layer.attention_output.weight.data, layer.mlp_output.weight.data
        groups = []
        for j in range(shape.kv_heads):
            mine, wide = slice(j * h, (j + 1) * h), slice(j * readers * h, (j + 1) * readers * h)
            groups.append(torch.cat([q[wide].flatten(), k[mine].flatten(), v[mine].flatten(), o[:, wide].flatten()]))
        channels = [
            torch.cat([*(linear.weight.data[j] for linear in layer.mlp_inputs), down[:, j]])
            for j in range(shape.mlp_width)
        ]
        for j in set(range(shape.kv_heads)) - set(naive_kept(groups, kept.groups)):
            o[:, j * readers * h : (j + 1) * readers * h] = 0
        down[:, sorted(set(range(shape.mlp_width)) - set(naive_kept(channels, width)))] = 0
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_magnitude_keeps_the_largest_norms(name: str) -> None:
    expected = logits(silenced(name, 0.6))
    torch.testing.assert_close(logits(compressed("structured-magnitude", name, 0.6)), expected, rtol=1e-4, atol=1e-4)
    assert (logits(tiny_model(name, dtype=torch.float32)) - expected).abs().max() > 1e-2


def test_equal_scores_keep_the_earlier_places() -> None:
    assert highest(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]


def kept_rows(small: PreTrainedModel, name: str) -> list[set[int]]:
    """Which channels of the dense model each block of a compressed one has, found by comparing rows."""
    dense, kept = tiny_model(name, dtype=torch.float32), []
    for mine, its in zip(modeling.Decoder(small).layers, modeling.Decoder(dense).layers, strict=True):
        same = mine.mlp_inputs[-1].weight[:, None] == its.mlp_inputs[-1].weight[None]
        places = same.all(-1).nonzero()[:, 1].tolist()
        assert places == sorted(places) and len(places) == len(mine.mlp_inputs[-1].weight)
        kept.append(set(places))
    return kept


def test_lots_are_nested_and_depend_on_the_seed() -> None:
    small, large, other = (
        kept_rows(compressed("random", "llama-gqa", *arguments), "llama-gqa")
        for arguments in ((0.5, 0), (0.8, 0), (0.5, 1))
    )
    assert all(few <= many for few, many in zip(small, large, strict=True))
    assert small != other and small[0] != small[1]


def test_lots_are_fair() -> None:
    shape = dense_shape("llama-gqa")
    layer = modeling.Decoder(tiny_model("llama-gqa")).layers[0]
    generator = torch.Generator().manual_seed(0)
    kept = [highest(Random().scores(layer, shape, generator).channels, 12) for _ in range(2000)]
    drawn = torch.cat(kept).bincount(minlength=48) / 2000
    assert drawn.sub(0.25).abs().max() < 5 * (0.25 * 0.75 / 2000) ** 0.5


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_checkpoints_come_back_bitwise_and_generate(name: str, method: str, tmp_path: Path) -> None:
    model = compressed(method, name, 0.6)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits(loaded).equal(logits(model))
    assert logits(compressed(method, name, 0.6)).equal(logits(model))
    assert_cache_changes_nothing(loaded)


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "opt"])
def test_error_grows_as_the_model_shrinks(name: str, method: str) -> None:
    expected = logits(tiny_model(name, dtype=torch.float32))
    errors = [
        float((logits(compressed(method, name, ratio)) - expected).square().mean()) for ratio in (1, 0.9, 0.75, 0.6)
    ]
    assert errors == sorted(errors) and errors[0] == 0
