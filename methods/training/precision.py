"""Full precision beside a model of less: all that is trained computes in fp32, on signals of the model's own dtype."""

# Shape suffixes: ... any leading axes, D input width, O output width.

from typing import Any

import torch
from torch import Tensor, nn


def full_precision(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Linear(torch.autograd.Function):
    """x W^T in the precision of W; x is kept for the backward pass as it came, not as a wider copy."""

    @staticmethod
    def forward(ctx: Any, x_D: Tensor, weight_OD: Tensor) -> Tensor:
        ctx.save_for_backward(x_D, weight_OD)
        return x_D.to(weight_OD.dtype) @ weight_OD.T

    @staticmethod
    def backward(ctx: Any, grad_O: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_D, weight_OD = ctx.saved_tensors
        grad_weight_OD = grad_O.flatten(0, -2).T @ x_D.flatten(0, -2).to(weight_OD.dtype)
        return (grad_O @ weight_OD).to(x_D.dtype), grad_weight_OD


class FullPrecisionLinear(nn.Linear):
    """A linear map without bias that reads signals of any precision and computes in that of its weight."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """[..., D] to [..., O]."""
        return _Linear.apply(input, self.weight)  # pyright: ignore[reportReturnType]
