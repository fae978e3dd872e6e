"""Costs and updates of rows and columns against Optimal Brain Surgeon on the whole Kronecker product."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from methods.errors import UserError
from methods.kfac import Factors
from methods.kronecker_surgery import Surgery, Update, write
from methods.live_parts import Part

R, C = 6, 8
DAMP_G, DAMP_A = 0.02, 0.05
ROWS, COLUMNS = torch.tensor([1, 4]), torch.tensor([0, 3, 7])
NONE = torch.tensor([], dtype=torch.int64)


def covariance(width: int) -> Tensor:
    x = torch.randn(3 * width, width, dtype=torch.float64)
    return x.T @ x / len(x)


def surgery(seed: int = 0, damp_g: float = DAMP_G, damp_a: float = DAMP_A) -> Surgery:
    torch.manual_seed(seed)
    return Surgery(torch.randn(R, C, dtype=torch.float64), covariance(R), covariance(C), damp_g, damp_a)


def damped(M: Tensor, share: float) -> Tensor:
    return M + share * M.diagonal().mean() * torch.eye(len(M), dtype=M.dtype)


def product(one: Surgery) -> Tensor:
    """G' kron A'."""
    return torch.kron(damped(one.outputs_RR, DAMP_G), damped(one.inputs_CC, DAMP_A))


def gone(rows: Tensor, columns: Tensor) -> Tensor:
    """True where a weight goes, shape [R, C]."""
    flags = torch.zeros(R, C, dtype=torch.bool)
    flags[rows] = True
    flags[:, columns] = True
    return flags


def brain_surgeon(W: Tensor, F: Tensor, flags: Tensor) -> Tensor:
    """w - F^-1[:, q] (F^-1[q, q])^-1 w_q."""
    inverse, q, w = torch.linalg.inv(F), flags.flatten(), W.flatten()
    return (w - inverse[:, q] @ torch.linalg.solve(inverse[q][:, q], w[q])).view_as(W)


def quadratic(change: Tensor, F: Tensor) -> float:
    return float(change.flatten() @ F @ change.flatten()) / 2


@pytest.mark.parametrize(("rows", "columns"), [(ROWS, COLUMNS), (ROWS, NONE), (NONE, COLUMNS), (NONE, NONE)])
def test_joint_removal_is_optimal_brain_surgeon_on_the_product(rows: Tensor, columns: Tensor) -> None:
    one = surgery()
    found, flags = one.remove(rows, columns, "joint", 0), gone(rows, columns)
    torch.testing.assert_close(found, brain_surgeon(one.weight_RC, product(one), flags), rtol=1e-12, atol=1e-13)
    assert not found[flags].any() and found[~flags].all()
    gradient = product(one) @ (found - one.weight_RC).flatten()
    assert gradient.view(R, C)[~flags].abs().max() < 1e-12


def test_costs_of_one_are_what_its_removal_does() -> None:
    one = surgery()
    rows, columns = one.costs()
    G, A = one.outputs_RR, one.inputs_CC
    for r in range(R):  # the other factor is not damped here, as published
        change = one.remove(torch.tensor([r]), NONE, "joint", 0) - one.weight_RC
        assert float(rows[r]) == pytest.approx(quadratic(change, torch.kron(damped(G, DAMP_G), A)))
    for c in range(C):
        change = one.remove(NONE, torch.tensor([c]), "sum", 0) - one.weight_RC
        assert float(columns[c]) == pytest.approx(quadratic(change, torch.kron(G, damped(A, DAMP_A))))


@pytest.mark.parametrize("seed", range(8))
def test_joint_is_better_than_the_sum_and_that_than_nothing(seed: int) -> None:
    one, flags = surgery(seed), gone(ROWS, COLUMNS)
    joint, total = (one.remove(ROWS, COLUMNS, update, 0) for update in ("joint", "sum"))  # type: ignore[arg-type]
    masked = one.weight_RC.masked_fill(flags, 0)
    costs = [quadratic(W - one.weight_RC, product(one)) for W in (joint, total, masked)]
    assert costs == sorted(costs) and costs[0] < costs[1] < costs[2]
    assert not total[flags].any()


def test_the_sum_is_of_both_changes_of_the_original() -> None:
    one = surgery()
    by_rows, by_columns = one.remove(ROWS, NONE, "sum", 0), one.remove(NONE, COLUMNS, "sum", 0)
    expected = (by_rows + by_columns - one.weight_RC).masked_fill(gone(ROWS, COLUMNS), 0)
    torch.testing.assert_close(one.remove(ROWS, COLUMNS, "sum", 0), expected)
    assert one.remove(ROWS, NONE, "sum", 0).equal(one.remove(ROWS, NONE, "joint", 0))


@pytest.mark.parametrize("update", ["sum", "joint"])
def test_a_few_at_a_time(update: Update) -> None:
    """By loops: each part's correction by itself, of the original or of what the former ones left."""
    one = surgery()
    P, expected = torch.linalg.inv(damped(one.inputs_CC, DAMP_A)), one.weight_RC.clone()
    for part in ([0, 3], [7]):
        base = one.weight_RC if update == "sum" else expected
        expected = expected - base[:, part] @ torch.linalg.inv(P[part][:, part]) @ P[part]
    expected[:, COLUMNS] = 0
    torch.testing.assert_close(one.remove(NONE, COLUMNS, update, 2), expected)
    assert one.remove(NONE, COLUMNS, update, 3).equal(one.remove(NONE, COLUMNS, update, 0))
    assert not torch.allclose(one.remove(NONE, COLUMNS, update, 1), one.remove(NONE, COLUMNS, update, 0))


