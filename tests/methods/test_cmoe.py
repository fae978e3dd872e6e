"""CMoE: activity, shared neurons, assignment and router against the definitions written out."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import methods
from methods import modeling
from methods.base import Budget, Context
from methods.cmoe import CMoE, assign
from methods.expert_plans import Structure
from methods.experts import mlp_inputs
from methods.modeling.structures.moe_mlp import MoEMLP, mixtures
from tests.methods.tiny import ONE_PER_FAMILY, RandomCalibration, logits, some_ids, tiny_model

CALIBRATION = RandomCalibration(samples=10, padded=2)


def converted(name: str, tmp_path: Path, **settings: str) -> Any:
    budget = Budget(ratio=0.8, basis="block", tolerance=1)
    method = methods.configure("cmoe", settings)
    return method.compress(tiny_model(name), None, budget, CALIBRATION, Context(scratch=tmp_path))  # type: ignore[arg-type]


def found(model: Any) -> list[MoEMLP]:
    return [moe for moe in mixtures(model) if moe is not None]


def random_activity(q: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(q, width, generator=torch.Generator().manual_seed(seed)) < 0.3


@pytest.mark.parametrize("profile", ["normalised", "plain"])
@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "phi", "opt"])
def test_activity_token_by_token(name: str, profile: Any, tmp_path: Path) -> None:
    method, decoder = CMoE(profile=profile, top=7), modeling.Decoder(tiny_model(name))
    layer, x_qD = next(mlp_inputs(decoder, CALIBRATION, Context(scratch=tmp_path), 30))
    with torch.no_grad():
        active = method.activity(layer, x_qD)
        assert active.shape == (30, layer.mlp_output.in_features)
        assert (active.sum(1) == 7).all() and float(active.double().mean(0).sum()) == pytest.approx(7)
        for row, x in zip(active, x_qD, strict=True):
            products = []
            for linear in layer.mlp_inputs:
                if profile == "plain":
                    products.append(linear(x))
                else:
                    products.append(torch.stack([w @ x / w.norm() / x.norm() for w in linear.weight]))
            h = layer.mlp_activation(products[0]) * (products[1] if len(products) > 1 else 1)
            assert sorted(row.nonzero()[:, 0].tolist()) == sorted(h.abs().argsort(descending=True)[:7].tolist())


@pytest.mark.parametrize("structure", [Structure(2, 2, 6), Structure(0, 1, 4), Structure(3, 3, 7)])
def test_parts_are_disjoint_and_shared_neurons_the_busiest(structure: Structure) -> None:
    active = random_activity(50, 30)
    shared, experts, representatives = CMoE().carve(active, structure)
    sizes = structure.sizes(30)
    assert len(shared) == sum(sizes[: structure.shared]) and [len(e) for e in experts] == sizes[structure.shared :]
    assert torch.cat([shared, *experts]).sort().values.tolist() == list(range(30))
    rate = active.double().mean(0)
    if len(shared):
        assert rate[shared].min() >= rate[torch.cat(experts)].max()
    assert all(int(r) in e.tolist() for r, e in zip(representatives, experts, strict=True))


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [3, 2, 2], [4, 4], [3, 3, 1]])
@pytest.mark.parametrize("seed", range(3))
def test_the_assignment_costs_no_more_than_any_other(sizes: list[int], seed: int, norm: int) -> None:
    columns = random_activity(sum(sizes), 9, seed).float()
    labels, nearest = assign(columns, sizes, norm, 1)
    assert labels.bincount(minlength=len(sizes)).tolist() == sizes
    cost = torch.tensor([[float((c - centre).norm(norm)) for centre in columns[: len(sizes)]] for c in columns])
    slots = [j for j, size in enumerate(sizes) for _ in range(size)]
    best = min(sum(float(cost[i, j]) for i, j in enumerate(order)) for order in set(itertools.permutations(slots)))
    assert float(cost[range(len(slots)), labels].sum()) == pytest.approx(best, rel=1e-5)
    for j, representative in enumerate(nearest.tolist()):
        members = (labels == j).nonzero()[:, 0].tolist()
        centre = columns[members].mean(0)
        distances = {i: float((columns[i] - centre).norm(norm)) for i in members}
        assert representative in members and distances[representative] == pytest.approx(min(distances.values()))


def test_rounds_go_on_until_nothing_moves() -> None:
    """The first centres are both of one cloud; the second round has the means."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(4, 30, generator=generator) < p for p in (0.05, 0.95))
    columns = torch.cat([a[:1], a[1:2], a[2:], b]).float()
    labels = assign(columns, [4, 4], 2, 20)[0]
    assert len(set(labels[:4].tolist())) == len(set(labels[4:].tolist())) == 1


