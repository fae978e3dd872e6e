"""Discrete functions with a gradient (ToMoE: ST-GumbelSigmoid, ST-GumbelSoftmax; DISP-LLM: the former).

    ST-GSig(a)     y = sigmoid((a + g + b) / tau)     value round(y)           gradient of y
    ST-GSmax(r)    y = softmax((r + g) / tau)         value one-hot(argmax y)  gradient of y
    ReinMax(a)     p = sigmoid(a + b)                 value s ~ Bernoulli(p)   gradient of p, over 2 P(s)

g is Gumbel(0, 1) noise, one variable per element, and b = 3, so that a = 0 is on but for a chance of 2e-9: every
expert starts as the whole layer. Values are exactly 0 or 1: the usual `hard + y - y.detach()` rounds, and a mask that
is all on must leave the network as it is to the last bit.
"""

from typing import Any

import torch
from torch import Tensor

OFFSET = 3.0
"""b: how far above zero every mask logit starts."""


class _StraightThrough(torch.autograd.Function):
    """Value of `hard`, gradient to `soft`."""

    @staticmethod
    def forward(ctx: Any, soft: Tensor, hard: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """`hard` in the forward pass, `soft` in the backward pass."""
    return _StraightThrough.apply(soft, hard)  # pyright: ignore[reportReturnType]


def gumbel(like: Tensor) -> Tensor:
    """Gumbel(0, 1) noise in the shape, dtype and place of a tensor; drawn as -log(Exp(1)), which never meets log 0."""
    return -torch.empty_like(like).exponential_().log()


def _noisy(logits: Tensor, noise: float) -> Tensor:
    return logits + noise * gumbel(logits) if noise else logits


def gumbel_sigmoid(logits: Tensor, tau: float, *, noise: float = 1.0) -> Tensor:
    """The soft mask y in [0, 1] of some mask logits, any shape; `noise` scales g."""
    return torch.sigmoid((_noisy(logits, noise) + OFFSET) / tau)


def st_gumbel_sigmoid(logits: Tensor, tau: float, *, noise: float = 1.0) -> Tensor:
    """0/1 mask of some mask logits, any shape; `noise` scales g."""
    y = gumbel_sigmoid(logits, tau, noise=noise)
    return straight_through(y, y.detach().round())


def reinmax(logits: Tensor) -> Tensor:
    """0/1 mask of some mask logits, any shape, with a gradient of second order: that of E f(s) for all quadratic f.

    ReinMax (Liu et al., https://arxiv.org/abs/2304.08612, temperature 1) of a choice between on and off: for s = 1 its
    2 q (1 - q) - p (1 - p) / 2 with q = (s + p) / 2 is (1 - p) / 2 = dp/da / (2 p), and likewise for s = 0.
    """
    p = torch.sigmoid(logits + OFFSET)
    hard = torch.bernoulli(p.detach())
    chance = torch.where(hard == 1, p, torch.sigmoid(-logits - OFFSET)).detach()
    return straight_through(p / (2 * chance), hard)


def st_gumbel_softmax(logits: Tensor, tau: float, *, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """One-hot rows and the probabilities y behind them, both [..., N]; ties go to the lowest index."""
    y = torch.softmax(_noisy(logits, noise) / tau, -1)
    hard = torch.zeros_like(y).scatter_(-1, y.detach().argmax(-1, keepdim=True), 1.0)
    return straight_through(y, hard), y


def probability_on(logits: Tensor, noise: float = 1.0) -> Tensor:
    """P(on) = 1 - exp(-exp((a + b) / noise)) of ST-GSig, whatever tau."""
    return -torch.expm1(-torch.exp((logits + OFFSET) / noise))
