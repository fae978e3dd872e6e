"""Conversion: the sparse model computes what the masked one computed, at the counted size that was asked for."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from methods import modeling
from methods.base import Budget
from methods.errors import UserError
from methods.modeling import Decoder
from methods.modeling.footprint import footprint
from methods.tomoe import ToMoE
from methods.tomoe.conversion import convert
from methods.tomoe.masking import MaskedDecoder
from methods.tomoe.network import ToMoENetwork
from methods.tomoe.objective import equalised
from methods.tomoe.scores import measure
from methods.tomoe.sites import spread
from methods.tomoe.sizes import best, sizes_at, solve
from tests.methods.tiny import CONFIGS, ONE_PER_FAMILY, assert_cache_changes_nothing, logits, some_ids, tiny_model
from tests.methods.tomoe.small import network
from tests.methods.training.small import SmallCalibration, context, tokenizer

VARIANTS: list[dict[str, Any]] = [
    {},
    {"experts": 1, "vo_routing": False},
    {"experts": 1},
    {"vo_routing": False},
    {"head_pruning": True},
    {"local_embeddings": True},
    {"vo_mask": "v_only"},
]


def converted(
    name: str,
    folder: Path,
    ratio: float = 0.7,
    basis: Any = "block",
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> tuple[PreTrainedModel, ToMoENetwork]:
    model = tiny_model(name, dtype=dtype)
    net = network(model, **changes)
    budget = Budget(ratio=ratio, basis=basis)
    return convert(net.settings, model, net, budget, SmallCalibration(), context(folder)), net


@pytest.mark.parametrize("basis", ["block", "total"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_counted_size_is_the_one_asked_for(name: str, basis: Any, tmp_path: Path) -> None:
    dense = footprint(tiny_model(name))
    for ratio in (0.9, 0.8):
        made = footprint(converted(name, tmp_path, ratio, basis, experts=3, embedding=2)[0])
        achieved = (
            made.active_block / dense.active_block if basis == "block" else made.active_total / dense.active_total
        )
        assert achieved == pytest.approx(ratio, abs=0.015)  # one head dimension is 1 % of so small a model
        assert achieved <= ratio


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("name", [*ONE_PER_FAMILY, "llama-mqa"])
def test_the_sparse_model_is_the_masked_one(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    sparse, net = converted(name, tmp_path, 0.75, **changes)
    model = tiny_model(name)
    masked = MaskedDecoder(Decoder(model), net, noise=0.0)
    with torch.no_grad():
        scores = measure(net, Decoder(model), SmallCalibration(), context(tmp_path))
        sizes = solve(net.settings, net.shape, scores, Budget(ratio=0.75, basis="block"))
    exact_values(masked, [size.values for size in sizes])
    with masked.attached(), torch.no_grad():
        masked.masks = net.draw(noise=0.0)
        for masks, score, size in zip(masked.masks, scores, sizes, strict=True):
            masks.experts_NM = equalised(score.experts_NM, size.neurons)
            if masks.heads_H is not None:
                masks.heads_H = bits(best(score.groups_G, size.groups), len(masks.heads_H))
            elif score.groups_G is not None:
                masks.qk_h = spread(bits(best(score.groups_G, size.groups), len(score.groups_G)), net.shape.rope_groups)
            if not net.settings.dynamic_values:
                masks.values_BTh = bits(best(score.values_Th[0], size.values), net.shape.head_dim)
        torch.testing.assert_close(logits(sparse), logits(model), rtol=1e-9, atol=1e-9)
    if net.settings.experts > 1:
        routes = torch.stack([cast(torch.Tensor, masks.routes_BTN) for masks in masked.masks])
        found = modeling.expert_ids(sparse, some_ids())
        assert found.equal(routes.argmax(-1).view_as(found))


def bits(places: list[int], length: int) -> torch.Tensor:
    return torch.zeros(length, dtype=torch.float64).index_fill(0, torch.tensor(places), 1.0)


def exact_values(masked: MaskedDecoder, kept: list[int]) -> None:
    """Let every token of the masked model keep exactly its layer's K dimensions."""

    def choose(index: int, x_BTD: torch.Tensor, mean_E: torch.Tensor) -> torch.Tensor:
        scores = masked.network.attention_sites[index].value_logits(x_BTD, mean_E)
        return torch.zeros_like(scores).scatter(-1, scores.topk(kept[index], -1).indices, 1.0)

    masked._choose_values = choose


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_saved_and_loaded_is_the_same_to_the_last_bit(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    sparse, _ = converted(name, tmp_path, dtype=torch.float32, **changes)
    sparse.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert logits(loaded).equal(logits(sparse))
    assert footprint(loaded) == footprint(sparse)
    assert_cache_changes_nothing(loaded)


def test_left_padding_changes_nothing(tmp_path: Path) -> None:
    sparse, _ = converted("llama-gqa", tmp_path)
    ids = some_ids(1, 8)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(11) >= 3)[None].long()
    with torch.no_grad():
        out = sparse(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    torch.testing.assert_close(out[:, 3:], logits(sparse, ids), rtol=1e-7, atol=1e-7)


def test_the_record_says_how_wide_experts_were_before_they_were_made_equal(tmp_path: Path) -> None:
    sparse, _ = converted("llama-gqa", tmp_path)
    for layer in sparse.config.compression["structures"]["moe_mlp"]["layers"]:
        assert len(layer["raw_widths"]) == layer["experts"] == 4
        assert layer["width"] <= layer["neurons"] <= 48


def test_a_ratio_below_the_smallest_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="below the least that tomoe can make.*Use --ratios"):
        converted("llama-gqa", tmp_path, 0.05)


def test_ratio_one_is_the_identity(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa", dtype=torch.float32)
    before = logits(model)
    made = ToMoE().compress(model, tokenizer(), Budget(ratio=1), SmallCalibration(), context(tmp_path))
    assert made is model and logits(made).equal(before)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(-8, 8), st.floats(0.01, 3))
def test_sizes_fall_as_the_shift_rises(t: float, step: float) -> None:
    model = tiny_model("phi")
    net = network(model)
    with torch.no_grad():
        scores = measure(net, Decoder(model), SmallCalibration(samples=2), context(Path()))
        lower, higher = sizes_at(net.settings, scores, t), sizes_at(net.settings, scores, t + step)
    for one, other in zip(lower, higher, strict=True):
        assert one.groups >= other.groups >= 1 and one.values >= other.values >= 1 and one.neurons >= other.neurons >= 1


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_from_dense_to_sparse_in_one_call(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, dtype=torch.float32)
    dense = footprint(model).active_block
    method = ToMoE(experts=3, embedding=2, learning_rate=0.03)
    budget = Budget(ratio=0.8, basis="block")
    made = method.compress(model, tokenizer(), budget, SmallCalibration(), context(tmp_path, steps=12))
    assert footprint(made).active_block / dense == pytest.approx(0.8, abs=0.015)
    assert_cache_changes_nothing(made)


def test_blocks_of_a_converted_model_can_be_removed(tmp_path: Path) -> None:
    sparse, _ = converted("llama-gqa", tmp_path, dtype=torch.float32)
    shorter = modeling.keep_layers(sparse, [0, 2, 3])
    shorter.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert logits(loaded).equal(logits(shorter))
    assert len(loaded.config.compression["structures"]["moe_mlp"]["layers"]) == 3
