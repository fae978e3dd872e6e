"""Metrics from stored samples: the same as when the model answered, and those of changed answers where they change."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from filelock import FileLock

from benchmarks import harness, perplexity, rescore, samples, store, tasks
from benchmarks.samples import Sample
from reports import samples as report_samples
from reports.records import read_all
from reports.results import pool
from tests.benchmarks import small_run, toys
from tests.benchmarks.test_harness import forbidden

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TOYS = ("toy_zero", "toys_mixed", "toys_same@1shot", "toy_three", "toy_written", "toy_filtered", "toy_rolling")


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


def keep_only(path: Path, start: str) -> None:
    """As if nothing else had been measured: the rest would only take time."""
    found = content(path)
    versions = found["provenance"]["task_versions"]
    found["provenance"]["task_versions"] = {name: versions[name] for name in versions if name.startswith(start)}
    store.write_record(path, found)


def test_every_metric_comes_back_as_it_was(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = measured.read_bytes()
    assert run(measured, "--write") == 0
    lines = capsys.readouterr().out.splitlines()
    equal = {line.strip().removesuffix(": equal") for line in lines if line.endswith(": equal")}
    scored = {name for name in content(measured)["metrics"] if "truncated_requests" not in name}
    # One of the tasks was measured twice, and in the groups with another number of solved examples.
    assert {"toy_three/acc@1shot", "toy_three/acc@2shot"} <= scored
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


def test_the_scores_of_documents_are_written_with_the_metrics(measured: Path) -> None:
    change(measured, "toy_written@0shot", texts=["so"])  # the right answer, which the samples do not know as such
    file = samples.path_of(measured.parent / "samples", "toy_written@0shot")
    others = {path: path.read_bytes() for path in file.parent.iterdir() if path != file}
    answers = [{**sample, "correct": {}} for sample in samples.read(file)]
    assert run(measured, "--write") == 0
    (after,) = [found for found in read_all(measured.parent) if found.status == "done"]
    (pooled,) = pool([after])
    assert after.metrics["toy_written/exact_match@0shot"].value == 1.0
    for name in after.metrics:
        if name.startswith("toy_") and not re.search("truncated_requests|perplexity", name):  # what can be paired
            assert len(report_samples.samples(pooled, name).scores)
    assert [{**sample, "correct": {}} for sample in samples.read(file)] == answers
    assert {path: path.read_bytes() for path in others} == others


def killed(*arguments: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("module", "writer"), [(store, "write_record"), (samples, "write")])
def test_what_a_kill_in_between_left_is_done_by_the_same_command(
    module: ModuleType, writer: str, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_only(measured, "toy_written")
    change(measured, "toy_written@0shot", texts=["so"])
    whole = shutil.copytree(measured.parent, measured.parent.with_name("whole"))
    assert run(whole / "record.json", "--write") == 0
    with monkeypatch.context() as patch:
        patch.setattr(module, writer, killed)
        with pytest.raises(KeyboardInterrupt):
            run(measured, "--write")
    assert run(measured, "--write") == 0
    file = samples.path_of(Path("samples"), "toy_written@0shot")
    assert (measured.parent / file).read_bytes() == (whole / file).read_bytes()
    assert content(measured)["metrics"] == content(whole / "record.json")["metrics"]
    assert content(measured)["provenance"]["rescored"]


def test_scores_are_written_even_where_no_metric_changes(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_only(measured, "toy_zero")
    change(measured, "toy_zero@0shot", correct={"acc": 0.25, "acc_norm": 0.25})
    before = content(measured)
    assert run(measured) == 0
    said = capsys.readouterr().out
    assert "  toy_zero@0shot: documents with other scores than in its samples\n" in said and "was " not in said
    assert content(measured) == before and run(measured, "--write") == 0
    assert content(measured)["metrics"] == before["metrics"] and "rescored" in content(measured)["provenance"]
    capsys.readouterr()
    assert run(measured) == 0 and "other scores" not in capsys.readouterr().out


def test_a_record_that_a_run_works_on_is_left_alone(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_only(measured, "toy_written")
    change(measured, "toy_written@0shot", texts=["so"])
    before = measured.read_bytes()
    with FileLock(measured.parents[4] / ".locks" / content(measured)["cell"]["id"]):
        assert run(measured, "--write") == 1 and measured.read_bytes() == before
        assert "not scored: a run is working on it" in capsys.readouterr().out
        assert run(measured) == 0
    assert run(measured, "--write") == 0 and measured.read_bytes() != before


@pytest.mark.parametrize(
    ("task", "changes", "reason"),
    [
        ("toy_zero@0shot", {"hash": "x"}, "document 0 of toy_zero is another one"),
        ("toy_zero@0shot", {"id": 99}, "document 0 of toy_zero is another one.*None"),
        ("toy_zero@0shot", {"greedy": None}, "do not say whether its choices are greedy"),
        ("toy_zero@0shot", {"log_likelihoods": [-1.0], "greedy": [True]}, "do not say whether its choices are greedy"),
        ("toy_zero@0shot", {"greedy": [True]}, "do not say whether its choices are greedy"),
        ("toy_zero@0shot", {"log_likelihoods": None}, "do not say whether its choices are greedy"),
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


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda windows: windows[:1], "the record has 2 windows, and the samples 1 or not"),
        (lambda windows: windows[::-1], "the record has 2 windows"),
        (lambda windows: [*windows, {**windows[1], "id": 2}], "the record has 2 windows, and the samples 3"),
        (lambda windows: [windows[0], {"id": 1, "hash": "x"}], "window 1 has the nll None"),
        (lambda windows: [{**windows[0], "nll": math.nan}, windows[1]], "window 0 has the nll nan"),
    ],
)
def test_windows_that_are_not_those_of_the_record_are_refused(
    damage: Callable[[list[Sample]], list[Sample]], reason: str, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_only(measured, "ppl-")
    (file,) = (measured.parent / "samples").glob("ppl-*")
    samples.write(file, damage(samples.read(file)))
    before = measured.read_bytes()
    assert run(measured, "--write") == 1 and measured.read_bytes() == before
    (refused,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  not scored: ")]
    assert reason in refused


def test_records_beside_one_with_damaged_samples_are_scored(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(measured.parent, measured.parent.with_name("second"))
    file = samples.path_of(measured.parent / "samples", "toy_zero@0shot")
    whole = bytearray(file.read_bytes())
    whole[10] ^= 0xFF  # the first of the compressed body: zlib itself fails
    file.write_bytes(whole)
    assert rescore.main(["--results", str(measured.parents[1])]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  not scored: toy") and "are damaged: Error -3" in line for line in lines) == 1
    assert sum("toy_zero/acc@0shot: equal" in line for line in lines) == 1
    assert sum("toy_written/exact_match@0shot: equal" in line for line in lines) == 2


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
