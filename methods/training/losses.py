"""The losses that look at the vocabulary: distillation from the dense model, and next-token prediction.

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

from methods.training.precision import full_precision

CHUNK = 256
"""Tokens whose logits are held at a time."""
Rooms = tuple[Tensor, Tensor, Tensor]
"""Tensors [t, V] for some tokens, to be written to: making new ones takes longer than filling them, on a CPU."""
Pull = Callable[[Rooms, slice], tuple[Tensor, Tensor, Tensor]]
"""From student log-probabilities of some tokens, in the first room: summed loss, summed reference value, and
d loss / d logits, which may be in any room."""


class _HeadLoss(torch.autograd.Function):
    """Mean over tokens of a loss on the logits of h W^T + b; the reference value comes along without a gradient."""

    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, head: nn.Linear, pull: Pull) -> tuple[Tensor, Tensor]:
        loss = reference = torch.zeros((), device=h_TD.device)
        whole = full_precision(h_TD[:0]).new_empty(3, min(CHUNK, len(h_TD)), head.out_features)
        grads = []
        for start in range(0, len(h_TD), CHUNK):
            tokens = slice(start, start + CHUNK)
            log_p_tV, logits_tV, spare_tV = whole[:, : len(h_TD[tokens])]
            log_probabilities(h_TD[tokens], head, logits_tV, log_p_tV)
            value, compared, grad_tV = pull((log_p_tV, logits_tV, spare_tV), tokens)
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


def log_probabilities(h_tD: Tensor, head: nn.Linear, logits_tV: Tensor, out_tV: Tensor) -> None:
    """Write logits of the next token, and their logarithmic softmax."""
    if head.weight.dtype == logits_tV.dtype:
        torch.mm(h_tD, head.weight.T, out=logits_tV)
        if head.bias is not None:
            logits_tV += head.bias
    else:
        logits_tV.copy_(head(h_tD))
    torch.log_softmax(logits_tV, -1, out=out_tV)


def product_sum(x: Tensor, y: Tensor) -> Tensor:
    """Sum of x * y without a tensor of the products."""
    return x.flatten() @ y.flatten()


def distillation(student_TD: Tensor, teacher_TD: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor]:
    """KD (nats), and the teacher's mean entropy: their sum is the cross-entropy form that the released code minimises.

    Args:
        student_TD: hidden states after the final norm; the gradient goes there.
        teacher_TD: those of the dense model.
    """

    def pull(rooms: Rooms, tokens: slice) -> tuple[Tensor, Tensor, Tensor]:
        log_p_tV, q_tV, log_q_tV = rooms
        log_probabilities(teacher_TD[tokens], head, q_tV, log_q_tV)
        torch.exp(log_q_tV, out=q_tV)
        entropy = -product_sum(q_tV, log_q_tV)
        return -product_sum(q_tV, log_p_tV) - entropy, entropy, log_p_tV.exp_().sub_(q_tV)

    return _HeadLoss.apply(student_TD, head, pull)  # pyright: ignore[reportReturnType]


def next_token(student_TD: Tensor, targets_T: Tensor, head: nn.Linear) -> Tensor:
    """Mean cross-entropy (nats) with the next token: the ablation of distillation."""

    def pull(rooms: Rooms, tokens: slice) -> tuple[Tensor, Tensor, Tensor]:
        log_p_tV, target_t1 = rooms[0], targets_T[tokens, None]
        loss = -log_p_tV.gather(1, target_t1).sum()
        grad_tV = log_p_tV.exp_().scatter_add_(1, target_t1, -torch.ones_like(target_t1, dtype=log_p_tV.dtype))
        return loss, torch.zeros_like(loss), grad_tV

    return _HeadLoss.apply(student_TD, head, pull)[0]  # pyright: ignore[reportOptionalSubscript]
