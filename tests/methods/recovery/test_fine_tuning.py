"""Fine-tuning: against a loop written out, what it leaves alone, resuming bit for bit, a model that gets better."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from benchmarks import data, models
from methods.base import Budget, Context, Training
from methods.errors import UserError
from methods.recovery import Recovery, adapters, fine_tuning
from methods.shortgpt import ShortGPT
from methods.training import loop
from methods.training.data import Blocks
from methods.training.loop import Loop
from methods.training.seeding import seeded
from tests.methods.recovery.made_of import STRUCTURES, fresh, needs_peft, noisy
from tests.methods.tiny import logits, tiny_model
from tests.methods.training.small import SmallCalibration, context, tokenizer

pytestmark = needs_peft


def recover(model: PreTrainedModel, folder: Path, *, steps: int = 4, **settings: Any) -> dict[str, int]:
    recipe = Recovery(**{"dropout": 0.0} | settings)
    artifacts = folder / "artifacts"
    return fine_tuning.recover(
        recipe, model, tokenizer(), SmallCalibration(), context(folder, steps=steps, artifacts=artifacts)
    )


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    theirs = other.state_dict()
    return all(tensor.equal(theirs[name]) for name, tensor in one.state_dict().items())


def written_out(model: PreTrainedModel, steps: int, rank: int, alpha: float, clip: float) -> dict[str, Tensor]:
    """LoRA by its formula, with torch alone."""
    blocks = iter(Blocks(SmallCalibration().rows(), tokenizer(), 16, 0))
    with seeded(0, "cpu"):
        drawn = {
            name: nn.Parameter(p.detach().clone()) for name, p in adapters.attach(model, Recovery(rank=rank)).items()
        }
    adapters.detach(model)
    base = weights(model)
    optimizer = torch.optim.AdamW(drawn.values(), weight_decay=0.01)

    def now() -> dict[str, Tensor]:
        merged = dict(base)
        for name in drawn:
            if "lora_A" in name:
                a, b = drawn[name], drawn[name.replace("lora_A", "lora_B")]
                weight = name.partition(".lora_A")[0] + ".weight"
                merged[weight] = base[weight] + alpha / rank * (b @ a)
        return merged

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * ((step + 1) / 2 if step < 1 else (steps - step) / (steps - 1))
        batch = torch.stack([next(blocks), next(blocks)])
        predicted = functional_call(model, now(), kwargs={"input_ids": batch[:, :-1]}, tie_weights=False).logits
        targets = torch.where(batch[:, 1:] == 0, -100, batch[:, 1:])  # BOS comes by chance
        nn.functional.cross_entropy(predicted.flatten(0, 1), targets.flatten()).backward()
        nn.utils.clip_grad_norm_(drawn.values(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach() for name, tensor in now().items()}


@pytest.mark.parametrize("name", ["llama-gqa", "opt"])
def test_it_is_lora(name: str, tmp_path: Path) -> None:
    settings = {"rank": 3, "alpha": 5.0, "learning_rate": 0.01, "weight_decay": 0.01, "warmup": 0.4, "clip": 0.05}
    model = fresh(name)
    recover(model, tmp_path, steps=5, **settings)
    expected = written_out(fresh(name), 5, 3, 5.0, 0.05)
    assert not model.state_dict()[trained(model)].equal(fresh(name).state_dict()[trained(model)])
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5)


def trained(model: PreTrainedModel) -> str:
    return adapters.projections(model)[0] + ".weight"


@pytest.mark.parametrize("structure", [*STRUCTURES, "noisy"])
def test_only_projections_change(structure: str, tmp_path: Path) -> None:
    model = noisy("opt") if structure == "noisy" else STRUCTURES[structure]("opt", tmp_path)
    before = weights(model)
    spent = recover(model, tmp_path, dropout=0.05)
    moved = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert moved == {f"{name}.weight" for name in adapters.projections(model)}
    linears = [model.get_submodule(name) for name in adapters.projections(model)]
    parameters = sum(8 * (linear.in_features + linear.out_features) for linear in linears)
    assert spent == {"tokens": 4 * 2 * 16, "parameters": parameters, "skipped": 0}
    assert not model.training


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, part = fresh("llama-gqa"), fresh("llama-gqa")
    recover(whole, tmp_path / "whole", steps=6, dropout=0.3)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    step = Loop.step

    def killed(self: Loop, number: int, batch: Tensor) -> dict[str, float]:
        if number == 4:
            raise KeyboardInterrupt
        return step(self, number, batch)

    monkeypatch.setattr(Loop, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        recover(part, tmp_path / "part", steps=6, dropout=0.3)
    monkeypatch.setattr(Loop, "step", step)
    part = fresh("llama-gqa")
    recover(part, tmp_path / "part", steps=6, dropout=0.3)
    assert same(part, whole)
    again = fresh("llama-gqa")
    monkeypatch.setattr(Loop, "step", killed)  # the final checkpoint is not trained again
    recover(again, tmp_path / "part", steps=6, dropout=0.3)
    assert same(again, whole)


def test_the_training_of_another_model_is_not_taken_up(tmp_path: Path) -> None:
    recover(fresh("llama-gqa"), tmp_path)
    with pytest.raises(UserError, match="of another model"):
        recover(tiny_model("llama-gqa", dtype=torch.float32, seed=1), tmp_path)
    with pytest.raises(UserError, match="of another settings"):
        recover(fresh("llama-gqa"), tmp_path, rank=2)


def test_choices_by_chance_are_made_without(tmp_path: Path) -> None:
    made = [noisy("llama-gqa", scale) for scale in (0.5, 4.0)]
    for number, model in enumerate(made):
        recover(model, tmp_path / str(number))
        torch.manual_seed(0)
        assert not logits(model).equal(logits(model))  # the chance is back
    plain = STRUCTURES["experts_and_chosen_values"]("llama-gqa", tmp_path)
    recover(plain, tmp_path / "plain")
    assert same(made[0], made[1]) and same(plain, made[0])


def test_dropout_is_that_of_the_adapters(tmp_path: Path) -> None:
    """OPT has one of its own, which stays off."""
    made = []
    for number, (own, theirs) in enumerate([(0.0, 0.0), (0.5, 0.0), (0.5, 0.5)]):
        made.append(tiny_model("opt", dtype=torch.float32, dropout=own, attention_dropout=own))
        recover(made[-1], tmp_path / str(number), dropout=theirs)
    assert same(made[0], made[1]) and not same(made[1], made[2])


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    made = [STRUCTURES["experts_and_chosen_values"]("llama-gqa", tmp_path) for _ in range(2)]
    for model, checkpointing in zip(made, (False, True), strict=True):
        recover(model, tmp_path / str(checkpointing), dropout=0.1, checkpointing=checkpointing)
    assert same(*made)


def test_kept_adapters_stay_on(tmp_path: Path) -> None:
    merged, kept = fresh("qwen2"), fresh("qwen2")
    recover(merged, tmp_path / "merged")
    recover(kept, tmp_path / "kept", merge=False)
    assert adapters.adapted(kept) and not adapters.adapted(merged)
    torch.testing.assert_close(logits(kept), logits(merged), rtol=1e-4, atol=1e-5)


def test_half_precision_is_refused_and_bfloat16_is_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Type --dtype bfloat16"):
        recover(tiny_model("llama-gqa", dtype=torch.float16), tmp_path)
    model = tiny_model("llama-gqa", dtype=torch.bfloat16)
    before = weights(model)
    recover(model, tmp_path, steps=8)
    assert model.dtype == torch.bfloat16 and not model.state_dict()[trained(model)].equal(before[trained(model)])


def test_a_trained_model_that_lost_a_block_gets_better(tmp_path: Path) -> None:
    zoo = models.resolve("tiny-llama")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(zoo.prepare(), dtype=torch.float32).eval()
    words = models.load_tokenizer(zoo.prepare())
    text = data.load("wikileads", "calibration")
    calibration = data.sample_calibration(text, words, 8, 64, 0)
    where = Context(scratch=tmp_path, training=Training(steps=20, sequences=4, window=64))
    model = ShortGPT().compress(model, words, Budget(ratio=0.8, tolerance=0.2), calibration, where)
    before = loss_of(model, calibration)
    fine_tuning.recover(Recovery(), model, words, calibration, where)
    after = loss_of(model, calibration)
    assert math.isfinite(after) and after < before - 0.02


@torch.no_grad()
def loss_of(model: PreTrainedModel, calibration: data.TokenCalibration) -> float:
    """Mean next-token loss on the calibration windows, by the stock loss."""
    (batch,) = calibration.batches(8)
    return float(model(input_ids=batch.input_ids, labels=batch.input_ids).loss)
