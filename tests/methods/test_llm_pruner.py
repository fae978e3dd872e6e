"""LLM-Pruner: kept sets by loops over heads and channels, published counts, contracts."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import methods
from methods import modeling
from methods.allocation import allocate, everything
from methods.base import Budget, Context
from methods.errors import UserError
from methods.gradients import snippets
from methods.llm_pruner import LLMPruner, part_way, stream_width
from methods.modeling.footprint import footprint
from methods.modeling.shape import DecoderShape
from tests.methods.test_floor import dense_shape
from tests.methods.test_slicegpt import LLAMA_2_7B
from tests.methods.tiny import (
    CONFIGS,
    ONE_PER_FAMILY,
    RandomCalibration,
    assert_cache_changes_nothing,
    logits,
    tiny_model,
)

MIDDLE: dict[str, Any] = {"protect_first": 0.25, "protect_last": 0.25}
"""Of four blocks, the second and the third are pruned."""
SHORT: dict[str, Any] = {"samples": 4, "tokens": 8}
PUBLISHED = 5_422_977_024
"""LLaMA-7B after removing a quarter of the heads and channels of blocks 4 to 29, as the README prints it."""


def compress(model: PreTrainedModel, ratio: float, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    context = Context(scratch=Path(), seed=seed)
    method = LLMPruner(**(SHORT | settings))
    return method.compress(model, None, Budget(ratio=ratio), RandomCalibration(), context)  # type: ignore[arg-type]


def samples(seed: int = 0, count: int = 4, tokens: int = 8) -> Tensor:
    """The texts that `compress` measures on."""
    return snippets(RandomCalibration(), count, tokens, 8, torch.Generator().manual_seed(seed))


def gradients(model: PreTrainedModel, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Mean and mean square over samples of the gradient of every parameter, by its id."""
    parameters, found = list(model.parameters()), []
    for row in ids:
        chances = model(input_ids=row[None]).logits[0, :-1].log_softmax(-1)
        loss = -chances[range(len(row) - 1), row[1:]].mean()
        found.append(torch.autograd.grad(loss, parameters))
    stacked = map(torch.stack, zip(*found, strict=True))
    return {id(p): (g.mean(0), g.square().mean(0)) for p, g in zip(parameters, stacked, strict=True)}


def naive_scores(layer: modeling.DecoderLayer, shape: DecoderShape, found: dict, measure: str) -> tuple[list, list]:
    """Sums over the members of every head group and of every channel, by loops; `sum` is the reduction."""

    def each(parameter: Any, index: Any) -> Tensor:
        w, (g, f) = parameter.detach()[index], (moment[index] for moment in found[id(parameter)])
        return {"vectorize": w * g, "param_first": (w * g).abs(), "param_mix": (w * g - w * w * f / 2).abs()}[measure]

    def row(linear: Any, index: int) -> float:
        bias = 0 if linear.bias is None else each(linear.bias, index)
        return abs(float(each(linear.weight, index).sum() + bias))

    def column(linear: Any, index: int) -> float:
        return abs(float(each(linear.weight, (slice(None), index)).sum()))

    q, k, v = layer.attention_inputs
    groups = [0.0] * shape.kv_heads
    for head in range(shape.heads):
        j = head // (shape.heads // shape.kv_heads)
        places = range(head * shape.head_dim, (head + 1) * shape.head_dim)
        groups[j] += sum(row(q, place) + column(layer.attention_output, place) for place in places)
    for j in range(shape.kv_heads):
        places = range(j * shape.head_dim, (j + 1) * shape.head_dim)
        groups[j] += sum(row(k, place) + row(v, place) for place in places)
    inputs = layer.mlp_inputs
    channels = [sum(row(w, c) for w in inputs) + column(layer.mlp_output, c) for c in range(shape.mlp_width)]
    return groups, channels


def lowest(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda place: scores[place])[:count]


def silenced(name: str, ratio: float, measure: str) -> PreTrainedModel:
    """The dense model in which the groups of lowest naive score, in its two middle blocks, write nothing."""
    model = tiny_model(name)
    decoder, found = modeling.Decoder(model), gradients(model, samples())
    shape = decoder.shape
    kept = allocate(shape, Budget(ratio=ratio), range(1, 3))
    readers = shape.heads // shape.kv_heads
    for layer, width in zip(decoder.layers[1:3], kept.channels, strict=True):
        groups, channels = naive_scores(layer, shape, found, measure)
        for j in lowest(groups, shape.kv_heads - kept.groups):
            wide = readers * shape.head_dim
            layer.attention_output.weight.data[:, j * wide : (j + 1) * wide] = 0
        layer.mlp_output.weight.data[:, lowest(channels, shape.mlp_width - width)] = 0
    return model


