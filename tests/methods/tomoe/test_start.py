"""The start from energies: grouping against planted groups, the router's aim, least squares, sizes at the start."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from methods.base import Budget, Context
from methods.modeling import Decoder
from methods.tomoe import ToMoE, start
from methods.tomoe.network import ToMoENetwork
from methods.tomoe.training import Trainer
from methods.training.straight_through import probability_on
from tests.methods.tiny import CONFIGS, some_ids, tiny_model
from tests.methods.training.small import SmallCalibration, context, tokenizer


def planted(tokens: int = 600, groups: int = 4, neurons: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that each excite the neurons of one group only (and a little noise): energies, and who belongs where."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.randint(groups, (tokens,), generator=generator)
    sets = torch.arange(neurons) // (neurons // groups)
    energy = 0.01 * torch.rand(tokens, neurons, generator=generator) + (owner[:, None] == sets).float()
    return energy / energy.sum(1, keepdim=True), owner


def test_planted_groups_are_found() -> None:
    energy, owner = planted()
    means = start.group(energy, 4, 10, torch.Generator().manual_seed(1))
    sets = start.highest(means, 10)
    choice = (energy @ sets.T).argmax(1)
    assert (sets.sum(0) == 1).all()  # disjoint: every neuron in one expert
    for group in range(4):
        assert len(choice[owner == group].unique()) == 1


def test_grouping_keeps_more_energy_than_one_set() -> None:
    energy = torch.rand(500, 30, generator=torch.Generator().manual_seed(0)) ** 4
    one = start.highest(energy.mean(0, keepdim=True), 10)
    several = start.highest(start.group(energy, 6, 10, torch.Generator().manual_seed(1)), 10)
    assert (energy @ several.T).max(1).values.mean() > 1.1 * (energy @ one.T).mean()


def test_the_router_learns_a_linear_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    x, rule = torch.randn(2000, 16, generator=generator), torch.randn(4, 16, generator=generator)
    kept = torch.nn.functional.one_hot((x @ rule.T).argmax(1), 4).float()
    weight = start.fit_router(x, kept)
    assert ((x @ weight.T).argmax(1) == kept.argmax(1)).float().mean() > 0.95


def test_least_squares_is_exact_where_it_can_be() -> None:
    generator = torch.Generator().manual_seed(0)
    features, targets = torch.randn(4, 16, generator=generator), torch.randn(4, 30, generator=generator)
    torch.testing.assert_close(features @ start.least_squares(features, targets).T, targets, rtol=0.02, atol=0.02)


class NoDoubleOn(TorchDispatchMode):
    """A device without float64."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        assert not isinstance(out, torch.Tensor) or out.dtype != torch.float64 or out.device.type != self.device
        return out


def test_least_squares_on_a_device_without_float64() -> None:
    with FakeTensorMode(), NoDoubleOn("mps"):
        features, targets = torch.empty(4, 16, device="mps"), torch.empty(4, 30, device="mps")
        weight = start.least_squares(features, targets)
    assert (weight.device.type, weight.dtype, weight.shape) == ("mps", torch.float32, (30, 16))


@pytest.mark.parametrize("p", [0.3, 0.5, 0.8])
def test_cut_keeps_the_share_that_was_asked_for(p: float) -> None:
    energy = torch.rand(3, 200, generator=torch.Generator().manual_seed(0)).exp()
    logits = start.logits_of(energy, p)
    on = (probability_on(logits) > 0.5 - 1e-6).sum(-1)
    assert on.tolist() == [round(200 * p)] * 3
    assert logits.argsort(-1).equal(energy.argsort(-1))


@pytest.mark.parametrize("settings", [{}, {"vo_routing": False}, {"head_pruning": True}, {"experts": 1}], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_training_starts_at_the_target(name: str, settings, tmp_path) -> None:
    """Every expert has p of the neurons, give or take the least squares' one; attention is whole."""
    model = tiny_model(name, dtype=torch.float32)
    method = ToMoE(start="energy", **{"experts": 3, "embedding": 8} | settings)
    budget = Budget(ratio=0.7, basis="block")
    trainer = Trainer(method, model, tokenizer(), budget, SmallCalibration(), context(tmp_path))
    start.begin(trainer.network, trainer.decoder, trainer.plan.target, trainer._first_windows(), context(tmp_path))
    with torch.no_grad():
        masks = trainer.network.draw(noise=0.0)
        logits = [site.expert_logits(m.embeddings_NE) for site, m in zip(trainer.network.mlp_sites, masks, strict=True)]
    evens_LN = (probability_on(torch.stack(logits)) > 0.5).sum(-1)  # neurons that are rather on than off
    assert (evens_LN - trainer.plan.target * trainer.decoder.shape.mlp_width).abs().max() < 1.6
    static = [mask for layer in masks for mask in (layer.qk_h, layer.heads_H) if mask is not None]
    assert all(mask.eq(1).all() for mask in static)


def test_nothing_but_the_start_differs() -> None:
    """The same architecture, the same names and shapes."""
    model = tiny_model("llama-gqa", dtype=torch.float32)

    def made(kind: str) -> ToMoENetwork:
        method = ToMoE(start=kind, experts=3, embedding=8)  # type: ignore[arg-type]
        return ToMoENetwork(Decoder(model).shape, method, 8, torch.Generator().manual_seed(0))

    shapes = [{k: v.shape for k, v in made(kind).state_dict().items()} for kind in ("random", "energy")]
    assert shapes[0] == shapes[1]


def test_the_context_s_seed_decides(tmp_path) -> None:
    def routers(seed: int) -> torch.Tensor:
        model = tiny_model("llama-gqa", dtype=torch.float32)
        method = ToMoE(start="energy", experts=3, embedding=8)
        network = ToMoENetwork(Decoder(model).shape, method, 8, torch.Generator().manual_seed(0))
        start.begin(network, Decoder(model), 0.5, some_ids(12, 16), Context(scratch=tmp_path, seed=seed))
        return network.mlp_sites[1].router.weight.detach()

    assert routers(0).equal(routers(0)) and not routers(0).equal(routers(1))
