"""What the tables of the speed task show: units, batches, what was not measured, where memory ended, and money."""

import math
from pathlib import Path
from typing import Any

import pytest

from reports.cost import cost_table
from reports.formats import comma_separated
from reports.records import read_all
from reports.render import files
from reports.speed import latency_table, speed_table, work_table
from tests.reports import factory
from tests.reports.test_report import run
from tests.reports.test_tables import entry, lookup, results

SHORT = {"method": "shortgpt", "ratio": 0.6}
KEY = ("tiny-llama", "60", "shortgpt")


def metrics(batch: int) -> dict[str, Any]:
    values = {
        "prefill_tokens_per_s": 4000.0,
        "decode_tokens_per_s": 100.0 * batch,
        "decode_tokens_per_s_iqr": 7.0,
        "first_token_s_p50": 0.016,
        "first_token_s_p99": 0.031,
        "next_token_s_p90": 0.0105,
        "prefill_time_over_bound": 1.5,
        "decode_time_over_bound": 12.25,
    }
    fixed = {"cache_bytes_per_token": 3072.0, "decode_flops_per_token": 5.5e6}
    fixed |= {"read_bytes_per_s": 20e9, "peak_flops_per_s": 80e9}
    found = {f"speed/{name}@b{batch}": value for name, value in values.items()}
    found |= {f"speed/{name}": value for name, value in fixed.items()}
    return {name: entry(value, stderr=None) for name, value in found.items()}


def record(**changes: Any) -> dict[str, Any]:
    return factory.record(**{**SHORT, "metrics": metrics(1) | metrics(16) | metrics(2), **changes})


def test_batches_are_rows_in_ascending_order(tmp_path: Path) -> None:
    for build in (speed_table, latency_table, work_table):
        table = build(results(tmp_path / build.__name__, record()))
        assert table is not None and [str(row[4]) for row in table.rows] == ["1", "2", "16"]


def test_a_batch_that_did_not_fit_is_no_row(tmp_path: Path) -> None:
    found = results(tmp_path, factory.record(metrics=metrics(1)), record(metrics=metrics(1) | metrics(8)))
    for table in (speed_table(found), latency_table(found), work_table(found)):
        assert table is not None
        assert [(str(row[3]), str(row[4])) for row in table.rows] == [
            ("dense", "1"),
            ("shortgpt", "1"),
            ("shortgpt", "8"),
        ]


def test_units(tmp_path: Path) -> None:
    found = results(tmp_path, record())
    speed, latency, work = lookup(speed_table(found)), lookup(latency_table(found)), lookup(work_table(found))
    assert (speed[*KEY, "16", "Decode: tokens/s"], speed[*KEY, "2", "Decode: quartiles apart"]) == ("1600", "7.00")
    assert (latency[*KEY, "1", "First token, ms: p99"], latency[*KEY, "1", "Next token, ms: p90"]) == ("31.00", "10.50")
    assert latency[*KEY, "1", "First token, ms: p90"] == "-"
    assert (work[*KEY, "1", "Cache, kB per token"], work[*KEY, "2", "MFLOP per token: decode"]) == ("3.07", "5.50")
    assert work[*KEY, "1", "Time over bound: decode"] == "12.25"


def test_what_older_records_lack_is_no_table_and_no_column(tmp_path: Path) -> None:
    found = results(tmp_path)
    assert latency_table(found) is None and work_table(found) is None
    columns = {column for *_, column in lookup(speed_table(found))}
    assert "Peak, MB" in columns and not {"Peak of host, MB", "Decode: quartiles apart"} & columns


def test_a_device_has_a_column_for_its_host(tmp_path: Path) -> None:
    found = results(tmp_path, record(metrics=metrics(1) | {"speed/peak_host_bytes@b1": entry(2.5e9, stderr=None)}))
    assert lookup(speed_table(found))[*KEY, "1", "Peak of host, MB"].startswith("2500")


def test_energy_is_shown_or_said_not_to_be_measured(tmp_path: Path) -> None:
    without = work_table(results(tmp_path / "without", record()))
    assert without is not None and "Energy: not measured, as no counter could be read." in without.notes
    assert not [column for column in without.columns if "mJ" in str(column)]
    joules = {"speed/decode_joules_per_token@b1": entry(0.25, stderr=None)}
    found = work_table(results(tmp_path / "with", record(metrics=metrics(1) | joules)))
    assert found is not None and not [note for note in found.notes if "Energy" in note]
    assert lookup(found)[*KEY, "1", "mJ per token: decode"] == "250.0"


def test_what_the_device_can_do_is_said(tmp_path: Path) -> None:
    faster = metrics(1) | {"speed/read_bytes_per_s": entry(31e9)}
    table = work_table(results(tmp_path, factory.record(metrics=faster), record()))
    assert table is not None and "The device read 20.00 to 31.00 GB/s and did 80.00 GFLOP/s." in table.notes


