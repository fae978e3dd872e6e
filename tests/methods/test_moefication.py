"""MoEfication and G-MoEfication: routers, targets and constants against the formulas, and what training is for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import methods
from methods import modeling
from methods.base import Budget, Context
from methods.experts import hidden, input_rows, mlp_inputs, random_parts
from methods.modeling.structures.moe_mlp import MoEMLP, mixtures
from methods.moefication import GMoEfication, MoEfication, captured, first_router
from tests.methods.tiny import ONE_PER_FAMILY, RandomCalibration, tiny_model

CALIBRATION = RandomCalibration(samples=20, padded=2)


def converted(method: str, name: str, tmp_path: Path, **settings: str) -> list[MoEMLP]:
    budget = Budget(ratio=0.8, basis="block", tolerance=1)
    context = Context(scratch=tmp_path)
    model = methods.configure(method, settings).compress(tiny_model(name), None, budget, CALIBRATION, context)  # type: ignore[arg-type]
    return [moe for moe in mixtures(model) if moe is not None]


def first_block(name: str, tmp_path: Path) -> tuple[Any, Tensor, Tensor]:
    """A dense block, what its MLP reads, and what goes into down."""
    decoder = modeling.Decoder(tiny_model(name))
    layer, x_SD = next(mlp_inputs(decoder, CALIBRATION, Context(scratch=tmp_path), 10**6))
    with torch.no_grad():
        return layer, x_SD, hidden(layer, x_SD)


@pytest.mark.parametrize("name", ["llama-gqa", "phi"])
def test_an_untrained_router_says_the_cosine_with_centroids(name: str, tmp_path: Path) -> None:
    """tanh of it; of gated MLPs the gate's half of what was clustered."""
    layer, x_SD, _ = first_block(name, tmp_path)
    for moe in converted("moefication", name, tmp_path, epochs="0", experts="A2E5")[:1]:
        first = layer.mlp_inputs[0].weight.detach()
        for j, positions in enumerate(moe.sets):
            members = moe.neurons[positions.long()].tolist()
            centroid = sum(first[i] / first[i].norm() for i in members) / len(members)
            cosine = torch.nn.functional.cosine_similarity(x_SD, centroid[None])
            torch.testing.assert_close(moe.router(x_SD)[:, j], cosine.tanh(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_targets_neuron_by_neuron(name: str, tmp_path: Path) -> None:
    layer, x_SD, h_SF = first_block(name, tmp_path)
    width = h_SF.shape[1]
    parts = random_parts([width // 4] * 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, nothing = MoEfication().targets(layer, x_SD, parts)
        general, constants = GMoEfication().targets(layer, x_SD, parts)
    assert nothing is None and constants is not None
    mean = [float(h_SF[:, i].mean()) for i in range(width)]
    for j, part in enumerate(parts):
        expected = [sum(abs(float(h_SF[t, i])) for i in part) for t in range(20)]
        squares = [sum((float(h_SF[t, i]) - mean[i]) ** 2 for i in part) for t in range(20)]
        assert plain[:20, j].tolist() == pytest.approx(expected, rel=1e-4)
        assert general[:20, j].tolist() == pytest.approx(squares, rel=1e-3, abs=1e-6)
        column = sum(mean[i] * layer.mlp_output.weight[:, i] for i in part.tolist())
        torch.testing.assert_close(constants[j].double(), column.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama-biases", "phi", "opt"])
def test_means_stand_in_for_experts_that_are_not_chosen(name: str, tmp_path: Path) -> None:
    """The other form of the same: h of chosen experts, the mean of h elsewhere, through the dense down."""
    layer, x_SD, h_SF = first_block(name, tmp_path)
    (moe, *_) = converted("g-moefication", name, tmp_path, experts="A2E5", epochs="1")
    x, mean_F = x_SD[:20].float(), h_SF.mean(0)
    with torch.no_grad():
        y = moe.float()(x)
        for row, h_F, experts in zip(y, h_SF, moe.choose(moe.router(x)).experts_Tk, strict=False):
            mixed = mean_F.clone()
            for j in experts.tolist():
                numbers = moe.neurons[moe.sets[j].long()].long()
                mixed[numbers] = h_F[numbers]
            torch.testing.assert_close(row.double(), layer.mlp_output(mixed), rtol=1e-3, atol=1e-4)
        moe.layout = type(moe.layout)(**{**vars(moe.layout), "active": 0})
        nobody = torch.zeros(3, 0, dtype=torch.int64)
        finished = moe._parts().finish(moe.choose(torch.zeros(3, 5))._replace(experts_Tk=nobody), torch.zeros(3, 32))
        expected = layer.mlp_output(mean_F) - (0 if layer.mlp_output.bias is None else layer.mlp_output.bias)
        torch.testing.assert_close(finished.double(), expected.expand(3, -1), rtol=1e-3, atol=1e-4)


def test_the_mean_is_the_best_constant(tmp_path: Path) -> None:
    """For one dropped neuron: the mean squared error of the output on the text, against nearby values and zero."""
    layer, _, h_SF = first_block("phi", tmp_path)
    column = layer.mlp_output.weight[:, 3].detach()

    def error(value: float) -> float:
        return float(((h_SF[:, 3] - value)[:, None] * column).square().sum(1).mean())

    mean = float(h_SF[:, 3].mean())
    assert all(error(mean) <= error(other) for other in (0.0, mean * 0.9, mean * 1.1, mean + 0.01, mean - 0.01))


@pytest.mark.parametrize("seed", range(3))
def test_with_relu_and_the_true_scores_what_is_chosen_is_all_there_is(seed: int, tmp_path: Path) -> None:
    """If all positive mass lies in k experts, the output is exact."""
    layer, x_SD, _ = first_block("opt", tmp_path)
    generator = torch.Generator().manual_seed(seed)
    parts = random_parts([16] * 4, generator)
    x = x_SD[:1]
    with torch.no_grad():
        for part in parts[2:]:
            layer.mlp_inputs[0].bias[part] = -1e4
        expected = layer.run_mlp(x)
        scores, _ = MoEfication().targets(layer, x, parts)
        chosen = scores[0].topk(2).indices
        assert sorted(chosen.tolist()) == [0, 1]
        router = torch.zeros(4, 32)
        router[chosen] = x[0].float()
        torch.testing.assert_close(modeling.convert_mlp(layer, router, parts, active=2).eval()(x), expected)


def test_captured_is_a_share_of_the_mass() -> None:
    targets = torch.tensor([[1.0, 2, 3, 4], [4.0, 3, 2, 1]])
    assert captured(torch.nn.Identity(), targets, targets) == pytest.approx(8 / 20)
    assert captured(torch.nn.Identity(), -targets, targets) == pytest.approx(2 / 20)
    six = torch.arange(6.0)[None]  # of which a fifth is two
    assert captured(torch.nn.Identity(), six, six) == pytest.approx(9 / 15)


def test_training_makes_the_router_better_and_never_worse(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x, planted = torch.randn(600, 32, generator=generator), torch.randn(32, 6, generator=generator)
    targets = (x @ planted).relu()
    with torch.no_grad():
        router = first_router(torch.randn(24, 32, generator=generator), torch.arange(24).view(6, 4).unbind(), 32)
    before = captured(router, x, targets)
    after = {}
    for epochs in (0, 1, 10):
        method = MoEfication(epochs=epochs, batch=64)
        trained = method.trained(router if epochs == 0 else copied(router), x, targets, torch.Generator())
        after[epochs] = captured(trained, x, targets)
    assert after[0] == before < after[1] < after[10] > 0.75


def copied(module: torch.nn.Module) -> torch.nn.Module:
    import copy

    return copy.deepcopy(module)


def test_a_learning_rate_that_ruins_the_router_keeps_the_first_one() -> None:
    x = torch.eye(20)
    targets = torch.cat([torch.ones(20, 1), torch.zeros(20, 2)], 1)
    with torch.no_grad():
        router = first_router(torch.ones(3, 20), torch.arange(3).view(3, 1).unbind(), 20)
        router.outer.weight[0, 0] = 2.0  # the first expert is always right
    before = {key: value.clone() for key, value in router.state_dict().items()}
    trained = MoEfication(epochs=3, learning_rate=100.0).trained(router, x, targets, torch.Generator())
    assert all(value.equal(before[key]) for key, value in trained.state_dict().items())


@pytest.mark.parametrize("name", ["llama-gqa", "opt"])
def test_experts_are_clusters_of_input_rows(name: str) -> None:
    layer = modeling.Decoder(tiny_model(name)).layers[0]
    rows = input_rows(layer)
    assert rows.shape == (layer.mlp_output.in_features, 32 * len(layer.mlp_inputs))
    torch.testing.assert_close(rows.norm(dim=1), torch.full((len(rows),), float(len(layer.mlp_inputs)) ** 0.5))
    up = layer.mlp_inputs[-1].weight
    torch.testing.assert_close(rows[:, -32:].double(), up / up.norm(dim=1, keepdim=True))
