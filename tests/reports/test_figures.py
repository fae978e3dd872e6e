"""What figures show, drawn or listed as missing: rules of choice, numbers, names, and files that do not change."""

import csv
import io
import json
import math
import shlex
import struct
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks import cli
from reports.figures import FAMILIES, Gap, Plot, ablation, figures, training
from reports.figures.files import SUFFIXES, drawing
from reports.figures.plot import file_name
from reports.figures.select import busiest, main, spread
from reports.figures.speed import front
from reports.records import read_all
from reports.results import pool
from tests.reports import factory

ODD = "my_$x^2$ <模型>"
POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12)


def shown(tmp_path: Path, records: list[dict[str, Any]]) -> tuple[dict[str, Plot], list[Gap]]:
    """Plots by name, and gaps."""
    plots, gaps = figures(pool(read_all(factory.write(tmp_path, records))))
    return {plot.name: plot for plot in plots}, gaps


def drawn(plots: list[Plot]) -> dict[str, str | bytes]:
    """Their files."""
    with drawing(plots) as contents:
        return contents()


def tomoe(tmp_path: Path) -> Path:
    """A ToMoE record at two ratios, with the files that its runs leave."""
    factory.write(tmp_path, [factory.record(method="tomoe", ratio=ratio) for ratio in (0.8, 0.6)])
    for path in tmp_path.rglob("record.json"):
        made = factory.structure(mixture=factory.mixture(), heads=2, qk=16, mlp=80)
        path.with_name("structure.json").write_text(json.dumps(made))
        path.with_name("training.csv").write_text(factory.training())
    return tmp_path


def test_a_dense_model_alone_gets_commands_for_others(tmp_path: Path) -> None:
    _, gaps = shown(tmp_path, [factory.record()])
    for gap in gaps:
        arguments = cli.parser().parse_args(shlex.split(gap.command)[2:])
        assert arguments.methods != ["dense"] and arguments.ratios == [0.8]


def test_settings_of_a_command_go_with_their_methods(tmp_path: Path) -> None:
    run = "python run_all.py --models tiny-llama --methods x y --ratios 0.6 --set x.a=1 y.b=2 --set x.c=3 --seeds 1"
    records = [factory.record(method=method, ratio=0.6, provenance__command=run) for method in "xy"]
    _, gaps = shown(tmp_path, [*records, factory.record(method="z", ratio=0.6)])
    commands = {gap.title: gap.command for gap in gaps}
    assert "--set x.a=1 x.c=3 y.b=2 " in commands["MMLU by size"]
    assert "--set" not in commands["Training dynamics"] and "--methods tomoe" in commands["Training dynamics"]
    assert "--seeds" not in commands["MMLU by size"]


def test_what_was_measured_is_shown_and_the_rest_is_listed_with_a_command_that_parses(tmp_path: Path) -> None:
    plots, gaps = shown(tmp_path, factory.matrix())
    families = ("perplexity", "accuracy", "pareto", "throughput", "cost")
    assert set(plots) == {f"{family}.{model}" for family in families for model in factory.DENSE}
    assert len(plots) + len(gaps) == len(FAMILIES) * len(factory.DENSE)
    for gap in gaps:
        words = shlex.split(gap.command)
        arguments = cli.parser().parse_args(words[2:])
        assert words[:2] == ["python", "run_all.py"] and arguments.models == [gap.model]
        assert arguments.budget == "demo" and arguments.ratios == [0.8]


def test_points_are_the_measured_numbers_at_the_counted_ratio(tmp_path: Path) -> None:
    records = factory.matrix()
    plots, _ = shown(tmp_path, records)
    (row,) = [
        row
        for row in plots["perplexity.tiny-llama"].rows
        if (row["method"], row["ratio"], row["metric"]) == ("slicegpt", 0.8, "wikileads/token_ppl@512")
    ]
    (record,) = [
        r for r in records if [r["cell"][k] for k in ("model", "method", "ratio")] == ["tiny-llama", "slicegpt", 0.8]
    ]
    metric, size = record["metrics"]["wikileads/token_ppl@512"], record["size"]
    assert (row["value"], row["value_error"], row["cells"]) == (metric["value"], metric["stderr"], record["cell"]["id"])
    assert row["counted"] == pytest.approx(100 * size["active_total"] / size["dense_params"])


