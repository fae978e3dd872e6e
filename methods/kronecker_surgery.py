"""Optimal Brain Surgeon for rows and columns of a weight W [R, C] whose curvature is F = G kron A (LLM Surgeon).

With G' = G + damp_g mean(diag G) I, A' likewise, and P the inverses of those (van der Ouderaa et al., their structured
case; W has its bias as last column):

    cost of row r       1/2 (W_r A W_r^T) / [P_G]_rr
    cost of column c    1/2 (W_c^T G W_c) / [P_A]_cc
    removing rows Q     D_Q(W) = - [P_G]_:Q ([P_G]_QQ)^-1 W_Q            (A cancels; columns: the same transposed)

`joint` removes rows, then columns of what that left: the exact minimum of 1/2 vec(D)^T F' vec(D) under the constraint
that all of them vanish. `sum` adds what either does to the original W, as the published script for rows and columns
does. Rows whose gradient and columns whose input is zero on all tokens cost nothing.
"""

# Shape suffixes: R rows, C columns, W width of a factor.

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from methods.errors import overflow
from methods.lazy import torch
from methods.linalg import damped_cholesky, ridge_solve

if TYPE_CHECKING:
    from torch import Tensor, nn

    from methods.kfac import Factors
    from methods.live_parts import Part

Update = Literal["sum", "joint"]


@dataclass(frozen=True)
class Surgery:
    """On one weight: it and its curvature in fp64, dead rows and columns left out."""

    weight_RC: Tensor
    outputs_RR: Tensor
    """G."""
    inputs_CC: Tensor
    """A."""
    damp_g: float
    damp_a: float

    @classmethod
    def of(cls, linear: nn.Linear, alive: Part, factors: Factors, *, damp_g: float, damp_a: float) -> Surgery:
        """On what is alive of a linear; a bias becomes the last column."""
        weight_RC, columns = linear.weight, alive.columns
        if linear.bias is not None:
            weight_RC = torch.cat([weight_RC, linear.bias[:, None]], 1)
            columns = torch.nn.functional.pad(columns, (0, 1), value=True)
        parts = [
            (weight_RC, alive.rows, columns),
            (factors.outputs_RR, alive.rows, alive.rows),
            (factors.inputs_CC, columns, columns),
        ]
        living = [matrix[rows][:, across].to(weight_RC.device).double() for matrix, rows, across in parts]
        return cls(*living, damp_g=damp_g, damp_a=damp_a)

    @cached_property
    def _rows(self) -> tuple[Tensor, bool]:
        return _damped_inverse(self.outputs_RR, self.damp_g)

    @cached_property
    def _columns(self) -> tuple[Tensor, bool]:
        return _damped_inverse(self.inputs_CC, self.damp_a)

    @property
    def strained(self) -> bool:
        """Whether a factor could only be inverted with more damping than asked for."""
        return self._rows[1] or self._columns[1]

    def costs(self) -> tuple[Tensor, Tensor]:
        """Of every row [R] and column [C]: by how much the loss grows (in the unit of the factors) when it
        alone goes and the others make up.

        Raises:
            UserError: one is not finite.
        """
        W_RC, G_RR, A_CC = self.weight_RC, self.outputs_RR, self.inputs_CC
        row_R = ((W_RC @ A_CC) * W_RC).sum(1) / self._rows[0].diagonal() / 2
        column_C = ((G_RR @ W_RC) * W_RC).sum(0) / self._columns[0].diagonal() / 2
        if not (row_R.isfinite().all() and column_C.isfinite().all()):
            raise overflow()
        return row_R * (G_RR.diagonal() > 0), column_C * (A_CC.diagonal() > 0)

    def remove(self, rows: Tensor, columns: Tensor, update: Update, at_once: int) -> Tensor:
        """The weight without some rows and columns, whose places are zero.

        Args:
            rows, columns: their numbers, int64; may be empty.
            at_once: so many of either share one inverse of [P]_QQ, 0 for all; the correlation of others is ignored.
        """
        result_RC = self.weight_RC.clone()
        for part in _parts(rows, at_once):
            result_RC += correction(result_RC if update == "joint" else self.weight_RC, self._rows[0], part)
        for part in _parts(columns, at_once):
            base_RC = result_RC if update == "joint" else self.weight_RC
            result_RC += correction(base_RC.mT, self._columns[0], part).mT
        result_RC[rows] = 0
        result_RC[:, columns] = 0
        return result_RC


def correction(W_RC: Tensor, inverse_RR: Tensor, rows: Tensor) -> Tensor:
    """D_Q(W), shape [R, C]: minus the rows themselves, and what the others do about it."""
    across_RQ = inverse_RR[:, rows]
    # Without damping of G or A rounding may have made this indefinite.
    return -across_RQ @ ridge_solve(across_RQ[rows], W_RC[rows], 0.0)[0]


def _parts(places: Tensor, at_once: int) -> list[Tensor]:
    return [*places.split(at_once or len(places))] if len(places) else []


def _damped_inverse(factor_WW: Tensor, damp: float) -> tuple[Tensor, bool]:
    """The inverse, and whether it took more damping than asked for."""
    root_WW, delta = damped_cholesky(factor_WW, damp)
    asked = damp * (factor_WW.diagonal().mean().item() or 1.0)
    return torch.cholesky_inverse(root_WW), delta > asked


def write(linear: nn.Linear, alive: Part, weight_RC: Tensor) -> None:
    """Put what is alive of a weight, and of its bias, where `Surgery.of` got it, in place.

    Raises:
        UserError: it is not finite.
    """
    if not weight_RC.isfinite().all():
        raise overflow()
    weight_RC = weight_RC.to(linear.weight.dtype)
    columns = alive.columns.nonzero()[:, 0].to(linear.weight.device)
    rows = alive.rows.nonzero()[:, 0].to(linear.weight.device)
    linear.weight[rows[:, None], columns] = weight_RC[:, : len(columns)]
    if linear.bias is not None:
        linear.bias[rows] = weight_RC[:, -1]
