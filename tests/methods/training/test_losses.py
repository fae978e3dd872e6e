"""KD and next-token loss on chunks of tokens against the whole logits."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from methods.training import losses as module
from methods.training.losses import distillation, next_token


@pytest.fixture(params=[True, False])
def head(request: pytest.FixtureRequest) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 50, bias=request.param).requires_grad_(False)


@pytest.fixture
def states() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(37, 16, requires_grad=True), torch.randn(37, 16)


def test_distillation_is_the_mean_divergence(head: nn.Linear, states, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 10)
    student, teacher = states
    loss, entropy = distillation(student, teacher, head)
    p, q = head(student).log_softmax(-1), head(teacher).log_softmax(-1)
    expected = kl_div(p, q, reduction="batchmean", log_target=True)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(loss + entropy, cross_entropy(head(student), q.exp()))
    (got,) = torch.autograd.grad(3 * loss, student)
    torch.testing.assert_close(got, torch.autograd.grad(3 * expected, student)[0])
    assert distillation(teacher, teacher, head)[0].abs() < 1e-5


def test_next_token_is_cross_entropy(head: nn.Linear, states, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 10)
    student, _ = states
    targets = torch.randint(50, (37,))
    loss = next_token(student, targets, head)
    expected = cross_entropy(head(student), targets)
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(got, torch.autograd.grad(expected, student)[0])


def test_no_logits_of_all_tokens_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of the vocabulary's width has at most a chunk of rows."""
    monkeypatch.setattr(module, "CHUNK", 8)
    head = nn.Linear(4, 1000, bias=False).requires_grad_(False)
    rows: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == 1000:
                rows.append(len(out))
            return out

    student = torch.randn(64, 4, requires_grad=True)
    with Watch():
        distillation(student, torch.randn(64, 4), head)[0].backward()
    assert rows and max(rows) == 8
