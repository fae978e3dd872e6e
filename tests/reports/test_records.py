"""Reading records: whole ones, damaged ones, and the paragraph a user gets."""

import json
from pathlib import Path
from typing import Any

import pytest

from reports.records import ReportError, read_all
from tests.reports import factory


def damaged(**changes: Any) -> str:
    """A record's text with dotted keys changed; `...` removes one."""
    content = factory.record(**changes)
    kept = {key: value for key, value in content.items() if value is not ...}
    for part in ("cell", "size"):
        if isinstance(kept.get(part), dict):
            kept[part] = {key: value for key, value in kept[part].items() if value is not ...}
    return json.dumps(kept)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "Expecting value"),
        ('{"schema": 1, "sta', "Unterminated string"),
        ("[]", "no schema number"),
        ('"text"', "no schema number"),
        (damaged(schema=None), "no schema number"),
        (damaged(status="finished"), "'finished', not one of done, failed, skipped"),
        (damaged(metrics=...), "lacks metrics"),
        (damaged(size={}), "lacks size.dense_params"),
        (damaged(size__active_total=...), "lacks size.active_total"),
        (damaged(size__on_budget="yes"), "size.on_budget is 'yes'"),
        (damaged(cell__ratio="0.5"), "cell.ratio is '0.5'"),
        (damaged(cell__id=...), "lacks cell.id"),
        (damaged(provenance=None), "provenance is None"),
        (damaged(metrics={"a/acc@0shot": 0.5}), "metrics.a/acc@0shot is 0.5"),
        (
            damaged(metrics={"a/acc@0shot": {"value": None, "stderr": None, "n": 1}}),
            "metrics.a/acc@0shot.value is None",
        ),
    ],
)
def test_damaged_record_is_named_with_its_damage_and_the_way_out(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "tiny-llama" / "record.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ReportError) as caught:
        read_all(tmp_path)
    message = str(caught.value)
    assert str(path) in message and named in message and "run_all.py" in message
    assert "\n" not in message


def test_record_that_is_no_text_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ReportError, match="is damaged"):
        read_all(tmp_path)


def test_newer_schema_is_not_called_damage(tmp_path: Path) -> None:
    factory.write(tmp_path, [factory.record(schema=2)])
    with pytest.raises(ReportError, match=r"has schema 2, and this version reads up to 1.*Update") as caught:
        read_all(tmp_path)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("folder", ["", "missing"])
def test_no_records_says_what_to_type(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ReportError, match=r"no record\.json below .*python run_all\.py --models"):
        read_all(tmp_path / folder)


def test_the_same_cell_twice_is_refused_with_both_paths(tmp_path: Path) -> None:
    factory.write(tmp_path, [factory.record(), factory.record()])
    with pytest.raises(ReportError, match=r"0/.*record\.json and .*1/.*record\.json describe the same cell"):
        read_all(tmp_path)


def test_unfinished_record_may_lack_everything_measured(tmp_path: Path) -> None:
    factory.write(tmp_path, [factory.failed("tiny-llama", "shortgpt", 0.6, "out of memory") | {"provenance": None}])
    (record,) = read_all(tmp_path)
    assert (record.status, record.error, record.size, record.metrics) == ("failed", "out of memory", {}, {})


def test_failed_record_keeps_what_was_measured_before_and_is_checked_for_it(tmp_path: Path) -> None:
    factory.write(tmp_path, [factory.record(status="failed", error="out of memory")])
    (record,) = read_all(tmp_path)
    assert record.status == "failed" and record.size["on_budget"] and "wikileads/token_ppl@512" in record.metrics
    with pytest.raises(ReportError, match="lacks size.active_total"):
        read_all(factory.write(tmp_path, [factory.record(status="failed", seed=1, size={"dense_params": 1})]))