def test_white_inputs_leave_only_the_outputs_to_decide() -> None:
    torch.manual_seed(0)
    W, G = torch.randn(R, C, dtype=torch.float64), covariance(R)
    one = Surgery(W, G, torch.eye(C, dtype=torch.float64), DAMP_G, 0.0)
    expected = W.square().sum(1) / torch.linalg.inv(damped(G, DAMP_G)).diagonal() / 2
    torch.testing.assert_close(one.costs()[0], expected)
    assert one.remove(NONE, COLUMNS, "joint", 0).equal(W.masked_fill(gone(NONE, COLUMNS), 0))


def test_white_gradients_make_column_removal_least_squares() -> None:
    torch.manual_seed(0)
    W, X = torch.randn(R, C, dtype=torch.float64), torch.randn(40, C, dtype=torch.float64)
    one = Surgery(W, torch.eye(R, dtype=torch.float64), X.T @ X / 40, 0.0, 1e-13)
    kept = ~gone(NONE, COLUMNS)[0]
    expected = torch.linalg.lstsq(X[:, kept], X @ W.T).solution.T
    torch.testing.assert_close(one.remove(NONE, COLUMNS, "joint", 0)[:, kept], expected, rtol=1e-9, atol=1e-9)


@given(scale=st.floats(1e-6, 1e6))
def test_only_the_product_of_the_factors_matters(scale: float) -> None:
    one = surgery()
    other = Surgery(one.weight_RC, one.outputs_RR * scale, one.inputs_CC / scale, DAMP_G, DAMP_A)
    for mine, its in zip(one.costs(), other.costs(), strict=True):
        torch.testing.assert_close(mine, its)
    removed = (each.remove(ROWS, COLUMNS, "sum", 0) for each in (one, other))
    torch.testing.assert_close(*removed, rtol=1e-6, atol=1e-9)


def test_what_has_no_curvature_costs_nothing() -> None:
    one = surgery()
    for factor, place in ((one.outputs_RR, 2), (one.inputs_CC, 5)):
        factor[place] = 0
        factor[:, place] = 0
    rows, columns = one.costs()
    assert rows[2] == columns[5] == 0 and (rows > 0).sum() == R - 1 and (columns > 0).sum() == C - 1
    nothing = Surgery(one.weight_RC, torch.zeros(R, R).double(), torch.zeros(C, C).double(), DAMP_G, DAMP_A)
    assert not any(costs.any() for costs in nothing.costs())
    assert nothing.remove(ROWS, COLUMNS, "sum", 0).equal(one.weight_RC.masked_fill(gone(ROWS, COLUMNS), 0))


def test_singular_factors_take_more_damping_and_say_so() -> None:
    x = torch.randn(2, C, dtype=torch.float64)
    one = surgery(damp_a=0.0)
    singular = Surgery(one.weight_RC, one.outputs_RR, x.T @ x, DAMP_G, 0.0)
    singular.costs(), one.costs()
    assert singular.strained and not one.strained
    assert singular.remove(ROWS, COLUMNS, "joint", 0).isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_is_operated_on_without_what_is_dead(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(C, R, bias, dtype=torch.float64).requires_grad_(False)
    alive = Part(torch.arange(R) != 2, (torch.arange(C) != 1) & (torch.arange(C) != 6))
    factors = Factors(covariance(R), covariance(C + bias))
    one = Surgery.of(linear, alive, factors, damp_g=DAMP_G, damp_a=DAMP_A)
    rows, columns = [0, 1, 3, 4, 5], [0, 2, 3, 4, 5, 7] + [C] * bias
    whole = linear.weight if linear.bias is None else torch.cat([linear.weight, linear.bias[:, None]], 1)
    assert one.weight_RC.equal(whole[rows][:, columns])
    assert one.outputs_RR.equal(factors.outputs_RR[rows][:, rows])
    assert one.inputs_CC.equal(factors.inputs_CC[columns][:, columns])
    before, new = linear.weight.clone(), torch.randn_like(one.weight_RC)
    write(linear, alive, new)
    assert linear.weight[rows][:, columns[:6]].equal(new[:, :6]) and linear.weight[2].equal(before[2])
    assert linear.weight[:, [1, 6]].equal(before[:, [1, 6]])
    assert linear.bias is None or linear.bias[rows].equal(new[:, -1])
    with pytest.raises(UserError, match="overflows"):
        write(linear, alive, new / 0)
