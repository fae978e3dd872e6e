"""The term of the objective that looks at the vocabulary: distillation from the dense model, or next-token prediction.

    KD = mean over tokens of KL(p_teacher || p_student)          temperature 1, whole vocabulary, fp32

Logits of a vocabulary of 152,064 take 1.25 GB per 2,048 tokens in fp32. So the head and the loss run on a few tokens at
a time, and the gradient with respect to the hidden states is made in the forward pass: the head is multiplied once for
the teacher and once each way for the student, and nothing of the vocabulary's size outlives its chunk.
"""

# Shape suffixes: T tokens, D hidden size, V vocabulary.

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

CHUNK = 256
"""Tokens whose logits are held at a time."""
Pull = Callable[[Tensor, slice], tuple[Tensor, Tensor, Tensor]]
"""From student log-probabilities [t, V] of some tokens: summed loss, summed reference value, d loss / d logits."""


class _HeadLoss(torch.autograd.Function):
    """Mean over tokens of a loss on the logits of h W^T + b; the reference value comes along without a gradient."""

    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, head: nn.Linear, pull: Pull) -> tuple[Tensor, Tensor]:
        loss = reference = torch.zeros((), device=h_TD.device)
        grads = []
        for start in range(0, len(h_TD), CHUNK):
            tokens = slice(start, start + CHUNK)
            log_p_tV = log_probabilities(h_TD[tokens], head)
            value, compared, grad_tV = pull(log_p_tV, tokens)
            loss, reference = loss + value, reference + compared
            grads.append(grad_tV.to(h_TD.dtype) @ head.weight / len(h_TD))
        ctx.save_for_backward(torch.cat(grads))
        loss, reference = loss / len(h_TD), reference / len(h_TD)
        ctx.mark_non_differentiable(reference)
        return loss, reference

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_TD,) = ctx.saved_tensors
        return grad_TD * grad.to(grad_TD.dtype), None, None


def log_probabilities(h_tD: Tensor, head: nn.Linear) -> Tensor:
    """Log-probabilities of the next token, [t, V] in fp32."""
    return linear(h_tD, head.weight, head.bias).float().log_softmax(-1)


def product_sum(x: Tensor, y: Tensor) -> Tensor:
    """Sum of x * y without a tensor of the products, which would take longer to allocate than to fill."""
    return x.flatten() @ y.flatten()


def distillation(student_TD: Tensor, teacher_TD: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor]:
    """KD (nats), and the teacher's mean entropy: their sum is the cross-entropy form that the released code minimises.

    Args:
        student_TD: hidden states after the final norm; the gradient goes there.
        teacher_TD: those of the dense model.
    """

    def pull(log_p_tV: Tensor, tokens: slice) -> tuple[Tensor, Tensor, Tensor]:
        log_q_tV = log_probabilities(teacher_TD[tokens], head)
        q_tV = log_q_tV.exp()
        entropy = -product_sum(q_tV, log_q_tV)
        return -product_sum(q_tV, log_p_tV) - entropy, entropy, log_p_tV.exp_().sub_(q_tV)

    return _HeadLoss.apply(student_TD, head, pull)  # pyright: ignore[reportReturnType]


def next_token(student_TD: Tensor, targets_T: Tensor, head: nn.Linear) -> Tensor:
    """Mean cross-entropy (nats) with the next token: the ablation of distillation."""

    def pull(log_p_tV: Tensor, tokens: slice) -> tuple[Tensor, Tensor, Tensor]:
        target_t1 = targets_T[tokens, None]
        loss = -log_p_tV.gather(1, target_t1).sum()
        return (
            loss,
            torch.zeros_like(loss),
            log_p_tV.exp_().scatter_add_(1, target_t1, -torch.ones_like(target_t1).float()),
        )

    return _HeadLoss.apply(student_TD, head, pull)[0]  # pyright: ignore[reportOptionalSubscript]
