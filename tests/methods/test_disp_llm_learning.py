"""A trained embedded model, a short training of DISP-LLM: the target is met, what is useless goes first, and what was
learned beats lots."""

import csv
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import data, models
from methods.base import Budget, Context, Training
from methods.dimension_masks import Trainer
from methods.disp_llm import DispLLM, Kept, choose, cut
from methods.modeling import Decoder
from methods.modeling.footprint import footprint

RATIO = Budget(ratio=0.7, basis="block")


def dense() -> PreTrainedModel:
    """tiny-llama, every fourth MLP channel of which writes nothing."""
    model = AutoModelForCausalLM.from_pretrained(models.resolve("tiny-llama").prepare(), dtype=torch.float32)
    with torch.no_grad():
        for layer in Decoder(model).layers:
            layer.mlp_output.weight[:, ::4] = 0
    return model.eval()


@dataclass(frozen=True)
class Trained:
    rows: list[dict[str, str]]
    logits: list[Kept]
    target: float
    windows: Tensor


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    tokens, folder = models.load_tokenizer(models.resolve("tiny-llama").prepare()), tmp_path_factory.mktemp("run")
    calibration = data.sample_calibration(data.load("wikileads", "calibration"), tokens, 16, 128, seed=0)
    context = Context(scratch=folder, artifacts=folder, training=Training(steps=100, sequences=2, window=128))
    trainer = Trainer(DispLLM(), dense(), tokens, RATIO, calibration, context)
    trainer.run()
    rows = list(csv.DictReader((folder / "training.csv").read_text().splitlines()))
    stream = torch.tensor(tokens(data.load("wikileads", "test").content, verbose=False)["input_ids"])
    with torch.no_grad():
        return Trained(rows, trainer.network.logits(), trainer.plan.target, stream[: 12 * 256].view(12, 256))


def test_the_size_is_met_while_training(trained: Trained) -> None:
    last = [float(row["fraction"]) for row in trained.rows[-20:]]
    assert sum(last) / len(last) == pytest.approx(trained.target, abs=0.02)


def test_channels_that_write_nothing_close_first(trained: Trained) -> None:
    for block in trained.logits:
        useless = torch.arange(len(block.neurons)) % 4 == 0
        assert block.neurons[useless].mean() < block.neurons[~useless].mean() - 1


def test_learned_masks_beat_the_same_sizes_at_random(trained: Trained) -> None:
    generator = torch.Generator().manual_seed(0)
    order = [
        Kept(*(mask[torch.randperm(len(mask), generator=generator)] for mask in block)) for block in trained.logits
    ]
    shape = Decoder(dense()).shape
    learned, lots = (cut(dense(), choose(logits, shape, RATIO)) for logits in (trained.logits, order))
    assert footprint(learned).active_block == footprint(lots).active_block
    assert 0 <= 0.7 - footprint(learned).active_block / shape.block < 0.001
    gain = loss(lots, trained.windows) - loss(learned, trained.windows)
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5, gain


@torch.no_grad()
def loss(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Nats per token of each window."""
    logits = model(input_ids=windows).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(1)
