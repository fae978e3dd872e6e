"""Learned against random routing: nothing to gain among equal experts, much where experts differ."""

import pytest
import torch

from benchmarks.routing import compare
from methods import modeling
from methods.errors import UserError
from methods.modeling import Decoder
from tests.methods.tiny import some_ids, tiny_model


def with_experts(experts: torch.Tensor):
    model = tiny_model("llama-gqa", dtype=torch.float32)
    for layer in Decoder(model).layers:
        modeling.convert_mlp(layer, torch.randn(len(experts), 32, generator=torch.Generator().manual_seed(0)), experts)
    return modeling.rebuild(model, {"moe_mlp": modeling.expert_record(model)})


def test_equal_experts_make_no_difference() -> None:
    made = compare(with_experts(torch.arange(20).expand(4, 20)), some_ids(6, 30))
    assert made.learned == pytest.approx(made.random, abs=1e-5)


def test_different_experts_make_one_and_the_model_is_left_as_it_was() -> None:
    model = with_experts(torch.stack([torch.arange(12), torch.arange(12, 24), torch.arange(24, 36)]))
    first, again = compare(model, some_ids(6, 30)), compare(model, some_ids(6, 30))
    assert first == again and abs(first.learned - first.random) > 1e-4 and first.difference_stderr > 0


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(UserError, match="no experts"):
        compare(tiny_model("llama-gqa", dtype=torch.float32), some_ids(2, 8))
