"""The tables of one method's runs, of what models are made of, and of throughput."""

from pathlib import Path
from typing import Any

from reports.modules import modules_table, published_modules_table
from reports.records import read_all
from reports.results import Result, pool
from reports.tables import Table
from reports.throughput import throughput_table
from reports.variants import ablations_table, settings_table
from tests.reports import factory


def results(tmp_path: Path, *records: dict[str, Any]) -> list[Result]:
    for index, record in enumerate(records):
        record["cell"]["id"] = str(index)
    return pool(read_all(factory.write(tmp_path, list(records))))


def column(table: Table | None, label: str) -> list[Any]:
    assert table
    return [row[[str(c) for c in table.columns].index(label)].value for row in table.rows]


def tomoe(**config: Any) -> dict[str, Any]:
    return factory.record(method="tomoe", ratio=0.6, cell__method_config=config)


def test_ablations_say_what_differs_from_most(tmp_path: Path) -> None:
    records = [tomoe(experts=8, tau=0.4), tomoe(experts=4, tau=0.4), tomoe(experts=8, tau=0.5), tomoe(experts=8)]
    table = ablations_table(results(tmp_path, *records, factory.record(method="sleb", ratio=0.6)))
    assert sorted(column(table, "Settings")) == ["as most", "experts=4", "tau=0.5", "without method_config.tau"]
    assert column(table, "Method") == ["tomoe"] * 4 and None not in column(table, "wikileads: @512")


def test_calibrations_are_settings_and_no_ablation(tmp_path: Path) -> None:
    other = {"cell__calibration": {"name": "alpaca", "samples": 16, "window": 256}}
    records = [factory.record(method="sleb", ratio=0.6, seed=seed) for seed in (0, 1)]
    found = results(tmp_path, *records, factory.record(method="sleb", ratio=0.6, **other))
    assert sorted(column(settings_table(found), "Settings")) in (
        ["as most", "calibration=alpaca"],
        ["as most", "calibration=wikileads"],
    )
    assert ablations_table(found) is None and settings_table(found[:1]) is None


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
