"""What the builders put into the tables, and how numbers are shown."""

import doctest
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import reports.tables
from reports.accuracy import few_shot_table, zero_shot_table
from reports.comparison import Measured
from reports.cost import size_table
from reports.perplexity import perplexity_table
from reports.records import read_all
from reports.results import Results, pool
from reports.speed import speed_table
from reports.summary import cautions, facts
from reports.tables import Table, number
from tests.reports import factory

BASE = {"method": "slicegpt", "ratio": 0.6}


def results(tmp_path: Path, *records: dict[str, Any]) -> Results:
    """The records, or the matrix of the factory, as results."""
    return pool(read_all(factory.write(tmp_path, list(records) or factory.matrix())))


def lookup(table: Table | None) -> dict[tuple[str, ...], str]:
    """Each shown text by the texts of its row's named columns and its header."""
    assert table is not None
    keys = [
        index for index, column in enumerate(table.columns) if str(column) in ("Model", "Method", "Asked, %", "Batch")
    ]
    rows = [(tuple(str(row[index]) for index in keys), row) for row in table.rows]
    return {
        (*key, str(column)): str(cell) for key, row in rows for column, cell in zip(table.columns, row, strict=True)
    }


def entry(value: float, n: int = 40, stderr: float | None = 0.01) -> dict[str, Any]:
    """A metric of a record."""
    return {"value": value, "stderr": stderr, "n": n}


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(reports.tables).failed == 0


def step(shown: str) -> Decimal:
    """What its last digit is worth."""
    return Decimal(1).scaleb(Decimal(shown).as_tuple().exponent)


@settings(deadline=None, max_examples=500)
@given(value=st.floats(-1e308, 1e308), error=st.floats(0, 1e308))
@example(value=99.996, error=0.0996)
@example(value=0.5, error=0.00996)
@example(value=5.0, error=5e-324)
def test_shown_number_and_error_are_within_half_their_last_digit(value: float, error: float) -> None:
    for exact, shown in zip((value, error), number(value, error).split(" ± "), strict=True):
        assert abs(Decimal(shown) - Decimal(exact)) <= step(shown) / 2
        assert len(shown) <= 15 and (exact == 0 or shown.strip("-0.") or abs(value) < error)


@given(value=st.floats(-1e308, 1e308))
def test_a_number_alone_is_never_rounded_to_nothing(value: float) -> None:
    shown = number(value)
    assert abs(Decimal(shown) - Decimal(value)) <= step(shown) / 2 and len(shown) <= 11
    assert (Decimal(shown) == 0) == (value == 0)


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.0123, 0.0004, "0.01230 ± 0.00040"),
        (5.12, 0.0099, "5.1200 ± 0.0099"),
        (5.12, 0.01, "5.12 ± 0.01"),
        (5.12, 0.0, "5.12 ± 0.00"),
        (-0.001, 0.5, "0.00 ± 0.50"),
        (5e6, 1e300, "5.000e+06 ± 1.000e+300"),
        (9_999_999.0, None, "9999999"),
        (1e7, None, "1.000e+07"),
        (0.004, None, "0.0040"),
        (-0.001, None, "-0.0010"),
        (-0.0, None, "0.00"),
        (1.5, None, "1.50"),
        (2e-9, None, "2.000e-09"),
        (math.inf, 0.5, "inf ± 0.50"),
        (0.5, math.nan, "0.50 ± nan"),
        (math.nan, 1e300, "nan ± 1.000e+300"),
    ],
)
def test_how_numbers_look(value: float, error: float | None, shown: str) -> None:
    assert number(value, error) == shown


@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0])
def test_odd_numbers_are_shown_and_not_hidden(value: float) -> None:
    assert number(value) in ("inf", "nan", "0.00")


def test_perplexity_has_a_row_per_method_and_a_column_per_text_and_ratio(tmp_path: Path) -> None:
    table = perplexity_table(results(tmp_path))
    shown = lookup(table)
    assert shown["tiny-llama", "dense", "wikileads @512: 100 %"] == "18.30 ± 0.61"
    assert shown["tiny-llama", "slicegpt", "wikileads @512: 80 %"] == "27.08 ± 0.90"
    assert shown["tiny-llama", "slicegpt", "wikileads @512: 60 %"] == "- (failed)"
    assert shown["tiny-llama", "shortgpt", "wikileads @512: 60 %"] == "73.9 ± 2.5 (at 64.12 %)†"
    assert shown["smollm2-135m-q4", "shortgpt", "moby-dick @512: 60 %"] == "300.2 ± 8.9"
    assert table is not None and any(note.startswith("† off budget") for note in table.notes)