def test_the_distance_and_the_rounds_are_those_asked_for() -> None:
    """Each of them makes other experts here."""
    active, found = random_activity(9, 24), []
    order = active.sum(0).argsort(descending=True, stable=True)
    cases: list[tuple[Any, int, int]] = [("l1", 1, 1), ("l2", 2, 1), ("l1", 1, 9), ("l2", 2, 9)]
    for distance, norm, iterations in cases:
        _, experts, nearest = CMoE(distance=distance, iterations=iterations).carve(active, Structure(0, 1, 4))
        labels, members = assign(active[:, order].T.float(), [6] * 4, norm, iterations)
        assert all(own.equal(order[labels == j]) for j, own in enumerate(experts)) and nearest.equal(order[members])
        found.append(labels.tolist())
    assert all(one != other for one, other in itertools.combinations(found, 2))


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_the_router_is_a_neuron_of_each_expert(name: str, tmp_path: Path) -> None:
    dense, moes = modeling.Decoder(tiny_model(name)).layers, found(converted(name, tmp_path))
    for layer, moe in zip(dense, moes, strict=True):
        weights = [linear.weight for linear in layer.mlp_inputs]
        for j, positions in enumerate(moe.sets):
            members = moe.neurons[positions.long()].tolist()
            rows = [list(moe.router.rows)[k][j] for k in range(len(weights))]  # type: ignore[union-attr, arg-type]
            fits = [
                i
                for i in members
                if all(torch.allclose(row, w[i] / w[i].norm()) for row, w in zip(rows, weights, strict=True))
            ]
            assert len(fits) == 1
        x = torch.randn(5, 32, dtype=torch.float64)
        products = [x @ row.T for row in moe.router.rows]  # type: ignore[union-attr]
        expected = (layer.mlp_activation(products[0]) * (products[1] if len(products) > 1 else 1)).abs()
        torch.testing.assert_close(moe.router(x), expected)
        assert not hasattr(layer.mlp_inputs[0], "router")


def test_each_block_is_profiled_behind_the_converted_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profiled: list[Tensor] = []
    activity = CMoE.activity
    monkeypatch.setattr(CMoE, "activity", lambda self, layer, x: profiled.append(x) or activity(self, layer, x))
    small, seen = converted("llama-gqa", tmp_path), [[] for _ in range(4)]
    for i, moe in enumerate(found(small)):
        moe.register_forward_pre_hook(lambda module, args, i=i: seen[i].append(args[0].detach()))
    for batch in CALIBRATION.batches(8):
        assert batch.mask is not None
        with torch.no_grad():
            small(input_ids=batch.input_ids, attention_mask=batch.mask)
        for one in seen:
            one[-1] = one[-1][batch.mask]
    for expected, x in zip(seen, profiled, strict=True):
        torch.testing.assert_close(x, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_what_is_skipped_is_what_is_missing(tmp_path: Path) -> None:
    """F_moe(x) - F(x) is minus the sum of the experts that a token does not get; nothing where their h is zero."""
    layer = modeling.Decoder(tiny_model("llama-gqa")).layers[0]
    x = torch.randn(6, 32, dtype=torch.float64)
    with torch.no_grad():
        expected, hidden = layer.run_mlp(x), layer.mlp_activation(layer.mlp_inputs[0](x)) * layer.mlp_inputs[1](x)
        down, moe = layer.mlp_output.weight.clone(), found(converted("llama-gqa", tmp_path))[0]
        difference = moe(x) - expected
        chosen = moe.choose(moe.router(x)).experts_Tk
        for row, h, best in zip(difference, hidden, chosen, strict=True):
            skipped = [j for j in range(len(moe.sets)) if j not in best.tolist()]
            numbers = torch.cat([moe.neurons[moe.sets[j].long()] for j in skipped]).long()
            torch.testing.assert_close(row, -(down[:, numbers] @ h[numbers]))
            assert row.norm() > 0
        silent = moe.get_parameter("gate_proj.weight")
        for j in range(1, len(moe.sets)):
            silent[moe.sets[j].long()] = 0  # act(0) = 0
        moe.get_submodule("gate").bias[0] = 10.0  # type: ignore[index]
        everything = moe.union(x)
        torch.testing.assert_close(moe(x), everything)


def test_weights_are_one_until_trained(tmp_path: Path) -> None:
    small = converted("phi", tmp_path)
    before = logits(small)
    for moe in found(small):
        weights = moe.choose(moe.router(torch.randn(9, 32, dtype=torch.float64)))
        assert moe.get_submodule("gate").bias.count_nonzero() == 0  # type: ignore[operator]
        assert weights.weights_Tk is not None and (weights.weights_Tk == 1).all()
    small.train()
    small(input_ids=some_ids(), labels=some_ids()).loss.backward()
    gates = [moe.get_submodule("gate") for moe in found(small)]
    for gate in gates:
        gate.balance()
        assert gate.scale.grad.count_nonzero() > 0 and gate.bias.count_nonzero() > 0
    names = [name for name, _ in small.named_parameters() if ".gate." in name]
    assert len(names) == len(gates) and all(name.endswith("gate.scale") for name in names)
    assert not logits(small.eval()).equal(before)  # the biases have moved
