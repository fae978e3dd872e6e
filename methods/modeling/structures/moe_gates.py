"""Which experts a token gets, and what their outputs are multiplied with, from what its router says.

With r_j the router's number for expert j, p = softmax(r) over all experts, and J the k chosen ones:

    equal     J = top-k of r         weight 1 (ToMoE, MoEfication)
    softmax   J = top-k of r         s exp(r_j) / sum of exp(r_i), i in J (LLaMA-MoE)
    scaled    J = top-k of p + b     1 + p_j u_j; b moves the choice and never the weight (CMoE)

Ties go to the lower number. In training, the weight of an `equal` gate has the gradient of p_j, so that its router goes
on learning. With `balance` after each pass, b takes a step of `STEP`, down for experts that got more tokens than the
mean, up for those that got fewer. (Not within the pass: with activation checkpointing blocks run twice.) u and b are at
least fp32 whatever the model is: beside 0.5 a step of 1e-3 is nothing in bfloat16.
"""

# Shape suffixes: T tokens, N experts, k experts of a token.

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from methods.modeling.structures.moe_layout import GateKind, Layout

STEP = 1e-3
"""gamma of CMoE's load balance."""


class Choice(NamedTuple):
    """The experts of every token."""

    experts_Tk: Tensor
    """Their numbers, int64, highest score first."""
    weights_Tk: Tensor | None
    """What their outputs are multiplied with; None: 1."""


def exact(dtype: torch.dtype) -> torch.dtype:
    """A dtype, but fp32 in place of a narrower one."""
    return torch.promote_types(dtype, torch.float32)


def best(scores_TN: Tensor, count: int) -> Tensor:
    """Places of the highest scores of each row, [T, count]."""
    if count == 1:
        return scores_TN.argmax(-1, keepdim=True)
    return scores_TN.argsort(dim=-1, descending=True, stable=True)[:, :count]


def unit_gate(logits_TN: Tensor, experts: Tensor) -> Tensor:
    """Exactly 1 for each of some experts ([T] or [T, k]), with the gradient of its probability: [T, k]."""
    chosen_Tk = logits_TN.softmax(-1).gather(1, experts.view(len(logits_TN), -1))
    return 1 + (chosen_Tk - chosen_Tk.detach())


class EqualGate(nn.Module):
    """All weights are 1."""

    kind: GateKind = "equal"

    def forward(self, logits_TN: Tensor, count: int) -> Choice:
        """Choose `count` experts."""
        experts_Tk = best(logits_TN, count)
        return Choice(experts_Tk, unit_gate(logits_TN, experts_Tk) if self.training else None)


class SoftmaxGate(nn.Module):
    """Weights add up to `scale`."""

    kind: GateKind = "softmax"

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, logits_TN: Tensor, count: int) -> Choice:
        """Choose `count` experts."""
        experts_Tk = best(logits_TN, count)
        chosen_Tk = logits_TN.gather(1, experts_Tk)
        weights_Tk = self.scale * chosen_Tk.softmax(-1, dtype=exact(chosen_Tk.dtype))
        return Choice(experts_Tk, weights_Tk.to(logits_TN.dtype))


class ScaledGate(nn.Module):
    """Weights are 1 until u is trained."""

    kind: GateKind = "scaled"
    bias: Tensor
    """b, [N]."""
    loads: Tensor
    """Tokens that each expert got in the last pass in training, [N]."""

    def __init__(self, experts: int, like: Tensor) -> None:
        super().__init__()
        zeros = torch.zeros(experts, device=like.device, dtype=exact(like.dtype))
        self.scale = nn.Parameter(zeros)
        self.register_buffer("bias", zeros.clone())
        self.register_buffer("loads", zeros.clone(), persistent=False)

    def forward(self, logits_TN: Tensor, count: int) -> Choice:
        """Choose `count` experts."""
        share_TN = logits_TN.softmax(-1, dtype=exact(logits_TN.dtype))
        experts_Tk = best(share_TN + self.bias, count)
        if self.training:
            self.loads.copy_(experts_Tk.flatten().bincount(minlength=len(self.loads)))
        weights_Tk = 1 + share_TN.gather(1, experts_Tk) * self.scale[experts_Tk]
        return Choice(experts_Tk, weights_Tk.to(logits_TN.dtype))

    @torch.no_grad()
    def balance(self) -> None:
        """Move b against the loads of the last pass."""
        self.bias.add_(STEP * (self.loads.mean() - self.loads).sign())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ScaledGate":
        def kept(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            return made if made.dtype == exact(made.dtype) else tensor.to(made.device, exact(made.dtype))

        return super()._apply(kept, recurse)


def make_gate(layout: Layout, like: Tensor) -> nn.Module:
    """The gate of a mixture, on the device and in the dtype of a tensor."""
    if layout.gate == "softmax":
        return SoftmaxGate(layout.scale)
    return ScaledGate(layout.experts, like) if layout.gate == "scaled" else EqualGate()
