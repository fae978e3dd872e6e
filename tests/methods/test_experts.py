"""Splits and measurements: against brute force, closed forms and hooks on the whole model."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods import experts, modeling
from methods.base import Context
from methods.gradients import next_token_loss
from tests.methods.tiny import CONFIGS, ONE_PER_FAMILY, RandomCalibration, some_ids, tiny_model


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_partition(parts: list[Tensor], sizes: list[int]) -> None:
    assert [len(part) for part in parts] == sizes
    assert torch.cat(parts).sort().values.tolist() == list(range(sum(sizes)))
    assert all((part.diff() > 0).all() for part in parts)


@pytest.mark.parametrize("sizes", [[4, 4, 4], [5, 5, 4, 4], [3], [1] * 6])
def test_every_split_hands_out_all_neurons(sizes: list[int]) -> None:
    total = sum(sizes)
    assert_partition(experts.random_parts(sizes, torch.Generator().manual_seed(1)), sizes)
    assert_partition(experts.balanced_parts(draw(total, 5), sizes, 0), sizes)
    assert_partition(experts.greedy_parts(draw(len(sizes), total), torch.arange(total), sizes), sizes)
    slices = experts.contiguous_parts(sizes)
    assert_partition(slices, sizes)
    assert torch.cat(slices).tolist() == list(range(total))


def test_lots_differ_by_seed() -> None:
    one, two = (experts.random_parts([20, 20], torch.Generator().manual_seed(seed))[0] for seed in (0, 1))
    assert not one.equal(two)


def test_clusters_are_found_and_balanced() -> None:
    """Three clouds of 6, 4 and 2 points: those far from their centre are taken by the others."""
    centres = torch.eye(3) * 100
    clouds = torch.cat([centres[i] + draw(n, 3, seed=i) for i, n in enumerate((4, 4, 4))])
    parts = experts.balanced_parts(clouds, [4, 4, 4], 0)
    assert {tuple(part.tolist()) for part in parts} == {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)}
    uneven = torch.cat([centres[i] + draw(n, 3, seed=i) for i, n in enumerate((6, 4, 2))])
    assert_partition(experts.balanced_parts(uneven, [4, 4, 4], 0), [4, 4, 4])
    labels = experts.cluster(uneven, 3, 2, 6, 0)
    assert sorted(labels.bincount().tolist()) == [2, 4, 6]


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_highest_first(seed: int) -> None:
    """Two experts of two: every order of (expert, neuron) pairs written out."""
    scores = draw(2, 4, seed=seed)
    pairs = sorted(itertools.product(range(2), range(4)), key=lambda pair: -float(scores[pair]))
    expected: list[list[int]] = [[], []]
    for j, i in pairs:
        if len(expected[j]) < 2 and i not in expected[0] + expected[1]:
            expected[j].append(i)
    found = experts.greedy_parts(scores, torch.arange(4), [2, 2])
    assert [part.tolist() for part in found] == [sorted(part) for part in expected]


def test_greedy_among_some_neurons() -> None:
    scores = torch.tensor([[9.0, 1, 8, 0, 7, 6], [9, 2, 8, 0, 7, 5]])
    found = experts.greedy_parts(scores, torch.tensor([1, 2, 4, 5]), [2, 2])
    assert [part.tolist() for part in found] == [[2, 4], [1, 5]]


def test_best_parts_may_overlap() -> None:
    scores = torch.tensor([[3.0, 2, 1, 0], [3, 1, 1, 0]])
    assert [part.tolist() for part in experts.best_parts(scores, [2, 2])] == [[0, 1], [0, 1]]


# --- What MLPs read ---


class Inputs:
    """What each block's MLP reads at real tokens of a whole forward pass, and what goes into down."""

    def __init__(self, model: Any, calibration: RandomCalibration) -> None:
        self.read: list[list[Tensor]] = [[] for _ in range(4)]
        self.hidden: list[list[Tensor]] = [[] for _ in range(4)]
        layers = modeling.Decoder(model).layers
        seen: list[Tensor] = []
        for layer in layers:
            for module in (layer.mlp_inputs[0], layer.mlp_output):
                module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        for batch in calibration.batches(5):
            seen.clear()
            with torch.no_grad():
                model(input_ids=batch.input_ids, attention_mask=batch.mask)
            keep = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.mask is None else batch.mask
            for i in range(4):
                self.read[i].append(seen[2 * i].reshape(*keep.shape, -1)[keep])
                self.hidden[i].append(seen[2 * i + 1].reshape(*keep.shape, -1)[keep])


@pytest.mark.parametrize("name", CONFIGS)
def test_what_mlps_read_and_hand_on(name: str, tmp_path: Path) -> None:
    calibration = RandomCalibration(padded=3)
    expected = Inputs(tiny_model(name), calibration)
    decoder = modeling.Decoder(tiny_model(name))
    context = Context(scratch=tmp_path, batch_size=5)
    for i, (layer, x_SD) in enumerate(experts.mlp_inputs(decoder, calibration, context, 100)):
        torch.testing.assert_close(x_SD, torch.cat(expected.read[i])[:100])
        torch.testing.assert_close(experts.hidden(layer, x_SD), torch.cat(expected.hidden[i])[:100])


