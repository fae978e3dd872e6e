"""MoEfication and G-MoEfication: routers, targets and constants against the formulas, and what training is for."""

from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import methods
from methods import modeling
from methods.base import Budget, Context
from methods.errors import UserError
from methods.expert_plans import Structure
from methods.experts import coactivations, graph_parts, hidden, input_rows, mlp_inputs, random_parts, thinned
from methods.modeling.structures.moe_mlp import MoEMLP, mixtures
from methods.moefication import GMoEfication, MoEfication, captured, centroids, first_router, stand_ins
from tests.methods.tiny import ONE_PER_FAMILY, RandomCalibration, logits, tiny_model

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
        assert MoEfication().centre(layer, x_SD) is None
        centre_F = GMoEfication().centre(layer, x_SD)
        assert centre_F is not None
        plain = MoEfication().targets(layer, x_SD, parts, None)
        general = GMoEfication().targets(layer, x_SD, parts, centre_F)
        constants = stand_ins(layer, centre_F, parts)
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
        scores = MoEfication().targets(layer, x, parts, None)
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
        rows = torch.randn(24, 32, generator=generator)
        router = first_router(centroids(rows, torch.arange(24).view(6, 4).unbind(), 32))
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
        router = first_router(centroids(torch.ones(3, 20), torch.arange(3).view(3, 1).unbind(), 20))
        router.outer.weight[0, 0] = 2.0  # the first expert is always right
    before = {key: value.clone() for key, value in router.state_dict().items()}
    trained = MoEfication(epochs=3, learning_rate=100.0).trained(router, x, targets, torch.Generator())
    assert all(value.equal(before[key]) for key, value in trained.state_dict().items())


@torch.no_grad()
def test_a_step_is_of_binary_cross_entropy_against_shares_of_the_largest_of_the_batch() -> None:
    """From logits of 0 the gradient is (1/2 - share) / 4, and what gradients were before does not count."""
    router = torch.nn.Linear(2, 2, bias=False)
    router.weight.zero_().grad = torch.ones(2, 2)
    optimizer, targets = torch.optim.SGD(router.parameters(), lr=1.0), torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    MoEfication()._step(router, optimizer, torch.eye(2), targets)
    shares = torch.tensor([[1 / 8, 2 / 8], [4 / 8, 8 / 8]])
    torch.testing.assert_close(router.weight.T, (shares - 1 / 2) / 4)


