"""The paper's numbers beside ours: the right ones, marked, and nowhere in what we compute."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from reports import published
from reports.accuracy import zero_shot_table
from reports.families import semi_structured_table
from reports.formats import comma_separated
from reports.perplexity import perplexity_table
from reports.records import read_all
from reports.results import Result, pool
from reports.significance import significance_table
from reports.tables import Table
from tests.reports import factory

TASKS = [*published.TASKS.values()]
PPL = "wikitext2/token_ppl@4096"


def llama(method: str, ratio: float, ppl: float = 9.0, share: float = 0.5, **changes: Any) -> dict[str, Any]:
    """A record of LLaMA-2 7B, with the paper's tasks at one share of right answers."""
    metrics = {PPL: {"value": ppl, "stderr": 0.1, "n": 80}}
    metrics |= {task: {"value": share, "stderr": 0.01, "n": 1000} for task in TASKS}
    return factory.record("llama2-7b", method, ratio, metrics=metrics, **changes)


def results(tmp_path: Path, *records: dict[str, Any]) -> list[Result]:
    return pool(read_all(factory.write(tmp_path, list(records))))


def rows(table: Table | None) -> list[dict[str, str]]:
    assert table
    return list(csv.DictReader(io.StringIO(comma_separated(table))))


def numbers(table: Table | None, method: str) -> list[str]:
    (row,) = [row for row in rows(table) if row["Method"] == method]
    return [value for name, value in row.items() if value and name not in ("Model", "Method", "Asked, %")]


def test_every_published_row_has_our_names() -> None:
    lines = [line for below in published._lines().values() for line in below]
    files = (published.FOLDER.glob(pattern) for pattern in ("*_ppl_*.csv", "*_zeroshot_*.csv"))
    rows = {tuple(row.items())[2:-1] for found in files for path in found for row in published.read(path.name)}
    twice = 2  # Tables 1 and 2 both have ToMoE at 50 %
    assert sum(len(line.numbers) for line in lines) == len(rows) - twice
    assert {name for line in lines for name in line.numbers} == {PPL, *TASKS, "Average"}


def test_published_rows_stand_below_ours_of_the_same_model_ratio_and_method(tmp_path: Path) -> None:
    found = results(tmp_path, llama("dense", 1.0), llama("tomoe", 0.5), llama("tomoe", 0.65), llama("sleb", 0.5))
    table = rows(perplexity_table(found))
    assert [row["Method"] for row in table] == [
        *("dense", "Dense, published", "tomoe", "ToMoE, published", "sleb", "SLEB, published")
    ]
    label = "wikitext2 @4096: {} %"
    assert table[3] | {"Model": ""} == {
        **dict.fromkeys(table[3], ""),
        "Method": "ToMoE, published",
        label.format(50): "8.36",
    }
    assert table[1][label.format(100)] == "5.12" and table[5][label.format(50)] == "103.38"


def test_zero_shot_has_the_papers_variants_and_its_average(tmp_path: Path) -> None:
    table = rows(zero_shot_table(results(tmp_path, llama("disp-llm", 0.7))))
    assert [(row["Method"], row["Average"]) for row in table] == [
        ("disp-llm", "50.0"),
        ("DISP-LLM, published", "58.1"),
        ("DISP-LLM Alpaca, published", "59.53"),
    ]


def test_doubts_are_marked_and_explained(tmp_path: Path) -> None:
    table = zero_shot_table(results(tmp_path, llama("disp-llm", 0.5)))
    (row,) = [row for row in rows(table) if row["Method"] == "DISP-LLM, published"]
    assert row["hellaswag: acc_norm"] == "63.43" and "¶" in row["hellaswag: acc_norm remarks"]
    assert [name for name in row if name.endswith("remarks")] == ["hellaswag: acc_norm remarks"]
    assert table and any("equals the 70% row" in note for note in table.notes)
    dense = perplexity_table(results(tmp_path / "dense", llama("dense", 1.0)))
    assert dense and any("4096-token window" in note for note in dense.notes)


@pytest.mark.parametrize(
    "changes", [{"cell__ratio_basis": "block"}, {"cell__model": "llama2-70b"}, {"cell__recover": {"kind": "lora"}}]
)
def test_other_settings_have_nothing_published(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = results(tmp_path, llama("tomoe", 0.5, **changes))
    for table in (perplexity_table(found), zero_shot_table(found)):
        assert not any("published" in row["Method"] for row in rows(table))
        assert table and not any("published" in note for note in table.notes)


def test_other_windows_and_tasks_have_nothing_published(tmp_path: Path) -> None:
    metrics = {"wikitext2/token_ppl@2048": {"value": 9.0, "stderr": 0.1, "n": 80}}
    found = results(tmp_path, factory.record("llama2-7b", "tomoe", 0.5, metrics=metrics))
    assert [row["Method"] for row in rows(perplexity_table(found))] == ["tomoe"]
    few = {task: {"value": 0.5, "stderr": 0.01, "n": 100} for task in TASKS[:2]}
    found = results(tmp_path / "few", factory.record("llama2-7b", "tomoe", 0.5, metrics=few))
    ours, theirs = rows(zero_shot_table(found))
    assert ours["Average"] == "50.0" and theirs["Average"] == ""


def test_published_numbers_change_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worse = [llama("tomoe", 0.5, 99.0, 0.3), llama("slicegpt", 0.5, 98.0, 0.31), llama("wanda", 0.5, 98.5)]
    found = results(tmp_path, *worse)
    builders = (perplexity_table, zero_shot_table, semi_structured_table, significance_table)
    tables = [table for builder in builders if (table := builder(found))]
    ours = [[row for row in table.rows if not any("published" in str(cell.value) for cell in row)] for table in tables]
    assert any(len(table.rows) > len(own) for table, own in zip(tables, ours, strict=True))
    assert not any(cell.best for table in tables for row in table.rows for cell in row if "published" in str(row[-1]))
    monkeypatch.setattr(published, "_lines", lambda: __import__("collections").defaultdict(list))
    without = [table for builder in builders if (table := builder(found))]
    assert [list(table.rows) for table in without] == ours


def test_semi_structured_rows_are_the_papers_table_2(tmp_path: Path) -> None:
    table = semi_structured_table(results(tmp_path, llama("wanda", 0.5), llama("tomoe", 0.5)))
    assert "11.02" in numbers(table, "Wanda (2:4), published") and "8.36" in numbers(table, "ToMoE, published")
