"""A cell from the dense model to its record, interrupted, repeated and broken in every way a run can be."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import cell, checkpoint, store, tasks
from benchmarks.metric import Metric
from tests.benchmarks import small_run

METRIC = "text/token_ppl@128"


def records(workplace: Path, out: str = "out") -> dict[str, dict[str, Any]]:
    """Records by method."""
    return {record["cell"]["method"]: record for record in store.records(workplace / out)}


def folder(workplace: Path, method: str) -> Path:
    """The folder of a method's only cell."""
    (record,) = (workplace / "out").glob(f"*/{method}/*/*/record.json")
    return record.parent


def test_a_run_leaves_complete_records(workplace: Path) -> None:
    assert small_run.run(workplace) == 0
    dense, short = records(workplace)["dense"], records(workplace)["shortgpt"]
    assert list(short) == list(store.KEYS) and list(short["cell"]) == list(store.CELL_KEYS)
    assert short["status"] == "done" and short["error"] is None
    model = AutoModelForCausalLM.from_pretrained(workplace / "model")
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert dense["size"]["active_total"] == dense["size"]["dense_params"] == model.num_parameters()
    assert short["size"]["active_total"] == model.num_parameters() - layer
    assert short["size"]["requested"] == 0.8 and short["size"]["on_budget"]
    assert short["size"]["stored_bytes"] > 4 * short["size"]["stored_total"]
    assert short["metrics"][METRIC].keys() == {"value", "stderr", "n"} and short["metrics"][METRIC]["n"] == 2
    assert short["time"]["total_s"] == pytest.approx(sum(short["time"].values()) - short["time"]["total_s"])
    assert short["memory"]["peak_host_bytes"] > 1e7
    assert short["provenance"]["versions"]["torch"] == torch.__version__
    assert short["provenance"]["task_versions"] == {"ppl-text@128": cell.PROTOCOL}
    assert dense["cell"]["calibration"] is None and "text" in short["provenance"]["dataset_revisions"]
    left = sorted(path.name for path in folder(workplace, "shortgpt").iterdir())
    assert left == ["log.txt", "record.json", "structure.json"]
    assert json.loads((folder(workplace, "shortgpt") / "structure.json").read_text())["num_hidden_layers"] == 3


def test_finished_cells_are_skipped_and_missing_tasks_added(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert small_run.run(workplace) == 0
    before = records(workplace)
    monkeypatch.setattr(cell, "_evaluate", forbidden)
    assert small_run.run(workplace) == 0 and records(workplace) == before
    monkeypatch.undo()
    text = f"ppl:{workplace / 'text.txt'}"
    assert small_run.run(workplace, "--tasks", f"{text}@32") == 0
    after = records(workplace)["shortgpt"]
    assert set(after["metrics"]) == {METRIC, "text/token_ppl@32"}
    assert after["metrics"][METRIC] == before["shortgpt"]["metrics"][METRIC]
    assert after["cell"] == before["shortgpt"]["cell"] and after["size"] == before["shortgpt"]["size"]
    assert after["time"]["evaluate_s"] > before["shortgpt"]["time"]["evaluate_s"]


def forbidden(*arguments: object, **options: object) -> None:
    raise AssertionError("this was done already")


def dies(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_a_cell_goes_on_after_its_last_finished_step(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "write_record", dies)
    with pytest.raises(KeyboardInterrupt):
        small_run.run(workplace, "--methods", "dense")
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "make", forbidden)
    monkeypatch.setattr(cell, "_evaluate", forbidden)
    assert small_run.run(workplace, "--methods", "dense") == 0
    assert METRIC in records(workplace)["dense"]["metrics"]


def test_a_failing_task_fails_its_cell_keeps_the_rest_and_is_tried_again(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"ppl:{workplace / 'text.txt'}"
    line = ("--methods", "dense", "--tasks", text, f"{text}@32")
    evaluate = tasks.evaluate

    def broken(task: tasks.Task, *arguments: Any, **options: Any) -> Any:
        if task.window == 32:
            raise RuntimeError("out\nof luck")
        return evaluate(task, *arguments, **options)

    monkeypatch.setattr(tasks, "evaluate", broken)
    assert small_run.run(workplace, *line) == 1
    dense = records(workplace)["dense"]
    assert dense["status"] == "failed" and dense["error"] == "RuntimeError: out of luck"
    assert set(dense["metrics"]) == {METRIC}
    assert "RuntimeError: out\nof luck" in (folder(workplace, "dense") / "log.txt").read_text()
    assert "failed: " in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(tasks, "evaluate", evaluate)
    assert small_run.run(workplace, *line) == 0
    assert set(records(workplace)["dense"]["metrics"]) == {METRIC, "text/token_ppl@32"}


def test_a_number_that_is_none_fails_the_cell(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "evaluate", lambda *a, **k: ({"x/token_ppl@8": Metric(math.inf, None, 1)}, {}))
    assert small_run.run(workplace, "--methods", "dense") == 1
    assert records(workplace)["dense"]["error"] == "ArithmeticError: x/token_ppl@8 is inf"


def test_checkpoints_are_kept_whole_and_can_be_evaluated_again(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ("--checkpoints", str(workplace / "kept"))
    assert small_run.run(workplace, *kept) == 0
    before = records(workplace)
    (kept_one,) = (workplace / "kept").glob("*/shortgpt/*/*")
    assert AutoModelForCausalLM.from_pretrained(kept_one).config.num_hidden_layers == 3
    monkeypatch.setattr(checkpoint, "_compress", forbidden)
    assert small_run.run(workplace, *kept, "--only-evaluate", "--force") == 0
    assert {name: record["metrics"] for name, record in records(workplace).items()} == {
        name: record["metrics"] for name, record in before.items()
    }


def test_force_runs_everything_again(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert small_run.run(workplace) == 0
    monkeypatch.setattr(checkpoint, "_compress", forbidden)
    assert small_run.run(workplace, "--force") == 1


def test_a_disk_that_fills_up_leaves_no_half_record(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", full)
    assert small_run.run(workplace, "--methods", "dense") == 1
    assert "The disk is full below" in capsys.readouterr().out
    assert not list((workplace / "out").rglob("record.json")) and not list((workplace / "out").rglob("*.tmp"))


def test_two_runs_never_share_a_cell(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    assert small_run.run(workplace, "--methods", "dense") == 0
    (lock,) = (workplace / "out" / ".locks").iterdir()
    monkeypatch.setattr(cell, "LOCK_SECONDS", 0.1)
    before = records(workplace)
    with FileLock(lock):
        assert small_run.run(workplace, "--methods", "dense", "--force") == 1
    assert records(workplace) == before


def test_the_calibration_text_must_be_long_enough(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "short.txt").write_text("a few words\nand a few more\n")
    assert small_run.run(workplace, "--calibration", str(workplace / "short.txt")) == 1
    assert "too few" in capsys.readouterr().out
    assert records(workplace)["dense"]["status"] == "done" and records(workplace)["shortgpt"]["status"] == "failed"
