"""Which results a figure shows: only what can be compared, at the settings that were measured."""

from pathlib import Path
from typing import Any

import pytest

from reports.figures import Plot, figures
from reports.figures.quality import BLOCK, TOTAL
from reports.records import read_all
from reports.results import pool
from tests.reports import factory
from tests.reports.test_figure_layout import drawn

PPL = "wikileads/token_ppl@512"
QUALITIES = ("perplexity", "pareto", "cost")


def run(method: str, ratio: float, *, lacks: str = " ", n: int = 8, **cell: Any) -> dict[str, Any]:
    """A record without the metrics that begin with `lacks`, and with cells of their own for other settings."""
    content = factory.record(method=method, ratio=ratio)
    content["cell"] |= cell | {"id": "-".join(map(str, (method, ratio, *cell.values()))).translate({32: None})}
    content["metrics"] = {name: metric for name, metric in content["metrics"].items() if not name.startswith(lacks)}
    for name in content["metrics"].keys() & {PPL}:
        content["metrics"][name]["n"] = n
    return content


def rows(tmp_path: Path, *records: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Of every figure, by its family."""
    return {name: [dict(row) for row in plot.rows] for name, plot in plots(tmp_path, *records).items()}


def plots(tmp_path: Path, *records: dict[str, Any]) -> dict[str, Plot]:
    found, _ = figures(pool(read_all(factory.write(tmp_path, list(records)))))
    return {plot.name.partition(".")[0]: plot for plot in found}


def test_of_two_dense_results_one_line_is_drawn(tmp_path: Path) -> None:
    other = run("dense", 1.0, budget={"name": "paper", "ppl_windows": 8})
    found = rows(tmp_path, factory.record(), other, run("sleb", 0.8), run("sleb", 0.6))["throughput"]
    dense = [(row["phase"], row["batch"]) for row in found if row["method"] == "dense"]
    assert sorted(dense) == [(phase, batch) for phase in ("decode", "prefill") for batch in (1, 4)]


def test_what_was_measured_otherwise_than_most_is_in_no_figure_of_quality(tmp_path: Path) -> None:
    like = [run(method, 0.6) for method in ("shortgpt", "slicegpt")]
    found = rows(tmp_path, factory.record(), *like, run("sleb", 0.6, n=2))
    for name in QUALITIES:
        shown = {row["method"] for row in found[name] if row["metric"] == PPL}
        assert shown - {"dense"} == {"shortgpt", "slicegpt"}, name


def test_variants_measured_otherwise_than_most_are_not_compared(tmp_path: Path) -> None:
    variants = [run("tomoe", 0.5, method_config={"experts": number}, n=2 if number == 3 else 8) for number in range(4)]
    found = rows(tmp_path, factory.record(), *variants)["ablation"]
    assert len(found) == 3 and not any("experts=3" in row["variant"] for row in found)


@pytest.mark.parametrize("where", ["provenance", "tasks"])
def test_what_another_device_timed_than_most_is_in_no_figure_of_seconds(tmp_path: Path, where: str) -> None:
    like, other = [run(method, 0.6) for method in ("shortgpt", "slicegpt")], [run("sleb", 0.6), factory.record()]
    for content in other:
        elsewhere = {"device": "cuda: another"}
        content["provenance"] |= elsewhere if where == "provenance" else {"tasks": {"speed": elsewhere}}
    found = plots(tmp_path, *other, *like)
    methods = {name: {row["method"] for row in found[name].rows} for name in ("throughput", "cost", "pareto")}
    assert methods["throughput"] == {"shortgpt", "slicegpt"}
    assert methods["cost"] == {"shortgpt", "slicegpt"} | ({"sleb"} if where == "tasks" else set())
    assert methods["pareto"] == {"dense", "shortgpt", "slicegpt", "sleb"}  # ratios to dense on the same device
    assert all("another device than most" in found[name].caption for name in ("throughput", "cost"))


@pytest.mark.parametrize(("family", "lacks"), [("perplexity", PPL), ("pareto", "speed"), ("throughput", "speed")])
def test_settings_are_chosen_among_those_that_have_the_metric(tmp_path: Path, family: str, lacks: str) -> None:
    many = [run("sleb", ratio, lacks=lacks, method_config={"drop": 1}) for ratio in (0.8, 0.7, 0.6)]
    few = [run("sleb", ratio, method_config={"drop": 2}) for ratio in (0.8, 0.7)]
    found = rows(tmp_path, factory.record(), *many, *few)[family]
    shown = {row["settings"] for row in found if row["method"] == "sleb" and row.get("metric", PPL) == PPL}
    assert shown == {"sleb (drop=2)"}


def test_ratio_is_chosen_among_those_that_have_the_metric(tmp_path: Path) -> None:
    methods = ("shortgpt", "sleb", "slicegpt")
    untimed = [run(method, 0.6, lacks="speed") for method in methods]
    found = rows(tmp_path, factory.record(), *untimed, *(run(method, 0.8) for method in methods[:2]))
    assert {row["ratio"] for row in found["throughput"]} == {1, 0.8}


def test_metric_against_cost_and_speed_is_one_that_compressed_models_have(tmp_path: Path) -> None:
    dense = factory.record()
    dense["metrics"] = {"rare/token_ppl@512": dense["metrics"][PPL], **dense["metrics"]}
    found = rows(tmp_path, dense, run("sleb", 0.8), run("slicegpt", 0.8))
    assert found["pareto"][0]["metric"] == found["cost"][0]["metric"] == PPL


@pytest.mark.parametrize(("usual", "label"), [("total", TOTAL), ("block", BLOCK)])
def test_ratios_of_another_basis_than_most_are_left_out_and_the_axis_names_it(
    tmp_path: Path, usual: str, label: str
) -> None:
    other = "block" if usual == "total" else "total"
    like = [run(method, 0.6, ratio_basis=usual) for method in ("shortgpt", "slicegpt")]
    found = plots(tmp_path, factory.record(), *like, run("sleb", 0.6, ratio_basis=other), run("cmoe", 0.6, dtype="x"))
    for name in (*QUALITIES, "throughput"):
        methods = {row["method"] for row in found[name].rows}
        assert methods - {"dense"} == {"shortgpt", "slicegpt"}, name
        assert "another basis" in found[name].caption
    figure = drawn(found["perplexity"])
    assert figure.axes[-1].get_xlabel() == label


def test_files_beside_records_are_looked_for_before_settings_are_chosen(tmp_path: Path) -> None:
    many = [run("tomoe", ratio, method_config={"experts": 1}) for ratio in (0.8, 0.7, 0.6)]
    structure = factory.structure(blocks=1, mixture=factory.mixture())
    few = [run("tomoe", 0.8, method_config={"experts": 8}) | {"structure": structure}]
    found = rows(tmp_path, factory.record(), *many, *few)
    assert {row["settings"] for row in found["unions"]} == {row["settings"] for row in found["widths"]}
    assert {row["settings"] for row in found["unions"]} == {"tomoe (experts=8)"}
