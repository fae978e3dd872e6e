"""The loop on three numbers, beside AdamW by hand. Whole runs, also of several processes: tests/methods/tomoe."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods.errors import UserError
from methods.training import loop as module
from methods.training.data import Blocks
from methods.training.loop import Group, Loop, LoopSettings
from methods.training.state import TrainingState
from tests.methods.training.small import context, sentences, tokenizer

AIM = torch.tensor([3.0, -4.0, 12.0])


class Numbers:
    """Two parameters and a constant; their sum is to come near AIM, with noise."""

    def __init__(self, folder: Path, *, steps: int = 5, noise: float = 0.0, factor: float = 1.0, **settings: Any):
        self.near, self.far = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
        self.constant, self.noise = torch.ones(3), noise
        self.gradients: list[Tensor] = []
        self.batches: list[Tensor] = []
        self.drawn: list[float] = []
        how = LoopSettings(
            name="numbers",
            label="training",
            remedy="Type something else.",
            **{"steps": steps, "sequences": 2, "seed": 0, "weight_decay": 0.0} | settings,
        )
        blocks = Blocks({"words": sentences()}, tokenizer(), 16, 0)
        groups = [Group({"near": self.near}), Group({"far": self.far}, factor)]
        where = context(folder / "scratch", artifacts=folder)
        constants = {"constant": self.constant}
        self.loop = Loop(how, groups, self.loss, lambda step: 0.1 / (step + 1), blocks, where, {}, constants)
        self.loop.optimizer.register_step_pre_hook(lambda *_: self.gradients.append(self.near.grad.clone()))  # type: ignore[union-attr]

    def loss(self, step: int, batch: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        self.batches.append(batch)
        noise_3 = torch.randn(3)
        self.drawn.append(float(noise_3[0]))
        aim = AIM + self.noise * noise_3
        loss = ((self.near + self.far + self.constant - 1 - aim) ** 2).sum() / 2
        return loss, {"loss": loss, "aim": 0.1}


def plain(steps: int, factor: float = 1.0, clip: float | None = None, weight_decay: float = 0.0) -> list[Tensor]:
    """The same by hand."""
    near, far = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([{"params": [near]}, {"params": [far]}], weight_decay=weight_decay)
    for step in range(steps):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.1 / (step + 1), factor * 0.1 / (step + 1)
        optimizer.zero_grad()
        (((near + far - AIM) ** 2).sum() / 2).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([near, far], clip)
        optimizer.step()
    return [near.detach(), far.detach()]


@pytest.mark.parametrize("settings", [{}, {"factor": 3.0}, {"weight_decay": 0.5}], ids=str)
def test_it_is_adamw_at_the_rate_of_each_step_and_group(settings: dict[str, float], tmp_path: Path) -> None:
    numbers = Numbers(tmp_path, **settings)
    numbers.loop.run()
    for trained, expected in zip((numbers.near, numbers.far), plain(5, **settings), strict=True):
        torch.testing.assert_close(trained.detach(), expected)


@pytest.mark.parametrize("clip", [0.5, 1e3])
def test_clipping_shortens_the_gradient_of_everything_to_a_norm_and_lengthens_none(clip: float, tmp_path: Path) -> None:
    """Of two equal gradients of length 13; AdamW does not care for the length of the first."""
    numbers = Numbers(tmp_path, clip=clip)
    numbers.loop.run()
    torch.testing.assert_close(numbers.gradients[0], -AIM * min(1.0, clip / (13 * 2**0.5)))
    torch.testing.assert_close(numbers.near.detach(), plain(5, clip=clip)[0])


def test_a_batch_has_a_token_more_than_the_window_and_the_log_what_was_told(tmp_path: Path) -> None:
    numbers = Numbers(tmp_path)
    numbers.loop.run()
    assert [list(batch.shape) for batch in numbers.batches] == [[2, 17]] * 5
    rows = list(csv.DictReader((tmp_path / "training.csv").read_text().splitlines()))
    assert [row["learning_rate"] for row in rows] == [f"{0.1 / (step + 1):.9g}" for step in range(5)]
    assert (rows[0]["loss"], rows[0]["aim"], rows[0]["batch_tokens"]) == ("84.5", "0.1", "32")


def test_every_step_has_noise_of_its_own(tmp_path: Path) -> None:
    numbers, before = Numbers(tmp_path), torch.get_rng_state()
    numbers.loop.run()
    assert len({*numbers.drawn}) == 5 and torch.get_rng_state().equal(before)


def test_begin_comes_before_the_first_step_and_not_again(tmp_path: Path) -> None:
    whole = Numbers(tmp_path / "whole", noise=1.0)
    whole.loop.run(lambda: whole.near.data.fill_(5.0))
    part = Numbers(tmp_path / "part", noise=1.0)
    part.near.data.fill_(5.0)
    for step, batch in zip(range(2), part.loop.batches(), strict=False):
        part.loop.step(step, batch)
    part.loop.state.save("step-000002", 2)
    resumed = Numbers(tmp_path / "part", noise=1.0)
    resumed.constant.fill_(7.0)  # comes back with the checkpoint
    resumed.loop.run(lambda: resumed.near.data.fill_(-99.0))
    assert resumed.near.equal(whole.near) and resumed.far.equal(whole.far) and resumed.constant.equal(torch.ones(3))
    assert not whole.near.equal(whole.far)


def test_a_loss_that_stays_non_finite_ends_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 3)
    numbers = Numbers(tmp_path, noise=float("nan"))
    with pytest.raises(UserError, match=r"not finite in 3 steps in a row.*Type something else\."):
        numbers.loop.run()
    assert numbers.near.equal(torch.zeros(3))


def test_the_latest_checkpoint_is_that_of_the_most_steps(tmp_path: Path) -> None:
    for name in ("step-999999", "step-1000000"):
        (tmp_path / name).mkdir()
    state = TrainingState(tmp_path, {}, None, {})  # type: ignore[arg-type]
    assert [path.name for path in state._checkpoints()] == ["step-999999", "step-1000000"]


def test_what_follows_a_row_cannot_be_predicted() -> None:
    blocks = Blocks({"words": sentences()}, tokenizer(), 16, 0)
    assert blocks.predictable(torch.tensor([[0, 5, 1], [7, 0, 0]])).tolist() == [
        [False, True, True],
        [True, False, False],
    ]