def test_the_number_of_threads_is_said(tmp_path: Path) -> None:
    two, four = (metrics(1) | {"speed/threads": entry(count)} for count in (2, 4))
    table = speed_table(results(tmp_path, factory.record(metrics=two), record(metrics=four)))
    assert table is not None and "Timed with 2 or 4 processor threads." in table.notes


def test_where_memory_ended_the_sweep_is_said(tmp_path: Path) -> None:
    ended = {"speed/largest_batch": entry(16), "speed/batch_without_room": entry(32)}
    dense = factory.record(metrics=metrics(1) | {"speed/largest_batch": entry(16)})
    table = speed_table(results(tmp_path, dense, record(metrics=metrics(16) | ended)))
    assert table is not None
    assert [note for note in table.notes if "memory" in note or "sweep" in note] == [
        "tiny-llama shortgpt at 60 %: memory holds a batch of 16 beside the dense model, not of 32.",
        "Where memory did not end the sweep, the preset's last batch did (16): larger ones may fit.",
    ]


def test_where_the_preset_ended_the_sweep_is_said(tmp_path: Path) -> None:
    def notes(name: str, *records: dict[str, Any]) -> list[str]:
        table = speed_table(results(tmp_path / name, *records))
        assert table is not None
        return [note for note in table.notes if "sweep" in note]

    small, large = (metrics(1) | {"speed/largest_batch": entry(last)} for last in (1, 4))
    assert notes("all", factory.record(metrics=large), record(metrics=small)) == [
        "Where memory did not end the sweep, the preset's last batch did (1 or 4): larger ones may fit."
    ]
    assert notes("memory", record(metrics=large | {"speed/batch_without_room": entry(8)})) == []
    assert notes("old", record(metrics=metrics(1))) == []


def test_costs_at_a_price(tmp_path: Path) -> None:
    tuned = {"compress_s": 5.0, "recover_s": 13.0}
    found = results(tmp_path, factory.record(metrics=metrics(1)), record(metrics=metrics(1), time=tuned))
    table = cost_table(found, 3.6)
    assert table is not None and "at 3.6 USD per hour" in table.caption
    shown = lookup(table)
    assert shown[*KEY, "1", "Compressing, USD"] == "0.018"
    assert shown["tiny-llama", "100", "dense", "1", "Compressing, USD"] == "-"
    assert shown[*KEY, "1", "USD per million tokens: prefill"] == "0.25"  # 250 s
    assert shown[*KEY, "1", "USD per million tokens: decode"] == "10"
    assert cost_table(results(tmp_path / "none", record(metrics={})), 3.6) is None


def test_small_costs_are_not_rounded_away(tmp_path: Path) -> None:
    fast = {"speed/prefill_tokens_per_s@b1": entry(3e6)}
    assert (
        lookup(cost_table(results(tmp_path, record(metrics=fast)), 3.6))[*KEY, "1", "USD per million tokens: prefill"]
        == f"{1e-3 / 3:.3g}"
    )


@pytest.mark.parametrize("value", [-1.0, 0.0, 1e-320, math.inf, -math.inf, math.nan])
def test_speeds_and_times_that_cannot_be_have_no_price(tmp_path: Path, value: float) -> None:
    wrong = record(metrics={"speed/decode_tokens_per_s@b1": entry(value), "speed/prefill_tokens_per_s@b1": entry(2.0)})
    wrong["time"] |= {"compress_s": 9.0, "recover_s": -2.0} if abs(value) < 1 else {"compress_s": value}
    shown = lookup(cost_table(results(tmp_path, wrong), 3.6))
    assert shown[*KEY, "1", "USD per million tokens: decode"] == "-"
    assert shown[*KEY, "1", "USD per million tokens: prefill"] == "500"
    assert shown[*KEY, "1", "Compressing, USD"] == "-"


def test_prices_keep_their_digits_in_csv(tmp_path: Path) -> None:
    fast = {"speed/prefill_tokens_per_s@b1": entry(3.0)}
    table = cost_table(results(tmp_path, record(metrics=fast)), 3.6)
    assert table and float(comma_separated(table).split(",")[-2]) == 0.001 * 1e6 / 3


def test_no_costs_without_a_price(tmp_path: Path) -> None:
    records = read_all(factory.write(tmp_path, [record()]))
    assert "cost.md" not in files(records) and "cost.md" in files(records, 2.5)


@pytest.mark.parametrize("price", ["0", "-1", "nan", "inf", "much"])
def test_a_price_is_a_number_above_nothing(tmp_path: Path, price: str) -> None:
    done = run("--results", tmp_path, "--out", tmp_path / "out", f"--usd-per-hour={price}")
    assert done.returncode == 2 and f"'{price}' is no price" in done.stderr


def test_the_price_is_an_option_of_the_command(tmp_path: Path) -> None:
    factory.write(tmp_path / "results", [record()])
    done = run("--results", tmp_path / "results", "--out", tmp_path / "out", "--usd-per-hour", "2.50")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2.5 USD per hour" in (tmp_path / "out" / "cost.md").read_text(encoding="utf-8")
