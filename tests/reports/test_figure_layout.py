"""How figures look: everything inside, nothing on top of another, numbers at every axis, methods told apart."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from reports.figures import Plot, figures
from reports.figures.scale import logarithmic
from reports.figures.style import panels, styled
from reports.records import read_all
from reports.results import pool
from tests.reports import factory

FULL = {"experts": 8, "vo_routing": True, "learning_rate": None, "expert_width": "equal", "union_weight": 1.0}
CHANGED = {"experts": 1, "vo_routing": False, "learning_rate": 0.003, "expert_width": "expected", "union_weight": 2.0}


def by_family(tmp_path: Path, records: list[dict[str, object]]) -> dict[str, Plot]:
    """By family, those of tiny-llama."""
    found, _ = figures(pool(read_all(factory.write(tmp_path, records))))
    return {plot.name.partition(".")[0]: plot for plot in found}


def drawn(plot: Plot) -> Figure:
    """With everything in its place; a layout that has no room warns, and warnings are errors."""
    with styled():
        figure = plot.draw(plot.rows)
        FigureCanvasAgg(figure).draw()
    return figure


def box(figure: Figure, artist: object) -> Bbox:
    """Where it is, in inches."""
    extent = artist.get_window_extent(FigureCanvasAgg(figure).get_renderer())  # pyright: ignore[reportAttributeAccessIssue]
    return extent.transformed(figure.dpi_scale_trans.inverted())


@given(st.floats(-9, 9), st.floats(0.001, 12), st.sampled_from("xy"))
@example(math.log10(1.9), math.log10(6.5 / 1.9), "x")  # seconds
@example(math.log10(380), math.log10(4200 / 380), "x")
@example(math.log10(54), math.log10(200 / 54), "y")  # perplexities
@settings(deadline=None, max_examples=15)
def test_logarithmic_axis_has_at_least_three_numbers_that_do_not_touch(low: float, decades: float, which: str) -> None:
    with styled():
        figure, (panel,) = panels(1, 1.9)
        logarithmic(panel, which)  # pyright: ignore[reportArgumentType]
        axis = {"x": panel.xaxis, "y": panel.yaxis}[which]
        panel.set(**{f"{which}lim": (10**low, 10 ** (low + decades))})
        FigureCanvasAgg(figure).draw()
    places, labels = axis.get_majorticklocs(), axis.get_ticklabels()
    assert len({label.get_text() for label in labels}) == len(places) >= 3
    assert all(10**low <= place <= 10 ** (low + decades) for place in places)
    assert all(
        float(label.get_text().replace("\N{MINUS SIGN}", "-")) == pytest.approx(at, 1e-4)
        for label, at in zip(labels, places, strict=True)
    )
    assert not any(box(figure, one).overlaps(box(figure, other)) for one, other in pairwise(labels))


@pytest.mark.parametrize("name", ["a-new-pruning-of-the-method", "long" * 17, "W" * 70, "_mine"])
def test_names_of_any_length_stand_whole_in_a_legend_below_panels_that_keep_their_size(
    tmp_path: Path, name: str
) -> None:
    methods = ("shortgpt", "slicegpt", "sleb", "structured-magnitude", name)
    records = [factory.record(), *(factory.record(method=method, ratio=0.8) for method in methods)]
    figure = drawn(by_family(tmp_path, records)["perplexity"])
    (legend,) = figure.legends
    inside = box(figure, legend)
    assert inside.x0 >= 0 and inside.x1 <= 3.3 and inside.y0 >= 0
    assert {"".join(text.get_text().split()) for text in legend.get_texts()} == {"dense", *methods}
    assert all(box(figure, panel).width > 2.5 and box(figure, panel).height > 1.3 for panel in figure.axes)
    assert all(box(figure, panel).y0 > inside.y1 for panel in figure.axes)


def test_short_names_share_lines_of_a_legend(tmp_path: Path) -> None:
    records = [factory.record(), *(factory.record(method=name, ratio=0.8) for name in ("sleb", "wanda", "cmoe"))]
    figure = drawn(by_family(tmp_path, records)["perplexity"])
    assert len({round(box(figure, text).y0, 2) for text in figure.legends[0].get_texts()}) == 1


def test_settings_of_variants_stand_between_bars_that_keep_their_size(tmp_path: Path) -> None:
    records = [factory.record()]
    for number, (config, text) in enumerate([(FULL, "wikileads"), (CHANGED, "/a/long/path" * 6), (CHANGED, "x")]):
        variant = factory.record(method="tomoe", ratio=0.5, cell__method_config=config)
        variant["cell"] |= {"id": f"variant-{number}", "calibration": {"name": text}}
        records.append(variant)
    figure = drawn(by_family(tmp_path, records)["ablation"])
    (panel,) = figure.axes
    bars, labels = [box(figure, bar) for bar in panel.patches], [box(figure, text) for text in panel.texts]
    assert box(figure, panel).width > 3 and box(figure, panel.xaxis.label).y0 >= 0
    assert all(label.x0 >= 0 and label.x1 <= 3.3 for label in labels)
    assert [bar.height for bar in bars] == pytest.approx([0.16] * 3, abs=0.03)
    stack = [place for pair in zip(labels, bars, strict=True) for place in pair]
    assert all(upper.y0 >= lower.y1 - 0.01 for upper, lower in pairwise(stack))


def test_a_setting_in_the_widest_letters_leaves_the_bars_their_size(tmp_path: Path) -> None:
    records = [factory.record(method="tomoe", ratio=0.5, cell__method_config={"text": letter * 90}) for letter in "WM"]
    records[0]["cell"]["id"] = "other"
    figure = drawn(by_family(tmp_path, [factory.record(), *records])["ablation"])
    assert box(figure, figure.axes[0]).width > 3
