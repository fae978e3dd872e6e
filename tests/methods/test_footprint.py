"""Counts of parameters: distinct ones from the tensors, active ones against what a token's pass really touches."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from methods import modeling
from methods.modeling.footprint import PartlyIdle, active, count, footprint
from methods.modeling.structures.moe_mlp import mixtures
from tests.methods.test_moe_mlp import EXPERTS, WIDTH, converted, make
from tests.methods.tiny import CONFIGS, ONE_PER_FAMILY, tiny_model


@pytest.mark.parametrize("name", CONFIGS)
def test_everything_in_a_dense_model_is_active(name: str) -> None:
    model = tiny_model(name)
    found, total = footprint(model), sum(parameter.numel() for parameter in model.parameters())
    assert found.active_total == found.distinct_total == found.stored_total == total
    assert found.active_block == sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-biases", "phi"])
def test_a_mixture_uses_what_gets_a_gradient_from_one_token(name: str) -> None:
    moe, _ = make(name, dtype=torch.float64)
    moe(torch.randn(1, 32, dtype=torch.float64)).sum().backward()
    touched = sum(int(p.grad.count_nonzero()) for p in moe.parameters() if p.grad is not None)
    assert moe.router.weight.grad is None
    assert active(moe) == touched + moe.router.weight.numel()
    assert active(moe) < count(moe)


@pytest.mark.parametrize("name", CONFIGS)
def test_active_parameters_of_a_model_with_mixtures(name: str) -> None:
    """Of every projection the rows (or columns) of one expert's neurons, and everything else whole."""
    model = converted(name)
    found, blocks, outside = footprint(model), 0, 0
    unions = {i: len(moe.neurons) for i, moe in enumerate(mixtures(model)) if moe}
    assert 32 not in unions.values()  # the hidden size
    for parameter_name, parameter in model.named_parameters():
        if ".layers." not in parameter_name:
            outside += parameter.numel()
            continue
        union = unions.get(int(parameter_name.split(".layers.")[1].split(".")[0]))
        kept = [WIDTH if size == union and _of_mlp(parameter_name) else size for size in parameter.shape]
        blocks += int(torch.tensor(kept).prod())
    assert (found.active_block, found.active_total) == (blocks, blocks + outside)
    assert found.distinct_total == found.stored_total == sum(p.numel() for p in model.parameters())
    assert found.active_total < found.distinct_total


def _of_mlp(name: str) -> bool:
    return any(part in name for part in ("gate_proj", "up_proj", "down_proj", "fc1", "fc2"))


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_copies_are_not_counted_and_not_saved(name: str, tmp_path: Path) -> None:
    model = converted(name)
    before = footprint(model)
    modeling.set_experts(model, "materialised")
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert footprint(model) == before
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}
    tables = sum(tensor.numel() for tensor in stored.values() if tensor.dtype == torch.int32)
    assert sum(tensor.numel() for tensor in stored.values()) == before.stored_total + tables
    assert tables == sum(EXPERTS * WIDTH + len(moe.neurons) for moe in mixtures(model) if moe)


def test_any_module_may_say_what_is_idle() -> None:
    class Half(nn.Linear):
        def idle_parameters(self) -> int:
            return self.weight.numel() // 2

    half = Half(4, 6, bias=False)
    assert isinstance(half, PartlyIdle) and not isinstance(nn.Linear(4, 6), PartlyIdle)
    assert (active(nn.Sequential(half, nn.Linear(6, 1))), active(nn.ModuleList([half, half]))) == (12 + 7, 12)


def test_counts_on_the_meta_device() -> None:
    model = converted("qwen2")
    assert footprint(model.to("meta")) == footprint(converted("qwen2"))
