"""The tables that set a family of methods against ToMoE: which rows, which shares, and none without the family."""

from pathlib import Path
from typing import Any

from reports.families import constructions_table, semi_structured_table
from reports.records import read_all
from reports.results import Results, pool
from reports.significance import significance_table
from reports.tables import TIED, Table
from tests.reports import factory


def results(tmp_path: Path, *found: dict[str, Any]) -> Results:
    return pool(read_all(factory.write(tmp_path, [factory.record(), *found])))


def test_rows_of_the_family_at_its_own_ratios(tmp_path: Path) -> None:
    methods = [("wanda", 0.6), ("tomoe", 0.6), ("tomoe", 0.8), ("cmoe", 0.8), ("shortgpt", 0.6), ("llama-moe", 0.7)]
    found = results(tmp_path, *(factory.record(method=method, ratio=ratio) for method, ratio in methods))
    single, made = semi_structured_table(found), constructions_table(found)
    assert single and made
    assert [(row[3].value, row[1].value) for row in single.rows] == [("dense", 100), ("tomoe", 60), ("wanda", 60)]
    assert [(row[3].value, row[1].value) for row in made.rows] == [
        ("dense", 100),
        ("cmoe", 80),
        ("tomoe", 80),
        ("llama-moe", 70),
    ]


def test_tomoe_is_beside_a_pattern_that_keeps_a_little_more(tmp_path: Path) -> None:
    table = semi_structured_table(
        results(tmp_path, *(factory.record(method=m, ratio=r) for m, r in [("wanda", 0.5195), ("tomoe", 0.5)]))
    )
    assert table and [row[3].value for row in table.rows] == ["dense", "wanda", "tomoe"]


def test_the_share_of_the_whole_model_is_counted(tmp_path: Path) -> None:
    size = {**factory.record(method="wanda", ratio=0.6)["size"], "active_total": 1_436_160, "dense_params": 2_872_320}
    table = semi_structured_table(results(tmp_path, factory.record(method="wanda", ratio=0.6, size=size)))
    assert table and str(table.columns[4]) == "Of all, %"
    assert [row[4].value for row in table.rows] == [100, 50]


def test_texts_come_before_tasks_and_their_average(tmp_path: Path) -> None:
    table = constructions_table(results(tmp_path, factory.record(method="cmoe", ratio=0.6)))
    assert table
    row = table.rows[1]
    metrics = factory.record(method="cmoe", ratio=0.6)["metrics"]
    texts = [entry["value"] for name, entry in metrics.items() if "token_ppl" in name]
    assert texts and [cell.value for cell in row[5 : 5 + len(texts)]] == texts
    tasks = [cell.value for cell in row[5 + len(texts) : -1]]
    assert str(table.columns[-1]) == "Average" and row[-1].value == sum(tasks) / len(tasks)  # type: ignore[arg-type]


def test_perplexity_alone_is_enough(tmp_path: Path) -> None:
    metrics = {"wikileads/token_ppl@512": {"value": 20.0, "stderr": 1.0, "n": 8}}
    found = [factory.record(metrics=metrics), factory.record(method="wanda", ratio=0.6, metrics=metrics)]
    table = semi_structured_table(pool(read_all(factory.write(tmp_path, found))))
    assert table and [str(column) for column in table.columns[5:]] == ["wikileads: @512"]


def standing(table: Table | None, label: str) -> dict[str, str]:
    """By method: best, tied or nothing, below a header."""
    assert table
    index = [str(column) for column in table.columns].index(label)
    return {str(row[3]): "best" * row[index].best + "tied" * (TIED in row[index].marks) for row in table.rows}


def test_best_and_tied_are_marked_among_the_family_and_tomoe(tmp_path: Path) -> None:
    texts = {"wanda": 3.2, "sparsegpt": 3.0, "tomoe": 3.001, "shortgpt": 2.0, "magnitude": 2.5}
    right = {"wanda": 30, "sparsegpt": 50, "tomoe": 48, "shortgpt": 60, "magnitude": 60}
    noise = [0.1, -0.1, 0.05, -0.05, 0.2, -0.2, 0.0, 0.01] * 2
    records = [
        factory.sampled(
            factory.record(method=method, ratio=0.6, size__on_budget=method != "magnitude"),
            {
                "wikileads/token_ppl@512": [texts[method] + (each if method == "tomoe" else 0) for each in noise],
                "piqa/acc@0shot": [1.0] * right[method] + [0.0] * (60 - right[method]),
            },
        )
        for method in texts
    ]
    found = results(tmp_path, *records)
    table = semi_structured_table(found)
    expected = {"dense": "", "magnitude": "", "sparsegpt": "best", "tomoe": "tied", "wanda": ""}
    assert standing(table, "wikileads: @512") == standing(table, "piqa: acc") == expected
    tests = significance_table(found)
    tested = [row[3].value for row in tests.rows if row[0].value == "semi-structured"] if tests else []
    assert tested == ["sparsegpt", "tomoe", "wanda"] * 2
    assert table and "exact McNemar" in " ".join(table.notes) and "bootstrap over windows" in " ".join(table.notes)
    assert "over all 4 comparisons" in " ".join(table.notes)


def test_without_the_family_there_is_no_table(tmp_path: Path) -> None:
    found = results(tmp_path, factory.record(method="tomoe", ratio=0.6))
    assert semi_structured_table(found) is None and constructions_table(found) is None


def test_what_was_tried_in_vain_stands_among_its_family(tmp_path: Path) -> None:
    lost = [factory.failed("tiny-llama", method, ratio, "boom") for method, ratio in (("wanda", 0.5), ("tomoe", 0.5))]
    others = [factory.failed("tiny-llama", method, 0.7, "boom") for method in ("tomoe", "slicegpt")]
    made = [factory.record(), factory.record(method="sparsegpt", ratio=0.5)]
    table = semi_structured_table(pool(read_all(factory.write(tmp_path, [*made, *lost, *others]))))
    assert table is not None
    found = [(str(row[3]), str(row[2])) for row in table.rows]
    assert [method for method, _ in found] == ["dense", "sparsegpt", "tomoe", "wanda"]
    assert found[2:] == [("tomoe", "- (failed)"), ("wanda", "- (failed)")]
    assert any("tiny-llama tomoe at 50 %; tiny-llama wanda at 50 %, because of this: boom" in n for n in table.notes)