def test_what_lies_beside_tomoes_records_is_read_and_drawn(tmp_path: Path) -> None:
    plots, _ = figures(pool(read_all(tomoe(tmp_path))))
    rows = {plot.name.partition(".")[0]: plot.rows for plot in plots}
    first = {name: rows[name][0] for name in rows}
    assert [first["widths"][part] for part in ("qk", "vo", "mlp")] == [25, 50, 20]
    assert first["unions"]["union"] == 75 and first["loads"]["over_even"] == 0.5
    assert [row["width"] for row in rows["expert-widths"][:2]] == [10, 30]
    assert [row["cosine"] for row in rows["similarity"][:4]] == [1, 0.25, 0.25, 1]
    assert len(rows["training"]) == 2 * 134 and first["training"]["kd"] == pytest.approx(0.1)
    assert {"training.tiny-llama", "loads.tiny-llama"} <= {plot.name for plot in plots}
    assert len(drawn([plot for plot in plots if plot.name.startswith(("train", "wid", "exp", "sim", "loa"))])) == 20


def test_files_are_the_same_every_time_and_hold_what_they_should(tmp_path: Path) -> None:
    plots, _ = shown(tmp_path, [factory.record(), factory.record(method=ODD, ratio=0.8)])
    plots = list(plots.values())[:3]
    found = drawn(plots)
    assert found == drawn(plots)
    assert set(found) == {f"figures/{plot.name}.{suffix}" for plot in plots for suffix in SUFFIXES}
    name = f"figures/{plots[0].name}"
    assert "".join(ElementTree.fromstring(found[f"{name}.svg"]).itertext()).count(ODD) == 1
    assert bytes(found[f"{name}.pdf"]).startswith(b"%PDF") and b"CreationDate" not in bytes(found[f"{name}.pdf"])
    (width,) = struct.unpack(">I", bytes(found[f"{name}.png"])[16:20])
    assert width == 495  # a column of 3.3 inch at 150 dots
    rows = list(csv.DictReader(io.StringIO(str(found[f"{name}.csv"]))))
    assert [float(row["value"]) for row in rows] == [row["value"] for row in plots[0].rows]


def test_main_settings_are_those_at_most_ratios(tmp_path: Path) -> None:
    def run(ratio: float, experts: int) -> dict[str, Any]:
        content = factory.record(method="tomoe", ratio=ratio, cell__method_config={"experts": experts})
        content["cell"]["id"] = f"{ratio} {experts}".replace(" ", "-")
        return content

    results = pool(read_all(factory.write(tmp_path, [run(0.8, 1), run(0.8, 8), run(0.6, 8)])))
    assert [(result.method, result.ratio) for result in main(results)] == [
        ("tomoe (experts=8)", 0.8),
        ("tomoe (experts=8)", 0.6),
    ]
    assert {result.ratio for result in busiest(results)} == {0.8}
    content = ablation.build(results)
    assert content and [row["variant"] for row in content.rows] == ["experts=1", "experts=8"]


def test_numbers_that_are_not_finite_are_not_drawn(tmp_path: Path) -> None:
    bad = factory.record(method="shortgpt", ratio=0.6)
    bad["metrics"]["wikileads/token_ppl@512"]["value"] = float("inf")
    plots, _ = shown(tmp_path, [factory.record(), factory.record(method="shortgpt", ratio=0.8), bad])
    found = [row["ratio"] for row in plots["perplexity.tiny-llama"].rows if row["metric"] == "wikileads/token_ppl@512"]
    assert found == [1, 0.8]


