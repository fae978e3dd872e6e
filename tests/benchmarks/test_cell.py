"""A cell from the dense model to its record, interrupted, repeated and broken in every way a run can be."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from benchmarks import cell, checkpoint, data, job, models, perplexity, record, store, tasks
from benchmarks.metric import Evaluation, Metric
from methods.base import Context, Training
from methods.shortgpt import ShortGPT
from tests.benchmarks import small_run

TEXT = "text-eec9e2d4"
"""What metrics call the text of these tests: its name and a hash."""
METRIC, SHORT_METRIC = f"{TEXT}/token_ppl@128", f"{TEXT}/token_ppl@32"
TASK, SHORT_TASK = f"ppl-{TEXT}@128", f"ppl-{TEXT}@32"


@pytest.fixture(scope="module")
def finished_once(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`inputs` with a run's records in `out`; not to be written to."""
    folder = shutil.copytree(inputs, tmp_path_factory.mktemp("finished"), dirs_exist_ok=True)
    logging.enable_progress_bar()
    assert small_run.run(folder) == 0
    return folder


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    """A copy of one's own."""
    return shutil.copytree(finished_once, tmp_path, dirs_exist_ok=True)


def records(workplace: Path, out: str = "out") -> dict[str, dict[str, Any]]:
    """Records by method."""
    return {found["cell"]["method"]: found for found in store.records(workplace / out)}


def folder(workplace: Path, method: str) -> Path:
    """The folder of a method's only cell."""
    (path,) = (workplace / "out").glob(f"*/{method}/*/*/record.json")
    return path.parent


def test_a_run_leaves_complete_records(finished: Path) -> None:
    assert not logging.is_progress_bar_enabled()
    dense, short = records(finished)["dense"], records(finished)["shortgpt"]
    assert list(short) == list(store.KEYS) and list(short["cell"]) == list(store.CELL_KEYS)
    assert short["status"] == "done" and short["error"] is None
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert dense["size"]["active_total"] == dense["size"]["dense_params"] == model.num_parameters()
    assert short["size"]["active_total"] == model.num_parameters() - layer
    assert short["size"]["requested"] == 0.8 and short["size"]["on_budget"]
    assert short["size"]["stored_bytes"] > 4 * short["size"]["stored_total"]
    assert short["metrics"][METRIC].keys() == {"value", "stderr", "n"} and short["metrics"][METRIC]["n"] == 2
    assert short["time"]["total_s"] == pytest.approx(sum(short["time"].values()) - short["time"]["total_s"])
    assert short["memory"]["peak_host_bytes"] > 1e7
    assert short["provenance"]["versions"]["torch"] == torch.__version__
    assert short["provenance"]["task_versions"] == {TASK: perplexity.VERSION}
    assert short["provenance"]["tasks"] == {} and short["provenance"]["started"] == record.STARTED
    assert dense["cell"]["calibration"] is None and TEXT in short["provenance"]["dataset_revisions"]
    left = sorted(path.name for path in folder(finished, "shortgpt").iterdir())
    assert left == ["log.txt", "record.json", "samples", "structure.json"]
    assert json.loads((folder(finished, "shortgpt") / "structure.json").read_text())["num_hidden_layers"] == 3


