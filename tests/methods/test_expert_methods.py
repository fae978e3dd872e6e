"""The contracts of every method that cuts MLPs into experts, on every family."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import methods
from methods import modeling
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


def compressed(
    case: str, model: PreTrainedModel, tmp_path: Path, ratio: float = 0.8, seed: int = 0, **changes: str
) -> PreTrainedModel:
    method = methods.configure(case.split()[0], {**CASES[case], **changes})
    budget, context = Budget(ratio=ratio, basis="block", tolerance=1), Context(scratch=tmp_path, seed=seed)
    return method.compress(model, None, budget, CALIBRATION, context)  # type: ignore[arg-type]


def found(model: PreTrainedModel) -> list[MoEMLP]:
    return [moe for moe in mixtures(model) if moe is not None]


@pytest.mark.parametrize("case", CASES)
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
    if "gradient" in case:
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
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16} and logits(small).isfinite().all()


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
