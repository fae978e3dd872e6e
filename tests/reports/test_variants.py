"""The tables of one method's runs, of what models are made of, and of throughput."""

import math
from pathlib import Path
from typing import Any

import pytest

from reports.modules import modules_table, published_modules_table
from reports.records import read_all
from reports.results import Results, pool
from reports.settings import NONE
from reports.significance import significance_table
from reports.tables import TIED, Table
from reports.throughput import throughput_table
from reports.variants import ablations_table, settings_table
from tests.reports import factory


def results(tmp_path: Path, *records: dict[str, Any]) -> Results:
    for index, record in enumerate(records):
        record["cell"]["id"] = str(index)
    return pool(read_all(factory.write(tmp_path, list(records))))


def column(table: Table | None, label: str) -> list[Any]:
    assert table
    return [row[[str(c) for c in table.columns].index(label)].value for row in table.rows]


def tomoe(**config: Any) -> dict[str, Any]:
    return factory.record(method="tomoe", ratio=0.6, cell__method_config=config)


def test_ablations_say_all_that_differs(tmp_path: Path) -> None:
    records = [tomoe(experts=8, tau=0.4), tomoe(experts=4, tau=0.4), tomoe(experts=8, tau=0.5), tomoe(experts=8)]
    table = ablations_table(results(tmp_path, *records, factory.record(method="sleb", ratio=0.6)))
    assert sorted(column(table, "Settings")) == [
        "experts=4, tau=0.4",
        "experts=8",
        "experts=8, tau=0.4",
        "experts=8, tau=0.5",
    ]
    assert column(table, "Method") == ["tomoe"] * 4 and None not in column(table, "wikileads: @512")


def test_calibrations_are_settings_and_no_ablation(tmp_path: Path) -> None:
    other = {"cell__calibration": {"name": "alpaca", "samples": 16, "window": 256}}
    records = [factory.record(method="sleb", ratio=0.6, seed=seed) for seed in (0, 1)]
    found = results(tmp_path, *records, factory.record(method="sleb", ratio=0.6, **other))
    assert sorted(column(settings_table(found), "Settings")) == ["calibration=alpaca", "calibration=wikileads"]
    assert ablations_table(found) is None and settings_table(Results(found[:1])) is None


def test_variants_of_presets_that_share_a_name_say_what_else_differs(tmp_path: Path) -> None:
    texts = [("wikileads", 16), ("wikileads", 64), ("alpaca", 16)]
    records = [
        factory.record(method="sleb", ratio=0.6, cell__calibration={"name": name, "samples": samples})
        for name, samples in texts
    ]
    assert sorted(column(settings_table(results(tmp_path, *records)), "Settings")) == [
        "calibration=alpaca, calibration.samples=16",
        "calibration=wikileads, calibration.samples=16",
        "calibration=wikileads, calibration.samples=64",
    ]


def test_the_same_run_is_told_alike_at_every_ratio(tmp_path: Path) -> None:
    """Also where as many runs are like it as are not; and what its record lacks is not called by an inner name."""
    records = [factory.record(method="tomoe", ratio=ratio, cell__method_config={}) for ratio in (0.7, 0.5)]
    wide = {"cell__method_config": {"expert_width": "expected"}}
    records[1:1] = [factory.record(method="tomoe", ratio=ratio, **wide) for ratio in (0.5, 0.7)]
    table = ablations_table(results(tmp_path, *records))
    told = set(zip(column(table, "Asked, %"), column(table, "Settings"), strict=True))
    assert told == {(ratio, settings) for ratio in (70, 50) for settings in ("expert_width=expected", NONE)}


def marks(table: Table | None, label: str) -> dict[tuple[object, ...], bool]:
    """Whether it is the best, by method and settings, below a header."""
    assert table
    index = [str(column) for column in table.columns].index(label)
    return {(row[3].value, row[4].value): row[index].best for row in table.rows}


def test_best_is_marked_among_the_runs_of_one_method(tmp_path: Path) -> None:
    def run(method: str, text: str, value: float, **changes: Any) -> dict[str, Any]:
        metrics = {"wikileads/token_ppl@512": {"value": value, "stderr": 1.0, "n": 8}}
        return factory.record(method=method, ratio=0.6, cell__calibration={"name": text}, metrics=metrics, **changes)

    records = [run("sleb", "a", 30.0), run("sleb", "b", 20.0), run("random", "a", 10.0), run("random", "b", 11.0)]
    found = results(tmp_path, *records, run("random", "a", 5.0, cell__dtype="bfloat16"))
    table = settings_table(found)
    best = [key for key, best in marks(table, "wikileads: @512").items() if best]
    assert best == [("random", "calibration=a, dtype=float32"), ("sleb", "calibration=b")]
    assert table and table.notes[0].startswith("Bold: the best of the runs of a method")


