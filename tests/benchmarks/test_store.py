"""Records are whole or absent, and what is wrong with one is said."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import store
from methods.errors import UserError

RECORD: dict[str, Any] = {
    "schema": store.SCHEMA,
    "status": "done",
    "cell": dict.fromkeys(store.CELL_KEYS, "x"),
    **store.EMPTY,
    "error": None,
}


def test_a_record_comes_back_with_its_keys_in_order(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    store.write_record(path, dict(reversed(RECORD.items())))
    read = store.read_record(path)
    assert read == RECORD and list(read) == list(store.KEYS)
    assert list(store.records(tmp_path)) == [RECORD]
    assert store.read_record(tmp_path / "none" / "record.json") is None


def failing(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_record_and_nothing_else(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    store.write_record(path, RECORD)
    monkeypatch.setattr(os, step, failing)
    with pytest.raises(OSError, match="No space"):
        store.write_record(path, RECORD | {"status": "failed"})
    assert store.read_record(path) == RECORD
    assert os.listdir(tmp_path) == ["record.json"]


def test_what_a_killed_writer_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".record.json.tmp").write_text('{"schema":')
    store.write_record(tmp_path / "record.json", RECORD)
    assert os.listdir(tmp_path) == ["record.json"]


def test_a_full_device_raises(tmp_path: Path) -> None:
    (tmp_path / ".record.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space"):
        store.write_record(tmp_path / "record.json", RECORD)
    assert os.listdir(tmp_path) == []


def test_numbers_that_json_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        store.write_record(tmp_path / "record.json", RECORD | {"metrics": {"m": float("nan")}})
    assert os.listdir(tmp_path) == []


def without(key: str) -> str:
    return json.dumps({name: value for name, value in RECORD.items() if name != key})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"schema": 1, "sta', "damaged"),
        ("[]", "no schema"),
        (without("schema"), "no schema"),
        (without("metrics"), "lacks metrics"),
        (without("cell"), "lacks cell, an object cell"),
        (json.dumps(RECORD | {"cell": {}}), r"lacks cell\.id"),
        (json.dumps(RECORD | {"cell": 3}), "lacks an object cell"),
        (json.dumps(RECORD | {"provenance": {}}), r"lacks provenance\.dataset_revisions"),
        (json.dumps(RECORD | {"status": "perhaps"}), "status"),
        (json.dumps(RECORD | {"schema": store.SCHEMA + 1}), "Update the program"),
        ("\x00\xff", "damaged"),
    ],
)
def test_a_damaged_record_is_reported_with_its_path(content: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=complaint) as error:
        store.read_record(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
