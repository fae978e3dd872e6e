"""Methods and ratios are told apart, in print without colour too, and look the same in all figures of a report."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from reports.figures import Plot, figures
from reports.figures.looks import FAMILIES, Looks, looks
from reports.records import read_all
from reports.results import pool
from tests.reports import factory
from tests.reports.test_figure_layout import box, by_family, drawn
from tests.reports.test_figures import tomoe

KNOWN = [name for names in FAMILIES.values() for name in names]


def of(tmp_path: Path, methods: list[str], ratio: float = 0.8) -> Looks:
    return looks(
        pool(read_all(factory.write(tmp_path, [factory.record(method=name, ratio=ratio) for name in methods])))
    )


def brightness(colour: str) -> float:
    """ITU-R BT.601."""
    return sum(part * weight for part, weight in zip(to_rgb(colour), (0.299, 0.587, 0.114), strict=True))


def test_methods_of_one_marker_differ_in_brightness_and_families_begin_with_other_markers(tmp_path: Path) -> None:
    shown = of(tmp_path, ["shortgpt"]).methods
    assert list(shown) == KNOWN and len(set(shown.values())) == len(KNOWN) == 20
    for one, other in combinations(shown.values(), 2):
        assert one.marker != other.marker or abs(brightness(one.colour) - brightness(other.colour)) > 0.12
    firsts = [shown[names[0]].marker for names in FAMILIES.values()]
    assert len(set(firsts)) == len(firsts)


def test_methods_from_elsewhere_are_told_apart_in_whatever_order_they_come(tmp_path: Path) -> None:
    names = [f"method-{number}" for number in range(30)]
    found = of(tmp_path / "a", names).methods
    assert len(set(found.values())) == 50 and list(found) == [*KNOWN, *sorted(names)]
    assert found == of(tmp_path / "b", names[::-1]).methods


def test_a_method_from_elsewhere_looks_the_same_for_every_model(tmp_path: Path) -> None:
    records = [
        factory.record(model=model, method=name, ratio=0.8) for model, name in (("a", "x"), ("b", "w"), ("b", "x"))
    ]
    found, _ = figures(pool(read_all(factory.write(tmp_path, records))))
    drawings = [drawn(plot) for plot in found if plot.name.startswith("cost")]
    assert len(drawings) == 2 and len({_marker(figure, "x") for figure in drawings}) == 1


def _marker(figure: Figure, name: str) -> tuple[object, ...]:
    (handle,) = [line for line in figure.legends[0].get_lines() if line.get_label() == name]
    return handle.get_marker(), handle.get_color()


def test_a_ratio_has_one_colour_in_all_figures_of_a_model(tmp_path: Path) -> None:
    found, _ = figures(pool(read_all(tomoe(tmp_path))))
    colours = []
    for plot in found:
        if plot.name.startswith(("training", "widths", "unions")):
            lines = drawn(plot).legends[0].get_lines()
            colours.append({str(line.get_label()): to_hex(line.get_color()) for line in lines})
    assert len(colours) == 3 and all(each == colours[0] for each in colours)
    assert abs(brightness(colours[0]["80 %"]) - brightness(colours[0]["60 %"])) > 0.4


def test_dense_model_stands_first_in_the_legend_drawn_as_in_the_panels(tmp_path: Path) -> None:
    records = [factory.record(), *(factory.record(method=name, ratio=0.8) for name in ("cmoe", "a", "tomoe"))]
    found = by_family(tmp_path, records)
    legends = {name: drawn(found[name]).legends[0].get_lines() for name in ("perplexity", "throughput", "pareto")}
    assert [line.get_label() for line in legends["perplexity"]] == ["dense", "tomoe", "cmoe", "a"]
    styles = {name: (lines[0].get_linestyle(), lines[0].get_marker()) for name, lines in legends.items()}
    assert styles == {"perplexity": ("--", ""), "throughput": ("--", "o"), "pareto": ("None", "o")}


def test_dead_and_even_experts_stand_at_the_end_and_in_the_middle_of_the_colours(tmp_path: Path) -> None:
    loads = drawn(next(plot for plot in figures(pool(read_all(tomoe(tmp_path))))[0] if plot.name.startswith("loads")))
    norm = loads.axes[0].images[0].norm
    assert (norm(0), norm(1), norm(2)) == (0, 0.5, 1) and norm.vmin == 0


def front(tmp_path: Path, metrics: list[tuple[float, float]], name: str) -> Plot:
    """A Pareto plot with these speeds and values of one metric."""
    records: list[dict[str, Any]] = []
    for at, (speed, quality) in enumerate(metrics):
        record = factory.record(method=f"m{at}", ratio=0.8)
        record["metrics"] = {
            name: {"value": quality, "stderr": 0.001, "n": 8},
            "speed/decode_tokens_per_s@b1": {"value": 1.0, "stderr": None, "n": 3},
            "speed/decode_tokens_per_s_vs_dense@b1": {"value": speed, "stderr": None, "n": 3},
        }
        records.append(record)
    return by_family(tmp_path, records)["pareto"]


@pytest.mark.parametrize("name", ["wikileads/token_ppl@512", "arc_easy/acc@0shot"])
@pytest.mark.parametrize("count", [3, 80])
def test_labels_of_the_front_touch_neither_each_other_nor_points(tmp_path: Path, name: str, count: int) -> None:
    start, sign = (1.5, 1) if "ppl" in name else (0.5, -1)
    plot = front(tmp_path, [(1 + at / count, start + sign * at / count / 3) for at in range(count)], name)
    figure = drawn(plot)
    (panel,) = figure.axes
    labels = [box(figure, text) for text in panel.texts]
    assert not any(one.overlaps(other) for one, other in combinations(labels, 2))
    places = panel.transData.transform([(row["speed"], row["quality"]) for row in plot.rows]) / figure.dpi
    assert not any(label.contains(*place) for label in labels for place in places)
    assert len(labels) == count if count == 3 else 3 < len(labels) < count