@pytest.mark.parametrize("measure", ["param_first", "vectorize", "param_mix"])
@pytest.mark.parametrize("name", CONFIGS)
def test_pruning_equals_silencing_the_lowest_groups(name: str, measure: str) -> None:
    ratio = 0.82 if name == "llama-mqa" else 0.75  # a single group stays
    expected = logits(silenced(name, ratio, measure))
    pruned = compress(tiny_model(name), ratio, importance=measure, **MIDDLE)
    torch.testing.assert_close(logits(pruned), expected, rtol=1e-9, atol=1e-9)
    assert (logits(tiny_model(name)) - expected).abs().max() > 1e-3


def test_the_published_count() -> None:
    shape = DecoderShape.from_config(LLAMA_2_7B)
    method, budget = LLMPruner(), Budget(ratio=PUBLISHED / shape.total)
    assert method.blocks(shape) == range(4, 30)
    found = allocate(shape, budget, method.blocks(shape))
    assert found.groups == 24 and found.channels == [8256] * 26
    assert method.predict(shape, budget).active_total == PUBLISHED
    with pytest.raises(UserError, match="not reachable for llm-pruner"):
        method.predict(shape, Budget(ratio=0.2))
    assert LLMPruner(protect_first=0, protect_last=0).predict(shape, Budget(ratio=0.2))


@given(layers=st.integers(1, 80), first=st.floats(0, 1), last=st.floats(0, 1))
def test_protected_blocks(layers: int, first: float, last: float) -> None:
    shape = dataclasses.replace(dense_shape("llama-mha"), layers=layers)
    if first + last >= 1:
        with pytest.raises(UserError, match="together less than 1"):
            LLMPruner(protect_first=first, protect_last=last)
        return
    blocks = LLMPruner(protect_first=first, protect_last=last).blocks(shape)
    assert len(blocks) >= 1 and blocks[0] >= 0 and blocks[-1] < layers
    assert abs(blocks[0] - first * layers) <= 1.5 and abs(layers - 1 - blocks[-1] - last * layers) <= 1.5


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_blocks_outside_the_range_stay_bit_for_bit(name: str) -> None:
    dense, pruned = (
        tiny_model(name, dtype=torch.float32),
        compress(tiny_model(name, dtype=torch.float32), 0.8, **MIDDLE),
    )
    for index in (0, 3):
        mine, its = (modeling.Decoder(model).module_list[index].state_dict() for model in (pruned, dense))
        assert mine.keys() == its.keys() and all(mine[key].equal(its[key]) for key in mine)
    layers = pruned.config.compression["structures"]["narrow_mlp"]["layers"]
    assert layers[0] is layers[3] is None and layers[1] < modeling.Decoder(dense).shape.mlp_width


@pytest.mark.parametrize("settings", [{}, {"mode": "channel"}, {"ranking": "global", "importance": "l1"}])
@pytest.mark.parametrize("name", CONFIGS)
def test_contract(name: str, settings: dict, tmp_path: Path) -> None:
    model = tiny_model(name, dtype=torch.float32)
    shape = modeling.Decoder(model).shape
    assert compress(model, 1, **settings) is model
    predicted = LLMPruner(**settings).predict(shape, Budget(ratio=0.7))
    pruned = compress(model, 0.7, **settings)
    counted = footprint(pruned)
    assert (counted.active_total, counted.active_block) == (predicted.active_total, predicted.active_block)
    assert abs(counted.active_total / shape.total - 0.7) <= predicted.grid_step / 2 + 1 / shape.total
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits(loaded).equal(logits(pruned))
    assert_cache_changes_nothing(loaded)
    assert logits(compress(tiny_model(name, dtype=torch.float32), 0.7, **settings)).equal(logits(pruned))


def test_error_grows_as_the_model_shrinks() -> None:
    expected = logits(tiny_model("llama-mha"))
    for settings in ({}, {"mode": "channel"}):
        small = [compress(tiny_model("llama-mha"), ratio, **settings) for ratio in (1, 0.95, 0.8, 0.6)]
        errors = [float((logits(model) - expected).square().mean()) for model in small]
        assert errors == sorted(errors) and errors[0] == 0 < errors[1]


def test_the_seed_draws_the_texts_and_the_lots() -> None:
    def outcome(measure: str, seed: int) -> Tensor:
        return logits(compress(tiny_model("llama-gqa"), 0.7, seed=seed, importance=measure, samples=2))

    for measure in ("param_first", "random"):
        assert outcome(measure, 0).equal(outcome(measure, 0))
        assert not torch.allclose(outcome(measure, 0), outcome(measure, 1))
    assert outcome("l2", 0).equal(outcome("l2", 1))


