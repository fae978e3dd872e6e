"""The regularisers: published start values, where their gradients go, their minima; the union by brute force."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from methods.modeling import Decoder
from methods.tomoe import ToMoE, objective
from methods.tomoe.network import LayerMasks
from methods.training.straight_through import st_gumbel_sigmoid
from tests.methods.tiny import tiny_model

SHAPE = Decoder(tiny_model("llama-gqa")).shape


def layer_masks(experts: Tensor, values: Tensor, qk: Tensor | None = None, tokens: int = 12) -> LayerMasks:
    count = len(experts)
    routes = torch.nn.functional.one_hot(torch.arange(tokens) % count, count).float()
    empty = torch.zeros(count, 2)
    return LayerMasks(
        embeddings_NE=empty,
        mean_E=empty[0],
        experts_NM=experts,
        qk_h=torch.ones(SHAPE.head_dim) if qk is None else qk,
        heads_H=None,
        routes_BTN=routes[None],
        shares_BTN=torch.full((1, tokens, count), 1 / count),
        values_BTh=values,
    )


def all_on() -> LayerMasks:
    return layer_masks(torch.ones(4, SHAPE.mlp_width), torch.ones(1, 12, SHAPE.head_dim))


def terms(masks: list[LayerMasks], p: float, **settings) -> objective.Terms:
    zero = torch.zeros(())
    logits = [torch.zeros_like(m.experts_NM) for m in masks]
    return objective.terms(ToMoE(**settings), SHAPE, masks, logits, p, zero, zero)


@pytest.mark.parametrize("p, start", [(0.4, 14.64), (0.5, 11.07), (0.6, 8.16), (0.7, 5.70)])
def test_published_start_value_of_the_parameter_term(p: float, start: float) -> None:
    made = terms([all_on()] * SHAPE.layers, p)
    assert float(16 * made.r_p) == pytest.approx(start, abs=0.005)
    assert made.fraction == 1 and made.r_u == 0


def test_fraction_is_the_sum_of_the_widths() -> None:
    experts = (torch.rand(4, SHAPE.mlp_width, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    values = (torch.rand(1, 12, SHAPE.head_dim, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    qk = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0])
    masks = [layer_masks(experts, values, qk)] * SHAPE.layers
    d, heads, m, h = SHAPE.hidden, SHAPE.heads + SHAPE.kv_heads, SHAPE.mlp_width, SHAPE.head_dim
    for count, vo in (("max", max(row.sum() for row in values[0])), ("mean", values[0].sum(1).mean())):
        kept = d * heads * 4 + d * heads * float(vo) + 3 * d * max(float(row.sum()) for row in experts)
        whole = 2 * d * heads * h + 3 * d * m
        assert float(terms(masks, 0.5, vo_count=count).fraction) == pytest.approx(kept / whole)


def test_only_the_widest_expert_and_token_feel_the_parameter_term() -> None:
    experts = torch.zeros(4, SHAPE.mlp_width)
    for expert, width in enumerate((5, 9, 7, 3)):
        experts[expert, :width] = 1
    values = torch.zeros(1, 12, SHAPE.head_dim)
    values[0, 4, :3] = 1
    experts.requires_grad_(), values.requires_grad_()
    terms([layer_masks(experts, values)] * SHAPE.layers, 0.5, vo_count="max").r_p.backward()
    assert experts.grad is not None and values.grad is not None
    assert [bool(row.any()) for row in experts.grad] == [False, True, False, False]
    assert [index for index, row in enumerate(values.grad[0]) if row.any()] == [4]


@given(st.floats(0, 1), st.floats(0, 1))
def test_log_ratio_is_a_symmetric_distance_from_equality(x: float, y: float) -> None:
    one, other = objective.log_ratio(torch.tensor(x), y), objective.log_ratio(torch.tensor(y), x)
    expected = abs(math.log((x + 0.001) / (y + 0.001)))
    assert float(one) == pytest.approx(expected, abs=1e-4) and float(other) == pytest.approx(expected, abs=1e-4)


def test_union_by_brute_force() -> None:
    masks = torch.randint(2, (3, 5, 40), generator=torch.Generator().manual_seed(0)).float()
    expected = [sum(any(row[j] for row in group) for j in range(40)) / 40 for group in masks]
    torch.testing.assert_close(objective.union(masks), torch.tensor(expected))


@given(st.lists(st.integers(0, 20), min_size=8, max_size=8).filter(any))
def test_balance_is_least_under_a_uniform_load(counts: list[int]) -> None:
    choice = torch.tensor([expert for expert, count in enumerate(counts) for _ in range(count)])
    routes = torch.nn.functional.one_hot(choice, 8).float()[None]
    masks = all_on()
    masks.routes_BTN = masks.shares_BTN = routes
    made = objective.balance(masks)
    loads = [count / sum(counts) for count in counts]
    assert made.loads_N.tolist() == pytest.approx(loads)
    assert float(made.paper) == pytest.approx(8 * sum(load**2 for load in loads), rel=1e-5)
    assert float(made.released) == pytest.approx(sum(load**2 for load in loads), rel=1e-5)
    assert made.paper >= 1 - 1e-5 and made.released >= 0.125 - 1e-6


def test_uniform_balance() -> None:
    masks = layer_masks(torch.ones(4, SHAPE.mlp_width), torch.ones(1, 12, SHAPE.head_dim))
    assert float(objective.balance(masks).paper) == pytest.approx(1.0)
    assert float(objective.balance(masks).released) == pytest.approx(0.25)


def test_expert_union_counts_experts_and_not_tokens() -> None:
    """Two experts with a half each: the union is whole even when no token goes to the second one."""
    experts = torch.zeros(2, SHAPE.mlp_width)
    experts[0, : SHAPE.mlp_width // 2] = 1
    experts[1, SHAPE.mlp_width // 2 :] = 1
    masks = layer_masks(experts, torch.ones(1, 12, SHAPE.head_dim))
    masks.routes_BTN = torch.tensor([1.0, 0.0]).expand(1, 12, 2)
    assert terms([masks] * SHAPE.layers, 0.5, union="sampled").r_u == 0


@pytest.mark.parametrize("settings", [{"experts": 1, "vo_routing": False}, {"experts": 1, "head_pruning": True}])
def test_no_union_term_where_there_is_no_choice(settings) -> None:
    masks = layer_masks(torch.zeros(1, SHAPE.mlp_width), torch.zeros(SHAPE.head_dim))
    assert terms([masks] * SHAPE.layers, 0.5, **settings).r_u == 0


def test_converted_masks_are_the_equalised_sets_with_a_gradient_around_the_cut() -> None:
    logits = (3 * torch.randn(4, 30, generator=torch.Generator().manual_seed(0)) - 3).requires_grad_()
    masks = objective.converted_masks(logits, 0.4)
    width = objective.expected_width(logits)
    assert 1 < width < 30
    for row, kept in zip(logits.detach(), masks, strict=True):
        best = sorted(range(30), key=lambda j: (-float(row[j]), j))[:width]
        assert kept.nonzero().flatten().tolist() == sorted(best)
    masks.sum().backward()
    assert logits.grad is not None and (logits.grad >= 0).all() and logits.grad.any()


def test_expected_width_is_that_of_many_draws() -> None:
    logits = 2 * torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) - 3
    torch.manual_seed(0)
    draws = torch.stack([st_gumbel_sigmoid(logits, 0.4).sum(-1) for _ in range(4000)]).mean(0)
    assert objective.expected_width(logits) == round(float(draws.max()))