def test_variants_of_tomoe_are_tested(tmp_path: Path) -> None:
    scores = {8: 50, 4: 48, 2: 20}
    records = [
        factory.sampled(tomoe(experts=experts), {"piqa/acc@0shot": [1.0] * right + [0.0] * (60 - right)})
        for experts, right in scores.items()
    ]
    found = results(tmp_path, *records)
    table = ablations_table(found)
    assert table
    cells = {row[4].value: row[5] for row in table.rows}
    assert cells["experts=8"].best and cells["experts=4"].marks == TIED and not cells["experts=2"].marks
    tests = significance_table(found)
    assert tests and {row[0].value for row in tests.rows} >= {"ablations"}


@pytest.mark.parametrize(
    ("changes", "best"),
    [
        ({}, {"slicegpt"}),
        ({"provenance__device": "another"}, {"shortgpt"}),
        ({"size__on_budget": False}, {"shortgpt"}),
        ({"ratio": 0.8}, {"shortgpt"}),
        ({"rate": -1e9}, {"shortgpt"}),
        ({"rate": math.inf}, {"shortgpt"}),
        ({"rate": 200.0}, {"shortgpt", "slicegpt"}),
    ],
)
def test_the_fastest_of_what_can_be_compared_is_bold(tmp_path: Path, changes: dict[str, Any], best: set[str]) -> None:
    rates = {"dense": 900.0, "shortgpt": 200.0, "sleb": 100.0, "slicegpt": changes.get("rate", 300.0)}
    kept = {key: value for key, value in changes.items() if key != "rate"}
    records = []
    for method, rate in rates.items():
        metrics = {f"speed/decode_tokens_per_s@b{b}": {"value": rate, "stderr": 1.0, "n": 3} for b in (1, 4)}
        place: dict[str, Any] = {"ratio": 1.0 if method == "dense" else 0.6}
        records.append(factory.record(method=method, metrics=metrics, **place | (kept if method == "slicegpt" else {})))
    table = throughput_table(results(tmp_path, *records))
    assert table and {str(row[3]) for row in table.rows if row[6].best} == best
    assert "nothing was tested" in table.caption


def test_ratios_and_recipes_are_no_variants(tmp_path: Path) -> None:
    lora = {"cell__recover": {"kind": "lora"}}
    records = [factory.record(method="tomoe", ratio=0.6, **change) for change in ({}, lora)]
    found = results(tmp_path, *records, factory.record(method="tomoe", ratio=0.8))
    assert ablations_table(found) is None and settings_table(found) is None


def test_modules_are_ranges_of_the_kept(tmp_path: Path) -> None:
    made = factory.structure(3, factory.mixture(), qk=20, mlp=50)
    made["layers"][0]["qk"]["kept"], made["layers"][1]["mixture"] = 30, factory.mixture(width=60)
    record = factory.record(method="tomoe", ratio=0.6) | {"structure": made}
    table = modules_table(results(tmp_path, record, factory.record(method="sleb", ratio=0.6)))
    assert column(table, "Kept: Q and K per head") == ["20 to 30 of 32"] and column(table, "Kept: Heads") == [""]
    assert column(table, "Kept: MLP") == ["50 of 400"] and column(table, "Experts: width") == ["50 to 60"]
    assert column(table, "Experts: number") == ["2"] and column(table, "Added") == ["routers"]
    assert column(table, "Method") == ["tomoe"]


def test_published_modules_stand_with_tomoe_only(tmp_path: Path) -> None:
    table = published_modules_table(results(tmp_path, tomoe()))
    assert dict(zip(column(table, "Module"), column(table, "After training"), strict=True))["Router"] == "kept"
    assert published_modules_table(results(tmp_path / "b", factory.record())) is None


def test_throughput_has_a_column_per_batch(tmp_path: Path) -> None:
    record = factory.record()
    table = throughput_table(results(tmp_path, record))
    for phase in ("prefill", "decode"):
        for batch in (1, 4):
            expected = record["metrics"][f"speed/{phase}_tokens_per_s@b{batch}"]["value"]
            assert column(table, f"{phase.capitalize()}: batch {batch}") == [expected]
