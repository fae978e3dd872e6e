"""Kronecker factors against per-token gradients by autograd, and against the singular vectors of the whole Fisher."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods import modeling
from methods.errors import UserError
from methods.kfac import Curvature, Factors
from methods.live_parts import projections
from tests.methods.tiny import CONFIGS, logits, some_ids, tiny_model

CPU = torch.device("cpu")


def linears(model: PreTrainedModel, block: int = 1) -> list[nn.Linear]:
    return list(projections(modeling.Decoder(model).layers[block]).values())


def naive(model: PreTrainedModel, linear: nn.Linear, texts: Iterable[Tensor]) -> tuple[Tensor, Tensor, float]:
    """(a, g) of every token of one linear, the gradient being that of a zero added to what it writes; and the loss."""
    inputs, gradients, losses = [], [], []
    for ids in texts:
        nothing = torch.zeros(1, len(ids), linear.out_features, dtype=torch.float64, requires_grad=True)

        def add(module: nn.Module, args: tuple, output: Tensor, nothing: Tensor = nothing) -> Tensor:
            a = args[0].detach().reshape(len(nothing[0]), -1)
            inputs.append(a if linear.bias is None else torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1))
            return output + nothing.view_as(output)

        handle = linear.register_forward_hook(add)
        chances = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        handle.remove()
        each = [-chances[t - 1, ids[t]] for t in range(1, len(ids))]
        gradients.append(torch.autograd.grad(sum(each), nothing)[0][0])  # type: ignore[arg-type]
        losses += [loss.item() for loss in each]
    return torch.cat(inputs), torch.cat(gradients), sum(losses) / len(losses)


@pytest.mark.parametrize("name", CONFIGS)
def test_factors_equal_sums_over_tokens(name: str) -> None:
    model, texts = tiny_model(name), [some_ids(1, 9)[0], some_ids(1, 6, seed=2)[0]]
    curvature = Curvature(model, linears(model), CPU)
    found = curvature.independent(texts)
    for linear, factors in zip(linears(model), found, strict=True):
        a, g, loss = naive(model, linear, texts)
        torch.testing.assert_close(factors.outputs_RR, g.T @ g, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(factors.inputs_CC, a.T @ a, rtol=1e-9, atol=1e-12)
        assert curvature.loss == pytest.approx(loss)


def test_the_model_is_left_alone() -> None:
    model = tiny_model("opt").requires_grad_(False)
    before = logits(model)
    Curvature(model, linears(model), CPU).independent([some_ids(1, 9)[0]])
    assert logits(model).equal(before) and not logits(model).requires_grad
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def feed(monkeypatch: pytest.MonkeyPatch, a: Tensor, g: Tensor) -> Curvature:
    """A curvature that sees these tokens of one linear [R, C] in every pass."""
    monkeypatch.setattr(Curvature, "_pass", lambda self, texts, see: see(0, a, g))
    linear = nn.Linear(a.shape[1], g.shape[1], bias=False, dtype=torch.float64)
    return Curvature(None, [linear], CPU)  # type: ignore[arg-type]


def fisher(a: Tensor, g: Tensor) -> Tensor:
    """Sum over tokens of the outer square of vec(g a^T), rows of the weight one after the other."""
    each = torch.stack([torch.kron(gn, an) for an, gn in zip(a, g, strict=True)])
    return each.T @ each


def test_independent_inputs_and_gradients_give_the_whole_fisher(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    a, g = torch.randn(7, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    every = feed(monkeypatch, a.repeat(5, 1), g.repeat_interleave(7, 0))  # each a with each g
    expected = fisher(a.repeat(5, 1), g.repeat_interleave(7, 0))
    G, A = every.independent([])[0]
    torch.testing.assert_close(torch.kron(G, A) / 35, expected)
    G, A = every.nearest([[]] * 2)[0]
    torch.testing.assert_close(torch.kron(G, A), expected)


def test_power_iteration_finds_the_nearest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    a = torch.randn(30, 4, dtype=torch.float64)
    g = torch.randn(30, 3, dtype=torch.float64) * a[:, :1].abs()  # far from independent
    rearranged = fisher(a, g).view(3, 4, 3, 4).transpose(1, 2).reshape(9, 16)
    U, S, Vh = torch.linalg.svd(rearranged)
    best = torch.kron(U[:, 0].view(3, 3), Vh[0].view(4, 4)) * S[0]

    def missed(factors: Factors) -> float:
        return float((torch.kron(*factors) - fisher(a, g)).norm())

    curvature = feed(monkeypatch, a, g)
    torch.testing.assert_close(torch.kron(*curvature.nearest([[]] * 60)[0]), best)
    G, A = curvature.independent([])[0]
    assert missed(Factors(G / 30, A)) > missed(curvature.nearest([[]] * 2)[0]) > float((best - fisher(a, g)).norm())


def test_overflows_are_refused() -> None:
    model = tiny_model("llama-gqa")
    modeling.Decoder(model).layers[2].mlp_output.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="overflows"):
        Curvature(model, linears(model), CPU).independent([some_ids(1, 9)[0]])
    model = tiny_model("llama-gqa")
    linear = linears(model)[0]
    linear.register_forward_pre_hook(lambda module, args: (args[0] * 1e200,))
    with pytest.raises(UserError, match="overflows"):
        Curvature(model, [linear], CPU).independent([some_ids(1, 9)[0]])


def test_no_gradient_is_no_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(7, 4, dtype=torch.float64)
    for factors in feed(monkeypatch, a, torch.zeros(7, 3, dtype=torch.float64)).nearest([[]] * 4):
        assert not any(factor.any() for factor in factors)
