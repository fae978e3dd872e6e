"""Training: what moves and what does not, resuming bit for bit, non-finite steps, activation checkpointing, memory."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from methods.base import Budget
from methods.errors import UserError
from methods.modeling import Decoder
from methods.tomoe import ToMoE
from methods.tomoe.network import ToMoENetwork
from methods.tomoe.training import Trainer, train
from methods.training import loop
from methods.training.loop import Loop
from tests.methods.tiny import ONE_PER_FAMILY, tiny_model
from tests.methods.training.small import SmallCalibration, context, sentences, tokenizer

HALF = Budget(ratio=0.6, basis="block", tolerance=0.2)


def run(
    folder: Path, name: str = "llama-gqa", *, steps: int = 4, artifacts: Path | None = None, **settings: Any
) -> ToMoENetwork:
    method = ToMoE(**{"experts": 3, "embedding": 4, "start": "random"} | settings)
    model = tiny_model(name, dtype=torch.float32)
    return train(
        method, model, tokenizer(), HALF, SmallCalibration(), context(folder, steps=steps, artifacts=artifacts)
    )


def same(one: ToMoENetwork, other: ToMoENetwork) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(
        name == other_name and tensor.equal(other_tensor) for (name, tensor), (other_name, other_tensor) in pairs
    )


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_only_the_network_is_trained_and_z_stays(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, dtype=torch.float32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    method = ToMoE(experts=3, embedding=4)
    trainer = Trainer(method, model, tokenizer(), HALF, SmallCalibration(), context(tmp_path))
    first = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    trainer.run()
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    moved = {key for key, value in trainer.network.state_dict().items() if not value.equal(first[key])}
    still = set(first) - moved
    assert "hypernetwork.z_SNI" in still
    assert {key for key in still if "z_SNI" not in key} <= unused(trainer.network)
    assert not any(parameter is trainer.network.hypernetwork.z_SNI for parameter in trainer.network.parameters())


def unused(network: ToMoENetwork) -> set[str]:
    """Where query and key keep their width, nothing is decided about them."""
    return {key for key in network.state_dict() if "static" in key} if network.shape.qk_norm else set()


@pytest.mark.parametrize("settings", [{}, {"mask_noise": "per_token"}, {"start": "energy"}, {"checkpointing": True}])
def test_resumed_equals_uninterrupted_bit_for_bit(settings: dict[str, Any], tmp_path: Path, monkeypatch) -> None:
    whole = run(tmp_path / "whole", steps=6, artifacts=tmp_path / "a", **settings)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    step, killed_at = Loop.step, 4

    def killed(self: Loop, number: int, batch: torch.Tensor) -> dict[str, float]:
        if number == killed_at:
            raise KeyboardInterrupt
        return step(self, number, batch)

    monkeypatch.setattr(Loop, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", steps=6, artifacts=tmp_path / "b", **settings)
    assert [path.name for path in (tmp_path / "part" / "tomoe").iterdir()] == ["step-000004"]
    monkeypatch.setattr(Loop, "step", step)
    assert same(run(tmp_path / "part", steps=6, artifacts=tmp_path / "b", **settings), whole)
    one, other = ((tmp_path / folder / "training.csv").read_text() for folder in "ab")
    without_time = [[row[:-3] for row in csv.reader(text.splitlines())] for text in (one, other)]
    assert without_time[0] == without_time[1] and len(without_time[0]) == 7


def test_the_final_checkpoint_is_not_trained_again(tmp_path: Path) -> None:
    made = run(tmp_path)
    assert [path.name for path in (tmp_path / "tomoe").iterdir()] == ["final"]
    assert same(run(tmp_path), made)


def test_different_seeds_differ(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa", dtype=torch.float32)
    made = [
        train(ToMoE(experts=2), model, tokenizer(), HALF, SmallCalibration(), context(tmp_path / str(seed), seed=seed))
        for seed in (0, 1)
    ]
    assert not same(*made)


@pytest.mark.parametrize(
    "change, what", [({"tau": 0.5}, "settings"), ({"steps": 9}, "budget"), ({"name": "llama-mha"}, ".*model")]
)
def test_a_checkpoint_of_another_run_is_refused(change: dict[str, Any], what: str, tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(UserError, match=f"is of another {what}.*Remove that folder"):
        run(tmp_path, **change)
    assert load_file(tmp_path / "tomoe" / "final" / "state.safetensors")


def test_another_text_outside_the_sampled_windows_is_another_run(tmp_path: Path) -> None:
    method, model = ToMoE(experts=3, embedding=4, start="random"), tiny_model("llama-gqa", dtype=torch.float32)
    where = context(tmp_path)
    train(method, model, tokenizer(), HALF, SmallCalibration(), where)
    other = SmallCalibration(sources={"words": [*sentences()[:-1], sentences()[-1][::-1]]})
    assert other.sha256 == SmallCalibration().sha256
    with pytest.raises(UserError, match="is of another text"):
        train(method, model, tokenizer(), HALF, other, where)


@pytest.mark.parametrize("seed", [2**24, 20260101, -1])
def test_any_seed_will_do(seed: int, tmp_path: Path) -> None:
    method, model = ToMoE(experts=3, embedding=4, start="random"), tiny_model("llama-gqa", dtype=torch.float32)
    trained = train(method, model, tokenizer(), HALF, SmallCalibration(), context(tmp_path, seed=seed, steps=1))
    assert all(tensor.isfinite().all() for tensor in trained.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_permuted_matrix_is_another_model(dtype: torch.dtype, tmp_path: Path) -> None:
    """All sums of a matrix stay what they were."""
    model, method = tiny_model("llama-gqa", dtype=dtype), ToMoE(experts=3, embedding=4, start="random")
    arguments = method, model, tokenizer(), HALF, SmallCalibration(), context(tmp_path)
    train(*arguments)
    train(*arguments)
    matrix = Decoder(model).layers[0].mlp_output.weight
    matrix.data = matrix.data.flip(0)
    with pytest.raises(UserError, match="is of another model"):
        train(*arguments)


@pytest.mark.parametrize("loss, columns", [("kd", {"kd", "kd_cross_entropy"}), ("lm", {"lm"})])
def test_the_column_is_named_after_the_loss(loss: str, columns: set[str], tmp_path: Path) -> None:
    run(tmp_path / "run", steps=1, artifacts=tmp_path, loss=loss)
    (row,) = csv.DictReader((tmp_path / "training.csv").read_text().splitlines())
    assert {name for name in row if name.startswith(("kd", "lm"))} == columns
    assert row["batch_tokens"] == "32"  # two sequences of 16
    assert float(row["tokens_per_second"]) == pytest.approx(32 / float(row["seconds"]), rel=1e-6)


def test_a_non_finite_step_is_skipped_and_counted(tmp_path: Path, monkeypatch) -> None:
    terms = Trainer._terms

    def broken(self: Trainer, *args: Any) -> Any:
        made = terms(self, *args)
        broken.calls += 1
        return made if broken.calls != 2 else type(made)(**{**vars(made), "loss": made.loss * float("nan")})

    broken.calls = 0
    monkeypatch.setattr(Trainer, "_terms", broken)
    network = run(tmp_path / "run", artifacts=tmp_path)
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())
    rows = list(csv.DictReader((tmp_path / "training.csv").read_text().splitlines()))
    assert [row["skipped"] for row in rows] == ["0", "1", "1", "1"]


def test_a_loss_that_stays_non_finite_stops_the_training_and_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    terms = Trainer._terms

    def broken(self: Trainer, *args: Any) -> Any:
        made = terms(self, *args)
        broken.calls += 1
        return made if broken.calls < 3 else type(made)(**{**vars(made), "loss": made.loss * float("inf")})

    broken.calls = 0
    monkeypatch.setattr(Trainer, "_terms", broken)
    with pytest.raises(UserError, match=r"not finite in 10 steps in a row.*learning_rate"):
        run(tmp_path / "run", steps=40, artifacts=tmp_path)
    assert len((tmp_path / "training.csv").read_text().splitlines()) == 1 + 11
    (saved,) = (tmp_path / "run" / "tomoe").iterdir()
    assert saved.name == "step-000012"
    assert all(tensor.isfinite().all() for tensor in load_file(saved / "state.safetensors").values())
    with pytest.raises(UserError, match="not finite"):  # and goes on where it stopped
        run(tmp_path / "run", steps=40, artifacts=tmp_path)
    assert [path.name for path in (tmp_path / "run" / "tomoe").iterdir()] == ["step-000013"]


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    kept, recomputed = run(tmp_path / "a"), run(tmp_path / "b", checkpointing=True)
    assert same(kept, recomputed)


def test_the_target_ramps_down_from_the_start(tmp_path: Path) -> None:
    method = ToMoE(steps=10, ramp=0.5)
    trainer = Trainer(method, tiny_model("llama-gqa"), tokenizer(), HALF, SmallCalibration(), context(tmp_path))
    targets = [trainer.plan.p(method, step) for step in range(10)]
    p = trainer.plan.target
    assert targets == pytest.approx([trainer.plan.start + (p - trainer.plan.start) * s / 5 for s in range(5)] + [p] * 5)
