"""SparseGPT against the textbook's optimal brain surgeon row by row, least squares, and what must not matter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import methods
from methods.base import Budget, Context
from methods.errors import UserError
from methods.sparsegpt import revived, solve, upper_factor
from methods.sparsity import Density
from tests.methods.pruned import best, naive, of_groups, share_of
from tests.methods.test_sparsity import pruned
from tests.methods.test_wanda import mask, normal, orthogonal
from tests.methods.tiny import CONFIGS, RandomCalibration, logits, tiny_model

TWO_OF_FOUR = Density(0.5, (2, 4))


def surgeon(
    W: Tensor,
    H: Tensor,
    group: tuple[int, int] | None,
    share: float = 0.5,
    block: int = 128,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights and mask: every column in turn, by an explicit inverse of what is left of H.

    Args:
        keep: the mask, where it is not to be chosen.
    """
    W, (R, C) = W.clone(), W.shape
    inverse = [torch.linalg.inv(H[i:, i:]) for i in range(C)]
    chosen = torch.ones(R, C, dtype=torch.bool)
    total = 0
    for i in range(C):
        width = group[1] if group else block
        if i % width == 0:
            end = min(i + width, C)
            scores = torch.stack([W[:, j].square() / inverse[j][0, 0] for j in range(i, end)], 1)
            if group:
                chosen[:, i:end] = of_groups(scores, *group)
            else:
                count, total = round(share * R * end) - total, round(share * R * end)
                places = best(scores.T.flatten().tolist(), count)  # by columns, as ties are told apart
                flat = torch.tensor([place in places for place in range(scores.numel())])
                chosen[:, i:end] = flat.view(end - i, R).T
            if keep is not None:
                chosen[:, i:end] = keep[:, i:end]
        for row in range(R):
            if not chosen[row, i]:
                W[row, i:] -= W[row, i] / inverse[i][0, 0] * inverse[i][0]
                W[row, i] = 0
    return W, chosen


