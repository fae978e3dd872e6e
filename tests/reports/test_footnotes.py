"""The sentences below the tables of measured numbers, the same below each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reports.accuracy import zero_shot_table
from reports.families import constructions_table, semi_structured_table
from reports.perplexity import perplexity_table
from reports.records import read_all
from reports.results import Results, pool
from reports.tables import UNLIKE, Table
from reports.throughput import throughput_table
from reports.variants import ablations_table, settings_table
from tests.reports import factory

MIXED = [semi_structured_table, constructions_table, settings_table, ablations_table]
WINDOWS = "Windows of tiny-llama wikileads @512: 8; tiny-llama moby-dick @512: 8."
DOCUMENTS = "Documents: arc_easy/acc_norm@0shot 2376; wikileads_mc/acc@0shot 40."


def runs() -> list[dict[str, Any]]:
    """What fills each of the tables, and a failed run beside."""
    alpaca = {"cell__calibration": {"name": "alpaca", "samples": 16, "window": 256}}
    changes: list[dict[str, Any]] = [{}, alpaca, {"cell__method_config": {"experts": 2}}]
    plain = [factory.record(method=method, ratio=0.6) for method in ("wanda", "cmoe")]
    return [factory.record(), *plain, *(factory.record(method="tomoe", ratio=0.6, **change) for change in changes)]


def results(tmp_path: Path, *records: dict[str, Any]) -> Results:
    for index, record in enumerate(records):
        record["cell"]["id"] = str(index)
    return pool(read_all(factory.write(tmp_path, list(records))))


@pytest.mark.parametrize("table_of", [perplexity_table, zero_shot_table, *MIXED])
def test_versions_and_counts_stand_below_every_table(
    tmp_path: Path, table_of: Callable[[Results], Table | None]
) -> None:
    table = table_of(results(tmp_path, *runs()))
    assert table
    (versions,) = (note for note in table.notes if note.startswith("Versions: "))
    assert "lm_eval 0.4.13, transformers 5.23.0" in versions
    counts = [note for note in table.notes if note.startswith(("Windows", "Documents"))]
    assert counts == {"perplexity": [WINDOWS], "zero-shot": [DOCUMENTS]}.get(table.name, [WINDOWS, DOCUMENTS])


@pytest.mark.parametrize(
    ("table_of", "config", "told"),
    [
        (settings_table, {"calibration": {"name": "own"}}, True),
        (settings_table, {"calibration": {"name": "own"}, "method_config": {"experts": 3}}, False),
        (ablations_table, {"method_config": {"experts": 3}}, True),
        (ablations_table, {"dtype": "bfloat16", "method_config": {"experts": 3}}, False),
        (throughput_table, {"method_config": {"experts": 3}}, True),
        (throughput_table, {"model": "smollm2-135m-q4"}, False),
    ],
)
def test_failures_stand_below_the_tables_they_belong_to(
    tmp_path: Path, table_of: Callable[[Results], Table | None], config: dict[str, Any], told: bool
) -> None:
    failed = factory.failed("tiny-llama", "tomoe", 0.6, "OutOfMemoryError: 7 GB", "skipped")
    failed["cell"] |= config
    table = table_of(results(tmp_path, *runs(), failed))
    assert table and any(note.startswith("Skipped: ") and "7 GB" in note for note in table.notes) == told


def test_windows_are_counted_and_compared_within_a_model(tmp_path: Path) -> None:
    """Two models of unlike tokenizers cut a text into unlike numbers of windows."""
    records = []
    for model, windows in {"tiny-llama": 8, "smollm2-135m-q4": 12}.items():
        metrics = {"wikileads/token_ppl@512": {"value": 20.0, "stderr": 1.0, "n": windows}}
        for experts in (2, 4):
            changes: dict[str, Any] = {"metrics": metrics, "cell__method_config": {"experts": experts}}
            records.append(factory.record(model, "tomoe", 0.6, **changes))
    table = ablations_table(results(tmp_path, *records))
    assert table and not any(UNLIKE in cell.marks for row in table.rows for cell in row)
    assert "Windows of tiny-llama wikileads @512: 8; smollm2-135m-q4 wikileads @512: 12." in table.notes
