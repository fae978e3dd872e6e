"""The paper's numbers beside ours: the right ones, marked, and nowhere in what we compute."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from benchmarks import models
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
    lines = [line for shares in published._lines().values() for below in shares.values() for line in below]
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
    other = zero_shot_table(results(tmp_path / "other", llama("modegpt", 0.7)))
    (row,) = [row for row in rows(other) if row["Method"] == "ModeGPT, published"]
    assert (row["hellaswag: acc_norm"], row["hellaswag: acc_norm remarks"]) == ("63.26", "¶")
    assert "arc_easy: acc_norm remarks" not in row
    dense = perplexity_table(results(tmp_path / "dense", llama("dense", 1.0)))
    assert dense and any("4096-token window" in note for note in dense.notes)
    assert "¶ published so, but to be read with care:" in dense.notes


@pytest.mark.parametrize(
    "changes", [{"cell__ratio_basis": "block"}, {"cell__model": "llama2-70b"}, {"cell__recover": {"kind": "lora"}}]
)
def test_other_settings_have_nothing_published(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = results(tmp_path, llama("tomoe", 0.5, **changes))
    for table in (perplexity_table(found), zero_shot_table(found)):
        assert not any("published" in row["Method"] for row in rows(table))
        assert table and not any("Rows that say published" in note for note in table.notes)


def test_other_windows_and_tasks_have_nothing_published(tmp_path: Path) -> None:
    metrics = {"wikitext2/token_ppl@2048": {"value": 9.0, "stderr": 0.1, "n": 80}}
    found = results(tmp_path, factory.record("llama2-7b", "tomoe", 0.5, metrics=metrics))
    assert [row["Method"] for row in rows(perplexity_table(found))] == ["tomoe"]
    few = {task: {"value": 0.5, "stderr": 0.01, "n": 100} for task in TASKS[:2]}
    found = results(tmp_path / "few", factory.record("llama2-7b", "tomoe", 0.5, metrics=few))
    ours, theirs = rows(zero_shot_table(found))
    assert ours["Average"] == "50.0" and theirs["Average"] == ""


def test_published_numbers_change_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worse = [llama("tomoe", 0.5, 99.0, 0.3), llama("slicegpt", 0.5, 98.0, 0.31), pattern("wanda", 0.5, ppl=98.5)]
    found = results(tmp_path, *worse)
    builders = (perplexity_table, zero_shot_table, semi_structured_table, significance_table)
    tables = [table for builder in builders if (table := builder(found))]
    ours = [[row for row in table.rows if not any("published" in str(cell.value) for cell in row)] for table in tables]
    assert any(len(table.rows) > len(own) for table, own in zip(tables, ours, strict=True))
    assert not any(cell.best for table in tables for row in table.rows for cell in row if "published" in str(row[-1]))
    monkeypatch.setattr(published, "_lines", lambda: __import__("collections").defaultdict(list))
    without = [table for builder in builders if (table := builder(found))]
    assert [list(table.rows) for table in without] == ours


def pattern(method: str, ratio: float, basis: str = "total", pattern: str = "2:4", **changes: Any) -> dict[str, Any]:
    return llama(method, ratio, cell__method_config={"pattern": pattern}, cell__ratio_basis=basis, **changes)


@pytest.mark.parametrize(("basis", "ratio"), [("total", 0.5195), ("block", 0.5)])
def test_semi_structured_rows_are_the_papers_table_2(tmp_path: Path, basis: str, ratio: float) -> None:
    table = semi_structured_table(results(tmp_path, pattern("wanda", ratio, basis), llama("tomoe", 0.5)))
    assert "11.02" in numbers(table, "Wanda (2:4), published") and "8.36" in numbers(table, "ToMoE, published")
    by_text = perplexity_table(results(tmp_path / "ppl", pattern("wanda", ratio, basis)))
    assert rows(by_text)[1][f"wikitext2 @4096: {100 * ratio:g} %"] == "11.02"


def test_a_pattern_is_compared_with_no_other_pattern(tmp_path: Path) -> None:
    table = perplexity_table(results(tmp_path, pattern("wanda", 0.5, pattern="unstructured")))
    assert table and [row["Method"] for row in rows(table)] == ["wanda"]
    assert "Published at other settings only, of all parameters, so not shown: llama2-7b wanda (2:4)." in table.notes


def test_models_named_by_their_hub_id_have_the_papers_numbers(tmp_path: Path) -> None:
    assert {name: models.resolve(name.replace("--", "/", 1)).name for name in published.HUB} == {
        name: name for name in published.HUB
    }
    ours = {models.ZOO[alias].location.replace("/", "--"): alias for alias in published.MODELS.values()}
    assert ours == published.HUB
    name = "meta-llama--Llama-2-7b-hf"
    table = zero_shot_table(results(tmp_path, llama("tomoe", 0.5, cell__model=name)))
    assert [(row["Model"], row["Method"]) for row in rows(table)] == [(name, "tomoe"), (name, "ToMoE, published")]


def test_what_is_published_at_other_settings_only_is_told_once(tmp_path: Path) -> None:
    block = [llama("tomoe", ratio, cell__ratio_basis="block") for ratio in (0.5, 0.4)]
    told = "Published at other settings only, of all parameters, so not shown: llama2-7b tomoe ({})."
    for table, shares in (
        (perplexity_table(results(tmp_path / "ppl", *block)), "70 %, 60 %, 50 %"),
        (zero_shot_table(results(tmp_path / "tasks", *block)), "60 %, 50 %"),
    ):
        assert table and [note for note in table.notes if "other settings" in note] == [told.format(shares)]
    matched = perplexity_table(results(tmp_path / "matched", *block, llama("tomoe", 0.5, cell__id="total")))
    assert matched and not any("other settings" in note for note in matched.notes)
