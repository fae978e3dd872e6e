"""Linear algebra of the methods that look at second moments: uncentred covariances, damping, ridge regression.

    Covariance          C = (1/n) sum over tokens of x^T x       of everything that was added
    damped_cholesky     L L^T = C + delta I, delta = c mean(diag C), the smallest c >= ridge of its ladder that factors
    ridge_leverage      [C (C + delta I)^-1]_ii
    ridge_solve         X = (C + delta I)^-1 B

A covariance of fewer tokens than it is wide is singular, and rounding may make it indefinite; damping decides what
happens then, and both functions return the delta that it took.
"""

# Shape suffixes: N tokens, W width of a covariance, K right-hand sides.

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from methods.errors import UserError, nothing_to_measure
from methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Precision = Literal["float64", "float32"]
LEAST_DAMPING = 1e-12
"""Where the ladder starts when no ridge was asked for, as a share of the mean diagonal."""
MOST_DAMPING = 1.0
"""Where it ends: beyond it the covariance would not matter any more."""


class Covariance:
    """The sum of x^T x over tokens, and their number; for several heads at once where a number of heads is given."""

    def __init__(
        self, width: int, device: torch.device, *, heads: int | None = None, precision: Precision = "float64"
    ) -> None:
        self.dtype: torch.dtype = getattr(torch, precision)
        leading = () if heads is None else (heads,)
        self.sum = torch.zeros(*leading, width, width, dtype=self.dtype, device=device)
        """Shape [W, W], or [heads, W, W]."""
        self.tokens = 0

    def add(self, x_NW: Tensor) -> None:
        """Count the tokens of one batch, shape [N, W], or [heads, N, W]."""
        x_NW = x_NW.to(self.dtype)
        self.sum += x_NW.mT @ x_NW
        self.tokens += x_NW.shape[-2]

    def mean(self) -> Tensor:
        """C, in the shape of the sum; singular with fewer tokens than it is wide.

        Raises:
            UserError: no tokens, or an overflow.
        """
        if self.tokens == 0:
            raise nothing_to_measure()
        self.require_rank(1)
        return self.sum / self.tokens

    def require_rank(self, rank: int) -> None:
        """Refuse a sum that cannot have some rank, or is not finite.

        Raises:
            UserError: fewer tokens than that, or an overflow.
        """
        if self.tokens < rank:
            raise UserError(
                f"{self.tokens} calibration tokens cannot span {rank} dimensions. "
                f"Ask for more (--calibration NAME:SAMPLESxWINDOW, their product at least {rank}) or use a larger "
                "--budget."
            )
        if not self.sum.isfinite().all():
            raise UserError("the model overflows on the calibration text. Use --dtype bfloat16 or float32.")


def damped_cholesky(C_WW: Tensor, ridge: float) -> tuple[Tensor, float]:
    """The lower factor of C + delta I, and delta: `ridge` times the mean diagonal, or ten times that until it factors.

    A matrix of zeros is damped by `ridge` itself.

    Raises:
        UserError: C has no factor even then, because it is not a covariance.
    """
    scale = C_WW.diagonal().mean().item() or 1.0
    while ridge <= MOST_DAMPING and math.isfinite(scale):
        damped_WW = C_WW.clone()
        damped_WW.diagonal().add_(ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(damped_WW)
        if not failed:
            return factor, ridge * scale
        ridge = max(10 * ridge, LEAST_DAMPING)
    raise UserError(
        "a covariance of the calibration activations cannot be factored, however much it is damped: the model "
        "overflows or its weights are not numbers. Use --dtype bfloat16 or float32."
    )


def ridge_leverage(C_FF: Tensor, ridge: float) -> tuple[Tensor, float]:
    """[C (C + lam I)^-1]_ii = 1 - lam [(C + lam I)^-1]_ii, shape [F], and lam."""
    factor, lam = damped_cholesky(C_FF, ridge)
    return 1 - lam * torch.cholesky_inverse(factor).diagonal(), lam


def ridge_solve(C_WW: Tensor, B_WK: Tensor, ridge: float) -> tuple[Tensor, float]:
    """(C + delta I)^-1 B, shape [W, K], and delta; see `damped_cholesky`."""
    factor, delta = damped_cholesky(C_WW, ridge)
    return torch.cholesky_solve(B_WK, factor), delta