@pytest.mark.parametrize(("achieved", "remark"), [(0.6049, ""), (0.6051, " (at 60.51 %)"), (0.5949, " (at 59.49 %)")])
def test_counted_ratio_is_shown_beyond_half_a_per_cent(tmp_path: Path, achieved: float, remark: str) -> None:
    record = factory.record(**BASE, size__dense_params=10_000, size__active_total=round(10_000 * achieved))
    shown = lookup(perplexity_table(results(tmp_path, record)))
    assert shown["tiny-llama", "slicegpt", "wikileads @512: 60 %"] == "47.9 ± 1.2".replace("47.9", "35.9") + remark


def test_windows_are_ordered_by_length_and_texts_with_slashes_survive(tmp_path: Path) -> None:
    metrics = {"notes/my text.txt/token_ppl@4096": entry(9.0), "wikitext2/token_ppl@2048": entry(8.0)}
    table = perplexity_table(results(tmp_path, factory.record(metrics=metrics)))
    assert table is not None
    assert [str(c) for c in table.columns[2:]] == ["wikitext2 @2048: 100 %", "notes/my text.txt @4096: 100 %"]


def test_zero_shot_shows_the_judging_metric_the_average_and_the_counted_ratio(tmp_path: Path) -> None:
    table = zero_shot_table(results(tmp_path))
    assert table is not None
    headers = [str(column) for column in table.columns]
    assert headers[4:] == ["arc_easy: acc_norm", "wikileads_mc: acc", "Average"]
    shown = lookup(table)
    assert shown["tiny-llama", "100", "dense", "arc_easy: acc_norm"] == "55.00 ± 0.99"
    assert shown["tiny-llama", "100", "dense", "Average"] == "60.0 ± 3.9"
    assert shown["tiny-llama", "60", "shortgpt", "Counted, %"] == "64.12†"


def test_average_only_where_every_task_of_the_table_was_measured(tmp_path: Path) -> None:
    part = {"wikileads_mc/acc@0shot": entry(0.5)}
    shown = lookup(zero_shot_table(results(tmp_path, factory.record(), factory.record(**BASE, metrics=part))))
    assert shown["tiny-llama", "60", "slicegpt", "wikileads_mc: acc"] == "50.0 ± 1.0"
    assert shown["tiny-llama", "60", "slicegpt", "Average"] == "-"


