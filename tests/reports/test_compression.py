"""The compression table: what it took, seeds pooled, and what the methods had to say."""

from pathlib import Path
from typing import Any

from reports.compression import compression_table
from reports.records import read_all
from reports.results import pool
from reports.tables import Table
from tests.reports import factory


def table(tmp_path: Path, *records: dict[str, Any]) -> Table | None:
    """The table of some records and the dense one."""
    return compression_table(pool(read_all(factory.write(tmp_path, [factory.record(), *records]))))


def test_means_over_seeds_and_notes_once(tmp_path: Path) -> None:
    first = factory.record(method="modegpt", ratio=0.6, notes=["a damping grew", "scores were taken over"])
    second = factory.record(method="modegpt", ratio=0.6, seed=1, notes=["a damping grew"], time__compress_s=7.1)
    second["memory"]["compress_peak_host_bytes"] = 600_000_000
    found = table(tmp_path, first, second)
    assert found is not None
    assert [cell.value for cell in found.rows[0][-3:]] == [6.1, 567.0, None]
    told = [note for note in found.notes if "modegpt at 60 %" in note]
    assert told == [
        "A damping grew: tiny-llama modegpt at 60 %.",
        "Scores were taken over: tiny-llama modegpt at 60 %.",
    ]


def test_records_from_before_there_were_notes(tmp_path: Path) -> None:
    old = factory.record(method="shortgpt", ratio=0.6, memory={"peak_host_bytes": 1, "peak_device_bytes": None})
    del old["notes"]
    found = table(tmp_path, old)
    assert found is not None and [cell.value for cell in found.rows[0][-3:]] == [5.1, None, None]


def test_only_dense_models_give_no_table(tmp_path: Path) -> None:
    assert table(tmp_path) is None
