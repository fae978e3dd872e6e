"""Covariances, damping and ridge regression against definitions written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.errors import UserError
from methods.linalg import LEAST_DAMPING, Covariance, damped_cholesky, ridge_solve

CPU = torch.device("cpu")


def rows(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(cuts=st.lists(st.integers(0, 30), max_size=4), seed=st.integers(0, 9))
def test_a_covariance_is_the_mean_outer_product_however_it_comes(cuts: list[int], seed: int) -> None:
    x = rows(30, 4, seed)
    covariance = Covariance(4, CPU)
    for part in x.tensor_split(sorted(cuts)):
        covariance.add(part)
    assert covariance.tokens == 30
    torch.testing.assert_close(covariance.mean(), sum(torch.outer(row, row) for row in x) / 30)


def test_heads_are_counted_apart_and_fp32_is_near() -> None:
    x = rows(50, 6).view(50, 2, 3)
    covariance, single = Covariance(3, CPU, heads=2), Covariance(3, CPU, precision="float32")
    covariance.add(x.transpose(0, 1))
    single.add(x[:, 1])
    assert covariance.tokens == 50
    for head in range(2):
        torch.testing.assert_close(covariance.mean()[head], x[:, head].T @ x[:, head] / 50)
    assert single.mean().dtype == torch.float32
    torch.testing.assert_close(single.mean().double(), covariance.mean()[1], rtol=1e-5, atol=1e-6)


def test_too_few_tokens_and_overflows_are_refused() -> None:
    covariance = Covariance(4, CPU)
    covariance.add(rows(3, 4))
    with pytest.raises(UserError, match=r"3 calibration tokens cannot span 4 dimensions.*at least 4"):
        covariance.require_rank(4)
    covariance.require_rank(3)
    with pytest.raises(UserError, match="nothing to measure"):
        Covariance(4, CPU).mean()
    covariance.add(torch.full((2, 4), float("inf")))
    with pytest.raises(UserError, match="overflows on the calibration text"):
        covariance.mean()


@given(rank=st.integers(0, 6), ridge=st.sampled_from([0.0, 1e-9, 1e-3]), seed=st.integers(0, 9))
def test_every_covariance_is_factored_with_little_damping(rank: int, ridge: float, seed: int) -> None:
    x = rows(rank, 6, seed)
    C = x.T @ x / max(rank, 1)
    scale = C.diagonal().mean().item() or 1
    factor, delta = damped_cholesky(C, ridge)
    torch.testing.assert_close(factor @ factor.T, C + delta * torch.eye(6, dtype=C.dtype), rtol=1e-9, atol=1e-12)
    assert ridge * scale <= delta <= max(ridge, 1e-9) * scale
    assert not factor.triu(1).any()


def test_damping_is_what_was_asked_where_that_is_enough_and_grows_tenfold_where_not() -> None:
    C = torch.diag(torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64))
    assert damped_cholesky(C, 0)[1] == 0 and damped_cholesky(C, 0.25)[1] == 0.5
    C[1, 1] = 0
    assert damped_cholesky(C, 0)[1] == pytest.approx(LEAST_DAMPING * 5 / 3)
    C[1, 1] = -0.01  # rounding may do that, on a smaller scale
    assert damped_cholesky(C, 1e-5)[1] == pytest.approx(1e-2 * 4.99 / 3)
    for hopeless in (-10.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="cannot be factored, however much"):
            damped_cholesky(C.fill_diagonal_(hopeless), 0)


@given(ridge=st.floats(1e-6, 0.5), seed=st.integers(0, 9))
def test_ridge_solve_minimises_its_penalised_error(ridge: float, seed: int) -> None:
    """The solution of the normal equations of least squares on rows to which sqrt(n delta) I was added."""
    x, y = rows(20, 4, seed), rows(20, 2, seed + 100)
    solution, delta = ridge_solve(x.T @ x / 20, x.T @ y / 20, ridge)
    padded = torch.cat([x, (20 * delta) ** 0.5 * torch.eye(4, dtype=x.dtype)])
    expected = torch.linalg.lstsq(padded, torch.cat([y, torch.zeros(4, 2, dtype=y.dtype)])).solution
    torch.testing.assert_close(solution, expected, rtol=1e-6, atol=1e-9)
