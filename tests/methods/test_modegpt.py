"""MoDeGPT against a naive one of dense shape, planted redundancy, and the contracts of every method."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

import methods
from methods import modeling
from methods.base import Batch, Budget, Context
from methods.block_statistics import gather
from methods.errors import UserError
from methods.modegpt import MoDeGPT
from methods.modeling.footprint import footprint
from methods.modeling.shape import DecoderShape
from methods.module_widths import mean_sparsity, removable, widths
from methods.shortgpt import block_influence
from tests.methods.test_block_statistics import Seen
from tests.methods.test_floor import dense_shape
from tests.methods.test_modular_decompositions import root
from tests.methods.test_slicegpt import LLAMA_2_7B
from tests.methods.tiny import (
    CONFIGS,
    ONE_PER_FAMILY,
    RandomCalibration,
    assert_cache_changes_nothing,
    logits,
    tiny_model,
)

EVEN = MoDeGPT(epsilon=math.inf)
CALIBRATION = RandomCalibration()


def context(tmp_path: Path, **changes: Any) -> Context:
    return Context(scratch=tmp_path, **changes)


def asked(ratio: float) -> Budget:
    return Budget(ratio=ratio, basis="block")


def compressed(model: PreTrainedModel, ratio: float, tmp_path: Path, method: MoDeGPT = EVEN) -> PreTrainedModel:
    return method.compress(model, None, asked(ratio), CALIBRATION, context(tmp_path))  # type: ignore[arg-type]


@torch.no_grad()
def naive_modegpt(name: str, ratio: float, joint: bool) -> PreTrainedModel:
    """The dense model in which what MoDeGPT drops is zero, and what it projects is projected, in full width."""
    model, dense = tiny_model(name), tiny_model(name)
    shape, budget = dense_shape(name), asked(ratio)
    h, readers = shape.head_dim, shape.heads // shape.kv_heads
    kept = widths(shape, budget, [mean_sparsity(shape, budget)] * 4)
    for index, layer in enumerate(modeling.Decoder(model).layers):
        seen, (qk, vo, mlp) = Seen(dense, index), kept[index]
        Z, down = seen["to down"].flatten(0, -2), layer.mlp_output.weight
        C = Z.T @ Z / len(Z)
        lam = 1e-3 * C.diagonal().mean()
        leverage = (C @ torch.linalg.inv(C + lam * torch.eye(len(C)))).diagonal().tolist()
        J = sorted(sorted(range(len(C)), key=lambda i: -leverage[i])[:mlp])
        solved = torch.linalg.lstsq(Z[:, J], Z @ down.T, driver="gelsd").solution.T
        down.zero_()
        down[:, J] = solved
        query, key, value = layer.attention_inputs
        q, k = seen["q"].view(-1, shape.heads, h), seen["k"].view(-1, shape.kv_heads, h)
        X, output = seen["to v"].flatten(0, -2), layer.attention_output
        S = root(X.T @ X / len(X) + 1e-5 * X.square().mean() * torch.eye(X.shape[1]))
        if value.bias is not None and vo < h:
            bias = value.bias.view(-1, h).repeat_interleave(readers, 0).flatten()
            output.bias = torch.nn.Parameter(output.weight @ bias + (0 if output.bias is None else output.bias))
            value.bias.zero_()
        for j in range(shape.kv_heads):
            mine = range(j * readers, (j + 1) * readers)
            worth = [[q[:, i, d].square().mean() * k[:, j, d].square().mean() for d in range(h)] for i in mine]
            score = {group: sum(row[d].item() for row in worth for d in group) for group in shape.rope_groups}
            if qk < h:
                left = [d for group in sorted(score, key=lambda group: -score[group]) for d in group][:qk]
                for linear, heads in ((query, mine), (key, [j])):
                    for i in heads:
                        for d in set(range(h)) - set(left):
                            linear.weight[i * h + d] = 0
                            if linear.bias is not None:
                                linear.bias[i * h + d] = 0
            if vo < h:
                rows = value.weight[j * h : (j + 1) * h]
                blocks = [output.weight[:, i * h : (i + 1) * h] for i in mine]
                M = torch.cat([block.T for block in blocks], 1) if joint else torch.eye(h, dtype=rows.dtype)
                U = torch.linalg.svd(S @ rows.T @ M, full_matrices=False)[0][:, :vo]
                product = [torch.linalg.inv(S) @ U @ U.T @ S @ rows.T @ block.T for block in blocks]
                # rank vo in values of full width: Wv P with P = pinv(Wv) S^-1 U U^T S Wv
                P = torch.linalg.pinv(rows.T) @ torch.linalg.inv(S) @ U @ U.T @ S @ rows.T
                for block, expected in zip(blocks, product, strict=True):
                    torch.testing.assert_close(rows.T @ P @ block.T, expected, rtol=1e-6, atol=1e-8)
                    block.copy_((P @ block.T).T)
    return model


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "phi" and "tied" not in name])
def test_the_method_equals_the_naive_one(name: str, joint: bool, tmp_path: Path) -> None:
    """Head mapping, rotary pairs per key head, biases, scale: all in one comparison of logits."""
    method = MoDeGPT(epsilon=math.inf, vo="joint" if joint else "value", solve_ridge=1e-13)
    small = compressed(tiny_model(name), 0.6, tmp_path, method)
    expected = logits(naive_modegpt(name, 0.6, joint))
    torch.testing.assert_close(logits(small), expected, rtol=1e-5, atol=1e-6)
    assert (logits(tiny_model(name)) - expected).abs().max() > 1e-2


@torch.no_grad()
def plant(model: PreTrainedModel) -> PreTrainedModel:
    """Half of everything carries nothing: pairs differ from key head to key head, values mix what is left."""
    shape = modeling.Decoder(model).shape
    h, groups = shape.head_dim, shape.rope_groups
    readers = shape.heads // shape.kv_heads
    generator = torch.Generator().manual_seed(1)
    for layer in modeling.Decoder(model).layers:
        query, key, value = layer.attention_inputs
        for j in range(shape.kv_heads):
            order = torch.randperm(len(groups), generator=generator).tolist()
            pairs, singles = ([g for g in order if len(groups[g]) == size] for size in (2, 1))
            empty = pairs[: len(pairs) // 2] + singles[: len(singles) // 2]
            dims = [] if shape.qk_norm else [d for g in empty for d in groups[g]]
            for linear, heads in ((query, range(j * readers, (j + 1) * readers)), (key, [j])):
                for row in (i * h + d for i in heads for d in dims):
                    linear.weight[row] = 0
                    if linear.bias is not None:
                        linear.bias[row] = 0
            rows = value.weight[j * h : (j + 1) * h]
            mixing = torch.randn(h, h // 2, dtype=rows.dtype, generator=generator)
            rows.copy_(mixing @ rows[: h // 2])
        for linear in layer.mlp_inputs[:1]:  # act(0) is 0 for each of the activations
            silent = torch.randperm(shape.mlp_width, generator=generator)[: shape.mlp_width // 2]
            linear.weight[silent] = 0
            if linear.bias is not None:
                linear.bias[silent] = 0
    return model


@pytest.mark.parametrize("vo", ["joint", "value"])
@pytest.mark.parametrize("name", CONFIGS)
def test_removing_what_carries_nothing_is_lossless(name: str, vo: Any, tmp_path: Path) -> None:
    """Which the compressed width in the softmax scale would break."""
    model = plant(tiny_model(name))
    expected = logits(model)
    shape = dense_shape(name)
    ratio = 1 - 0.42 * 4 * removable(shape) / shape.block
    small = compressed(model, ratio, tmp_path, MoDeGPT(epsilon=math.inf, vo=vo))
    for sizes in small.config.compression["structures"]["narrow_attention"]["layers"]:
        assert sizes["vo"] < shape.head_dim and (shape.qk_norm or sizes["qk"] < shape.head_dim)
    torch.testing.assert_close(logits(small), expected, rtol=1e-5, atol=1e-6)


# Contracts


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_checkpoints_come_back_bitwise_and_generate(name: str, tmp_path: Path) -> None:
    small = [compressed(tiny_model(name, dtype=torch.float32), 0.6, tmp_path, MoDeGPT()) for _ in range(2)]
    assert list(tmp_path.iterdir()) == []  # the statistics are gone
    small[0].save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits(loaded).equal(logits(small[0])) and logits(small[1]).equal(logits(small[0]))
    assert_cache_changes_nothing(loaded)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=4, deadline=None)
@given(ratio=st.floats(0.5, 0.999), basis=st.sampled_from(["total", "block"]))
def test_prediction_equals_the_count_of_the_tensors(
    name: str, ratio: float, basis: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape, budget = dense_shape(name), Budget(ratio=ratio, basis=basis, tolerance=0.05)
    if mean_sparsity(shape, budget) > 0.8:
        return
    for method in (EVEN, MoDeGPT(epsilon=0.05)):
        predicted = method.predict(shape, budget)
        model, place = tiny_model(name, dtype=torch.float32), context(tmp_path_factory.mktemp("scratch"))
        counted = footprint(method.compress(model, None, budget, CALIBRATION, place))  # type: ignore[arg-type]
        off = abs(predicted.active_total - counted.active_total) / budget.dense(shape)
        assert off == 0 if method is EVEN else off <= predicted.grid_step
        assert counted.active_block - counted.active_total == shape.block - shape.total


def test_ratio_one_is_the_model_itself_and_llama_2_7b_is_met(tmp_path: Path) -> None:
    model = tiny_model("phi")
    assert compressed(model, 1, tmp_path) is model
    shape = DecoderShape.from_config(LLAMA_2_7B)
    for ratio in (0.7, 0.5):
        total = MoDeGPT().predict(shape, Budget(ratio=ratio)).active_total
        assert abs(total - ratio * shape.total) <= 3 * 4096 / 2


@given(ratio=st.floats(0.01, 0.999), basis=st.sampled_from(["total", "block"]))
def test_a_ratio_is_met_or_refused_with_one_that_works(ratio: float, basis: Any) -> None:
    shape = DecoderShape.from_config(LLAMA_2_7B)
    try:
        MoDeGPT().predict(shape, Budget(ratio=ratio, basis=basis, tolerance=1e-6))
    except UserError as error:
        assert f"ratio {ratio:g} is not reachable for modegpt" in str(error)
        hint = float(str(error).partition("--ratios ")[2].partition(",")[0])
        MoDeGPT().predict(shape, Budget(ratio=hint, basis=basis))


def test_one_pass_serves_several_ratios(tmp_path: Path) -> None:
    statistics = gather(tiny_model("qwen2"), CALIBRATION, context(tmp_path), tmp_path)
    torch.testing.assert_close(
        torch.tensor(statistics.influence),
        torch.tensor(block_influence(modeling.Decoder(tiny_model("qwen2")), CALIBRATION.batches(5))),
    )
    for ratio in (0.8, 0.6):
        swept = MoDeGPT().decompose(tiny_model("qwen2"), asked(ratio), statistics, context(tmp_path))
        alone = compressed(tiny_model("qwen2"), ratio, tmp_path / "alone", MoDeGPT())
        assert logits(swept).equal(logits(alone))


def test_sums_in_fp32_are_near_and_the_report_says_what_was_done(tmp_path: Path) -> None:
    exact = compressed(tiny_model("llama-gqa"), 0.7, tmp_path)
    method = MoDeGPT(epsilon=math.inf, precision="float32")
    place = context(tmp_path, artifacts=tmp_path)
    single = method.compress(tiny_model("llama-gqa"), None, asked(0.7), CALIBRATION, place)  # type: ignore[arg-type]
    torch.testing.assert_close(logits(single), logits(exact), rtol=0, atol=1e-2)
    report = json.loads((tmp_path / "modegpt.json").read_text())
    assert report["settings"]["precision"] == "float32" and len(report["blocks"]) == 4
    record = single.config.compression["structures"]["narrow_mlp"]["layers"]
    assert [block["mlp"] for block in report["blocks"]] == record
    assert all(0 < block["solve_damping"] < block["leverage_damping"] for block in report["blocks"])


def test_less_influential_blocks_lose_more(tmp_path: Path) -> None:
    place = context(tmp_path, artifacts=tmp_path)
    MoDeGPT(epsilon=0.05).compress(tiny_model("llama-mha"), None, asked(0.6), CALIBRATION, place)  # type: ignore[arg-type]
    blocks = json.loads((tmp_path / "modegpt.json").read_text())["blocks"]
    order = sorted(blocks, key=lambda block: block["influence"])
    for key in ("mlp", "qk", "vo"):
        assert [block[key] for block in order] == sorted(block[key] for block in order)
    assert order[0]["mlp"] < order[-1]["mlp"]


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "opt"])
def test_the_error_of_every_block_grows_as_the_model_shrinks(name: str, tmp_path: Path) -> None:
    """Of each block on what enters it in the dense model; over blocks errors may cancel, or grow by far."""
    errors = []
    for ratio in (0.9, 0.75, 0.6, 0.45):
        small, dense = compressed(tiny_model(name), ratio, tmp_path), modeling.Decoder(tiny_model(name))
        signals, row = modeling.Signals.of(dense, CALIBRATION, 12), []
        for mine, its in zip(modeling.Decoder(small).layers, dense.layers, strict=True):
            (x,), (keywords,) = signals.batches, signals.keywords
            with torch.no_grad():
                ours, signals.batches[0] = mine.module(x, **keywords), its.module(x, **keywords)
            row.append((ours - signals.batches[0]).square().mean().item())
        errors.append(row)
    for lighter, heavier in pairwise(errors):
        assert all(0 < little < much for little, much in zip(lighter, heavier, strict=True))


def test_no_text_is_an_error_and_too_little_is_told(tmp_path: Path) -> None:
    def run(samples: int) -> list[str]:
        given = context(tmp_path)
        few = RandomCalibration(samples=samples)
        small = EVEN.compress(tiny_model("llama-gqa"), None, asked(0.7), few, given)  # type: ignore[arg-type]
        assert logits(small).isfinite().all()
        return given.notes

    with pytest.raises(UserError, match="there is nothing to measure"):
        run(0)
    assert run(3) == []
    (note,) = run(2)
    assert note.startswith("32 calibration tokens for MLPs of 48 channels")


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3", "phi", "opt"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_singular_covariances_without_ridges_give_numbers_or_an_error(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    class Constant(RandomCalibration):
        def batches(self, size: int) -> Iterator[Batch]:
            for batch in super().batches(size):
                yield Batch(torch.full_like(batch.input_ids, 7), None)

    method = MoDeGPT(epsilon=math.inf, vo="value", value_ridge=0, solve_ridge=0)
    model = tiny_model(name, dtype=dtype)
    small = method.compress(model, None, asked(0.7), Constant(), context(tmp_path))  # type: ignore[arg-type]
    assert logits(small).isfinite().all()


def test_weights_that_the_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa", dtype=torch.float16)
    for layer in modeling.Decoder(model).layers:
        layer.attention_norm.get_parameter("weight").data *= 1e-4
        layer.attention_inputs[2].weight.data *= 1e-4
    with pytest.raises(UserError, match=r"does not fit torch.float16.*--dtype bfloat16"):
        compressed(model, 0.7, tmp_path)


def test_an_overflow_is_an_error_and_nothing_to_see_is_none(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa")
    modeling.Decoder(model).layers[1].mlp_inputs[0].weight.data[0] = float("nan")
    with pytest.raises(UserError, match="overflows on the calibration text"):
        compressed(model, 0.7, tmp_path)
    silent = tiny_model("opt")
    with torch.no_grad():
        for linear in (*(layer := modeling.Decoder(silent).layers[0]).mlp_inputs, *layer.attention_inputs):
            linear.weight.zero_()
            linear.bias.fill_(-1)  # no neuron fires; queries, keys and values do not depend on the token
    expected = logits(silent)
    assert expected.isfinite().all() and logits(compressed(silent, 0.7, tmp_path)).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": "0"}, "must be above 0"),
        ({"max_sparsity": "1"}, "between 0 and 1"),
        ({"leverage_ridge": "0"}, "the first above 0"),
        ({"value_ridge": "-1"}, "between 0 and 1"),
        ({"solve_ridge": "nan"}, "between 0 and 1"),
        ({"vo": "both"}, "joint, value"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        methods.configure("modegpt", settings)
    assert methods.configure("modegpt", {"epsilon": "inf"}) == EVEN
