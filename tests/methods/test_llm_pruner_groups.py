"""LLM-Pruner's groups: which rows and columns go together, what their scores make, and which groups stay."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from methods import modeling
from methods.allocation import Scores, everything
from methods.base import Silent
from methods.gradients import gradient_moments
from methods.importance import Importance
from methods.llm_pruner import REDUCTIONS, block_scores, global_choice, spread, stream_scores
from tests.methods.test_floor import dense_shape
from tests.methods.tiny import ONE_PER_FAMILY, some_ids, tiny_model


def importance_of(model: PreTrainedModel, measure: Any = "param_first") -> Importance:
    found = gradient_moments(model, list(model.parameters()), some_ids(), Silent(), squares=True)
    return Importance(measure, found, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("measure", ["vectorize", "param_first", "param_second", "param_mix"])
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_a_channel_that_writes_nothing_goes_first(name: str, measure: str) -> None:
    model = tiny_model(name)
    layer = modeling.Decoder(model).layers[1]
    layer.mlp_output.weight.data[:, 17] = 0
    shape = modeling.Decoder(model).shape
    head, readers = shape.head_dim, shape.heads // shape.kv_heads
    layer.attention_output.weight.data[:, -head * readers :] = 0
    scores = block_scores(layer, head, importance_of(model, measure), REDUCTIONS["sum"])
    assert scores.channels[17] == 0 and (scores.channels > 0).sum() > 40  # some of OPT's are dead by themselves
    assert scores.groups.argmin() == len(scores.groups) - 1


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3", "llama-mqa"])
def test_query_heads_belong_to_the_key_head_they_read(name: str) -> None:
    """A gradient that only a query head has shows in the group of key head floor(h / r)."""
    model = tiny_model(name)
    decoder = modeling.Decoder(model)
    shape, layer = decoder.shape, decoder.layers[0]
    readers = shape.heads // shape.kv_heads
    zero = {p: torch.zeros_like(p) for p in model.parameters()}
    for head in range(shape.heads):
        gradient = torch.zeros_like(layer.attention_inputs[0].weight)
        gradient[head * shape.head_dim : (head + 1) * shape.head_dim] = 1
        moments = {p: (z, z) for p, z in zero.items()} | {layer.attention_inputs[0].weight: (gradient, gradient)}
        importance = Importance("param_first", moments, torch.Generator())  # type: ignore[arg-type]
        groups = block_scores(layer, shape.head_dim, importance, REDUCTIONS["sum"]).groups
        assert groups.nonzero().flatten().tolist() == [head // readers]


@pytest.mark.parametrize(
    ("reduction", "combine"),
    [("sum", sum), ("mean", lambda x: sum(x) / len(x)), ("max", max), ("first", lambda x: x[0]), ("prod", math.prod)],
)
def test_reductions_of_a_channels_members(reduction: Any, combine: Any) -> None:
    model = tiny_model("llama-mha")
    layer, importance = modeling.Decoder(model).layers[1], importance_of(model)
    gate, up = (importance.rows(linear).tolist() for linear in layer.mlp_inputs)
    members = list(zip(gate, up, importance.columns(layer.mlp_output).tolist(), strict=True))
    scores = block_scores(layer, 8, importance, REDUCTIONS[reduction])
    assert scores.channels.tolist() == pytest.approx([combine(three) for three in members], rel=1e-9, abs=0)
    q, k, v = (importance.rows(linear).tolist() for linear in layer.attention_inputs)
    four = list(zip(q, k, v, importance.columns(layer.attention_output).tolist(), strict=True))
    heads = [sum(combine(dim) for dim in four[h * 8 : h * 8 + 8]) for h in range(4)]
    assert scores.groups.tolist() == pytest.approx(heads, rel=1e-9, abs=0)


scores_of_blocks = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=4)


@given(scores=scores_of_blocks, data=st.data())
def test_spread_keeps_the_highest_and_one_of_each(scores: list[list[int]], data: st.DataObject) -> None:
    total = sum(map(len, scores))
    count = data.draw(st.integers(len(scores), total))
    found = [part.tolist() for part in spread([torch.tensor(part, dtype=torch.float64) for part in scores], count)]
    assert sum(map(len, found)) == count and all(found)
    must = {(b, part.index(max(part))) for b, part in enumerate(scores)}
    free = [(b, i) for b, part in enumerate(scores) for i in range(len(part)) if (b, i) not in must]
    free.sort(key=lambda place: -scores[place[0]][place[1]])
    expected = must | set(free[: count - len(must)])
    assert {(b, i) for b, places in enumerate(found) for i in places} == expected


def test_global_ranking_takes_more_where_scores_are_low() -> None:
    low, high = (Scores(x * torch.arange(1.0, 5), x * torch.arange(1.0, 49)) for x in (0.01, 1))
    shape = dense_shape("llama-mha")
    allocation = dataclasses.replace(everything(shape, range(2)), groups=2, total_channels=50)
    weak, strong = global_choice([low, high], allocation)
    assert weak.groups.tolist() == [3] and strong.groups.tolist() == [1, 2, 3]
    assert weak.channels.tolist() == [46, 47] and strong.channels.tolist() == list(range(48))


def test_stream_channels_score_all_that_reads_and_writes_them() -> None:
    model = tiny_model("phi")
    importance, decoder = importance_of(model), modeling.Decoder(model)
    total = importance.columns(decoder.embeddings[0]) + importance.columns(decoder.head)
    total += importance.rows(decoder.final_norm)
    for layer in decoder.layers:
        total += importance.rows(layer.attention_norm)
        for reader in layer.attention_inputs + layer.mlp_inputs:
            total += importance.columns(reader)
        total += importance.rows(layer.attention_output) + importance.rows(layer.mlp_output)
    torch.testing.assert_close(stream_scores(decoder, importance, REDUCTIONS["sum"]), total)


def test_a_dead_stream_channel_goes_first() -> None:
    model = tiny_model("llama-mha")
    decoder = modeling.Decoder(model)
    parts = modeling.stream_parts(decoder)
    for reader in parts.readers:
        reader.weight.data[:, 11] = 0
    for writer in parts.writers:
        writer.weight.data[11] = 0
    scores = stream_scores(decoder, importance_of(model), REDUCTIONS["sum"])
    assert scores[11] == 0 and scores.argmin() == 11