def test_half_precision_is_scored_in_full() -> None:
    pruned = compress(tiny_model("llama-gqa", dtype=torch.bfloat16), 0.7)
    assert pruned.dtype == torch.bfloat16 and logits(pruned).isfinite().all()


def test_steps_lead_to_the_same_size_and_measure_anew() -> None:
    shape = dense_shape("llama-gqa")
    goal = allocate(shape, Budget(ratio=0.6))
    sizes = [part_way(goal, step / 4).size for step in range(5)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == everything(shape).size and sizes[4] == goal.size
    for settings in ({"importance": "param_first"}, {"mode": "channel"}, {"ranking": "global"}):
        at_once, by_steps = (
            compress(tiny_model("llama-gqa"), 0.6, iterative_steps=steps, **settings) for steps in (1, 3)
        )
        assert footprint(at_once) == footprint(by_steps)
        assert not torch.allclose(logits(at_once), logits(by_steps))


@given(ratio=st.floats(0.05, 1), basis=st.sampled_from(["total", "block"]), name=st.sampled_from(sorted(CONFIGS)))
def test_no_width_of_the_stream_is_nearer(ratio: float, basis: Any, name: str) -> None:
    shape, budget = dense_shape(name), Budget(ratio=ratio, basis=basis)
    missed = {
        d: abs(budget.dense(dataclasses.replace(shape, hidden=d)) - ratio * budget.dense(shape)) for d in range(1, 33)
    }
    assert missed[stream_width(shape, budget)] <= min(missed.values()) + 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples is 0; the least is 1"),
        ({"tokens": 1}, "tokens is 1; the least is 2"),
        ({"iterative_steps": 0}, "iterative_steps is 0"),
        ({"protect_first": -0.1}, "none may be negative"),
        ({"protect_first": float("nan")}, "none may be negative"),
        ({"mode": "channel", "reduction": "prod"}, "no floating-point number holds"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LLMPruner(**settings)


def test_unmeasurable_models_and_texts_are_refused() -> None:
    budget, context = Budget(ratio=0.7), Context(scratch=Path())
    with pytest.raises(UserError, match="calibration text is empty"):
        LLMPruner().compress(tiny_model("phi"), None, budget, RandomCalibration(samples=0), context)  # type: ignore[arg-type]
    broken = tiny_model("llama-gqa")
    modeling.Decoder(broken).layers[1].mlp_output.weight.data[0, 0] = float("nan")
    for measure in ("param_first", "l1"):
        with pytest.raises(UserError, match="overflows"):
            compress(broken, 0.7, importance=measure)


@pytest.mark.parametrize(
    ("given", "idle"),
    [
        ({"mode": "channel", "ranking": "global"}, "ranking"),
        ({"mode": "channel", "protect_first": "0.5"}, "protect_first"),
        ({"importance": "l1", "samples": "99"}, "samples"),
        ({"importance": "random", "tokens": "99"}, "tokens"),
    ],
)
def test_settings_without_effect_are_refused(given: dict[str, str], idle: str) -> None:
    with pytest.raises(UserError, match=rf"llm-pruner.{idle}=.* has no effect beside"):
        methods.configure("llm-pruner", given)


def test_all_of_the_text_can_be_asked_for(tmp_path: Path) -> None:
    for settings, told in (({}, "10 stretches of 16 tokens"), ({"preset": "matched"}, "12 stretches of 16 tokens")):
        context = Context(scratch=tmp_path)
        method, budget = methods.configure("llm-pruner", settings), Budget(ratio=0.8, basis="block")
        method.compress(tiny_model("llama-gqa"), None, budget, RandomCalibration(), context)  # type: ignore[arg-type]
        assert told in context.notes[0]


def test_every_step_draws_texts_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def spy(*arguments: Any) -> torch.Tensor:
        drawn.append(snippets(*arguments))
        return drawn[-1]

    monkeypatch.setattr("methods.llm_pruner.snippets", spy)
    method, budget = LLMPruner(iterative_steps=2, tokens=8), Budget(ratio=0.8, basis="block")
    for _ in range(2):
        method.compress(tiny_model("llama-gqa"), None, budget, RandomCalibration(), Context(scratch=tmp_path))  # type: ignore[arg-type]
    assert not drawn[0].equal(drawn[1]) and drawn[0].equal(drawn[2]) and drawn[1].equal(drawn[3])
