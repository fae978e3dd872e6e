"""The contracts of every method that cuts MLPs into experts, on every family."""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import methods
from methods import modeling
from methods.allocation import channel_size
from methods.base import Budget, Context
from methods.errors import UserError
from methods.modeling.footprint import footprint
from methods.modeling.record import structures_of
from methods.modeling.structures.moe_mlp import MoEMLP, mixtures
from tests.methods.tiny import (
    CONFIGS,
    ONE_PER_FAMILY,
    RandomCalibration,
    assert_cache_changes_nothing,
    logits,
    tiny_model,
)

CASES: dict[str, dict[str, str]] = {
    "moefication": {"epochs": "3"},
    "moefication similarity": {"router": "similarity"},
    "moefication coactivation": {"split": "coactivation", "epochs": "3"},
    "moefication ground-truth": {"router": "ground-truth", "split": "coactivation"},
    "g-moefication": {"epochs": "3"},
    "g-moefication similarity": {"router": "similarity", "split": "coactivation"},
    "g-moefication ground-truth": {"router": "ground-truth"},
    "llama-moe": {},
    "llama-moe clustering": {"split": "clustering", "router": "linear"},
    "llama-moe gradient": {"split": "gradient"},
    "llama-moe sharing": {"split": "sharing"},
    "llama-moe-v2": {},
    "llama-moe-v2 vanilla": {"mode": "vanilla"},
    "cmoe": {},
    "cmoe as in the paper": {"profile": "plain", "distance": "l2", "iterations": "5"},
}
EVERYTHING = {
    "moefication": "A7E7",
    "g-moefication": "A7E7",
    "llama-moe clustering": "A5E5",
    "llama-moe-v2": "S2A1E3",
    "cmoe": "S2A3E5",
}
"""Structures in which a token gets all there is."""
CALIBRATION = RandomCalibration(samples=24, padded=3)
RANKED = {"split": "parameters", "router": "mlp", "epochs": 30, "learning_rate": 0.01, "batch": 512}
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "moefication": (96, {**RANKED, "expert_neurons": 32}),
    "g-moefication": (64, RANKED),
    "llama-moe": (16, {"split": "random", "router": "mlp", "scale": None}),
    "llama-moe-v2": (8, {"mode": "residual", "dense_ends": 1, "jitter": 0.4, "samples": 1024}),
    "cmoe": (8, {"top": 10, "tokens": 8 * 2048, "profile": "normalised", "distance": "l1", "iterations": 1}),
}
"""Parts of an MLP of 3,072 neurons, and settings, of papers and released code."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_are_the_published_ones(name: str) -> None:
    experts, settings = PUBLISHED[name]
    method: Any = methods.configure(name, {})
    assert asdict(method).items() >= settings.items()
    assert method.default_experts(replace(modeling.Decoder(tiny_model("opt")).shape, mlp_width=3072)) == experts


def compressed(
    case: str, model: PreTrainedModel, tmp_path: Path, ratio: float = 0.8, seed: int = 0, **changes: str
) -> PreTrainedModel:
    method = methods.configure(case.split()[0], {**CASES[case], **changes})
    budget, context = Budget(ratio=ratio, basis="block", tolerance=1), Context(scratch=tmp_path, seed=seed)
    return method.compress(model, None, budget, CALIBRATION, context)  # type: ignore[arg-type]


def found(model: PreTrainedModel) -> list[MoEMLP]:
    return [moe for moe in mixtures(model) if moe is not None]


@pytest.mark.parametrize("case", [case for case in CASES if case != "llama-moe sharing"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_size_is_the_predicted_one_and_no_neuron_is_lost(case: str, name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    method = methods.configure(case.split()[0], CASES[case])
    shape, budget = modeling.Decoder(model).shape, Budget(ratio=0.8, basis="block", tolerance=1)
    predicted = method.predict(shape, budget)
    small = compressed(case, model, tmp_path)
    counted = footprint(small)
    assert predicted is not None
    assert (counted.active_total, counted.active_block) == (predicted.active_total, predicted.active_block)
    for moe in found(small):
        parts = [*moe.sets] if moe.shared is None else [moe.shared, *moe.sets]
        assert torch.cat(parts).tolist() == list(range(shape.mlp_width))
        assert moe.neurons.sort().values.tolist() == list(range(shape.mlp_width))


@pytest.mark.parametrize("structure", ["auto", "A2E4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_of_experts_that_overlap_no_size_is_predicted(name: str, structure: str, tmp_path: Path) -> None:
    """A token uses what they have together, or as many neurons as its own experts; either is less than asked for."""
    method = methods.configure("llama-moe", {"split": "sharing", "experts": structure})
    model, budget = tiny_model(name), Budget(ratio=0.8, basis="block", tolerance=1)
    shape, context = modeling.Decoder(model).shape, Context(scratch=tmp_path)
    assert method.predict(shape, budget) is None
    small = method.compress(model, None, budget, CALIBRATION, context)  # type: ignore[arg-type]
    size, moes = shape.block, found(small)
    for moe in moes:
        own = [len(numbers) for numbers in moe.sets]
        used = min(len({*torch.cat(moe.sets).tolist()}), sum(sorted(own)[-moe.layout.active :]))
        size -= (shape.mlp_width - used) * channel_size(shape)
        size += sum(parameter.numel() for parameter in moe.router.parameters())
    counted = footprint(small).active_block
    assert counted == size and not Budget(ratio=0.8, basis="block").accepts(counted / shape.block)
    told = re.fullmatch(r"experts overlap: .* at most (.*)% of the MLP neurons, not (.*)% as asked", context.notes[-1])
    assert told and float(told[1]) < float(told[2])
    assert structure == "auto" or (told[2] == "50.0" and {moe.layout.active for moe in moes} == {2})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_saving_loading_and_generating(case: str, name: str, tmp_path: Path) -> None:
    small = compressed(case, tiny_model(name, dtype=torch.float32), tmp_path)
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits(loaded).equal(logits(small))
    assert_cache_changes_nothing(loaded)
    assert json.loads((tmp_path / "config.json").read_text())["compression"]["structures"].keys() == {"moe_mlp"}


@pytest.mark.parametrize("case", EVERYTHING)
@pytest.mark.parametrize("name", CONFIGS)
def test_with_all_experts_the_model_is_the_dense_one(case: str, name: str, tmp_path: Path) -> None:
    """Whatever the router says; 48 and 64 neurons do not divide by 5 or 7."""
    scale = {"scale": "5"} if case == "llama-moe clustering" else {}  # of a gate of zeros: weights of 5 / 5
    small = compressed(case, tiny_model(name), tmp_path, experts=EVERYTHING[case], **scale)
    torch.testing.assert_close(logits(small), logits(tiny_model(name)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_same_seed_gives_the_same_model(case: str, tmp_path: Path) -> None:
    one, again = (compressed(case, tiny_model("qwen2"), tmp_path).state_dict() for _ in range(2))
    assert all(one[key].equal(again[key]) for key in one)
    if case == "llama-moe":
        other = compressed(case, tiny_model("qwen2"), tmp_path, seed=1).state_dict()
        assert not all(one[key].equal(other[key]) for key in one)


@pytest.mark.parametrize("case", CASES)
def test_ratio_one_leaves_the_model_alone(case: str, tmp_path: Path) -> None:
    model = tiny_model("phi")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert compressed(case, model, tmp_path, ratio=1) is model
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    method = methods.configure(case.split()[0], CASES[case])
    predicted = method.predict(modeling.Decoder(model).shape, Budget(ratio=1))
    assert predicted is not None and predicted.active_total == footprint(model).active_total


@pytest.mark.parametrize("case", CASES)
def test_padding_does_not_count(case: str, tmp_path: Path) -> None:
    """Windows with padding behind them are windows without it."""
    if "gradient" in case or "sharing" in case:
        pytest.skip("windows are grouped by their own tokens: see test_windows")
    bare = RandomCalibration(samples=24, window=13)

    class Padded(RandomCalibration):
        def batches(self, size: int) -> Any:
            for batch in bare.batches(size):
                ids = torch.cat([batch.input_ids, torch.full((len(batch.input_ids), 3), 5)], 1)
                mask = torch.ones_like(ids, dtype=torch.bool)
                mask[:, 13:] = False
                yield batch._replace(input_ids=ids, mask=mask)

    method = methods.configure(case.split()[0], CASES[case])
    budget, context = Budget(ratio=0.8, basis="block", tolerance=1), Context(scratch=tmp_path)
    one, other = (
        method.compress(tiny_model("qwen2"), None, budget, text, context)  # type: ignore[arg-type]
        for text in (bare, Padded())
    )
    for moe, same in zip(found(one), found(other), strict=True):
        assert moe.neurons.equal(same.neurons)
    torch.testing.assert_close(logits(one), logits(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-tied", "phi"])
def test_a_delta_holds_routers_and_tables_only(name: str, tmp_path: Path) -> None:
    """Neurons have moved, and are found."""
    small = compressed("cmoe", tiny_model(name, dtype=torch.float32), tmp_path)
    modeling.save_delta(small, tiny_model(name, dtype=torch.float32), tmp_path / "delta")
    loaded = modeling.load_delta(tmp_path / "delta", tiny_model(name, dtype=torch.float32))
    assert logits(loaded).equal(logits(small))
    stored = json.loads((tmp_path / "delta" / "delta.json").read_text())["tensors"]
    kinds = ("router", "gate.", "neurons", "index", "shared", "fc1.bias")
    assert {key for key, recipe in stored.items() if "stored" in recipe} == {
        key for key in stored if ".layers." in key and any(kind in key for kind in kinds) and "proj.weight" not in key
    }


@pytest.mark.parametrize("case", CASES)
def test_half_precision_works(case: str, tmp_path: Path) -> None:
    small = compressed(case, tiny_model("llama-gqa", dtype=torch.bfloat16), tmp_path)
    dtypes = {name: parameter.dtype for name, parameter in small.named_parameters()}
    assert all(dtypes[name] == (torch.float32 if name.endswith("gate.scale") else torch.bfloat16) for name in dtypes)
    assert logits(small).isfinite().all()


WITHOUT_TEXT = ("llama-moe", "llama-moe clustering", "llama-moe-v2 vanilla", "moefication similarity")


@pytest.mark.parametrize("case", [case for case in CASES if case not in WITHOUT_TEXT])
def test_an_empty_text_is_refused(case: str, tmp_path: Path) -> None:
    method = methods.configure(case.split()[0], CASES[case])
    with pytest.raises(UserError, match="calibration text is empty"):
        method.compress(
            tiny_model("opt"),
            None,  # type: ignore[arg-type]
            Budget(ratio=0.8, basis="block", tolerance=1),
            RandomCalibration(samples=0),
            Context(scratch=tmp_path),
        )


BY_WINDOWS = ("llama-moe gradient", "llama-moe sharing")
BY_TOKENS = [case for case in CASES if case not in WITHOUT_TEXT and case not in BY_WINDOWS]


def experts_of_tokens(case: str, tokens: int, tmp_path: Path, *, experts: int, text: RandomCalibration) -> None:
    """Make so many experts, none of them shared, after so many tokens."""
    structure = f"{'S0' * ('cmoe' in case)}A1E{experts}"
    method = methods.configure(case.split()[0], {**CASES[case], "experts": structure, "tokens": str(tokens)})
    budget, context = Budget(ratio=0.8, basis="block", tolerance=1), Context(scratch=tmp_path)
    method.compress(tiny_model("llama-gqa"), None, budget, text, context)  # type: ignore[arg-type]


def enough_for(case: str, experts: int) -> int:
    """The fewest tokens: one per expert, of v2 one per expert after 40 %."""
    return math.ceil(experts / 0.6) if case == "llama-moe-v2" else experts


@pytest.mark.parametrize("case", BY_TOKENS)
@pytest.mark.parametrize("experts", [2, 3, 6])
def test_as_many_tokens_as_experts_are_needed(case: str, experts: int, tmp_path: Path) -> None:
    """What is refused can be mended by what the message says."""
    least = enough_for(case, experts)
    experts_of_tokens(case, least, tmp_path, experts=experts, text=CALIBRATION)
    for tokens in {1, least - 1}:
        told = rf"cannot tell {experts} experts apart by {tokens} tokens?\b.*Use --set {case.split()[0]}.tokens=16384"
        with pytest.raises(UserError, match=told) as refused:
            experts_of_tokens(case, tokens, tmp_path, experts=experts, text=CALIBRATION)
        fewer = re.search(r"fewer experts: --set \S+experts=E(\d+)$", str(refused.value))
        if fewer:
            assert 1 < int(fewer[1]) < experts
            experts_of_tokens(case, tokens, tmp_path, experts=int(fewer[1]), text=CALIBRATION)
        else:
            assert tokens < enough_for(case, 2)


@pytest.mark.parametrize("case", BY_TOKENS)
def test_a_text_shorter_than_there_are_experts_is_refused(case: str, tmp_path: Path) -> None:
    text = RandomCalibration(samples=1, window=4)
    with pytest.raises(UserError, match="cannot tell 7 experts apart by 4 tokens.*such as --calibration NAME:16x512"):
        experts_of_tokens(case, 16384, tmp_path, experts=7, text=text)


@pytest.mark.parametrize("case", ["moefication", "g-moefication"])
def test_one_token_trains_no_router(case: str, tmp_path: Path) -> None:
    """It would be learned from and judged by; not even for one expert."""
    with pytest.raises(UserError, match="by 1 token "):
        experts_of_tokens(case, 1, tmp_path, experts=1, text=CALIBRATION)
    experts_of_tokens(case, 2, tmp_path, experts=1, text=CALIBRATION)


def louder(factor: float) -> PreTrainedModel:
    """A model whose last block has large gates and ups: h is `factor` squared as large as it was."""
    model = tiny_model("llama-gqa", dtype=torch.float32)
    with torch.no_grad():
        for linear in modeling.Decoder(model).layers[-1].mlp_inputs:
            linear.weight.mul_(factor)
    return model


@pytest.mark.parametrize("case", BY_TOKENS)
def test_an_overflow_in_the_last_block_is_refused(case: str, tmp_path: Path) -> None:
    """What its MLP reads is finite, and nothing comes behind it."""
    with pytest.raises(UserError, match="overflows on the calibration text"):
        compressed(case, louder(1e20), tmp_path)


def test_an_overflow_of_squares_is_refused(tmp_path: Path) -> None:
    """Where h is finite; what sums up |h| needs none."""
    with pytest.raises(UserError, match="overflows on the calibration text"):
        compressed("g-moefication", louder(1e10), tmp_path)
    assert all(p.isfinite().all() for p in compressed("moefication", louder(1e10), tmp_path).parameters())


@pytest.mark.parametrize("case", WITHOUT_TEXT)
def test_where_nobody_looks_at_text_none_is_needed(case: str, tmp_path: Path) -> None:
    method = methods.configure(case.split()[0], CASES[case])
    budget, text = Budget(ratio=0.8, basis="block", tolerance=1), RandomCalibration(samples=0)
    small = method.compress(tiny_model("opt"), None, budget, text, Context(scratch=tmp_path))  # type: ignore[arg-type]
    assert logits(small).isfinite().all()


def test_what_is_not_as_published_is_told(tmp_path: Path) -> None:
    context = Context(scratch=tmp_path)
    method, budget = methods.configure("cmoe", {}), Budget(ratio=0.8, basis="block", tolerance=1)
    method.compress(tiny_model("qwen2"), None, budget, CALIBRATION, context)  # type: ignore[arg-type]
    assert context.notes == ["MLPs were cut into 6 parts (usual: 8) for their width and the ratio"]


def test_ends_stay_dense_where_they_do(tmp_path: Path) -> None:
    small = compressed("llama-moe-v2", tiny_model("phi"), tmp_path)
    record = structures_of(small.config)["moe_mlp"]["layers"]
    assert [layer is None for layer in record] == [True, False, False, True]
    assert all(layer["gate"] == "softmax" and layer.get("scale", 1) == 1 for layer in record[1:3])
