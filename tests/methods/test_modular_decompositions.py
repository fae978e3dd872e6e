"""MoDeGPT's three decompositions against brute force and the published formulas."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.block_statistics import BlockStatistics
from methods.linalg import ridge_leverage
from methods.modegpt import MoDeGPT, choose_dimensions, nystroem, value_basis
from tests.methods.test_attention_structures import rotated
from tests.methods.test_floor import dense_shape

EVEN = MoDeGPT()


def data(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated columns of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, dtype=torch.float64, generator=generator) * torch.linspace(0.2, 2, columns)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator) @ mixing


# MLP


@given(seed=st.integers(0, 50), width=st.integers(1, 7))
def test_nystroem_is_least_squares(seed: int, width: int) -> None:
    Z, down, n = data(40, 8, seed), data(5, 8, seed + 1), 40
    neurons = torch.randperm(8, generator=torch.Generator().manual_seed(seed))[:width].sort().values
    rest = [i for i in range(8) if i not in neurons.tolist()]
    C = Z.T @ Z / n
    new, delta = nystroem(C, down, neurons, 0)
    assert delta == 0
    expected = torch.linalg.lstsq(Z[:, neurons], Z @ down.T).solution
    torch.testing.assert_close(new.T, expected, rtol=1e-6, atol=1e-8)
    error = (Z[:, neurons] @ new.T - Z @ down.T).square().sum() / n
    inverse = torch.linalg.inv(C[neurons][:, neurons])
    schur = C[rest][:, rest] - C[rest][:, neurons] @ inverse @ C[neurons][:, rest]
    torch.testing.assert_close(error, (down[:, rest] @ schur * down[:, rest]).sum(), rtol=1e-6, atol=1e-8)
    dropped = (Z[:, rest] @ down[:, rest].T).square().sum() / n
    assert error <= dropped + 1e-9


def test_keeping_every_neuron_is_exact_even_where_the_covariance_is_singular() -> None:
    Z, down = data(5, 8), data(3, 8)
    new, _ = nystroem(Z.T @ Z / 5, down, torch.arange(8), 1e-3)
    assert new.equal(down)
    new, delta = nystroem(torch.zeros(8, 8, dtype=torch.float64), down, torch.arange(4), 0)  # dead neurons
    assert new.equal(down[:, :4]) and delta > 0


def test_leverage_against_its_definition() -> None:
    Z = data(30, 6)
    C = Z.T @ Z / 30
    leverage, lam = ridge_leverage(C, 1e-2)
    assert lam == pytest.approx(1e-2 * C.diagonal().mean().item())
    torch.testing.assert_close(leverage, (C @ torch.linalg.inv(C + lam * torch.eye(6))).diagonal())


# Queries and keys


@given(data=st.data(), heads=st.integers(1, 3), P=st.integers(0, 3), S=st.integers(0, 3))
def test_the_chosen_dimensions_are_worth_most(data: st.DataObject, heads: int, P: int, S: int) -> None:
    if P + S == 0 or (S == 0 and P == 0):
        return
    width = 2 * data.draw(st.integers(1, P)) if S == 0 else data.draw(st.integers(1, 2 * P + S))
    score = st.integers(0, 9).map(float)
    pairs, singles = (
        torch.tensor(data.draw(st.lists(st.lists(score, min_size=k, max_size=k), min_size=heads, max_size=heads)))
        for k in (P, S)
    )
    kept = choose_dimensions(pairs, singles, width)
    assert kept.shape == (heads, width)

    def worth(head: int, chosen: list[int]) -> float:
        """A pair counts half for each of its dimensions."""
        return sum(pairs[head, i % P].item() / 2 if i < 2 * P else singles[head, i - 2 * P].item() for i in chosen)

    for row in kept.tolist():
        assert row == sorted(set(row)) and all((i + P in row) if i < P else True for i in row)
        assert sum(i < 2 * P for i in row) == sum(i < 2 * P for i in kept[0].tolist())
    best = -1.0
    for p in range(P + 1):  # brute force: for every number of pairs, every head's best subset
        if 0 <= width - 2 * p <= S:
            tops = [sum(sorted(pairs[j].tolist())[P - p :]) for j in range(heads)]
            tops += [sum(sorted(singles[j].tolist())[S - (width - 2 * p) :]) for j in range(heads)]
            best = max(best, sum(tops))
    assert sum(worth(head, row) for head, row in enumerate(kept.tolist())) == pytest.approx(best)


def found(query_NHh: torch.Tensor, key_NJh: torch.Tensor) -> BlockStatistics:
    nothing = torch.zeros(())
    return BlockStatistics(query_NHh.square().mean(0), key_NJh.square().mean(0), *[nothing] * 5)


def test_the_energy_of_pairs_does_not_depend_on_positions() -> None:
    """Each token anywhere: what a rotation moves from one dimension to the other stays in the pair."""
    shape = dense_shape("llama-gqa")
    query, key = data(50, 32).view(1, 50, 4, 8), data(50, 16, 1).view(1, 50, 2, 8)
    turned = [rotated(x, 8, 10000.0)[0] for x in (query, key)]
    by_energy = MoDeGPT(pair_score="energies")
    before, after = (by_energy.scores(found(*pair), shape)[0] for pair in ((query[0], key[0]), turned))
    torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-9)
    before, after = (EVEN.scores(found(*pair), shape)[0] for pair in ((query[0], key[0]), turned))
    assert not torch.allclose(before, after, rtol=1e-2)  # the published score holds for what the projections give
    for j in range(2):
        for p in range(4):
            mine = [
                query[0, :, i, d].square().mean() * key[0, :, j, d].square().mean()
                for i in (2 * j, 2 * j + 1)
                for d in (p, p + 4)
            ]
            assert before[j, p].item() == pytest.approx(sum(mine).item())


# Values and outputs


def root(C: torch.Tensor) -> torch.Tensor:
    eigenvalues, vectors = torch.linalg.eigh(C)
    return vectors @ (vectors * eigenvalues.clamp_min(0).sqrt()).T


@given(seed=st.integers(0, 50), r=st.integers(1, 4), joint=st.booleans())
def test_the_value_basis_is_the_truncated_svd(seed: int, r: int, joint: bool) -> None:
    """Against the formula with C_x^1/2 written out; the error is the tail of the singular values and the least."""
    X, Wv, Wo = data(30, 6, seed), data(6, 4, seed + 1), data(4, 12, seed + 2)
    M = Wo if joint else torch.eye(4, dtype=torch.float64)
    C_x = X.T @ X / 30
    inward, outward = value_basis(Wv.T @ C_x @ Wv, M, r)
    S = root(C_x)
    U, sigma, Vh = torch.linalg.svd(S @ Wv @ M, full_matrices=False)
    published = torch.linalg.inv(S) @ U[:, :r] * sigma[:r] @ Vh[:r]
    torch.testing.assert_close(Wv @ inward @ outward @ M, published, rtol=1e-5, atol=1e-7)
    error = (X @ (Wv @ inward @ outward @ M - Wv @ M)).square().sum() / 30
    torch.testing.assert_close(error, sigma[r:].square().sum(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(  # the new values are as long as each other, as with S^-1 U_r
        inward.T @ Wv.T @ C_x @ Wv @ inward, torch.eye(r, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )
    other = data(4, 2 * r, seed + 3)
    assert error <= (X @ Wv @ (other[:, :r] @ other[:, r:].T - torch.eye(4)) @ M).square().sum() / 30 + 1e-9
    if r == 4:
        torch.testing.assert_close(inward @ outward, torch.eye(4, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_the_joint_basis_is_better_for_the_output_and_neither_fails_without_rank() -> None:
    C, M = data(30, 6).T @ data(30, 6), data(6, 20, 1)

    def error(inward: torch.Tensor, outward: torch.Tensor) -> float:
        rest = (inward @ outward - torch.eye(6)) @ M
        return (rest.T @ C @ rest).trace().item()

    joint, value = error(*value_basis(C, M, 3)), error(*value_basis(C, torch.eye(6, dtype=M.dtype), 3))
    assert joint < value
    thin = data(1, 6).T @ data(1, 6)
    for poor, mixed in ((thin, M), (0 * C, M), (C, 0 * M)):
        assert all(part.isfinite().all() for part in value_basis(poor, mixed, 3))
    for rank in (1, 2):  # no direction is blown up of which the values say nothing
        poor = data(rank, 6).T @ data(rank, 6)
        inward, outward = value_basis(poor, torch.eye(6, dtype=M.dtype), 3)
        assert inward.abs().max() < 10 and not inward[:, rank:].any() and outward[rank:].abs().max() < 1e-12
    rest = (torch.linalg.multi_dot(value_basis(thin, M, 3)) - torch.eye(6)) @ M
    assert (rest.T @ thin @ rest).trace().abs() < 1e-9 * (M.T @ thin @ M).trace()
