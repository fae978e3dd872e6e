"""Wanda: weights are worth their size times that of what they multiply.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", https://arxiv.org/abs/2306.11695.
With X [tokens, C] what a projection W [R, C] reads,

    S_ij = |W_ij| |X_j|_2

and of every group of weights of an output those of highest S stay; unstructured, weights are compared within an output.
Nothing is updated. If the columns of X are orthogonal, no other mask of the pattern leaves a smaller |X (W' - W)^T|.

Departs from the released code: the calibration text is that of the run (there 128 windows of C4); padding does not
count; outputs of an unstructured projection may differ by one weight, so that the total is the asked one; the variant
that searches an alpha is left out.
"""

# Shape suffixes: N tokens, R outputs, C inputs.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.base import Budget, Context, Training
from methods.errors import nothing_to_measure
from methods.lazy import torch
from methods.modeling.shape import DecoderShape
from methods.pruning_pass import CalibratedPruning
from methods.registry import register
from methods.sparsity import Density

if TYPE_CHECKING:
    from torch import Tensor, nn


class Energy:
    """The sum of squares of every input, over tokens."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum_C = torch.zeros(width, dtype=torch.float64)
        """On the CPU: not every device has fp64."""
        self.tokens = 0
        self._device = device

    def add(self, x_NC: Tensor) -> None:
        """Count the tokens of one batch; the squares of one batch are summed in at least fp32."""
        self.sum_C += x_NC.to(torch.promote_types(x_NC.dtype, torch.float32)).square().sum(0).cpu()
        self.tokens += len(x_NC)

    def norm(self, dtype: torch.dtype) -> Tensor:
        """The root of the mean square, [C], on the device.

        Raises:
            UserError: there were no tokens.
        """
        if not self.tokens:
            raise nothing_to_measure()
        return (self.sum_C / self.tokens).sqrt().to(dtype).to(self._device)


@register("wanda", title="Wanda", reference="https://arxiv.org/abs/2306.11695", family="semi-structured")
@dataclass(frozen=True, kw_only=True)
class Wanda(CalibratedPruning[Energy]):
    """Keep the weights of largest absolute value times norm of their input."""

    def work(self, shape: DecoderShape, budget: Budget, tokens: int, training: Training) -> float:
        """Two passes."""
        return 2.0 * tokens

    def statistic(self, width: int, device: torch.device) -> Energy:
        """Sums of squares."""
        return Energy(width, device)

    def masks(self, linears: Sequence[nn.Linear], seen: Energy, density: Density, context: Context) -> list[Tensor]:
        """The highest scores."""
        return [density.mask(scores(linear.weight, seen)) for linear in linears]


def scores(weight_RC: Tensor, seen: Energy) -> Tensor:
    """S but for a common factor, in at least fp32."""
    dtype = torch.promote_types(weight_RC.dtype, torch.float32)
    return weight_RC.detach().to(dtype).abs() * seen.norm(dtype)
