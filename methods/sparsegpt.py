"""SparseGPT: weights go column by column, and the columns to the right make up for each.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
https://arxiv.org/abs/2301.00774. With H = mean of x^T x [C, C] over what a projection W [R, C] reads, damped by
`damping` times its mean diagonal, and U the upper triangle for which H^-1 = U^T U, for every column i of the weights as
they have become:

    n:m             where i is a multiple of m: of every output's W[:, i : i + m] the n highest W^2 / diag(U)^2 stay
    unstructured    where i is a multiple of `blocksize`: of W[:, i : i + blocksize] the highest, over all outputs
    e = (W_i - what stays of W_i) / U_ii                W[:, i:] -= e U[i, i:]

The sum of e^2 over an output's columns is (W' - W) H (W' - W)^T: the mean square of the change of the output, and of
the damping. Columns right of a block of `blocksize` get its updates at once, which changes nothing but time.

Departs from the released code: U comes from one factorization (of H in reverse order) instead of two and an inverse;
inputs that are always zero, whose weights go first, get the mean diagonal instead of 1 there, so that the damping
does not depend on the scale of the others; damping grows where it does not suffice; the calibration text is that of the
run, and padding does not count.
"""

# Shape suffixes: R outputs, C inputs, w columns of a block, m of a group.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from methods.base import Budget, Context, Training
from methods.errors import UserError, overflow
from methods.lazy import torch
from methods.linalg import Covariance, Precision, damped_cholesky
from methods.modeling.shape import DecoderShape
from methods.pruning_pass import CalibratedPruning
from methods.registry import register
from methods.sparsity import Density, group_of, groups

if TYPE_CHECKING:
    from torch import Tensor, nn

    from methods.modeling import DecoderLayer

PUBLISHED = 128
"""Columns of a block."""