def test_few_shot_tasks_have_their_own_table_and_parts_of_a_group_do_not_fill_it(tmp_path: Path) -> None:
    metrics = {f"{task}/acc@5shot": entry(0.4) for task in ("mmlu", "mmlu_anatomy", "winogrande")}
    found = results(tmp_path, factory.record(metrics=metrics))
    table = few_shot_table(found)
    assert zero_shot_table(found) is None and table is not None
    assert [str(c) for c in table.columns[4:]] == ["mmlu: acc, 5 shots", "winogrande: acc, 5 shots", "Average"]
    assert list(cautions(found)) == ["Measured but in none of the tables, see the records: mmlu_anatomy/acc@5shot."]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"metrics__arc_easy/acc_norm@0shot": entry(0.4, n=9)}, "n 9, not 2376"),
        ({"metrics": {"arc_easy/acc_norm@0shot": entry(0.4, n=200)}}, "n 200, not 2376"),
        ({"provenance__task_versions": {"arc_easy": "2.0"}}, "task version 2.0, not 1.0"),
        ({"provenance__dataset_revisions": {"arc_easy": "abc"}}, "data revision abc, not unknown"),
        ({"provenance__versions": {"lm_eval": "0.3.0"}}, "lm_eval 0.3.0, not 0.4.13"),
    ],
)
def test_rows_measured_otherwise_are_marked_and_explained(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    others = [factory.record(), factory.record(method="shortgpt", ratio=0.6)]
    table = zero_shot_table(results(tmp_path, *others, factory.record(**BASE, **change)))
    shown = lookup(table)
    assert shown["tiny-llama", "60", "slicegpt", "arc_easy: acc_norm"].endswith("‡")
    assert "‡" not in shown["tiny-llama", "60", "shortgpt", "arc_easy: acc_norm"]
    assert shown["tiny-llama", "60", "slicegpt", "Average"][-1] in "‡-"
    assert table is not None
    assert f"tiny-llama slicegpt at 60 %: arc_easy/acc_norm@0shot {told}." in table.notes
    assert any(note.startswith("‡ measured under other conditions") for note in table.notes)


def test_perplexity_on_other_windows_is_marked_within_a_model_only(tmp_path: Path) -> None:
    other = factory.record(**BASE, metrics={"wikileads/token_ppl@512": entry(30.0, n=2)})
    large = factory.record("smollm2-135m-q4", metrics={"wikileads/token_ppl@512": entry(20.0, n=9)})
    shown = lookup(perplexity_table(results(tmp_path, factory.record(), other, large)))
    assert shown["tiny-llama", "slicegpt", "wikileads @512: 60 %"].endswith("‡")
    assert "‡" not in shown["smollm2-135m-q4", "dense", "wikileads @512: 100 %"]


def test_perplexity_of_another_protocol_version_is_marked(tmp_path: Path) -> None:
    other = factory.record(**BASE, provenance__task_versions={"ppl-wikileads@512": "2"})
    table = perplexity_table(results(tmp_path, factory.record(), other))
    assert table is not None
    assert "tiny-llama slicegpt at 60 %: wikileads/token_ppl@512 task version 2, not 1." in table.notes


def test_seeds_that_were_measured_otherwise_are_marked(tmp_path: Path) -> None:
    first = factory.record(**BASE, metrics={"wikileads_mc/acc@0shot": entry(0.4, n=40)})
    second = factory.record(**BASE, seed=1, metrics={"wikileads_mc/acc@0shot": entry(0.5, n=80)})
    table = zero_shot_table(results(tmp_path, factory.record(), first, second))
    assert lookup(table)["tiny-llama", "60", "slicegpt", "wikileads_mc: acc"] == "45.0 ± 7.1 (2 seeds)‡"
    assert table is not None
    assert "tiny-llama slicegpt at 60 %: wikileads_mc/acc@0shot n 40 or 80, not 40." in table.notes


def test_seeds_of_a_single_row_that_were_measured_otherwise_are_marked(tmp_path: Path) -> None:
    records = [factory.record(seed=n, metrics={"wikileads_mc/acc@0shot": entry(0.4, n=n)}) for n in (40, 80)]
    table = zero_shot_table(results(tmp_path, *records))
    assert table is not None
    assert "tiny-llama dense at 100 %: wikileads_mc/acc@0shot has seeds of different n." in table.notes


def test_another_window_or_number_of_shots_does_not_mark_a_number(tmp_path: Path) -> None:
    names = (
        "wikileads/token_ppl@512",
        "wikileads/token_ppl@256",
        "arc_challenge/acc@0shot",
        "arc_challenge/acc@25shot",
    )
    metrics = dict.fromkeys(names, entry(0.5))
    versions = {"ppl-wikileads@512": "1", "arc_challenge@0shot": "1.0"}
    more = versions | {"ppl-wikileads@256": "1", "arc_challenge@25shot": "2.0"}
    found = results(
        tmp_path,
        factory.record(metrics=metrics, provenance__task_versions=versions),
        factory.record(**BASE, metrics=metrics, provenance__task_versions=more),
    )
    for name in ("wikileads/token_ppl@512", "arc_challenge/acc@0shot"):
        assert Measured(name, found).differences() == []
    assert Measured("arc_challenge/acc@25shot", found).differences() == [
        "tiny-llama slicegpt at 60 %: arc_challenge/acc@25shot task version 2.0, not unknown."
    ]


def test_a_version_that_is_recorded_in_one_row_only_is_named(tmp_path: Path) -> None:
    without = factory.record(**BASE, provenance__task_versions={})
    found = results(tmp_path, factory.record(), factory.record(method="shortgpt"), without)
    assert Measured("wikileads/token_ppl@512", found).differences() == [
        "tiny-llama slicegpt at 60 %: wikileads/token_ppl@512 task version unknown, not 1."
    ]


def test_seeds_of_which_one_has_no_version_are_said_to_differ_in_it(tmp_path: Path) -> None:
    found = results(tmp_path, factory.record(), factory.record(seed=1, provenance__task_versions={}))
    assert Measured("wikileads/token_ppl@512", found).differences() == [
        "tiny-llama dense at 100 %: wikileads/token_ppl@512 has seeds of different task version."
    ]


def test_finished_metrics_of_a_failed_cell_are_shown_and_called_incomplete(tmp_path: Path) -> None:
    part = {"wikileads/token_ppl@512": entry(30.0, n=8)}
    cell = factory.record(**BASE, status="failed", error="boom", metrics=part)
    found = results(tmp_path, factory.record(), cell, factory.failed("tiny-llama", "shortgpt", 0.6, "early"))
    for table in (perplexity_table(found), size_table(found)):
        assert table is not None
        assert "Incomplete, see the failed and skipped cells: tiny-llama slicegpt at 60 %." in table.notes
    shown = lookup(perplexity_table(found))
    assert shown["tiny-llama", "slicegpt", "wikileads @512: 60 %"] == "30.00 ± 0.01"
    assert shown["tiny-llama", "shortgpt", "wikileads @512: 60 %"] == "- (failed)"


def test_what_plus_minus_means_is_said_as_it_applies(tmp_path: Path) -> None:
    one = results(tmp_path / "one")
    two = results(tmp_path / "two", factory.record(**BASE), factory.record(**BASE, seed=1))
    for build in (perplexity_table, zero_shot_table, speed_table):
        single, several = build(one), build(two)
        assert single is not None and several is not None
        assert single.caption.endswith("± is one standard error.")
        assert several.caption.endswith("or the standard deviation over the seeds where a number says seeds.")


@pytest.mark.parametrize(
    ("counts", "columns"),
    [
        ({"mmlu_a": 30, "mmlu_b": 10}, ["mmlu"]),
        ({"mmlu_a": 30, "mmlu_b": 10, "mmlu_stem": 40}, ["mmlu"]),  # a subgroup has no data of its own
        ({"mmlu_a": 30, "mmlu_pro": 9}, ["mmlu", "mmlu_a", "mmlu_pro"]),  # cannot tell: it does not add up
        ({"mmlu_a": 30, "mmlu_b": 10, "mmlu_pro": 9, "mmlu_pro_a": 9}, ["mmlu", "mmlu_pro"]),
        ({"mmlu_b": 9}, ["mmlu", "mmlu_b"]),
        ({"mmluother": 40}, ["mmlu", "mmluother"]),
    ],
)
def test_only_what_adds_up_to_a_group_is_hidden_as_its_part(
    tmp_path: Path, counts: dict[str, int], columns: list[str]
) -> None:
    metrics = {f"{task}/acc@5shot": entry(0.4, n=n) for task, n in ({"mmlu": 40} | counts).items()}
    leaves = {task: "abc" for task in counts if task not in ("mmlu_stem", "mmlu_pro")}
    table = few_shot_table(results(tmp_path, factory.record(metrics=metrics, provenance__dataset_revisions=leaves)))
    assert table is not None
    assert [column.group for column in table.columns[4:] if column.group] == columns


def test_cut_prompts_are_marked_and_counted_and_no_score(tmp_path: Path) -> None:
    score = {"arc_easy/acc_norm@0shot": entry(0.4)}
    cut = score | {"arc_easy/truncated_requests@0shot": entry(3.0, 160, None)}
    orphan = {"bundle/truncated_requests@0shot": entry(2.0, 9, None)}
    found = results(tmp_path, factory.record(metrics=cut | orphan), factory.record(**BASE, metrics=score))
    table = zero_shot_table(found)
    shown = lookup(table)
    assert table is not None and [str(column) for column in table.columns[4:]] == ["arc_easy: acc_norm"]
    assert shown["tiny-llama", "100", "dense", "arc_easy: acc_norm"] == "40.0 ± 1.0§"
    assert shown["tiny-llama", "60", "slicegpt", "arc_easy: acc_norm"] == "40.0 ± 1.0"
    assert "tiny-llama dense at 100 %: arc_easy/acc_norm@0shot, 3 of 160 prompts cut." in table.notes
    assert table.notes[0].startswith("§ measured on prompts that were cut")
    assert list(cautions(found)) == [
        "Measured but in none of the tables, see the records: bundle/truncated_requests@0shot."
    ]


@pytest.mark.parametrize(("share", "uneven"), [(0.74, True), (0.681, True), (0.679, False)])
def test_methods_of_clearly_different_size_are_named_below_every_table(
    tmp_path: Path, share: float, uneven: bool
) -> None:
    found = results(
        tmp_path,
        *(
            factory.record(method=method, ratio=0.7, size__dense_params=1000, size__active_total=active)
            for method, active in (("slicegpt", 660), ("shortgpt", round(1000 * share)))
        ),
    )
    told = (
        f"Not of one size: on tiny-llama at 70 % asked, counted are shortgpt {100 * share:.2f} %, slicegpt 66.00 %, "
        "so part of the difference between these methods is one of size."
    )
    tables = [build(found) for build in (perplexity_table, zero_shot_table, size_table, speed_table)]
    assert all((told in table.notes) == uneven for table in tables if table) and None not in tables
    assert (told in list(cautions(found))) == uneven


def test_speed_names_the_device_that_timed_it(tmp_path: Path) -> None:
    later = {"speed": {"git_commit": "4f2a9c1", "git_dirty": True, "device": "cuda:0: X"}}
    table = speed_table(results(tmp_path, factory.record(), factory.record(**BASE, provenance__tasks=later)))
    assert table is not None
    assert any(note.endswith("between rows: cpu: 2 cores; cuda:0: X.") for note in table.notes)


def test_speed_says_in_words_what_is_not_faster(tmp_path: Path) -> None:
    table = speed_table(results(tmp_path))
    assert table is not None
    assert lookup(table)["tiny-llama", "80", "slicegpt", "4", "Decode: vs dense"] == "0.99 ± 0.02"
    slower = [note.partition(" is not measurably faster")[0] for note in table.notes if "faster" in note]
    assert slower == [
        "tiny-llama slicegpt at 80 %",
        "smollm2-135m-q4 slicegpt at 80 %",
        "smollm2-135m-q4 slicegpt at 60 %",
    ]


def test_speed_within_its_error_is_not_called_faster(tmp_path: Path) -> None:
    metrics = {
        "speed/decode_tokens_per_s@b1": entry(9.0),
        "speed/decode_tokens_per_s_vs_dense@b1": entry(1.03, stderr=0.02),
    }
    table = speed_table(results(tmp_path, factory.record(**BASE, metrics=metrics)))
    assert table is not None
    assert "not measurably faster than dense in decode at batch 1 (1.03 ± 0.02 of its speed)." in table.notes[1]


def test_size_shows_counts_and_bytes(tmp_path: Path) -> None:
    shown = lookup(size_table(results(tmp_path)))
    assert shown["smollm2-135m-q4", "100", "dense", "Parameters, millions: active"] == "134.5"
    assert shown["tiny-llama", "80", "slicegpt", "On disk, MB"] == "9.17"
    assert shown["tiny-llama", "80", "slicegpt", "In memory, MB"] == "9.19"


def test_size_says_in_words_what_is_not_smaller(tmp_path: Path) -> None:
    big = factory.record(**BASE, size__stored_bytes=20_000_000)
    table = size_table(results(tmp_path, factory.record(), big))
    assert table is not None
    assert table.notes[1:] == (
        "tiny-llama slicegpt at 60 % is not smaller on disk than dense: 20.00 against 11.49 MB.",
    )


def test_unequal_settings_of_methods_are_pointed_out(tmp_path: Path) -> None:
    alpaca = {"name": "alpaca", "samples": 16, "window": 256}
    found = results(tmp_path, factory.record(**BASE), factory.record(method="shortgpt", cell__calibration=alpaca))
    assert next(cautions(found)) == (
        "The methods on tiny-llama were not run with equal settings: "
        "shortgpt: calibration=alpaca; slicegpt: calibration=wikileads."
    )


def test_head_of_the_report_names_every_distinct_value(tmp_path: Path) -> None:
    other = factory.record(**BASE, provenance__git_commit=None, provenance__git_dirty=False)
    found = dict(facts(results(tmp_path, factory.record(), other)))
    assert found["Commit"] == "4f2a9c1 with uncommitted changes; no commit"
    assert found["Ratios"] == "60 % (total basis)"
    assert found["Calibration"] == "wikileads, 16 windows of 256 tokens"


@pytest.mark.parametrize(("count", "end"), [(3, "run 2"), (5, "run 2; and 2 more, each in the records of its cells")])
def test_many_commands_are_counted(tmp_path: Path, count: int, end: str) -> None:
    records = [factory.record(seed=seed, provenance__command=f"run {seed % count}") for seed in range(2 * count)]
    assert dict(facts(results(tmp_path, *records)))["Command"] == f"run 0; run 1; {end}"


def test_tasks_measured_at_another_commit_are_named_in_the_head(tmp_path: Path) -> None:
    run = {"git_commit": "77aa", "git_dirty": False, "started": "2026-11-23", "device": "cpu: 8 cores", "command": "c"}
    later = {"speed": run, "arc_easy@0shot": run}
    found = results(tmp_path, factory.record(), factory.record(**BASE, provenance__tasks=later))
    assert dict(facts(found))["Commit"] == "4f2a9c1 with uncommitted changes; 77aa"
    assert dict(facts(found))["Started"] == "2026-11-22T10:00:00+00:00 to 2026-11-23"
    assert next(cautions(found)) == (
        "Measured at several commits, so numbers may differ because the program does. "
        "4f2a9c1 with uncommitted changes: whole cells; 77aa: arc_easy@0shot, speed."
    )


def test_what_was_tried_in_vain_has_a_row_and_its_reason(tmp_path: Path) -> None:
    failed = [factory.failed("tiny-llama", "slicegpt", ratio, "no memory") for ratio in (0.8, 0.6)]
    skipped = factory.failed("tiny-llama", "sleb", 0.6, "no data", status="skipped")
    found = results(tmp_path, factory.record(), factory.record(method="shortgpt", ratio=0.6), *failed, skipped)
    for table in (perplexity_table(found), zero_shot_table(found)):
        assert table is not None
        titles = "tiny-llama slicegpt at 80 %; tiny-llama slicegpt at 60 %"
        assert f"Failed: {titles}, because of this: no memory" in table.notes
        assert "Skipped: tiny-llama sleb at 60 %, because of this: no data" in table.notes
    table = zero_shot_table(found)
    rows = [[str(cell) for cell in row] for row in table.rows] if table else []
    assert [row[1:4] for row in rows] == [
        ["100", "100", "dense"],
        ["80", "- (failed)", "slicegpt"],
        ["60", "59.79", "shortgpt"],
        ["60", "- (skipped)", "sleb"],
        ["60", "- (failed)", "slicegpt"],
    ]


def test_a_seed_that_was_lost_makes_a_result_incomplete(tmp_path: Path) -> None:
    lost = factory.failed("tiny-llama", "slicegpt", 0.6, "boom")
    lost["cell"] |= {"seed": 1, "id": "lost"}
    found = results(tmp_path, factory.record(), factory.record(**BASE), lost)
    table = perplexity_table(found)
    assert table and "Incomplete, see the failed and skipped cells: tiny-llama slicegpt at 60 %." in table.notes
    assert found.absent == () and [len(result.records) for result in found] == [1, 1]


@pytest.mark.parametrize(
    ("bases", "said"),
    [
        ("tt", "Shares are of all parameters, embeddings and output head included."),
        ("bb", "Shares are of the parameters of the blocks, without embeddings and output head."),
        (
            "tb",
            "Shares are of all parameters, embeddings and output head included; of those of the blocks only for "
            "tiny-llama sleb at 60 %.",
        ),
    ],
)
def test_tables_say_what_their_shares_are_of(tmp_path: Path, bases: str, said: str) -> None:
    names = {"t": "total", "b": "block"}
    made = [
        factory.record(method=method, ratio=0.6, cell__ratio_basis=names[basis])
        for method, basis in zip(("shortgpt", "sleb"), bases, strict=True)
    ]
    found = results(tmp_path, factory.record(), *made)
    for table in (perplexity_table(found), zero_shot_table(found), size_table(found)):
        assert table and said in table.notes
