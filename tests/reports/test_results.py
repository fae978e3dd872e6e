"""Pooling seeds, telling variants apart, and the counted ratio."""

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from reports.perplexity import perplexity_table
from reports.records import read_all
from reports.results import Result, pool
from tests.reports import factory

TEXT = "wikileads/token_ppl@512"


def ppl(value: float) -> dict[str, Any]:
    """A metric of a record."""
    return {"value": value, "stderr": None, "n": 8}


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


def test_numbers_at_the_end_of_a_float_have_no_spread_but_a_result(tmp_path: Path) -> None:
    metrics = ({TEXT: ppl(value), "a/b": ppl(1.7e308)} for value in (1.7e308, -1.7e308))
    (result,) = pooled(tmp_path, *(factory.record(seed=seed, metrics=each) for seed, each in enumerate(metrics)))
    found, beyond = result.metric(TEXT), result.metric("a/b")
    assert found and (found.value, found.error) == (0, None) and beyond and math.isnan(beyond.value)


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


WORDS = st.sampled_from(["a", "b", "c"])
FEW = st.integers(0, 2)
PRESETS = st.fixed_dictionaries({"samples": FEW}, optional={"name": WORDS, "window": FEW})
RUNS = st.fixed_dictionaries(
    {
        "cell__calibration": st.none() | PRESETS,
        "cell__budget": PRESETS,
        "cell__dtype": WORDS,
        "cell__method_config": st.fixed_dictionaries({}, optional={"name": WORDS, "tau": FEW, "router": PRESETS}),
        "cell__recover": st.just({}) | st.fixed_dictionaries({"kind": WORDS}, optional={"text": PRESETS}),
    }
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs=st.lists(RUNS, min_size=2, max_size=5))
@example([{"cell__calibration": {"name": name, "samples": n}} for name, n in (("a", 16), ("a", 64), ("b", 16))])
@example(
    [{"cell__budget": {"name": "a", "documents": n}, "cell__calibration": {"name": c}} for n, c in ((1, "a"), (2, "b"))]
)
def test_other_settings_are_another_title_and_no_result_vanishes(
    tmp_path_factory: pytest.TempPathFactory, runs: list[dict[str, Any]]
) -> None:
    records = [
        factory.record(method="sleb", ratio=0.6, cell__id=str(index), metrics={TEXT: ppl(100.0 + index)}, **run)
        for index, run in enumerate(runs)
    ]
    found = pooled(tmp_path_factory.mktemp("results"), *records)
    assert len({result.title for result in found}) == len(found)
    table = perplexity_table(found)
    assert table
    assert sorted(row[2].value for row in table.rows) == sorted(result.metric(TEXT).value for result in found)


def test_results_of_one_title_are_rows_of_their_own(tmp_path: Path) -> None:
    configs: list[dict[str, Any]] = [{"a": "1, b=2"}, {"a": "1", "b": "2"}]
    found = pooled(tmp_path, *(factory.record(method="sleb", cell__id=str(c), cell__method_config=c) for c in configs))
    table = perplexity_table(found)
    assert {result.method for result in found} == {"sleb (a=1, b=2)"} and table and len(table.rows) == 2


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


def test_an_unknown_counted_share_is_explained(tmp_path: Path) -> None:
    table = perplexity_table(pooled(tmp_path, factory.record(method="sleb", ratio=0.6, cell__ratio_basis="block")))
    assert table and any("Counted share unknown" in note and "tiny-llama sleb at 60 %" in note for note in table.notes)
