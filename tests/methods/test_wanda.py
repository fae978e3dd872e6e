"""Wanda against loops over the whole model, its invariances, and where its mask is the best there is."""

from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import methods
from methods.base import Budget, Context
from methods.sparsity import Density
from methods.wanda import Energy, scores
from tests.methods.pruned import best, naive, of_groups, share_of
from tests.methods.test_sparsity import pruned
from tests.methods.tiny import CONFIGS, RandomCalibration, logits, tiny_model

TWO_OF_FOUR, CPU = Density(0.5, (2, 4)), torch.device("cpu")


def energy(X: Tensor) -> Energy:
    found = Energy(X.shape[1], CPU)
    found.add(X)
    return found


def mask(W: Tensor, X: Tensor, density: Density = TWO_OF_FOUR) -> Tensor:
    return density.mask(scores(W, energy(X)))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_scores_are_sizes_times_norms() -> None:
    W, X = normal(5, 8, seed=0), normal(30, 8, seed=1)
    expected = torch.tensor([[abs(W[i, j]) * sum(x**2 for x in X[:, j]) ** 0.5 for j in range(8)] for i in range(5)])
    found = scores(W, energy(X))
    torch.testing.assert_close(found / found[0, 0], expected.to(W) / expected[0, 0].to(W))


@pytest.mark.parametrize("pattern", ["2:4", "5:8", "unstructured"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_method_equals_the_naive_one(name: str, pattern: str, tmp_path: Path) -> None:
    """Inputs are those of a network whose earlier blocks are pruned, a block's own projections not yet."""
    calibration = RandomCalibration(samples=4, padded=3)
    small, _ = pruned("wanda", tiny_model(name), tmp_path, calibration, ratio=0.6, pattern=pattern)
    dense = tiny_model(name)
    share = share_of(dense, 0.6)

    def choose(W: Tensor, X: Tensor) -> Tensor:
        S = W.abs() * X.square().sum(0).sqrt()
        if pattern != "unstructured":
            n, m = map(int, pattern.split(":"))
            return W * of_groups(S, n, m)
        each, rest = divmod(round(share * W.numel()), len(W))
        keep = torch.zeros_like(W)
        for i, row in enumerate(S.tolist()):
            keep[i, sorted(best(row, each + (i < rest)))] = 1
        return W * keep

    assert logits(small).equal(logits(naive(dense, calibration, choose)))
    assert (logits(small) - logits(tiny_model(name))).abs().max() > 1e-2


def test_inputs_of_equal_norm_leave_magnitude() -> None:
    W, X = normal(6, 12, seed=2), normal(40, 12, seed=3)
    assert mask(W, X / X.norm(dim=0)).equal(TWO_OF_FOUR.mask(W.abs()))


@given(seed=st.integers(0, 99))
def test_moving_scale_from_weights_to_inputs_changes_nothing(seed: int) -> None:
    """Which changes what magnitude keeps."""
    W, X, c = normal(6, 12, seed=seed), normal(40, 12, seed=seed + 100), normal(12, seed=seed + 200).exp()
    assert mask(W / c, X * c).equal(mask(W, X))
    assert not TWO_OF_FOUR.mask((W / c.square()).abs()).equal(TWO_OF_FOUR.mask(W.abs()))


@given(seed=st.integers(0, 99))
def test_the_scale_of_an_output_does_not_matter(seed: int) -> None:
    W, X, c = normal(6, 12, seed=seed), normal(40, 12, seed=seed + 100), normal(6, 1, seed=seed + 200).exp()
    for density in (TWO_OF_FOUR, Density(0.5, None)):
        assert mask(W * c, X, density).equal(mask(W, X, density))


@given(cuts=st.lists(st.integers(0, 30), max_size=4), seed=st.integers(0, 9))
def test_neither_batches_nor_the_order_of_tokens_matter(cuts: list[int], seed: int) -> None:
    X = normal(30, 4, seed=seed)
    found = Energy(4, CPU)
    for part in X[torch.randperm(30, generator=torch.Generator().manual_seed(seed))].tensor_split(sorted(cuts)):
        found.add(part)
    torch.testing.assert_close(found.norm(torch.float64), X.square().mean(0).sqrt())


def test_batches_of_the_calibration_do_not_matter(tmp_path: Path) -> None:
    """To the last bit of the masks, though not of the sums."""
    method, budget, results = methods.configure("wanda", {}), Budget(ratio=0.5, basis="block", tolerance=0.2), []
    for size in (1, 5, 12):
        context = Context(scratch=tmp_path, batch_size=size)
        model = method.compress(tiny_model("qwen3"), None, budget, RandomCalibration(), context)  # type: ignore[arg-type]
        results.append(logits(model))
    assert results[0].equal(results[1]) and results[0].equal(results[2])


def orthogonal(tokens: int, width: int, seed: int) -> Tensor:
    """Columns that are orthogonal, of different norms."""
    return torch.linalg.qr(normal(tokens, width, seed=seed))[0] * normal(width, seed=seed + 1).exp()


@pytest.mark.parametrize("seed", range(5))
def test_for_orthogonal_inputs_no_mask_is_better(seed: int) -> None:
    W, X = normal(3, 8, seed=seed), orthogonal(20, 8, seed + 10)
    pairs = list(combinations(range(4), 2))
    for row, found in zip(W, mask(W, X), strict=True):

        def error(chosen: tuple[tuple[int, int], ...], row: Tensor = row) -> float:
            keep = torch.zeros(8, dtype=torch.bool)
            keep[[4 * group + place for group, pair in enumerate(chosen) for place in pair]] = True
            return (X @ (row * ~keep)).square().sum().item()

        least = min(product(pairs, repeat=2), key=error)
        assert set(found.nonzero()[:, 0].tolist()) == {4 * g + place for g, pair in enumerate(least) for place in pair}


def test_squares_of_half_precision_do_not_overflow() -> None:
    inputs = torch.tensor([[1000.0, 2000.0, 300.0, 1e-4]]).half()
    torch.testing.assert_close(energy(inputs).norm(torch.float32), inputs[0].float())


def test_weights_of_a_dominant_input_survive() -> None:
    W, X = normal(50, 16, seed=4), normal(40, 16, seed=5)
    X[:, 6] *= 1e4
    assert mask(W, X)[:, 6].all() and not mask(W, normal(40, 16, seed=5))[:, 6].all()