def test_adam_takes_published_steps_and_never_sees_what_chooses_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine tenths of 2,000 tokens in four steps an epoch, each token once; the others, and no more, are looked at."""
    steps: list[list[int]] = []
    looked: list[set[int]] = []

    def step(self: MoEfication, router: Any, optimizer: torch.optim.Optimizer, x: Tensor, targets: Tensor) -> None:
        assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["lr"] == 0.01
        assert x[:, 0].equal(targets[:, 0])
        steps.append(x[:, 0].int().tolist())

    def look(router: Any, x: Tensor, targets: Tensor) -> float:
        assert x[:, 0].equal(targets[:, 0])
        looked.append({*x[:, 0].int().tolist()})
        return 0.0

    monkeypatch.setattr(MoEfication, "_step", step)
    monkeypatch.setattr("methods.moefication.captured", look)
    tokens = torch.arange(2000.0)[:, None]
    MoEfication().trained(modeling.MLPRouter(1, 1, cosine=True), tokens, tokens, torch.Generator())
    assert [*map(len, steps)] == [512, 512, 512, 264] * 30
    held_out, epochs = looked[0], [[*chain(*steps[i : i + 4])] for i in range(0, 120, 4)]
    assert len(held_out) == 200 and looked == [held_out] * 31
    assert all(sorted(epoch) == sorted({*range(2000)} - held_out) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("name", ["llama-gqa", "opt"])
def test_experts_are_clusters_of_input_rows(name: str) -> None:
    layer = modeling.Decoder(tiny_model(name)).layers[0]
    rows = input_rows(layer)
    assert rows.shape == (layer.mlp_output.in_features, 32 * len(layer.mlp_inputs))
    torch.testing.assert_close(rows.norm(dim=1), torch.full((len(rows),), float(len(layer.mlp_inputs)) ** 0.5))
    up = layer.mlp_inputs[-1].weight
    torch.testing.assert_close(rows[:, -32:].double(), up / up.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("router", ["similarity", "ground-truth"])
@pytest.mark.parametrize("setting", ["epochs", "batch", "learning_rate"])
@pytest.mark.parametrize("method", ["moefication", "g-moefication"])
def test_routers_that_learn_nothing_take_no_settings_of_training(method: str, setting: str, router: str) -> None:
    with pytest.raises(UserError, match=rf"{method}\.{setting}=1(\.0)? has no effect beside {method}.router={router}"):
        methods.configure(method, {"router": router, setting: "1"})
    if setting != "epochs":
        with pytest.raises(UserError, match=rf"{setting}=1(\.0)? has no effect beside {method}.epochs=0"):
            methods.configure(method, {"epochs": "0", setting: "1"})
    methods.configure(method, {setting: "1"})


# --- Every router behind every split ---

NAMES = ("moefication", "g-moefication")
KINDS = [*product(NAMES, ("parameters", "coactivation"), ("mlp", "similarity", "ground-truth"))]


def settings_of(split: str, router: str, experts: str) -> dict[str, str]:
    return {"split": split, "router": router, "experts": experts} | ({"epochs": "1"} if router == "mlp" else {})


@pytest.mark.parametrize(("method", "split", "router"), KINDS)
@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "phi"])
def test_with_all_experts_the_model_is_the_dense_one(
    name: str, method: str, split: str, router: str, tmp_path: Path
) -> None:
    """And its experts are all neurons, as evenly as can be."""
    budget, given = Budget(ratio=0.8, basis="block", tolerance=1), settings_of(split, router, "A7E7")
    model = tiny_model(name)
    small = methods.configure(method, given).compress(model, None, budget, CALIBRATION, Context(scratch=tmp_path))  # type: ignore[arg-type]
    torch.testing.assert_close(logits(small), logits(tiny_model(name)), rtol=1e-4, atol=1e-4)
    for moe in mixtures(small):
        assert moe is not None
        assert [len(own) for own in moe.sets] == Structure(0, 7, 7).sizes(len(moe.neurons))
        assert moe.neurons.sort().values.tolist() == list(range(modeling.Decoder(tiny_model(name)).shape.mlp_width))


@pytest.mark.parametrize(("method", "split"), [*product(NAMES, ("parameters", "coactivation"))])
@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "phi", "opt"])
def test_the_ground_truth_is_the_target(name: str, method: str, split: str, tmp_path: Path) -> None:
    """Neuron by neuron, and no router chooses better by it."""
    _, x_SD, h_SF = first_block(name, tmp_path)
    given = settings_of(split, "ground-truth", "A2E5")
    (moe, *_) = converted(method, name, tmp_path, **given)
    scores_SN = moe.router(x_SD)
    for j, own in enumerate(moe.sets):
        numbers = moe.neurons[own.long()].tolist()
        for t in range(10):
            centre = [float(h_SF[:, i].mean()) if method == "g-moefication" else 0.0 for i in numbers]
            distances = [abs(float(h_SF[t, i]) - c) for i, c in zip(numbers, centre, strict=True)]
            expected = sum(d**2 for d in distances) if method == "g-moefication" else sum(distances)
            assert float(scores_SN[t, j]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    experts = moe.choose(scores_SN).experts_Tk
    assert experts.equal(scores_SN.argsort(dim=1, descending=True, stable=True)[:, :2])


def test_an_oracle_is_saved_without_a_copy_of_weights(tmp_path: Path) -> None:
    (moe, *_) = converted("moefication", "llama-gqa", tmp_path, router="ground-truth", experts="A2E5")
    assert not moe.router.state_dict() and not [*moe.router.parameters()] and len([*moe.modules()]) == 7
    (moe, *_) = converted("g-moefication", "llama-gqa", tmp_path, router="ground-truth", experts="A2E5")
    assert {key: value.shape for key, value in moe.router.state_dict().items()} == {"centre": (48,)}


def test_an_oracle_follows_the_weights_it_looks_at(tmp_path: Path) -> None:
    """Those of its own mixture, in a copy too."""
    _, x_SD, _ = first_block("phi", tmp_path)
    (moe, *_) = converted("moefication", "phi", tmp_path, router="ground-truth", experts="A2E5")
    before, other = moe.router(x_SD), copied(moe)
    with torch.no_grad():
        other.get_parameter("fc1.weight").mul_(3)
    assert moe.router(x_SD).equal(before) and not other.get_submodule("router")(x_SD).equal(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_ground_truth_is_finite_in_half_precision(dtype: torch.dtype) -> None:
    """Squares of 1,000 are beyond float16."""
    layer = modeling.Decoder(tiny_model("opt", dtype=dtype)).layers[0]
    router = modeling.OracleRouter(torch.full((64,), -1000.0))
    moe = modeling.convert_mlp(layer, router, torch.arange(64).view(4, 16), active=2)
    scores = moe.router(torch.ones(3, 32, dtype=dtype))
    assert scores.dtype == dtype and scores.isfinite().all()


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "phi"])
def test_similarity_ranks_by_the_cosine(name: str, method: str, tmp_path: Path) -> None:
    """Of the token and the mean of normalised rows (of gated MLPs the gate's)."""
    layer, x_SD, _ = first_block(name, tmp_path)
    (moe, *_) = converted(method, name, tmp_path, router="similarity", experts="A3E5")
    first, cosines = layer.mlp_inputs[0].weight.detach(), []
    for own in moe.sets:
        members = moe.neurons[own.long()].tolist()
        centroid = sum(first[i] / first[i].norm() for i in members) / len(members)
        cosines.append(torch.stack([x @ centroid / x.norm() / centroid.norm() for x in x_SD]))
    order = torch.stack(cosines, 1).argsort(dim=1, descending=True)
    assert moe.choose(moe.router(x_SD)).experts_Tk.equal(order[:, :3])
    torch.testing.assert_close(moe.router(x_SD) / x_SD.norm(dim=1, keepdim=True), torch.stack(cosines, 1))


def planted(name: str, groups: list[Tensor], **changes: int) -> tuple[Any, Tensor]:
    """A block whose neurons of group j do something where coordinate j is positive, and tokens with two such."""
    layer = modeling.Decoder(tiny_model(name, **changes)).layers[0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for linear in layer.mlp_inputs:
            linear.weight.zero_()
            for j, group in enumerate(groups):
                linear.weight[group, j] = 1 + torch.rand(len(group), generator=generator).double()
            if linear.bias is not None:
                linear.bias.zero_()
    x_SD = torch.full((200, 32), -5.0, dtype=torch.float64)
    on = torch.stack([torch.randperm(len(groups), generator=generator)[:2] for _ in x_SD])
    return layer, x_SD.scatter_(1, on, 1 + torch.rand(200, 2, generator=generator).double())


@pytest.mark.parametrize("seed", range(3))
def test_if_all_mass_lies_in_k_experts_the_ground_truth_is_exact(seed: int) -> None:
    """Behind ReLU, token by token other experts; and one expert fewer is not enough."""
    parts = random_parts([16] * 4, torch.Generator().manual_seed(seed))
    layer, x_SD = planted("opt", parts)
    expected, fewer = layer.run_mlp(x_SD), planted("opt", parts)[0]
    moe = modeling.convert_mlp(layer, modeling.OracleRouter(), parts, active=2).eval()
    with torch.no_grad():
        torch.testing.assert_close(moe(x_SD), expected)
        assert len(moe.choose(moe.router(x_SD)).experts_Tk.sort(1).values.unique(dim=0)) == 6
        less = modeling.convert_mlp(fewer, modeling.OracleRouter(), parts, active=1).eval()(x_SD)
    assert ((less - expected).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("method", [MoEfication(split="coactivation"), GMoEfication(split="coactivation")])
@pytest.mark.parametrize("name", ["opt", "phi", "llama-gqa", "qwen2"])
def test_neurons_that_are_active_together_become_experts(name: str, method: Any) -> None:
    """Two of twenty groups at a token: the tenth that counts where nothing is zero."""
    sets = random_parts([3] * 20, torch.Generator().manual_seed(1))
    layer, x_SD = planted(name, sets, **{"ffn_dim" if name == "opt" else "intermediate_size": 60})
    with torch.no_grad():
        found = method.parts(layer, x_SD, [3] * 20, 0)
    assert {tuple(part.tolist()) for part in found} == {tuple(part.tolist()) for part in sets}


@pytest.mark.parametrize("name", ["llama-gqa", "phi", "opt"])
def test_coactivations_token_by_token(name: str, tmp_path: Path) -> None:
    layer, x_SD, h_SF = first_block(name, tmp_path)
    width, expected = h_SF.shape[1], torch.zeros(h_SF.shape[1], h_SF.shape[1])
    for h_F in h_SF:
        most = h_F.abs().argsort(descending=True)[: -(-width // 10)]
        active = [i for i in range(width) if h_F[i] > 0] if name == "opt" else most.tolist()
        for i, j in product(active, active):
            expected[i, j] += 1
    with torch.no_grad():
        assert coactivations(layer, x_SD).equal(expected)
    assert expected.count_nonzero() > 9


@pytest.mark.parametrize("zeros", [0.0, 0.25, 0.85, 0.95, 1.0])
def test_the_weakest_ties_are_cut(zeros: float) -> None:
    """Those below 0.99 times the first decile that is not zero; where nine tenths are zero, none."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 2000, (60, 60), generator=generator).float()
    counts *= torch.rand(60, 60, generator=generator) >= zeros
    deciles = [numpy.percentile(counts, 10 * d, method="inverted_cdf") for d in range(1, 10)]
    least = 0.99 * next((float(value) for value in deciles if value > 0), 0.0)
    found = thinned(counts)
    for value, kept in zip(counts.flatten().tolist(), found.flatten().tolist(), strict=True):
        assert kept == (value if value >= least else 0)
    assert zeros in (0.95, 1.0) or (found == 0).sum() > (counts == 0).sum()


@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 1.0]))
def test_parts_of_any_graph_have_the_sizes(count: int, more: int, seed: int, density: float) -> None:
    generator, width = torch.Generator().manual_seed(seed), count + more
    weights = torch.randint(0, 100, (width, width), generator=generator).float()
    weights = torch.triu(weights * (torch.rand(width, width, generator=generator) < density), 1)
    sizes = Structure(0, 1, count).sizes(width)
    parts = graph_parts(weights + weights.T, sizes, 0)
    assert [*map(len, parts)] == sizes and torch.cat(parts).sort().values.tolist() == list(range(width))
    again = graph_parts(weights + weights.T, sizes, 0)
    assert all(part.equal(same) for part, same in zip(parts, again, strict=True))


def test_of_a_part_that_is_too_large_the_least_tied_leave() -> None:
    """Whatever METIS says: seven neurons that belong together do not fit into a part of six."""
    weights = torch.zeros(12, 12)
    weights[:7, :7], weights[7:, 7:] = 100.0, 100.0
    weights[6, :6] = weights[:6, 6] = 50.0  # less tied to its own than they are to each other
    weights[6, 7:] = weights[7:, 6] = 1.0
    first, second = graph_parts(weights.fill_diagonal_(0), [6, 6], 0)
    assert sorted([first.tolist(), second.tolist()]) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_where_metis_put_it_a_neuron_stays_if_there_is_room() -> None:
    """Though the sixth is tied less to the first part than the seventh is: together they would cost more elsewhere."""
    weights = torch.zeros(12, 12)
    weights[:5, :5], weights[7:, 7:] = 100.0, 100.0
    weights[5, :5], weights[6, 7:], weights[6, :5] = 4.0, 4.0, 5.0
    weights = weights.maximum(weights.T).fill_diagonal_(0)
    parts = graph_parts(weights, [6, 6], 0)
    assert sorted(part.tolist() for part in parts) == [[*range(6)], [*range(6, 12)]]
