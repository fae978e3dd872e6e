"""Reading records: whole ones, damaged ones, and the paragraph a user gets."""

import json
import math
import re
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
        (damaged(cell__method="\ud800"), "surrogates not allowed"),
        (damaged(provenance=None), "provenance is None"),
        (damaged(provenance__tasks={"speed": 1}), "provenance.tasks.speed is 1"),
        (damaged(provenance__versions=[]), "provenance.versions is []"),
        (damaged(size__active_total=math.nan), "size.active_total is nan"),
        (damaged(size__dense_params=0), "size.dense_params is 0"),
        (damaged(cell__ratio=math.inf), "cell.ratio is inf"),
        (damaged(cell__ratio=-3), "cell.ratio is -3, not a share"),
        (damaged(cell__ratio=60), "cell.ratio is 60, not a share"),
        (damaged(cell__seed=True), "cell.seed is True"),
        (damaged(cell__budget="demo"), "cell.budget is 'demo'"),
        (damaged(schema=True), "no schema number"),
        (damaged(size__active_total=-5), "size.active_total is -5"),
        (damaged(size__stored_bytes=10**400), "int too large"),
        (damaged(provenance__recovery={"tokens": "many"}), "provenance.recovery.tokens is 'many'"),
        (
            damaged(metrics={"a/acc@0shot": {"value": True, "stderr": None, "n": 4}}),
            "metrics.a/acc@0shot.value is True",
        ),
        (damaged(metrics={"a/acc@0shot": {"value": 10**400, "stderr": None, "n": 4}}), "int too large"),
        (damaged(time={"compress_s": "long"}), "time.compress_s is 'long'"),
        (damaged(metrics={"a/acc@0shot": {"value": 1, "stderr": None, "n": 0}}), "metrics.a/acc@0shot.n is 0"),
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
    (message,) = read_all(tmp_path).problems
    assert message.startswith("tiny-llama/record.json is damaged") and named in message and "run_all.py" in message
    assert "\n" not in message


def test_record_that_is_no_text_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_bytes(b"\xff\xfe\x00")
    assert "is damaged" in read_all(tmp_path).problems[0]


def test_newer_schema_is_not_called_damage(tmp_path: Path) -> None:
    factory.write(tmp_path, [factory.record(schema=2)])
    (message,) = read_all(tmp_path).problems
    assert re.search(r"has schema 2, and this version reads up to 1.*Update", message) and "damaged" not in message


def test_no_folder_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"no folder .*missing.*python run_all\.py --models"):
        read_all(tmp_path / "missing")
    assert read_all(tmp_path) == [] and read_all(tmp_path).problems == ()


def test_of_the_same_cell_twice_the_first_is_kept_and_both_are_named(tmp_path: Path) -> None:
    found = read_all(factory.write(tmp_path, [factory.record(), factory.record(metrics={}, cell__seed=1)]))
    assert len(found) == 1 and found[0].metrics
    (message,) = found.problems
    assert re.match(r"1/\w+/record\.json is left out: 0/\w+/record\.json describes the same cell", message)


def test_cells_of_other_ids_that_differ_in_nothing_are_no_seeds(tmp_path: Path) -> None:
    kinds = ({}, {"cell__id": "b"}, {"cell__id": "c", "seed": 1}, {"cell__id": "d", "cell__dtype": "bfloat16"})
    found = read_all(factory.write(tmp_path, [factory.record(**kind) for kind in kinds]))
    assert [record.cell["id"] for record in found][1:] == ["c", "d"]
    (message,) = found.problems
    assert message == (
        f"1/b/record.json is left out: 0/{found[0].cell['id']}/record.json has another id but is of the same model, "
        "method, ratio, seed and settings. Delete one of them."
    )


def test_damage_leaves_the_others_readable(tmp_path: Path) -> None:
    factory.write(tmp_path, [factory.record(), factory.record(schema=2, seed=1), factory.record(seed=2)])
    found = read_all(tmp_path)
    assert [record.cell["seed"] for record in found] == [0, 2] and len(found.problems) == 1


ACC, PPL = "arc_easy/acc@0shot", "wikitext2/token_ppl@512"


def metric(name: str, value: float, stderr: float | None = None) -> dict[str, Any]:
    return {"metrics": {name: {"value": value, "stderr": stderr, "n": 4}}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        *((metric(ACC, value), f"{ACC} {value}") for value in (math.nan, math.inf, -math.inf, -0.1, 1.1)),
        *((metric(PPL, value), f"{PPL} {value}") for value in (math.nan, -5.0, 0.0, 0.99)),
        (metric("speed/decode_tokens_per_s@b1", -1.0), "speed/decode_tokens_per_s@b1 -1.0"),
        (metric("story/log_likelihood", math.inf), "story/log_likelihood inf"),
        *((metric(ACC, 0.5, stderr), f"{ACC} ± {stderr}") for stderr in (math.nan, math.inf, -0.1)),
        ({"time": {"compress_s": -1.0, "load_s": None}}, "time.compress_s -1.0"),
        ({"memory": {"peak_host_bytes": math.inf}}, "memory.peak_host_bytes inf"),
    ],
)
def test_numbers_that_cannot_be_are_kept_and_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    found = read_all(factory.write(tmp_path, [factory.record(**changes)]))
    assert len(found) == 1
    assert found.problems[0].startswith(f"tiny-llama dense at 1.0, seed 0 has numbers that cannot be: {told}. They are")


@pytest.mark.parametrize("changes", [metric(ACC, 0), metric(ACC, 1, 0), metric(PPL, 1), metric("story/log", -3.5)])
def test_the_ends_of_what_can_be_are_no_problem(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert read_all(factory.write(tmp_path, [factory.record(**changes)])).problems == ()


def test_unfinished_record_may_lack_everything_measured(tmp_path: Path) -> None:
    factory.write(tmp_path, [factory.failed("tiny-llama", "shortgpt", 0.6, "out of memory") | {"provenance": None}])
    (record,) = read_all(tmp_path)
    assert (record.status, record.error, record.size, record.metrics) == ("failed", "out of memory", {}, {})


def test_failed_record_keeps_what_was_measured_before_and_is_checked_for_it(tmp_path: Path) -> None:
    factory.write(tmp_path, [factory.record(status="failed", error="out of memory")])
    (record,) = read_all(tmp_path)
    assert record.status == "failed" and record.size["on_budget"] and "wikileads/token_ppl@512" in record.metrics
    found = read_all(factory.write(tmp_path, [factory.record(status="failed", seed=1, size={"dense_params": 1})]))
    assert len(found) == 1 and "lacks size." in found.problems[0]
