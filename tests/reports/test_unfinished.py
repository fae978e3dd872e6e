"""What is missing, and what to type."""

from pathlib import Path
from typing import Any

from reports.records import read_all
from reports.results import pool
from reports.unfinished import unfinished_table
from tests.reports import factory


def rows(tmp_path: Path, *records: dict[str, Any]) -> list[list[Any]]:
    found = read_all(factory.write(tmp_path, list(records)))
    table = unfinished_table(found, pool(found))
    return [[cell.value for cell in row] for row in table.rows] if table else []


def test_a_whole_matrix_misses_nothing(tmp_path: Path) -> None:
    assert rows(tmp_path, factory.record(), factory.record(method="sleb", ratio=0.6)) == []


def test_a_failed_cell_has_its_reason_and_command(tmp_path: Path) -> None:
    failed = factory.failed("my model", "slicegpt", 0.6, "boom")
    failed["cell"] |= {"ratio_basis": "block", "seed": 3, "recover": {"kind": "lora"}}
    (row,) = rows(tmp_path, failed)
    command = "python run_all.py --models 'my model' --methods slicegpt --ratios 0.6 --ratio-basis block --budget demo"
    why = [60, 3, "failed", "boom", f"{command} --seeds 3 --recover lora"]
    assert row == ["my model", "slicegpt + fine-tuning", *why]


def test_cells_that_were_never_started(tmp_path: Path) -> None:
    records = [factory.record(method="sleb", ratio=ratio) for ratio in (0.8, 0.6)]
    records += [factory.record(method="slicegpt", ratio=0.6), factory.record(method="wanda", ratio=0.5)]
    command = "python run_all.py --models tiny-llama --methods {} --ratios {} --budget demo"
    assert rows(tmp_path, *records) == [
        ["tiny-llama", "dense", 100, None, "missing", "never started", command.format("dense", 1)],
        ["tiny-llama", "slicegpt", 80, None, "missing", "never started", command.format("slicegpt", 0.8)],
    ]


def test_what_failed_is_not_missing_too(tmp_path: Path) -> None:
    records = [factory.record(), factory.record(method="sleb", ratio=0.6), factory.record(method="sleb", ratio=0.8)]
    records += [factory.record(method="slicegpt", ratio=0.8), factory.failed("tiny-llama", "slicegpt", 0.6, "boom")]
    assert [row[4] for row in rows(tmp_path, *records)] == ["failed"]
