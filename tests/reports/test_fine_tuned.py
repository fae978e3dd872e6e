"""Rows of fine-tuned models: named as such, right below their plain rows, and never pooled or compared with them."""

from pathlib import Path
from typing import Any

import pytest

from reports.compression import compression_table
from reports.perplexity import perplexity_table
from reports.records import Records, read_all
from reports.render import files
from reports.results import Result, pool
from tests.reports import factory

RECIPE = {"kind": "lora", "rank": 8, "alpha": 16.0, "merge": True}


def tuned(method: str, ratio: float, seed: int = 0, recipe: dict[str, Any] | None = None, **changes: Any) -> dict:
    """The record of a fine-tuned cell."""
    recipe = recipe or RECIPE
    content = factory.record("tiny-llama", method, ratio, seed, cell__recover=recipe, **changes)
    content["cell"]["id"] = f"{content['cell']['id']}-{recipe['rank']}"
    content["time"]["recover_s"] = 9.5
    content["provenance"]["recovery"] = {"tokens": 307_200, "parameters": 100, "skipped": 0}
    return content


def plain(method: str, ratio: float, seed: int = 0, **changes: Any) -> dict:
    return factory.record("tiny-llama", method, ratio, seed, **changes)


@pytest.fixture
def results(tmp_path: Path) -> list[Result]:
    """At 80 % only slicegpt has a plain row, at 60 % both methods have both."""
    found = [plain("dense", 1.0), plain("slicegpt", 0.8), tuned("shortgpt", 0.8), tuned("slicegpt", 0.8)]
    found += [tuned("shortgpt", 0.6), tuned("slicegpt", 0.6), plain("shortgpt", 0.6), plain("slicegpt", 0.6)]
    return pool(read_all(factory.write(tmp_path, found)))


def test_they_come_right_below_their_plain_rows(results: list[Result]) -> None:
    assert [(result.ratio, result.method) for result in results] == [
        (1.0, "dense"),
        (0.8, "shortgpt + fine-tuning (307,200 tokens)"),
        (0.8, "slicegpt"),
        (0.8, "slicegpt + fine-tuning (307,200 tokens)"),
        (0.6, "shortgpt"),
        (0.6, "shortgpt + fine-tuning (307,200 tokens)"),
        (0.6, "slicegpt"),
        (0.6, "slicegpt + fine-tuning (307,200 tokens)"),
    ]
    table = perplexity_table(results)
    assert table
    methods = [row[1].value for row in table.rows]
    tuned_on = "+ fine-tuning (307,200 tokens)"
    assert methods == ["dense", "shortgpt", f"shortgpt {tuned_on}", "slicegpt", f"slicegpt {tuned_on}"]


def test_they_are_not_pooled_with_plain_rows(results: list[Result]) -> None:
    assert all(len(result.records) == 1 for result in results)
    assert [result.fine_tuned for result in results] == [False, True, False, True, False, True, False, True]


def test_seeds_of_one_recipe_are_pooled(tmp_path: Path) -> None:
    found = [tuned("slicegpt", 0.8, seed) for seed in (0, 1)] + [plain("slicegpt", 0.8, seed) for seed in (0, 1)]
    one, other = pool(read_all(factory.write(tmp_path, found)))
    assert (one.method, len(one.records)) == ("slicegpt", 2)
    assert (other.method, len(other.records)) == ("slicegpt + fine-tuning (307,200 tokens)", 2)


def test_settings_are_named_where_they_belong(tmp_path: Path) -> None:
    wide = {"cell__method_config": {"angular": True}, "cell__id": "x"}
    found = [plain("slicegpt", 0.8), plain("slicegpt", 0.8, **wide), tuned("slicegpt", 0.8)]
    found += [tuned("slicegpt", 0.8, recipe=RECIPE | {"rank": 32})]
    assert [result.method for result in pool(read_all(factory.write(tmp_path, found)))] == [
        "slicegpt (angular=False)",
        "slicegpt (angular=False) + fine-tuning (307,200 tokens, rank=32)",
        "slicegpt (angular=False) + fine-tuning (307,200 tokens, rank=8)",
        "slicegpt (angular=True)",
    ]


def test_being_fine_tuned_is_no_unequal_setting(results: list[Result], tmp_path: Path) -> None:
    report = files(Records(record for result in results for record in result.records))["report.md"]
    assert "not run with equal settings" not in report and "Not of one size" not in report
    other = [tuned("shortgpt", 0.8), tuned("slicegpt", 0.8, recipe=RECIPE | {"rank": 32})]
    report = files(read_all(factory.write(tmp_path / "other", other)))["report.md"]
    tuned_on = "+ fine-tuning (307,200 tokens)"
    assert f"not run with equal settings: shortgpt {tuned_on}: rank=8; slicegpt {tuned_on}: rank=32" in report


def test_the_report_says_what_was_done(results: list[Result]) -> None:
    report = files(Records(record for result in results for record in result.records))["report.md"]
    assert "lora on 307,200 tokens: rank 8, alpha 16.0, merge True" in report
    assert 'only rows that say "+ fine-tuning"\nwere trained further after compression.\n' in report
    assert "nothing is fine-tuned" not in report
    without = files(Records(record for r in results if not r.fine_tuned for record in r.records))["report.md"]
    assert "nothing is fine-tuned afterwards" in without and "Fine-tuning" not in without


def test_its_time_has_a_column_of_its_own(results: list[Result]) -> None:
    table = compression_table(results)
    assert table
    column = [str(column) for column in table.columns].index("Fine-tuning, s")
    assert [row[column].value for row in table.rows] == [9.5 if r.fine_tuned else None for r in results if not r.dense]
    alone = compression_table([result for result in results if not result.fine_tuned])
    assert alone and "Fine-tuning, s" not in map(str, alone.columns)


def test_a_failed_one_has_no_row_of_its_own(tmp_path: Path) -> None:
    failed = factory.failed("tiny-llama", "slicegpt", 0.6, "out of luck")
    failed["cell"] |= {"recover": RECIPE, "id": "failed"}
    found = [plain("slicegpt", 0.6), tuned("slicegpt", 0.8), failed]
    table = perplexity_table(pool(read_all(factory.write(tmp_path, found))))
    assert table and [row[1].value for row in table.rows] == ["slicegpt", "slicegpt + fine-tuning (307,200 tokens)"]
    assert "failed" in [cell.remark for cell in table.rows[1]]


def test_a_failed_one_is_told_from_its_plain_cell(tmp_path: Path) -> None:
    failed = factory.failed("tiny-llama", "slicegpt", 0.6, "out of luck")
    failed["cell"]["recover"] = RECIPE
    found = read_all(factory.write(tmp_path, [plain("dense", 1.0), failed]))
    assert "| slicegpt + fine-tuning |" in " ".join(files(found)["unfinished.md"].split())
