"""Adapters on models of every structure: where they are, what they add, and that merging them changes nothing."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import methods
from methods import modeling
from methods.base import Budget, Context
from methods.errors import UserError
from methods.modeling.decoder import Decoder
from methods.modeling.footprint import footprint
from methods.modeling.structures import topk_products
from methods.recovery import Recovery, adapters
from tests.methods.recovery.made_of import STRUCTURES, needs_peft, noisy
from tests.methods.tiny import ONE_PER_FAMILY, RandomCalibration, assert_cache_changes_nothing, logits, tiny_model

pytestmark = needs_peft
CASES = [(structure, name) for structure in STRUCTURES for name in ("llama-gqa", "qwen2", "phi", "opt")]
SETTINGS = Recovery(rank=3, alpha=5.0, dropout=0.5)


@pytest.fixture(autouse=True)
def rows_are_read_in_small_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_products, "SMALLEST", 1)


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    """The model with adapters that do something, without dropout."""
    torch.manual_seed(0)
    for parameter in adapters.attach(model, SETTINGS).values():
        parameter.data.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("structure, name", CASES)
def test_merged_equals_unmerged(structure: str, name: str, tmp_path: Path) -> None:
    model = STRUCTURES[structure](name, tmp_path)
    plain, names, size = logits(model), list(model.state_dict()), footprint(model)
    model = adapted(model)
    apart = logits(model)
    assert not torch.allclose(apart, plain, atol=0.1)
    assert_cache_changes_nothing(model)
    with torch.enable_grad():
        torch.testing.assert_close(model(input_ids=torch.arange(12)[None]).logits, cached(model), **CLOSE)
    adapters.merge(model)
    torch.testing.assert_close(logits(model), apart, **CLOSE)
    assert_cache_changes_nothing(model)
    assert list(model.state_dict()) == names and footprint(model) == size
    assert not any("lora" in type(part).__module__ for part in model.modules()) and not hasattr(model, "peft_config")
    model.save_pretrained(tmp_path / "saved")
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")).equal(logits(model))


CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@torch.no_grad()
def cached(model: PreTrainedModel) -> torch.Tensor:
    """Logits of tokens that come one by one, which has ways of its own (`topk_products`, `moe_stores`)."""
    past, parts = None, []
    for token in torch.arange(12)[None].T:
        output = model(input_ids=token[:, None], past_key_values=past, use_cache=True)
        past, parts = output.past_key_values, [*parts, output.logits]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("structure, name", CASES)
def test_adapters_kept_apart(structure: str, name: str, tmp_path: Path) -> None:
    model = STRUCTURES[structure](name, tmp_path)
    before, size = copy.deepcopy(model.state_dict()), footprint(model)
    added = sum(3 * (p.in_features + p.out_features) for p in map(model.get_submodule, adapters.projections(model)))
    apart, with_them = logits(adapted(model)), footprint(model)
    counts = vars(with_them).items() - vars(size).items()
    assert counts == {(name, count + added) for name, count in vars(size).items()}
    adapters.save(model, tmp_path / "saved")
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    loaded.load_adapter(str(tmp_path / "saved" / adapters.FOLDER))
    torch.testing.assert_close(logits(loaded), apart, **CLOSE)
    assert footprint(loaded) == with_them


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_every_projection_has_one_and_nothing_else(name: str) -> None:
    model = tiny_model(name, dtype=torch.float32)
    family = Decoder(model).family
    parts = (family.query, family.key, family.value, family.output, family.gate, family.up, family.down)
    expected = {f"{family.layers}.{block}.{part}" for block in range(4) for part in parts if part}
    adapted(model)
    assert {name for name, part in model.named_modules() if hasattr(part, "lora_A")} == expected
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.partition(".lora_")[0] for name in trained} == expected and len(trained) == 2 * len(expected)


@pytest.mark.parametrize("name", ["llama-gqa", "phi"])
def test_what_chooses_has_none(name: str) -> None:
    model = noisy(name)
    choosing = ("router", "selector.project", "selector.score")
    blocks = [part for layer in Decoder(model).layers for part in layer.module.named_modules()]
    others = [name for name, part in blocks if isinstance(part, nn.Linear) and not name.endswith(choosing)]
    assert len(adapters.projections(model)) == len(others) == 4 * (6 if name == "phi" else 7)
    assert not any(name.endswith(choosing) for name in adapters.projections(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_by_hand(dtype: torch.dtype) -> None:
    """W + alpha / rank B A, rounded once."""
    model = tiny_model("llama-gqa", dtype=dtype)
    before = model.model.layers[1].mlp.down_proj.weight.clone()
    lora = adapted(model).model.layers[1].mlp.down_proj
    a, b = (part["default"].weight.detach() for part in (lora.lora_A, lora.lora_B))
    assert a.dtype == b.dtype == torch.float32 and a.shape == (3, 48)
    expected = (before.float() + 5 / 3 * b @ a).to(dtype)
    adapters.merge(model)
    torch.testing.assert_close(model.model.layers[1].mlp.down_proj.weight, expected, rtol=0, atol=1e-6)


def test_a_fresh_adapter_adds_nothing() -> None:
    model = tiny_model("qwen3", dtype=torch.float32)
    before = logits(model)
    adapters.attach(model, SETTINGS)
    assert logits(model).equal(before)


def test_expert_stores_are_made_anew_after_merging() -> None:
    model = STRUCTURES["experts_and_chosen_values"]("llama-gqa", Path())
    modeling.set_experts(model, "materialised", "sorted")
    logits(model)  # makes the stores
    apart = logits(adapted(model))
    adapters.merge(model)
    torch.testing.assert_close(logits(model), apart, **CLOSE)


def test_pruned_single_weights_are_refused(tmp_path: Path) -> None:
    budget, context = Budget(ratio=0.5, basis="block", tolerance=0.1), Context(scratch=tmp_path)
    model = methods.configure("magnitude", {}).compress(
        tiny_model("llama-gqa"),
        None,  # type: ignore[arg-type]
        budget,
        RandomCalibration(),
        context,
    )
    with pytest.raises(UserError, match="would fill the zeros"):
        adapters.attach(model, Recovery())
