"""Tasks that cannot be measured are skipped with the reason, and run once they can be; nothing else is done twice."""

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import run_all
from benchmarks import cell, checkpoint, checks, hub, store, tasks
from benchmarks.metric import Evaluation, Metric
from benchmarks.tasks import Task
from reports.records import read_all
from reports.render import files
from tests.benchmarks import small_run
from tests.benchmarks.test_harness import forbidden

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SCIQ = "sciq@0shot"


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))


def line(folder: Path, *names: str) -> tuple[str, ...]:
    return "--offline", "--tasks", f"ppl:{folder / 'text.txt'}", *names


def records(folder: Path) -> list[dict[str, Any]]:
    return list(store.records(folder / "out"))


def found_at_last(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have the data of every task there, and half of sciq solved; receives the tasks that are run."""
    asked: list[str] = []

    def evaluate(task: Task, *arguments: Any, **options: Any) -> Evaluation:
        asked.append(task.name)
        return Evaluation(
            metrics={"sciq/acc@0shot": Metric(0.5, None, 8)}, dataset_revisions={}, task_versions={task.name: "1"}
        )

    monkeypatch.setattr(hub, "cached_dataset", lambda *arguments: True)
    monkeypatch.setattr(tasks, "evaluate", evaluate)
    return asked


def test_a_task_whose_data_cannot_be_had_is_a_skipped_row(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert small_run.run(workplace, *line(workplace, "sciq")) == 0
    before = records(workplace)
    assert [(found["status"], list(found["skipped"]), len(found["metrics"])) for found in before] == [
        ("done", [SCIQ], 1)
    ] * 2
    assert "allenai/sciq (default) is not whole in the local cache" in before[0]["skipped"][SCIQ]
    (said,) = [each for each in capsys.readouterr().out.splitlines() if each.startswith("skipped: ")]
    assert SCIQ in said and "load_dataset" in said
    # The same command does nothing while the data are not there,
    with monkeypatch.context() as patch:
        patch.setattr(cell, "run", forbidden)
        assert small_run.run(workplace, *line(workplace, "sciq")) == 0
    assert records(workplace) == before and "skipped: " in capsys.readouterr().out
    # and runs only that task once they are.
    asked = found_at_last(monkeypatch)
    assert small_run.run(workplace, *line(workplace, "sciq")) == 0
    assert asked == [SCIQ] * 2
    assert [(found["skipped"], len(found["metrics"])) for found in records(workplace)] == [({}, 2)] * 2
    assert "skipped: " not in capsys.readouterr().out


def test_a_run_of_which_nothing_can_be_measured_is_skipped_reported_and_run_later(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = "--offline", "--tasks", "sciq"
    assert small_run.run(workplace, *asked) == 0
    before = records(workplace)
    assert [(found["status"], found["error"], found["size"], list(found["skipped"])) for found in before] == [
        ("skipped", None, {}, [SCIQ])
    ] * 2
    read = read_all(workplace / "out")
    assert [record.error for record in read] == [f"nothing could be measured: {SCIQ}"] * 2
    rows = list(csv.DictReader(io.StringIO(str(files(read)["unfinished.csv"]))))
    assert [row["Status"] for row in rows] == ["skipped"] * 2 + ["task skipped"] * 2
    assert all(row["Why"].startswith("nothing could be measured: ") for row in rows[:2])
    for row in rows[2:]:
        assert row["Why"].startswith(f"{SCIQ}: ") and "not whole in the local cache" in row["Why"]
        assert f" --out {workplace / 'out'} " in row["Command"]
    with monkeypatch.context() as patch:
        patch.setattr(cell, "run", forbidden)
        assert small_run.run(workplace, *asked) == 0 and records(workplace) == before
    found_at_last(monkeypatch)
    assert small_run.run(workplace, *asked) == 0
    assert [(found["status"], found["skipped"], list(found["metrics"])) for found in records(workplace)] == [
        ("done", {}, ["sciq/acc@0shot"])
    ] * 2
    assert [record.size["on_budget"] for record in read_all(workplace / "out")] == [True, True]


def test_a_skipped_task_asked_for_later_is_noted_without_compressing_again(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert small_run.run(workplace, *line(workplace)) == 0
    before = records(workplace)
    monkeypatch.setattr(checkpoint, "make", forbidden)
    monkeypatch.setattr(cell, "_evaluate", forbidden)
    monkeypatch.setattr(checks, "check_inputs", lambda request, jobs: None)
    assert small_run.run(workplace, *line(workplace, "sciq"), "--only-evaluate") == 0
    after = records(workplace)
    assert [list(found["skipped"]) for found in after] == [[SCIQ]] * 2
    assert [found["metrics"] for found in after] == [found["metrics"] for found in before]
    assert [found["time"] for found in after] == [found["time"] for found in before]


@pytest.mark.parametrize("more", [("--only-evaluate",), ()])
def test_what_was_measured_stays_so_when_its_data_is_gone(
    more: tuple[str, ...], workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--checkpoints", str(workplace / "kept"), *line(workplace, "sciq"))
    with monkeypatch.context() as patch:
        found_at_last(patch)
        assert small_run.run(workplace, *asked) == 0
    before = records(workplace)
    assert small_run.run(workplace, *asked, "--force", *more) == 0
    (said,) = [each for each in capsys.readouterr().out.splitlines() if each.startswith("skipped: ")]
    assert f"{SCIQ}: its earlier measurement stays: the data set allenai/sciq" in said
    after = records(workplace)
    assert [(found["status"], found["skipped"]) for found in after] == [("done", {})] * 2
    assert [found["metrics"]["sciq/acc@0shot"] for found in after] == [
        found["metrics"]["sciq/acc@0shot"] for found in before
    ]
    monkeypatch.setattr(cell, "run", forbidden)
    assert small_run.run(workplace, *asked) == 0 and "skipped: " not in capsys.readouterr().out


@pytest.mark.parametrize("known_before", [True, False])
def test_a_text_shorter_than_a_window_is_a_skipped_row(
    known_before: bool, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not known_before:  # as of a named text, whose tokens only the cell counts
        monkeypatch.setattr(checks, "check_length", lambda task: None)
    small_run.make_text(workplace / "short.txt", lines=12)
    asked = line(workplace, f"ppl:{workplace / 'short.txt'}")
    assert small_run.run(workplace, *asked) == 0
    before = records(workplace)
    for found in before:
        assert found["status"] == "done" and len(found["metrics"]) == 1
        ((task, reason),) = found["skipped"].items()
        assert task.startswith("ppl-short-") and "one " in reason and "window of 128" in reason
    assert "window of 128" in capsys.readouterr().out
    monkeypatch.setattr(cell, "run", forbidden)
    assert small_run.run(workplace, *asked) == 0 and records(workplace) == before


def test_a_calibration_text_that_cannot_be_had_still_refuses_the_run(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert small_run.run(workplace, *line(workplace), "--calibration", "alpaca") == 2
    assert "tatsu-lab/alpaca" in capsys.readouterr().err


def test_the_plan_says_what_is_not_there(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_all.main(small_run.arguments(workplace, *line(workplace, "sciq", "boolq@4shot"), "--plan")) == 0
    said = capsys.readouterr().out
    assert f"Skipped unless the run can fetch its data: {SCIQ}: the data set allenai/sciq" in said
    (row,) = [each.split() for each in said.splitlines() if each.startswith("boolq@4shot ")]
    assert row == ["boolq@4shot", "8", f"{8 * (5 * 155 + 2):,}", "±34.6"]
    assert not (workplace / "out").exists()


def test_fewer_windows_than_asked_for_are_noted(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_run.make_text(workplace / "little.txt", lines=60)
    asked = ("--methods", "dense", "--budget", "demo", "--tasks", f"ppl:{workplace / 'little.txt'}")
    assert small_run.run(workplace, *asked) == 0
    (found,) = records(workplace)
    (metric,), (note,) = found["metrics"].values(), found["notes"]
    assert metric["n"] < 8 and note.endswith(f": asked for 8 windows, there are {metric['n']}")
    assert small_run.run(workplace, *asked[:-1], f"ppl:{workplace / 'text.txt'}") == 0
    assert records(workplace)[0]["notes"] == [note]
    assert small_run.run(workplace, *asked[:-1], "sciq", "--offline") == 0  # nothing is compressed for that
    assert records(workplace)[0]["notes"] == [note]
    assert small_run.run(workplace, *asked, "--force") == 0
    assert records(workplace)[0]["notes"] == [note]


def test_a_killed_evaluation_resumes_at_the_next_task(
    workplace: Path, toy: Callable[[str], Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import harness

    asked, evaluate, seen = ("--methods", "dense", "--tasks", "toy_zero", "toy_two"), harness.evaluate, []

    def until_the_second(task: Task, *arguments: Any) -> Evaluation:
        seen.append(task.source)
        if seen == ["toy_zero", "toy_two"]:
            raise KeyboardInterrupt
        return evaluate(task, *arguments)

    monkeypatch.setattr(harness, "evaluate", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        small_run.run(workplace, *asked)
    monkeypatch.setattr(checkpoint, "make", forbidden)
    assert small_run.run(workplace, *asked) == 0
    assert seen == ["toy_zero", "toy_two", "toy_two"]
    (found,) = records(workplace)
    assert {"toy_zero/acc@0shot", "toy_two/acc@2shot"} <= set(found["metrics"])
    assert small_run.run(workplace, *asked) == 0 and len(seen) == 3
