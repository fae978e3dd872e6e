"""training.csv and TensorBoard events: whole counts, resuming over whatever an earlier run left."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from methods.training.log import NAME, StepLog


def write(folder: Path, start: int, stop: int, more: dict[str, float] | None = None, tensorboard: bool = False) -> None:
    with StepLog(folder, start, tensorboard) as log:
        for step in range(start, stop):
            log.write({"step": step, "batch_tokens": 32} | (more or {}))


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / NAME).read_text().splitlines()))


def steps(folder: Path) -> list[int]:
    return [int(row["step"]) for row in rows(folder)]


def test_counts_are_whole_and_other_numbers_as_precise_as_float32(tmp_path: Path) -> None:
    loss = float(torch.tensor(1 / 3))
    write(tmp_path, 12_345_678, 12_345_679, {"loss": loss, "tokens.a": 9_876_543_210_123})
    (row,) = rows(tmp_path)
    assert (row["step"], row["tokens.a"]) == ("12345678", "9876543210123")
    assert float(torch.tensor(float(row["loss"]))) == loss


def test_a_resumed_run_drops_the_rows_it_repeats(tmp_path: Path) -> None:
    write(tmp_path, 0, 5)
    write(tmp_path, 3, 6)
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_a_row_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, 3)
    whole = (tmp_path / NAME).read_text()
    (tmp_path / NAME).write_text(whole[: whole.rindex(",")])
    write(tmp_path, 3, 5)
    assert steps(tmp_path) == [0, 1, 3, 4]


@pytest.mark.parametrize("left", [None, "", "\n"])
def test_resuming_without_the_earlier_rows(left: str | None, tmp_path: Path) -> None:
    if left is not None:
        (tmp_path / NAME).write_text(left)
    write(tmp_path, 3, 5)
    assert steps(tmp_path) == [3, 4]


def test_tensorboard_hides_the_events_of_steps_that_are_repeated(tmp_path: Path, monkeypatch) -> None:
    made: dict[str, Any] = {"scalars": []}

    def writer(folder: str, purge_step: int) -> Any:
        made.update(folder=folder, purge_step=purge_step)
        return SimpleNamespace(add_scalar=lambda *scalar: made["scalars"].append(scalar), close=lambda: None)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    write(tmp_path, 3, 4, {"loss": 0.5}, tensorboard=True)
    assert (made["folder"], made["purge_step"]) == (str(tmp_path), 3)
    assert ("loss", 0.5, 3) in made["scalars"]
