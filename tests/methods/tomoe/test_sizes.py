"""What conversion counts: real tokens only, experts by each rule of width, multiples within the budget."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from methods.base import Batch, Budget
from methods.errors import UserError
from methods.modeling import Decoder
from methods.modeling.footprint import footprint
from methods.tomoe import ToMoE
from methods.tomoe.conversion import convert
from methods.tomoe.scores import Scores, drawn, measure
from methods.tomoe.sizes import neurons_on, sizes_at
from tests.methods.tiny import ONE_PER_FAMILY, logits, tiny_model
from tests.methods.tomoe.small import network
from tests.methods.tomoe.test_accounting import SHAPES
from tests.methods.training.small import SmallCalibration, context


@dataclass(frozen=True)
class Padded(SmallCalibration):
    """The same windows with some padding at one side."""

    side: Literal["left", "right"] = "right"

    def batches(self, size: int) -> Iterator[Batch]:
        for ids, _ in super().batches(size):
            parts = [ids, torch.full((len(ids), 5), 7)]
            real = [torch.ones_like(ids, dtype=torch.bool), torch.zeros(len(ids), 5, dtype=torch.bool)]
            if self.side == "left":
                parts, real = parts[::-1], real[::-1]
            yield Batch(torch.cat(parts, 1), torch.cat(real, 1))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_padding_has_no_say_in_how_many_values_stay(name: str, side: Any, tmp_path: Path) -> None:
    model = tiny_model(name)
    net, decoder = network(model), Decoder(model)
    expected = measure(net, decoder, SmallCalibration(), context(tmp_path))
    found = measure(net, decoder, Padded(side=side), context(tmp_path))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other.values_Th, one.values_Th, rtol=1e-4, atol=1e-5)  # rotary angles are fp32


def scores_of(experts_NM: Tensor) -> Scores:
    return Scores(experts_NM, experts_NM, None, torch.zeros(1, 8), 1)


def some_logits(experts: int = 3, neurons: int = 40) -> Tensor:
    return 2 * torch.randn(experts, neurons, generator=torch.Generator().manual_seed(0)) - 3


@pytest.mark.parametrize("t", [-1.0, 0.0, 2.5])
def test_without_noise_a_neuron_is_on_above_the_threshold(t: float) -> None:
    settings, scores = ToMoE(expert_width="threshold"), scores_of(some_logits())
    expected = [sum(float(a) - t + 3 > 0 for a in row) for row in some_logits()]
    assert neurons_on(settings, scores, t).tolist() == expected
    assert sizes_at(settings, [scores], t)[0].neurons == max(expected)


def test_widths_of_draws_are_the_expected_ones_on_average(tmp_path: Path) -> None:
    settings, expected = ToMoE(last_noise=1.0), scores_of(some_logits())
    sampled = replace(settings, expert_width="sampled")
    draws = [drawn([expected], 1.0, context(tmp_path, seed=seed))[0] for seed in range(400)]
    widths = torch.stack([neurons_on(sampled, draw, 0.5) for draw in draws]).double()
    # A count of 40 independent neurons has a variance of 10 at most: the mean of 400 is within 0.16 two times of three.
    torch.testing.assert_close(widths.mean(0), neurons_on(settings, expected, 0.5).double(), rtol=0, atol=0.6)
    assert widths.std(0).min() > 1
    assert draws[0].counted_NM.equal(drawn([expected], 1.0, context(tmp_path))[0].counted_NM)
    assert draws[0].experts_NM is expected.experts_NM  # the draw counts, and does not choose


@pytest.mark.parametrize("settings", [{}, {"expert_width": "threshold"}, {"expert_width": "sampled"}], ids=str)
@pytest.mark.parametrize("multiple", [1, 8])
def test_multiples_stay_within_the_budget(settings: dict[str, Any], multiple: int, tmp_path: Path) -> None:
    model = tiny_model("llama-gqa")
    dense, net = footprint(model).active_block, network(model, width_multiple=multiple, **settings)
    budget = Budget(ratio=0.8, basis="block")
    step = net.settings.predict(net.shape, budget).grid_step
    assert step == multiple * 3 * 32 / net.shape.block
    sparse = convert(net.settings, model, net, budget, SmallCalibration(), context(tmp_path))
    assert 0.8 - step < footprint(sparse).active_block / dense <= 0.8
    widths = [layer["width"] for layer in sparse.config.compression["structures"]["moe_mlp"]["layers"]]
    assert {width % multiple for width in widths} == {0} and len(set(widths)) > 1
    assert logits(sparse).isfinite().all()


def test_an_expert_is_never_wider_than_its_mlp() -> None:
    settings = ToMoE(width_multiple=32)
    assert sizes_at(settings, [scores_of(some_logits())], 40.0)[0].neurons == 32
    assert sizes_at(settings, [scores_of(some_logits())], -40.0)[0].neurons == 40


def test_a_multiple_too_large_for_the_ratio_is_refused_before_anything_runs() -> None:
    shape, third = SHAPES["phi-2"], Budget(ratio=0.3)
    assert ToMoE(width_multiple=256).predict(shape, third)
    with pytest.raises(UserError, match=r"too few for an expert.*the least is 0.28. Use --ratios 0.\d+ or more") as e:
        ToMoE(width_multiple=4000).predict(shape, third)
    named = float(str(e.value).rpartition("--ratios ")[2].split()[0])
    assert ToMoE(width_multiple=4000).predict(shape, Budget(ratio=named))
    with pytest.raises(UserError, match="tomoe.width_multiple is 5000, which is not between 1 and 4096"):
        ToMoE(width_multiple=5000)
