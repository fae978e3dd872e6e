"""ST-GumbelSigmoid and ST-GumbelSoftmax: chances, values and gradients by closed form."""

import math

import pytest
import torch

from methods.training.straight_through import (
    OFFSET,
    gumbel,
    gumbel_sigmoid,
    probability_on,
    reinmax,
    st_gumbel_sigmoid,
    st_gumbel_softmax,
    straight_through,
)


@pytest.mark.parametrize("logit", [-4.5, -3.3665, -3.0, -2.0, 0.0])
def test_chance_of_being_on(logit: float) -> None:
    torch.manual_seed(0)
    draws = st_gumbel_sigmoid(torch.full((1_000_000,), logit), 0.4)
    expected = 1 - math.exp(-math.exp(logit + 3))
    assert float(draws.mean()) == pytest.approx(expected, abs=5 * math.sqrt(0.25 / 1e6))
    assert float(probability_on(torch.tensor(logit))) == pytest.approx(expected, abs=1e-6)


def test_worked_values_of_the_chance() -> None:
    assert float(1 - probability_on(torch.tensor(0.0, dtype=torch.float64))) == pytest.approx(1.9e-9, rel=0.05)
    assert float(probability_on(torch.tensor(-OFFSET + math.log(math.log(2))))) == pytest.approx(0.5)
    assert float(probability_on(torch.tensor(-3.0))) == pytest.approx(0.632, abs=1e-3)


@pytest.mark.parametrize("tau", [0.3, 0.4, 0.5])
def test_sigmoid_value_is_a_bit_and_gradient_that_of_the_soft_one(tau: float) -> None:
    logits = torch.linspace(-6, 2, 101, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    mask = st_gumbel_sigmoid(logits, tau)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    weights = torch.arange(101.0)
    (mask * weights).sum().backward()
    torch.manual_seed(3)
    y = torch.sigmoid((logits.detach() + gumbel(logits.detach()) + 3) / tau)
    torch.testing.assert_close(logits.grad, weights * y * (1 - y) / tau)
    assert mask.equal((y > 0.5).double())


def test_soft_masks_are_between_0_and_1_and_hard_ones_their_nearest() -> None:
    logits = torch.linspace(-8, 2, 1001, dtype=torch.float64)
    torch.manual_seed(3)
    soft = gumbel_sigmoid(logits, 0.4)
    torch.manual_seed(3)
    assert st_gumbel_sigmoid(logits, 0.4).equal(soft.round())
    assert (soft >= 0).all() and (soft <= 1).all() and ((soft > 0.01) & (soft < 0.99)).any()


@pytest.mark.parametrize("logit", [-7.0, -3.0, -1.5, 0.0])
def test_reinmax_on_average_is_the_derivative_of_a_quadratic_s_mean(logit: float) -> None:
    """f(s) = a s^2 + b s, of which E f = (a + b) p; each value's estimate is that of ReinMax's formula."""
    a, b, p = 0.7, -2.0, 1 / (1 + math.exp(-logit - 3))
    logits = torch.full((100_000,), logit, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    mask = reinmax(logits)
    assert float(mask.detach().mean()) == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 1e5))
    (a * mask**2 + b * mask).sum().backward()
    grads = logits.grad
    assert grads is not None
    for value in (0.0, 1.0):
        q = (value + p) / 2
        expected = (2 * a * value + b) * (2 * q * (1 - q) - p * (1 - p) / 2)
        torch.testing.assert_close(grads[mask == value], torch.full_like(grads[mask == value], expected))
    means = {value: grads[mask == value].mean().nan_to_num() for value in (0.0, 1.0)}
    assert p * means[1.0] + (1 - p) * means[0.0] == pytest.approx((a + b) * p * (1 - p))


def test_softmax_value_is_one_hot_and_gradient_that_of_the_soft_one() -> None:
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    routes, shares = st_gumbel_softmax(logits, 0.4)
    assert routes.sum(-1).eq(1).all() and routes.max(-1).values.eq(1).all()
    (gradient,) = torch.autograd.grad((routes * weights).sum(), logits)
    torch.manual_seed(3)
    soft = torch.softmax((logits + gumbel(logits.detach())) / 0.4, -1)
    (expected,) = torch.autograd.grad((soft * weights).sum(), logits)
    torch.testing.assert_close(gradient, expected)
    assert shares.equal(soft)


def test_the_choice_is_a_draw_from_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -0.5, 2.0])
    torch.manual_seed(0)
    routes, _ = st_gumbel_softmax(logits.expand(400_000, 4), 0.4)
    torch.testing.assert_close(routes.mean(0), logits.softmax(0), atol=4e-3, rtol=0)


def test_without_noise_ties_go_to_the_lowest_index() -> None:
    routes, _ = st_gumbel_softmax(torch.tensor([[1.0, 2.0, 2.0]]), 0.4, noise=0.0)
    assert routes.tolist() == [[0.0, 1.0, 0.0]]
    assert st_gumbel_sigmoid(torch.tensor([-2.9, -3.1]), 0.4, noise=0.0).tolist() == [1.0, 0.0]


def test_straight_through_does_not_round() -> None:
    soft = torch.rand(1000, requires_grad=True)
    assert straight_through(soft, torch.ones(1000)).eq(1).all()