def problem(R: int = 6, C: int = 16, N: int = 60, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, correlated inputs, and their damped covariance."""
    X = normal(N, C, seed=seed) @ normal(C, C, seed=seed + 1) + 0.5
    H = X.T @ X / N
    return normal(R, C, seed=seed + 2), X, H + 0.01 * H.diagonal().mean() * torch.eye(C, dtype=H.dtype)


def solved(W: Tensor, H: Tensor, density: Density = TWO_OF_FOUR, blocksize: int = 128) -> Any:
    U, delta = upper_factor(H, 0)
    assert delta == 0
    return solve(W, U, density, blocksize)


def test_the_factor_is_that_of_the_inverse() -> None:
    _, _, H = problem()
    U, delta = upper_factor(H, 0.01)
    assert U.tril(-1).abs().max() == 0 and delta == pytest.approx(0.01 * H.diagonal().mean().item())
    damped = H + delta * torch.eye(16, dtype=H.dtype)
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(damped))
    torch.testing.assert_close(U, torch.linalg.cholesky(torch.linalg.inv(damped), upper=True))


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 99),
    group=st.sampled_from([(2, 4), (1, 4), (4, 8), (3, 16)]),
    blocksize=st.sampled_from([16, 32, 128]),
)
def test_groups_equal_the_surgeon(seed: int, group: tuple[int, int], blocksize: int) -> None:
    W, _, H = problem(C=48, N=90, seed=seed)
    found = solved(W, H, Density(group[0] / group[1], group), blocksize)
    weight, chosen = surgeon(W, H, group)
    assert found.mask_RC.equal(chosen)
    torch.testing.assert_close(found.weight_RC, weight, rtol=1e-8, atol=1e-10)
    assert (found.weight_RC != 0).equal(chosen)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), share=st.floats(0.1, 0.9), blocksize=st.sampled_from([5, 16, 100]))
def test_without_groups_blocks_equal_the_surgeon(seed: int, share: float, blocksize: int) -> None:
    W, _, H = problem(C=24, seed=seed)
    found = solved(W, H, Density(share, None), blocksize)
    weight, chosen = surgeon(W, H, None, share, blocksize)
    assert found.mask_RC.equal(chosen) and int(chosen.sum()) == round(share * W.numel())
    torch.testing.assert_close(found.weight_RC, weight, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("pattern", "sequential"), [("2:4", False), ("2:4", True), ("unstructured", False)])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_method_equals_the_naive_one(name: str, sequential: bool, pattern: str, tmp_path: Path) -> None:
    calibration, dense = RandomCalibration(samples=4, padded=3), tiny_model(name)
    fields = {"pattern": pattern, "true_sequential": str(sequential).lower(), "precision": "float64"}
    small, context = pruned("sparsegpt", tiny_model(name), tmp_path, calibration, ratio=0.6, **fields)
    group = None if pattern == "unstructured" else (2, 4)
    share = share_of(dense, 0.6)

    def choose(W: Tensor, X: Tensor) -> Tensor:
        H = X.T @ X / len(X)
        dead = H.diagonal() == 0
        H = H + torch.diag(dead * H.diagonal().mean())
        H = H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
        return surgeon(W * ~dead, H, group, share)[0]

    expected = logits(naive(dense, calibration, choose, sequential))
    torch.testing.assert_close(logits(small), expected, rtol=1e-6, atol=1e-7)
    assert not any("damping" in note for note in context.notes)


def test_looking_anew_makes_a_difference_and_fp32_is_near(tmp_path: Path) -> None:
    results = {}
    for sequential in ("true", "false"):
        for precision in ("float64", "float32"):
            fields = {"true_sequential": sequential, "precision": precision}
            results[sequential, precision] = logits(pruned("sparsegpt", tiny_model("qwen2"), tmp_path, **fields)[0])
        torch.testing.assert_close(results[sequential, "float32"], results[sequential, "float64"], rtol=1e-2, atol=1e-2)
    assert (results["true", "float64"] - results["false", "float64"]).abs().max() > 0.01


def change(X: Tensor, W: Tensor, new: Tensor) -> float:
    return (X @ (new - W).T).square().sum().item()


@pytest.mark.parametrize("seed", range(5))
def test_errors_are_in_the_order_that_theory_says(seed: int) -> None:
    """Least squares on its mask < SparseGPT < Wanda's mask with the same updates < Wanda < magnitude."""
    W, X, H = problem(R=40, C=32, N=400, seed=100 * seed)
    found = solved(W, H)
    least = torch.zeros_like(W)
    for row, kept in enumerate(found.mask_RC):
        least[row, kept] = torch.linalg.lstsq(X[:, kept], X @ W[row]).solution
    updated, _ = surgeon(W, H, (2, 4), keep=mask(W, X))
    order = [least, found.weight_RC, updated, W * mask(W, X), W * TWO_OF_FOUR.mask(W.abs())]
    errors = [change(X, W, new) for new in order]
    assert errors == sorted(errors) and errors[1] < 0.9 * errors[3]


@pytest.mark.parametrize("seed", range(5))
def test_with_a_diagonal_covariance_nothing_is_updated_and_the_mask_is_wandas(seed: int) -> None:
    W, X = normal(6, 16, seed=seed), orthogonal(40, 16, seed + 10)
    found = solved(W, (X.T @ X).diagonal().diag())
    assert found.mask_RC.equal(mask(W, X))
    torch.testing.assert_close(found.weight_RC, W * found.mask_RC, rtol=0, atol=0)


@given(seed=st.integers(0, 20), blocksize=st.sampled_from([4, 8, 12]))
def test_blocks_change_nothing_but_time(seed: int, blocksize: int) -> None:
    W, _, H = problem(seed=seed)
    blocks, whole = solved(W, H, blocksize=blocksize), solved(W, H, blocksize=16)
    assert blocks.mask_RC.equal(whole.mask_RC)
    torch.testing.assert_close(blocks.weight_RC, whole.weight_RC)
    torch.testing.assert_close(blocks.error_R, whole.error_R)


@given(seed=st.integers(0, 20))
def test_outputs_do_not_know_of_each_other(seed: int) -> None:
    W, _, H = problem(seed=seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(solved(W[order], H).weight_RC, solved(W, H).weight_RC[order])
    torch.testing.assert_close(solved(W[2:3], H).weight_RC, solved(W, H).weight_RC[2:3])


@given(seed=st.integers(0, 20), share=st.sampled_from([None, 0.3, 0.8]))
def test_the_errors_add_up_to_the_quadratic_form(seed: int, share: float | None) -> None:
    W, _, H = problem(seed=seed)
    found = solved(W, H, TWO_OF_FOUR if share is None else Density(share, None), 8)
    D = found.weight_RC - W
    torch.testing.assert_close(found.error_R, torch.einsum("rc,cd,rd->r", D, H, D))


def test_batches_of_the_calibration_do_not_matter(tmp_path: Path) -> None:
    method, results = methods.configure("sparsegpt", {"precision": "float64"}), []
    for size in (1, 5, 12):
        context = Context(scratch=tmp_path, batch_size=size)
        budget = Budget(ratio=0.5, basis="block", tolerance=0.2)
        model = method.compress(tiny_model("opt"), None, budget, RandomCalibration(), context)  # type: ignore[arg-type]
        results.append(logits(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(results[0], results[2], rtol=1e-6, atol=1e-7)


def test_everything_kept_is_everything_left_alone() -> None:
    W, _, H = problem()
    found = solved(W, H, Density(1.0, None), 8)
    assert found.weight_RC.equal(W) and found.mask_RC.all() and not found.error_R.any()


def test_inputs_that_are_always_zero_go_first_and_disturb_nothing() -> None:
    W, X, _ = problem()
    X[:, [1, 2, 5]] = 0
    H, dead = revived(X.T @ X / len(X))
    assert dead.nonzero()[:, 0].tolist() == [1, 2, 5]
    W = W * ~dead
    U, _ = upper_factor(H, 0.01)
    found = solve(W, U, TWO_OF_FOUR, 128)
    assert not found.mask_RC[:, [1, 2, 5]].any() and found.weight_RC.isfinite().all()
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(16, dtype=H.dtype)
    alive = (~dead).nonzero()[:, 0]
    weight, _ = surgeon(W[:, alive], damped[alive][:, alive], None, keep=found.mask_RC[:, alive])
    torch.testing.assert_close(found.weight_RC[:, alive], weight)


def test_a_network_with_silent_neurons_and_little_text(tmp_path: Path) -> None:
    silent = tiny_model("opt")
    for layer in silent.model.decoder.layers:
        layer.fc1.weight.data[:50] = 0
        layer.fc1.bias.data[:50] = -1
    small, context = pruned("sparsegpt", silent, tmp_path, RandomCalibration(samples=1, window=8), damping="0")
    assert logits(small).isfinite().all()
    assert any("took more damping than sparsegpt.damping=0" in note for note in context.notes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blocksize": "6"}, "a multiple of 4, at least 4. Use --set sparsegpt.blocksize=128$"),
        ({"pattern": "2:3"}, "blocksize is 128; .* a multiple of 3, .*blocksize=126$"),
        ({"pattern": "100:200"}, "blocksize=200$"),
        ({"blocksize": "0", "pattern": "unstructured"}, "at least 1"),
        ({"damping": "-1"}, "between 0 and 1"),
        ({"damping": "nan"}, "between 0 and 1"),
        ({"precision": "float16"}, "float64"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        methods.configure("sparsegpt", fields)
