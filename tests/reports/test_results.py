"""Pooling seeds, telling variants apart, and the counted ratio."""

import statistics
from pathlib import Path
from typing import Any

import pytest

from reports.records import read_all
from reports.results import Result, pool
from tests.reports import factory


def pooled(tmp_path: Path, *records: dict[str, Any]) -> list[Result]:
    """The records as results."""
    return pool(read_all(factory.write(tmp_path, list(records))))


def test_seeds_give_mean_and_standard_deviation(tmp_path: Path) -> None:
    records = [factory.record(method="slicegpt", ratio=0.6, seed=seed) for seed in (0, 1, 2)]
    (result,) = pooled(tmp_path, *records)
    values = [record["metrics"]["arc_easy/acc_norm@0shot"]["value"] for record in records]
    found = result.metric("arc_easy/acc_norm@0shot")
    assert found is not None and found.seeds == 3
    assert found.value == pytest.approx(statistics.fmean(values))
    assert found.error == pytest.approx(statistics.stdev(values))


def test_one_seed_keeps_its_value_and_standard_error_exactly(tmp_path: Path) -> None:
    record = factory.record()
    (result,) = pooled(tmp_path, record)
    found, entry = result.metric("wikileads/token_ppl@512"), record["metrics"]["wikileads/token_ppl@512"]
    assert found is not None and (found.value, found.error, found.seeds) == (entry["value"], entry["stderr"], 1)


def test_average_propagates_the_standard_errors_of_independent_tasks(tmp_path: Path) -> None:
    metrics = {
        f"{task}/acc@0shot": {"value": 0.5, "stderr": error, "n": 9} for task, error in (("a", 0.03), ("b", 0.04))
    }
    (result,) = pooled(tmp_path, factory.record(metrics=metrics))
    found = result.average(list(metrics))
    assert found is not None and found.value == 0.5 and found.error == pytest.approx(0.025)
    assert result.average([*metrics, "c/acc@0shot"]) is None


@pytest.mark.parametrize(
    ("change", "labels"),
    [
        ({"cell__method_config": {"angular": True}}, {"shortgpt (angular=False)", "shortgpt (angular=True)"}),
        (
            {"cell__calibration": {"name": "alpaca", "samples": 32, "window": 256}},
            {"shortgpt (calibration=wikileads)", "shortgpt (calibration=alpaca)"},
        ),
        (
            {"cell__calibration": {"name": "wikileads", "samples": 32, "window": 256}},
            {"shortgpt (calibration.samples=16)", "shortgpt (calibration.samples=32)"},
        ),
        ({"cell__budget": {"name": "paper"}}, {"shortgpt (budget=demo)", "shortgpt (budget=paper)"}),
        ({"cell__dtype": "bfloat16"}, {"shortgpt (dtype=float32)", "shortgpt (dtype=bfloat16)"}),
        ({"cell__ratio_basis": "block"}, {"shortgpt (ratio_basis=total)", "shortgpt (ratio_basis=block)"}),
        ({"provenance__model_revision": "b"}, {"shortgpt (model_revision=a)", "shortgpt (model_revision=b)"}),
    ],
)
def test_runs_with_other_settings_are_rows_of_their_own(
    tmp_path: Path, change: dict[str, Any], labels: set[str]
) -> None:
    plain: dict[str, Any] = {"provenance__model_revision": "a", "cell__id": "one"}
    first = factory.record(method="shortgpt", ratio=0.6, **plain)
    changed: dict[str, Any] = plain | change | {"cell__id": "two"}
    second = factory.record(method="shortgpt", ratio=0.6, **changed)
    assert {result.method for result in pooled(tmp_path, first, second)} == labels


def test_a_single_variant_bears_the_plain_name(tmp_path: Path) -> None:
    records = [factory.record(method="shortgpt", ratio=ratio) for ratio in (0.8, 0.6)]
    assert [result.method for result in pooled(tmp_path, *records)] == ["shortgpt", "shortgpt"]


def test_counted_ratio_in_both_bases(tmp_path: Path) -> None:
    sizes = {"dense_params": 1000, "active_total": 700, "active_block": 500}
    dense = factory.record(size=factory.record()["size"] | sizes | {"active_total": 1000, "active_block": 800})
    total, block = (
        factory.record(method=method, ratio=0.6, cell__ratio_basis=basis, size=dense["size"] | sizes)
        for method, basis in (("shortgpt", "total"), ("slicegpt", "block"))
    )
    found = {result.method: result.achieved for result in pooled(tmp_path, dense, total, block)}
    assert found == {"dense": 1.0, "shortgpt": 0.7, "slicegpt": 0.625}


def test_counted_ratio_of_the_block_basis_is_unknown_without_the_dense_record(tmp_path: Path) -> None:
    (result,) = pooled(tmp_path, factory.record(method="slicegpt", ratio=0.6, cell__ratio_basis="block"))
    assert result.achieved is None


def test_order_is_smaller_model_then_dense_then_falling_ratio(tmp_path: Path) -> None:
    records = [factory.record(method="cmoe"), *reversed(factory.matrix())]
    found = [(result.model, result.ratio, result.method) for result in pooled(tmp_path, *records)]
    assert found[:5] == [
        ("tiny-llama", 1.0, "dense"),
        ("tiny-llama", 1.0, "cmoe"),
        ("tiny-llama", 0.8, "shortgpt"),
        ("tiny-llama", 0.8, "slicegpt"),
        ("tiny-llama", 0.6, "shortgpt"),
    ]
    assert len(found) == 10