@register("sparsegpt", title="SparseGPT", reference="https://arxiv.org/abs/2301.00774", family="semi-structured")
@dataclass(frozen=True, kw_only=True)
class SparseGPT(CalibratedPruning[Covariance]):
    """Prune and update column by column by the inverse covariance of the inputs."""

    damping: float = 0.01
    """Added to the diagonal of H, as a share of its mean; ten times more as often as the factorization fails."""
    blocksize: int = PUBLISHED
    """Columns of a block; unstructured, the ones whose weights are compared."""
    true_sequential: bool = False
    """Look anew at what a projection reads when those before it in the block are pruned: query, key and value, output,
    gate and up, down; four passes per block more instead of one."""
    precision: Precision = "float32"
    """In which H is summed and weights are updated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _, width = group_of(self.pattern) or (1, 1)
        if self.blocksize < 1 or self.blocksize % width:
            raise UserError(
                f"sparsegpt.blocksize is {self.blocksize}; with the pattern {self.pattern} it must be a multiple of "
                f"{width}, at least {width}. Use --set sparsegpt.blocksize={max(PUBLISHED // width, 1) * width}"
            )
        if not 0 <= self.damping <= 1:
            raise UserError(f"sparsegpt.damping is {self.damping}, a share between 0 and 1. The published one is 0.01.")

    def work(self, shape: DecoderShape, budget: Budget, tokens: int, training: Training) -> float:
        """Two passes (or five), and about as much as one for the covariances."""
        return (6.0 if self.true_sequential else 3.0) * tokens

    def stages(self, layer: DecoderLayer) -> list[list[list[str]]]:
        """All projections of a block, or one group after the other."""
        return [[group] for group in groups(layer)] if self.true_sequential else super().stages(layer)

    def statistic(self, width: int, device: torch.device) -> Covariance:
        """Sums of x^T x."""
        return Covariance(width, device, precision=self.precision)

    def masks(self, linears: Sequence[nn.Linear], seen: Covariance, density: Density, context: Context) -> list[Tensor]:
        """What stays; the weights are updated in place."""
        H_CC, dead_C = revived(seen.mean())
        U_CC, delta = upper_factor(H_CC, self.damping)
        if delta > 1.001 * self.damping * H_CC.diagonal().mean().item():
            context.note(f"the covariance of some inputs took more damping than sparsegpt.damping={self.damping:g}")
        masks = []
        for linear in linears:
            W_RC = linear.weight.detach().to(H_CC.dtype).masked_fill(dead_C, 0)
            solved = solve(W_RC, U_CC, density, self.blocksize)
            if not solved.error_R.isfinite().all():
                raise overflow()
            linear.weight.copy_(solved.weight_RC)
            masks.append(solved.mask_RC)
        return masks


def revived(H_CC: Tensor) -> tuple[Tensor, Tensor]:
    """H with its mean diagonal where inputs are always zero, and which ones these are, bool [C]."""
    diagonal_C = H_CC.diagonal()
    dead_C = diagonal_C == 0
    return H_CC + torch.diag(dead_C * diagonal_C.mean()), dead_C


def upper_factor(H_CC: Tensor, damping: float) -> tuple[Tensor, float]:
    """U, upper triangular with U^T U = (H + delta I)^-1, and delta (see `damped_cholesky`).

    With rows and columns in reverse order, L L^T = H + delta I; L in the old order is upper triangular, and U = L^-1.
    """
    L_CC, delta = damped_cholesky(H_CC.flip(0, 1), damping)
    identity_CC = torch.eye(len(H_CC), dtype=H_CC.dtype, device=H_CC.device)
    return torch.linalg.solve_triangular(L_CC.flip(0, 1), identity_CC, upper=True), delta


class Solution(NamedTuple):
    """Of one projection."""

    weight_RC: Tensor
    """Zero where nothing is kept."""
    mask_RC: Tensor
    """What is kept, bool."""
    error_R: Tensor
    """(W' - W) (H + delta I) (W' - W)^T of every output."""


def solve(W_RC: Tensor, U_CC: Tensor, density: Density, blocksize: int) -> Solution:
    """The columns one after the other, for all outputs at once."""
    R, C = W_RC.shape
    W_CR = W_RC.T.contiguous()  # a column is read as a piece
    mask_CR, error_R = torch.ones_like(W_CR, dtype=torch.bool), W_CR.new_zeros(R)
    for start in range(0, C, blocksize):
        end = min(start + blocksize, C)
        block = slice(start, end)
        count = density.count(R, end) - (density.count(R, start) if start else 0)
        errors_wR = _solve_block(W_CR[block], U_CC[block, block], mask_CR[block], density, count)
        W_CR[end:] -= U_CC[block, end:].T @ errors_wR
        error_R += errors_wR.square().sum(0)
    return Solution(W_CR.T, mask_CR.T, error_R)


def _solve_block(W_wR: Tensor, U_ww: Tensor, mask_wR: Tensor, density: Density, count: int) -> Tensor:
    """Prune the columns of a block and update those right of each, in place; the errors e of all, [w, R]."""
    scale_w = U_ww.diagonal().square()
    width = density.group[1] if density.group else len(W_wR)
    errors_wR = torch.empty_like(W_wR)
    for i in range(len(W_wR)):
        if i % width == 0:
            mask_wR[i : i + width] = _chosen(W_wR[i : i + width], scale_w[i : i + width], density, count)
        kept_R = W_wR[i] * mask_wR[i]
        errors_wR[i] = (W_wR[i] - kept_R) / U_ww[i, i]
        W_wR[i + 1 :].addr_(U_ww[i, i + 1 :], errors_wR[i], alpha=-1)
        W_wR[i] = kept_R
    return errors_wR


def _chosen(W_mR: Tensor, scale_m: Tensor, density: Density, count: int) -> Tensor:
    """Which weights of a group, or of a block, stay: bool [m, R]."""
    scores_mR = W_mR.square() / scale_m[:, None]
    if density.group:
        return density.mask(scores_mR.T).T
    return density.highest(scores_mR.reshape(1, -1), count).view(scores_mR.shape)
