"""Metrics from stored samples: the same as when the model answered, and those of changed answers where they change."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness, perplexity, rescore, samples, store, tasks
from tests.benchmarks import small_run, toys
from tests.benchmarks.test_harness import forbidden

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TOYS = ("toy_zero", "toys_mixed", "toys_same@1shot", "toy_written", "toy_filtered", "toy_rolling")


@pytest.fixture(scope="module")
def measured_once(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that was measured on every kind of task, and the tasks' definitions."""
    folder = shutil.copytree(inputs, tmp_path_factory.mktemp("measured"), dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "OWN_TASKS", toys.write(folder / "definitions"))
        text = f"ppl:{folder / 'text.txt'}@32"
        assert small_run.run(folder, "--methods", "dense", "--tasks", text, *TOYS) == 0
    return folder


@pytest.fixture
def measured(measured_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of its record; no model can be asked."""
    folder = shutil.copytree(measured_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(tasks, "OWN_TASKS", folder / "definitions")
    monkeypatch.setattr(harness, "PrefixLM", forbidden)
    (path,) = (folder / "out").rglob("record.json")
    return path


def run(path: Path, *more: str) -> int:
    return rescore.main(["--results", str(path.parent), *more])


def content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def change(path: Path, task: str, **changes: Any) -> None:
    """Give every sample of a task other entries; None removes one."""
    file = samples.path_of(path.parent / "samples", task)
    removed = {key for key, value in changes.items() if value is None}
    rewritten = [{**sample, **changes} for sample in samples.read(file)]
    samples.write(file, [{key: sample[key] for key in sample if key not in removed} for sample in rewritten])


def test_every_metric_comes_back_as_it_was(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = measured.read_bytes()
    assert run(measured, "--write") == 0
    lines = capsys.readouterr().out.splitlines()
    equal = {line.strip().removesuffix(": equal") for line in lines if line.endswith(": equal")}
    scored = {name for name in content(measured)["metrics"] if "truncated_requests" not in name}
    assert equal == scored and {"toys_mixed/acc@mixedshot", "toy_filtered/exact_match[lower]@0shot"} <= scored
    assert len(lines) == 1 + len(equal) and measured.read_bytes() == before


def test_other_answers_give_other_metrics(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(measured)
    change(measured, "toy_two@2shot", log_likelihoods=[-1.0, -2.0])  # "yes" is right
    file = samples.path_of(
        measured.parent / "samples", next(n for n in before["provenance"]["task_versions"] if "ppl" in n)
    )
    samples.write(file, [{**sample, "nll": float(sample["id"])} for sample in samples.read(file)])
    assert run(measured) == 0 and content(measured) == before
    assert run(measured, "--write") == 0
    after = content(measured)
    assert after["metrics"]["toy_two/acc@2shot"]["value"] == 1.0
    members = [
        after["metrics"][f"{name}/acc@{shots}shot"]
        for name, shots in (("toy_zero", 0), ("toy_two", 2), ("toy_three", 1))
    ]
    mean = sum(member["value"] for member in members) / 3
    assert after["metrics"]["toys_mixed/acc@mixedshot"]["value"] == pytest.approx(mean)
    (ppl,) = (metric for name, metric in after["metrics"].items() if "token_ppl" in name)
    assert ppl["value"] == pytest.approx(math.exp(0.5)) and ppl["n"] == 2
    assert after["provenance"].pop("rescored")["command"].endswith("--write") and list(after) == list(store.KEYS)
    assert after["provenance"] == before["provenance"] and "was {" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "changes", "reason"),
    [
        ("toy_zero@0shot", {"hash": "x"}, "document 0 of toy_zero is another one"),
        ("toy_zero@0shot", {"id": 99}, "document 0 of toy_zero is another one.*None"),
        ("toy_zero@0shot", {"greedy": None}, "do not say whether its choices are greedy"),
        ("toy_zero@0shot", {"log_likelihoods": [-1.0], "greedy": [True]}, "do not say whether its choices are greedy"),
        ("toy_written@0shot", {"texts": None}, "do not say texts"),
    ],
)
def test_what_cannot_be_scored_is_said_and_the_rest_is_scored(
    task: str, changes: dict[str, Any], reason: str, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(measured, task, **changes)
    assert run(measured) == 1
    lines = capsys.readouterr().out.splitlines()
    (refused,) = [line for line in lines if line.startswith("  not scored: toy")]
    assert re.search(reason, refused) and sum(line.endswith(": equal") for line in lines) >= 5


def test_other_versions_are_refused_with_both_named(
    measured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(perplexity, "VERSION", "7")
    file = tasks.OWN_TASKS / "zero.yaml"
    file.write_text(file.read_text() + "metadata: {version: 3.0}\n")
    assert run(measured) == 1
    said = capsys.readouterr().out
    assert "was measured in version 1, and here it has version 7" in said
    assert "toy_zero@0shot was measured in version Yaml, and here it has version 3.0" in said


def test_missing_samples_are_named(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples.path_of(measured.parent / "samples", "toy_written@0shot").unlink()
    assert run(measured) == 1
    assert "not scored: toy_written@0shot: there are no samples at" in capsys.readouterr().out


def test_a_folder_without_samples_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rescore.main(["--results", str(tmp_path)]) == 2
    assert "No record below" in capsys.readouterr().err
