"""A trained embedded model, a short training: the target is met, the union is whole, and what was learned helps."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import data, models
from methods import modeling
from methods.base import Budget, Context, Training
from methods.modeling.footprint import footprint
from methods.tomoe import ToMoE
from methods.tomoe.conversion import convert
from methods.tomoe.network import ToMoENetwork
from methods.tomoe.training import Trainer

RATIO = Budget(ratio=0.7, basis="block")


def dense() -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(models.resolve("tiny-llama").prepare(), dtype=torch.float32)
    return model.eval()


@dataclass(frozen=True)
class Trained:
    rows: list[dict[str, float]]
    sparse: PreTrainedModel
    shuffled: PreTrainedModel
    windows: Tensor


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    tokens = models.load_tokenizer(models.resolve("tiny-llama").prepare())
    text = data.load("wikileads", "calibration")
    calibration = data.sample_calibration(text, tokens, 16, 128, seed=0)
    context = Context(scratch=tmp_path_factory.mktemp("scratch"), training=Training(steps=100, sequences=2, window=128))
    method = ToMoE()
    trainer = Trainer(method, dense(), tokens, RATIO, calibration, context)
    rows, step = [], trainer.loop.step
    trainer.loop.step = lambda *arguments: rows.append(step(*arguments)) or rows[-1]  # type: ignore[method-assign]
    trainer.run()
    stream = torch.tensor(tokens(data.load("wikileads", "test").content, verbose=False)["input_ids"])
    made = [
        convert(method, dense(), network, RATIO, calibration, context)
        for network in (trainer.network, shuffled(trainer.network))
    ]
    return Trained(rows, made[0], made[1], stream[: 12 * 256].view(12, 256))


def shuffled(network: ToMoENetwork) -> ToMoENetwork:
    """The same logits on other neurons and dimensions: masks of equal size, chosen at random."""
    network, generator = copy.deepcopy(network), torch.Generator().manual_seed(0)
    decoders = [site.decoder for site in network.mlp_sites]
    decoders += [linear for site in network.attention_sites for linear in (site.dynamic, site.static)]
    for linear in decoders:
        order = torch.randperm(linear.out_features, generator=generator)
        linear.weight.data = linear.weight.data[order]
    return network


@torch.no_grad()
def divergence(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """KL from the dense model per window."""
    p, q = (each(windows).logits.log_softmax(-1) for each in (dense(), model))
    return (p.exp() * (p - q)).sum(-1).mean(-1)


def test_the_parameter_term_is_met(trained: Trained) -> None:
    assert sum(row["r_p"] for row in trained.rows[-10:]) / 10 < 0.05
    share = footprint(trained.sparse).active_block / footprint(dense()).active_block
    assert share == pytest.approx(0.7, abs=0.001)


def test_the_hard_union_is_nearly_whole(trained: Trained) -> None:
    layers = trained.sparse.config.compression["structures"]["moe_mlp"]["layers"]
    assert sum(layer["neurons"] for layer in layers) / (264 * len(layers)) > 0.9


def test_distillation_loss_falls_at_the_final_target(trained: Trained) -> None:
    reached = [row["kd"] for row in trained.rows if row["target"] == trained.rows[-1]["target"]]
    assert sum(reached[-10:]) < sum(reached[:10])


def test_learned_masks_beat_random_ones_of_equal_size(trained: Trained) -> None:
    sizes = [footprint(model).active_block for model in (trained.shuffled, trained.sparse)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.002)
    assert (divergence(trained.sparse, trained.windows) < divergence(trained.shuffled, trained.windows)).all()


def test_learned_routing_beats_random_routing_of_the_same_experts(trained: Trained) -> None:
    learned = divergence(trained.sparse, trained.windows)
    generator = torch.Generator().manual_seed(0)

    def at_random(module: object, args: object, logits: Tensor) -> Tensor:
        return torch.rand(logits.shape, generator=generator)

    handles = [layer.mlp.router.register_forward_hook(at_random) for layer in modeling.Decoder(trained.sparse).layers]  # type: ignore[union-attr]
    anyhow = divergence(trained.sparse, trained.windows)
    for handle in handles:
        handle.remove()
    assert (anyhow - learned).mean() > 3 * (anyhow - learned).std() / len(learned) ** 0.5
