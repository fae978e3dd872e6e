"""Two folders against each other."""

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from reports.compare import comparison_table
from reports.records import read_all
from reports.results import pool
from reports.tables import Table
from tests.reports import factory

ROOT = Path(__file__).parents[2]
PPL, ACC = "wikileads/token_ppl@512", "arc_easy/acc@0shot"
NATS = [random.Random(1).gauss(3, 0.5) for _ in range(40)]
RIGHT = [float(index % 3 == 0) for index in range(60)]


def record(
    method: str = "slicegpt", nats: float = 0.0, right: list[float] | None = None, **changes: Any
) -> dict[str, Any]:
    """A record with samples: `nats` more per token, give or take."""
    noise = random.Random(2)
    scores = {PPL: [value + nats + noise.gauss(0, abs(nats) / 5) for value in NATS], ACC: right or RIGHT}
    return factory.sampled(factory.record(method=method, ratio=0.6, **changes), scores)


def compare(tmp_path: Path, first: list[dict[str, Any]], second: list[dict[str, Any]]) -> Table:
    folders = (factory.write(tmp_path / name, records) for name, records in (("a", first), ("b", second)))
    return comparison_table(*(pool(read_all(folder)) for folder in folders))


def verdicts(table: Table) -> dict[tuple[str, str], str]:
    return {(str(row[4].value), str(row[5].value)): str(row[-1].value) for row in table.rows}


@pytest.mark.parametrize(("nats", "verdict"), [(0.1, "worse"), (-0.1, "better"), (0.0, "tied")])
def test_lower_perplexity_is_better(tmp_path: Path, nats: float, verdict: str) -> None:
    table = compare(tmp_path, [record()], [record(nats=nats)])
    assert verdicts(table) == {("slicegpt", PPL): verdict, ("slicegpt", ACC): "tied"}
    assert any(note.startswith("B is: ") and f"{1 + (verdict == 'tied')} {verdict}" in note for note in table.notes)


@pytest.mark.parametrize(("dense", "told"), [([], True), ([factory.record()], False)])
def test_an_unknown_counted_share_has_its_reason(tmp_path: Path, dense: list[dict[str, Any]], told: bool) -> None:
    block = record(cell__ratio_basis="block")
    table = compare(tmp_path, [block, *dense], [block])
    assert told == (table.rows[0][2].value is None) and table.rows[0][3].value is None
    notes = [note for note in table.notes if note.startswith("Counted share unknown")]
    assert len(notes) == 1 and notes[0].endswith(": tiny-llama slicegpt at 60 %.")


def test_more_right_answers_are_better_by_mcnemar_and_holm(tmp_path: Path) -> None:
    more = [max(value, float(index % 10 == 1)) for index, value in enumerate(RIGHT)]
    alone = int(sum(more) - sum(RIGHT))
    table = compare(tmp_path, [record()], [record(right=more)])
    (row,) = [row for row in table.rows if row[5].value == ACC]
    assert row[11].value == pytest.approx(stats.binomtest(0, alone).pvalue)
    assert row[12].value == pytest.approx(min(1, 2 * stats.binomtest(0, alone).pvalue))
    assert row[8].value == pytest.approx(100 * alone / len(RIGHT)) and row[-1].value == "tied"
    every = compare(tmp_path / "every", [record()], [record(right=[1.0] * 60)])
    assert verdicts(every)["slicegpt", ACC] == "better"


def test_cells_of_one_folder_only_are_named(tmp_path: Path) -> None:
    table = compare(tmp_path, [record(), record("sleb")], [record(), record("wanda")])
    assert {method for method, _ in verdicts(table)} == {"slicegpt"}
    assert (
        "Only in A: tiny-llama sleb at 60 %." in table.notes and "Only in B: tiny-llama wanda at 60 %." in table.notes
    )


def test_other_settings_are_other_cells(tmp_path: Path) -> None:
    table = compare(tmp_path, [record()], [record(cell__method_config={"angular": True})])
    assert table.rows == () and any("no cell that both" in note for note in table.notes)
    why = "Other settings in A (angular=False) than in B (angular=True): tiny-llama slicegpt at 60 %."
    assert why in table.notes and not any(note.startswith("Only in") for note in table.notes)


def test_a_setting_that_one_folder_lacks_is_named_once_for_all_cells(tmp_path: Path) -> None:
    budget = factory.record()["cell"]["budget"]
    more = [record(method, cell__budget=budget | {"new": 3}) for method in ("slicegpt", "sleb")]
    table = compare(tmp_path, [record(), record("sleb")], more)
    both = "tiny-llama sleb at 60 %; tiny-llama slicegpt at 60 %"
    assert f"Other settings in A (none) than in B (budget.new=3): {both}." in table.notes


def test_the_nearest_settings_are_told_and_the_others_are_in_one_folder_only(tmp_path: Path) -> None:
    near, far = {"angular": False, "depth": 2}, {"angular": True, "depth": 2}
    both = [record(cell__method_config=config, cell__id=str(config)) for config in (far, near)]
    table = compare(tmp_path, [record()], both)
    assert "Other settings in A (none) than in B (depth=2): tiny-llama slicegpt at 60 %." in table.notes
    assert "Only in B: tiny-llama slicegpt (angular=True) at 60 %." in table.notes
    assert not any(note.startswith("Only in A") for note in table.notes)


@pytest.mark.parametrize(("apart", "verdict"), [(0.03, "not compared: not of one size"), (0.015, "better")])
def test_a_larger_model_is_not_called_better(tmp_path: Path, apart: float, verdict: str) -> None:
    larger = record(nats=-0.1)
    larger["size"] |= {"active_total": larger["size"]["active_total"] + round(apart * 2_872_320), "on_budget": False}
    table = compare(tmp_path, [record()], [larger])
    assert verdicts(table)["slicegpt", PPL] == verdict
    (row,) = [row for row in table.rows if row[5].value == PPL]
    assert [str(column) for column in table.columns[2:4]] == ["Counted, %: A", "Counted, %: B"]
    assert row[3].value == pytest.approx(row[2].value + 100 * apart, abs=1e-3)  # type: ignore[operator]
    assert (row[2].marks, row[3].marks) == ("", "†") and row[8].value == pytest.approx(math.exp(-0.1), rel=0.01)
    assert any(note.startswith("†") for note in table.notes)
    assert any("2 not compared" in note for note in table.notes) == (apart > 0.02)


def test_other_documents_and_versions_are_refused_with_both_named(tmp_path: Path) -> None:
    other = factory.sampled(factory.record(method="slicegpt", ratio=0.6), {ACC: RIGHT}, documents="others")
    versions = {"arc_easy@0shot": "2.0"}
    newer = record("sleb", provenance__task_versions=versions)
    found = verdicts(compare(tmp_path, [record(), record("sleb")], [other, newer]))
    assert found["slicegpt", ACC] == "not compared: different documents (60 and 60, by id and hash)"
    assert found["slicegpt", PPL] == "not compared: B has not measured it"
    assert found["sleb", ACC] == "not compared: task version 2.0, not 1.0"


def test_the_command_prints_and_writes_and_ends_in_0(tmp_path: Path) -> None:
    for name, nats in (("a", 0.0), ("b", 0.1)):
        factory.write(tmp_path / name, [record(nats=nats)])
    (tmp_path / "b" / "record.json").write_text("{")
    command = [sys.executable, "-m", "reports", "compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "worse" in done.stdout and "B: record.json is damaged" in done.stdout.replace("\n", " ")
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "| worse" in text and {path.suffix for path in (tmp_path / "out").iterdir()} == {
        ".md",
        ".tex",
        ".csv",
        ".html",
    }