def test_finished_cells_are_skipped_and_missing_tasks_added(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = records(finished)
    monkeypatch.setattr(cell, "_evaluate", forbidden)
    assert small_run.run(finished) == 0 and records(finished) == before
    monkeypatch.undo()
    monkeypatch.setattr(record, "STARTED", "later")
    monkeypatch.setattr(perplexity, "VERSION", "7")
    text = f"ppl:{finished / 'text.txt'}"
    assert small_run.run(finished, "--tasks", f"{text}@32") == 0
    after = records(finished)["shortgpt"]
    assert set(after["metrics"]) == {METRIC, SHORT_METRIC}
    assert after["metrics"][METRIC] == before["shortgpt"]["metrics"][METRIC]
    assert after["cell"] == before["shortgpt"]["cell"] and after["size"] == before["shortgpt"]["size"]
    assert after["time"]["evaluate_s"] > before["shortgpt"]["time"]["evaluate_s"]
    assert after["provenance"]["task_versions"] == {TASK: "1", SHORT_TASK: "7"}
    assert after["provenance"]["started"] == "later"
    earlier = {key: before["shortgpt"]["provenance"][key] for key in record.ORIGIN}
    assert after["provenance"]["tasks"] == {TASK: earlier}


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
    line = ("--methods", "dense", "--tasks", f"{text}@32", text)
    evaluate = tasks.evaluate

    def broken(task: tasks.Task, *arguments: Any, **options: Any) -> Any:
        if task.window == 32:
            raise RuntimeError("out\nof luck")
        return evaluate(task, *arguments, **options)

    monkeypatch.setattr(tasks, "evaluate", broken)
    assert small_run.run(workplace, *line) == 1
    dense = records(workplace)["dense"]
    assert dense["status"] == "failed" and dense["error"] == f"{SHORT_TASK}: RuntimeError: out of luck"
    assert set(dense["metrics"]) == {METRIC} and dense["size"]
    assert "RuntimeError: out\nof luck" in (folder(workplace, "dense") / "log.txt").read_text()
    assert "failed: " in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(tasks, "evaluate", evaluate)
    assert small_run.run(workplace, *line) == 0
    assert set(records(workplace)["dense"]["metrics"]) == {METRIC, SHORT_METRIC}


def evaluation(metrics: dict[str, Metric], versions: dict[str, str] | None = None) -> Evaluation:
    """What a stand-in for an evaluation returns."""
    return Evaluation(metrics=metrics, dataset_revisions={}, task_versions=versions or {})


def test_a_number_that_is_none_fails_the_cell(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "evaluate", lambda *a, **k: evaluation({"x/token_ppl@8": Metric(math.inf, None, 1)}))
    assert small_run.run(workplace, "--methods", "dense") == 1
    assert records(workplace)["dense"]["error"] == f"{TASK}: ArithmeticError: x/token_ppl@8 is inf"


def test_checkpoints_are_kept_whole_and_can_be_evaluated_again(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ("--checkpoints", str(workplace / "out"))  # beside the records
    assert small_run.run(workplace, *kept) == 0
    before = metrics(workplace)
    (kept_one,) = (workplace / "out").glob("*/shortgpt/*/*/checkpoint")
    assert AutoModelForCausalLM.from_pretrained(kept_one).config.num_hidden_layers == 3
    monkeypatch.setattr(checkpoint, "_compress", forbidden)
    fetched_by_the_checks(monkeypatch)
    assert small_run.run(workplace, *kept, "--only-evaluate", "--force") == 0
    assert metrics(workplace) == before


def metrics(workplace: Path) -> dict[str, Any]:
    """Metrics by method."""
    return {name: found["metrics"] for name, found in records(workplace).items()}


def fetched_by_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models have their fingerprint only once they were checked, as hub models do that are not in the cache."""
    known, fingerprint = set(), models.Model.fingerprint
    monkeypatch.setattr(models.Model, "check", lambda model, offline: known.add(model.name))
    monkeypatch.setattr(models.Model, "fingerprint", lambda model: fingerprint(model) if model.name in known else "?")


def test_a_method_that_trains_gets_a_budget_all_rows_and_a_folder(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, compress = [], ShortGPT.compress

    def spy(method: ShortGPT, model: Any, tokenizer: Any, budget: Any, calibration: Any, context: Context) -> Any:
        seen.append((context.training, calibration.rows()))
        assert context.artifacts is not None
        (context.artifacts / "training.csv").write_text("step\n")
        return compress(method, model, tokenizer, budget, calibration, context)

    monkeypatch.setattr(ShortGPT, "compress", spy)
    assert small_run.run(workplace, "--budget", "demo") == 0
    text = str(workplace / "text.txt")
    training = Training(steps=300, sequences=4, window=128)  # 256 tokens are more than the model has positions
    assert seen == [(training, {text: data.load(text, "calibration").content.split("\n")})]
    assert (folder(workplace, "shortgpt") / "training.csv").read_text() == "step\n"


def test_force_measures_the_asked_tasks_again_and_keeps_the_others(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = metrics(finished)
    text = f"ppl:{finished / 'text.txt'}@32"
    assert small_run.run(finished, "--tasks", text) == 0
    worse = {SHORT_METRIC: Metric(99.0, None, 1)}
    monkeypatch.setattr(tasks, "evaluate", lambda *a, **k: evaluation(worse, {SHORT_TASK: "2"}))
    assert small_run.run(finished, "--tasks", text, "--force") == 0
    after = records(finished)["shortgpt"]
    assert after["metrics"][SHORT_METRIC]["value"] == 99.0
    assert after["metrics"][METRIC] == before["shortgpt"][METRIC]
    assert after["provenance"]["task_versions"] == {TASK: "1", SHORT_TASK: "2"}
    monkeypatch.setattr(checkpoint, "_compress", forbidden)
    assert small_run.run(finished, "--force") == 1
    failed = records(finished)["shortgpt"]
    assert failed["status"] == "failed" and failed["metrics"] == after["metrics"] and failed["size"] == after["size"]


def test_a_disk_that_fills_up_leaves_no_half_record(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", full)
    assert small_run.run(workplace, "--methods", "dense") == 1
    assert "The disk is full below" in capsys.readouterr().out
    assert not list((workplace / "out").rglob("record.json")) and not list((workplace / "out").rglob("*.tmp"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device")]),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_while_saving_is_told_and_swept(
    error: Exception, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(model: PreTrainedModel, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert small_run.run(workplace, "--methods", "dense") == 1
    assert "The disk is full below" in capsys.readouterr().out
    assert not list((workplace / "out").rglob("*.safetensors"))


def test_two_runs_never_share_a_cell(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    monkeypatch.setattr(job, "LOCK_SECONDS", 0.1)
    before = records(finished)
    with FileLock(finished / "out" / ".locks" / before["dense"]["cell"]["id"]):
        assert small_run.run(finished, "--methods", "dense", "--force") == 1
    assert records(finished) == before
