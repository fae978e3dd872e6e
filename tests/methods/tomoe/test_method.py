"""ToMoE as a method: settings, presets, what is refused, and that every ablation runs from dense to sparse."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods import registry
from methods.base import Budget
from methods.errors import UserError
from methods.modeling import Decoder
from methods.modeling.footprint import footprint
from methods.tomoe import ToMoE
from tests.methods.tiny import assert_cache_changes_nothing, tiny_model
from tests.methods.tomoe.test_accounting import SHAPES
from tests.methods.training.small import SmallCalibration, context, tokenizer

ABLATIONS: list[dict[str, str]] = [
    {"experts": "1", "vo_routing": "false"},
    {"experts": "16"},
    {"tau": "0.3"},
    {"beta": "0"},
    {"loss": "lm"},
    {"vo_routing": "false"},
    {"local_embeddings": "true"},
    {"head_pruning": "true"},
    {"mask_grad": "double"},
    {"mask_noise": "per_token"},
    {"start": "random"},
    {"inference_noise": "true"},
    {"vo_mask": "o_only"},
    {"topk": "cap", "kept_values": "max"},
    {"preset": "paper", "steps": "3"},
    {"preset": "released", "steps": "3"},
]


@pytest.mark.parametrize("settings", ABLATIONS, ids=str)
@pytest.mark.parametrize("name", ["llama-gqa", "phi"])
def test_every_ablation_runs_from_dense_to_sparse(name: str, settings: dict[str, str], tmp_path: Path) -> None:
    model = tiny_model(name, dtype=torch.float32)
    dense = footprint(model).active_block
    method = registry.configure("tomoe", {"experts": "3", "embedding": "2"} | settings)
    budget = Budget(ratio=0.8, basis="block")
    made = method.compress(model, tokenizer(), budget, SmallCalibration(), context(tmp_path, steps=3))
    assert footprint(made).active_block / dense == pytest.approx(0.8, abs=0.02)
    if settings.get("preset") != "released":  # which keeps drawing noise
        assert_cache_changes_nothing(made)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"experts": 0}, "tomoe.experts is 0, which is not between 1 and 4096.*--set tomoe.experts"),
        ({"embedding": 1}, "tomoe.embedding is 1, which is not between 2"),
        ({"embedding": 9}, "tomoe.embedding is 9, and each direction.*--set tomoe.embedding=10"),
        ({"steps": 0}, "tomoe.steps is 0, which is not between 1"),
        ({"tau": 0.0}, "tomoe.tau is 0, which is not between 0.001"),
        ({"tau": -0.4}, "tomoe.tau is -0.4"),
        ({"tau": float("nan")}, "tomoe.tau is nan"),
        ({"ramp": 1.0}, "tomoe.ramp is 1, which is not between 0 and 0.99"),
        ({"last_noise": 0.0}, "tomoe.last_noise is 0, which is not between 0.01 and 1"),
        ({"weight_decay": -0.1}, "tomoe.weight_decay is -0.1"),
        ({"alpha": float("inf")}, "tomoe.alpha is inf"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ToMoE(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"head_pruning": "true", "vo_routing": "false"}, "tomoe.vo_routing=false .* beside tomoe.head_pruning=true"),
        ({"head_pruning": "true", "vo_mask": "v_only"}, "tomoe.vo_mask=v_only .* beside tomoe.head_pruning=true"),
        ({"vo_routing": "false", "topk": "cap"}, "tomoe.topk=cap .* beside tomoe.vo_routing=false"),
        ({"preset": "released", "head_pruning": "true", "vo_mask": "o_only"}, "tomoe.vo_mask=o_only"),
        ({"vo_routing": "false", "vo_count": "mean"}, "tomoe.vo_count=mean .* beside tomoe.vo_routing=false"),
        ({"experts": "1", "router_rate": "2"}, "tomoe.router_rate=2.0 .* beside tomoe.experts=1. Leave one of them"),
        ({"experts": "1", "attention_union": "false", "beta": "3"}, "tomoe.beta=3.0 .* and tomoe.attention_union"),
        ({"experts": "1", "vo_routing": "false", "inference_noise": "true"}, "tomoe.inference_noise=true"),
        ({"loss": "lm", "kd_weight": "2"}, "tomoe.kd_weight=2.0 .* beside tomoe.loss=lm"),
        ({"beta": "0", "union": "sampled"}, "tomoe.union=sampled .* beside tomoe.beta=0"),
        ({"gamma": "0", "load_balance": "released"}, "tomoe.load_balance=released .* beside tomoe.gamma=0"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.configure("tomoe", settings)


@pytest.mark.parametrize("preset", ["default", "paper", "released"])
@pytest.mark.parametrize("settings", [settings for settings in ABLATIONS if "preset" not in settings], ids=str)
def test_every_ablation_of_every_preset_is_possible(preset: str, settings: dict[str, str]) -> None:
    """What a preset itself says is no contradiction."""
    assert registry.configure("tomoe", {"preset": preset, "embedding": "2", "steps": "3"} | settings)


def test_what_nobody_set_is_not_blamed() -> None:
    """However many settings are unlike those of the preset."""
    far = {"learning_rate": "1e-3", "schedule": "constant", "ramp": "0", "start": "random", "last_noise": "1"}
    assert registry.configure("tomoe", {"vo_routing": "false", "union": "sampled"} | far)
    near = {"mask_noise": "per_expert", "embedding": "16", "steps": "300", "schedule": "cosine", "start": "energy"}
    assert registry.configure("tomoe", {"preset": "paper", "vo_routing": "false"} | near)


@pytest.mark.parametrize("name", SHAPES)
@given(ratio=st.floats(0.3, 0.99), basis=st.sampled_from(["total", "block"]))
def test_prediction_is_the_size_asked_for(name: str, ratio: float, basis: Any) -> None:
    shape, budget = SHAPES[name], Budget(ratio=ratio, basis=basis)
    made = ToMoE().predict(shape, budget)
    assert budget.achieved(made.active_total, made.active_block, shape) == pytest.approx(ratio, abs=1e-6)
    assert shape.total - made.active_total == shape.block - made.active_block


def test_a_ratio_that_leaves_nothing_is_refused_before_anything_runs() -> None:
    with pytest.raises(UserError, match=r"ratio 0.05 leaves tomoe only -0.\d+.*Use --ratios 0.\d+ or more"):
        ToMoE().predict(SHAPES["llama3-8b"], Budget(ratio=0.05))


def test_the_ratio_it_names_instead_works() -> None:
    with pytest.raises(UserError) as caught:
        ToMoE().predict(SHAPES["phi-2"], Budget(ratio=0.05))
    named = float(str(caught.value).rpartition("--ratios ")[2].split()[0])
    assert ToMoE().predict(SHAPES["phi-2"], Budget(ratio=named))


def test_added_weights_lower_the_target() -> None:
    shape = Decoder(tiny_model("llama-gqa")).shape
    half = Budget(ratio=0.5, basis="block")
    alone = ToMoE(experts=1, vo_routing=False)
    assert alone.added(shape).count(shape) == 0
    assert ToMoE().target(shape, half) < alone.target(shape, half)


def test_learning_rate_follows_the_fan_in() -> None:
    assert [round(ToMoE().rate(SHAPES[name]), 6) for name in ("llama2-7b", "phi-2")] == [0.001, 0.0016]
    assert ToMoE().rate(Decoder(tiny_model("llama-gqa")).shape) == 0.01
    assert ToMoE(learning_rate=0.5).rate(SHAPES["phi-2"]) == 0.5


def test_embedding_width_follows_the_model() -> None:
    assert [ToMoE().width(SHAPES[name]) for name in ("llama2-7b", "phi-2")] == [128, 80]
    assert ToMoE().width(Decoder(tiny_model("llama-gqa")).shape) == 16


def test_a_text_shorter_than_a_block_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa")
    calibration = SmallCalibration(sources={"words": ["w1 w2"]})
    with pytest.raises(UserError, match="shorter than one training block of 17 tokens"):
        ToMoE().compress(model, tokenizer(), Budget(ratio=0.7), calibration, context(tmp_path))


def test_float16_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa", dtype=torch.float16)
    with pytest.raises(UserError, match="gradients vanish in float16. Type --dtype bfloat16"):
        ToMoE().compress(model, tokenizer(), Budget(ratio=0.7), SmallCalibration(), context(tmp_path))


def test_presets_say_every_setting_of_the_mathematics() -> None:
    """A default that changes must not change what was published."""
    settings = {field.name for field in dataclasses.fields(ToMoE)} - {"tensorboard"}
    assert set(ToMoE.presets["paper"]) == set(ToMoE.presets["released"]) == settings