@pytest.mark.parametrize("sequential", [True, False])
def test_the_next_block_is_behind_the_changed_one_or_the_dense_one(sequential: bool, tmp_path: Path) -> None:
    changed, decoder = tiny_model("llama-gqa"), modeling.Decoder(tiny_model("llama-gqa"))
    with torch.no_grad():
        for layer in modeling.Decoder(changed).layers:
            layer.mlp_output.weight.zero_()
    expected = Inputs(changed if sequential else tiny_model("llama-gqa"), RandomCalibration()).read
    context = Context(scratch=tmp_path, batch_size=5)
    steps = experts.mlp_inputs(decoder, RandomCalibration(), context, 10**6, sequential=sequential)
    for i, (layer, x_SD) in enumerate(steps):
        torch.testing.assert_close(x_SD, torch.cat(expected[i]))
        with torch.no_grad():
            layer.mlp_output.weight.zero_()


def test_only_the_beginning_of_the_text_is_run() -> None:
    text = RandomCalibration(samples=20, window=16, padded=6)
    assert [len(batch.input_ids) for batch in experts.beginning(text, 41, 2)] == [2, 2, 2]
    assert [len(batch.input_ids) for batch in experts.beginning(text, 40, 2)] == [2, 2]


def test_windows(tmp_path: Path) -> None:
    context = Context(scratch=tmp_path)
    found = experts.windows(RandomCalibration(samples=5, padded=3), context, 4)
    expected = next(iter(RandomCalibration(samples=5).batches(8))).input_ids
    assert len(found) == 4 and all(a.equal(b[:13]) for a, b in zip(found, expected, strict=False))


# --- Importance ---


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_importance_is_activation_times_gradient(name: str, tmp_path: Path) -> None:
    """Against autograd on a tensor put in the place of h, one block and one text at a time; kinds by position."""
    model, texts = tiny_model(name), [*some_ids(3, 9), some_ids(1, 5)[0]]
    layers = modeling.Decoder(model).layers[1:3]
    kinds = torch.tensor([0, 1, 1, 2, 0, 0, 1, 2, 2])

    def group(place: int, number: int, x_TD: Tensor) -> Tensor:
        return (kinds[: len(x_TD)] + place * (number == 3)) % 3

    found, counts = experts.neuron_importance(model, layers, texts, group, 4, Context(scratch=tmp_path))
    width = layers[0].mlp_output.in_features
    sums, tokens = torch.zeros(2, 4, width, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    for place, layer in enumerate(layers):
        for number, ids in enumerate(texts):
            kept: list[Tensor] = []

            def replace(module: nn.Module, args: tuple, kept: list[Tensor] = kept) -> Any:
                kept.append(args[0].detach().clone().requires_grad_())
                return (kept[0],)

            handle = layer.mlp_output.register_forward_pre_hook(replace)
            (gradient,) = torch.autograd.grad(next_token_loss(model, ids), kept)
            handle.remove()
            scores = (kept[0].detach() * gradient).abs().view(len(ids), -1)
            for row, kind in zip(scores, group(place, number, scores), strict=True):
                sums[place, kind] += row
                tokens[place, kind] += 1
    assert counts.equal(tokens) and (counts.sum(1) == 32).all() and (counts[:, 3] == 0).all()
    torch.testing.assert_close(found, sums / tokens.clamp_min(1)[..., None])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_importance_scales_with_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from methods import gradients

    model, texts = tiny_model("opt"), list(some_ids())
    layers = modeling.Decoder(model).layers

    def measured() -> Tensor:
        zeros = lambda place, number, x_TD: torch.zeros(len(x_TD), dtype=torch.int64)  # noqa: E731
        return experts.neuron_importance(model, layers, texts, zeros, 1, Context(scratch=tmp_path))[0]

    before = measured()
    monkeypatch.setattr(gradients, "next_token_loss", lambda model, ids: 3 * next_token_loss(model, ids))
    torch.testing.assert_close(measured(), 3 * before)


def test_importance_of_a_quadratic_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """L = |W h|^2 / 2 at the last block, W of down alone: h * dL/dh = h * (W^T W h), written by hand."""
    from methods import gradients

    model = tiny_model("opt")
    layer = modeling.Decoder(model).layers[3]
    outputs: list[Tensor] = []
    layer.mlp_output.register_forward_hook(lambda module, args, y: outputs.append(y) or None)
    hidden: list[Tensor] = []

    def loss(model: Any, ids: Tensor) -> Tensor:
        model(input_ids=ids[None])
        return outputs.pop().square().sum() / 2

    monkeypatch.setattr(gradients, "next_token_loss", loss)
    layer.mlp_output.register_forward_pre_hook(lambda module, args: hidden.append(args[0].detach().view(-1, 64)))
    ids = some_ids(1, 7)[0]
    zeros = lambda place, number, x_TD: torch.zeros(len(x_TD), dtype=torch.int64)  # noqa: E731
    found, _ = experts.neuron_importance(model, [layer], [ids], zeros, 1, Context(scratch=tmp_path))
    W, b = layer.mlp_output.weight.detach(), layer.mlp_output.bias.detach()
    h = hidden[0]
    torch.testing.assert_close(found[0, 0], (h * ((h @ W.T + b) @ W)).abs().mean(0))