@pytest.mark.parametrize("absurd", [math.nan, math.inf, -3.0, 0.0, 1e308, 1e-300])
def test_speeds_that_cannot_be_or_no_axis_can_hold_are_in_no_figure(tmp_path: Path, absurd: float) -> None:
    bad = factory.record(method="sleb", ratio=0.8)
    for name in (name for name in bad["metrics"] if name.startswith("speed/")):
        bad["metrics"][name]["value"] = absurd
    plots, _ = shown(tmp_path, [factory.record(), factory.record(method="shortgpt", ratio=0.8), bad])
    for name in ("pareto", "throughput") if absurd else ("throughput",):  # 0 is a place on the axis of ratios
        assert {row["method"] for row in plots[f"{name}.tiny-llama"].rows} == {"dense", "shortgpt"}


def test_numbers_that_no_axis_can_hold_are_left_out_and_the_caption_says_so(tmp_path: Path) -> None:
    far, wide, slow = (factory.record(method=method, ratio=0.8) for method in ("sleb", "slicegpt", "cmoe"))
    for name, metric in far["metrics"].items():
        metric["value"] = metric["value"] if "/acc" in name else 1e308
    wide["metrics"]["wikileads/token_ppl@512"]["stderr"] = 1e308
    slow["time"]["compress_s"] = 1e308
    plots, _ = shown(tmp_path, [factory.record(), factory.record(method="shortgpt", ratio=0.8), far, wide, slow])
    text = "wikileads/token_ppl@512"
    for name in ("perplexity", "pareto", "cost"):
        rows = [row for row in plots[f"{name}.tiny-llama"].rows if row["metric"] == text]
        assert {row["method"] for row in rows} - {"dense"} == {"shortgpt"} | ({"cmoe"} if name != "cost" else set())
        assert "numbers beyond 1e30" in plots[f"{name}.tiny-llama"].caption
    assert drawn(list(plots.values()))


@given(POINTS, st.booleans())
def test_front_is_what_nothing_dominates(points: list[tuple[int, int]], lower: bool) -> None:
    best = front(points, lower)
    sign = 1 if lower else -1
    beaten = {
        i
        for (i, (s, q)), (t, r) in product(enumerate(points), points)
        if (t > s and sign * r <= sign * q) or (t >= s and sign * r < sign * q)
    }
    assert best == set(range(len(points))) - beaten


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=700))
def test_thinned_curves_keep_steps_in_order_and_their_range(values: list[float]) -> None:
    rows = training.thinned([{"step": step, "kd": value} for step, value in enumerate(values)])
    assert len(rows) <= training.POINTS
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps) and (len(values) > training.POINTS or [row["kd"] for row in rows] == values)
    assert all(min(values) - 1e-6 <= row["kd"] <= max(values) + 1e-6 for row in rows)


@given(st.text(min_size=1), st.text(min_size=1))
@example("org/model", "org model")
def test_models_have_file_names_of_their_own_that_links_take(one: str, other: str) -> None:
    assert (file_name("cost", one) == file_name("cost", other)) == (one == other)
    assert all(char.isascii() and (char.isalnum() or char in "._-") for char in file_name("cost", one))


@given(st.lists(st.integers(), max_size=20), st.integers(2, 6))
def test_spread_keeps_order_and_both_ends(items: list[int], count: int) -> None:
    found = spread(list(enumerate(items)), count)
    assert len(found) == min(count, len(items)) and found == sorted(set(found))
    assert not items or (found[0][0], found[-1][0]) == (0, len(items) - 1)


def test_processes_draw_the_same_bytes_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots, _ = shown(tmp_path, factory.matrix())
    some = list(plots.values())[:4]
    alone = drawn(some)
    monkeypatch.setattr("reports.figures.files.WORTH_A_PROCESS", 2)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    shared = drawn(some)
    assert list(shared) == list(alone) and shared == alone
