"""ToMoE with one setting changed, or several: what each is worth."""

from collections.abc import Sequence
from itertools import accumulate

from matplotlib.figure import Figure

from reports.figures.legends import wrapped
from reports.figures.looks import Looks
from reports.figures.plot import Content, Row, Rows, column
from reports.figures.select import ERRORS, TOMOE, TOO_FAR, busiest, identity, measured, quality, tomoe, usual, value
from reports.figures.style import COLUMN, share
from reports.results import Result
from reports.settings import apart

BAR, LINE = 0.16, 0.1
"""Inches that a bar takes, and a line of its label."""
LETTERS = 60
"""In a line of a label."""


def build(results: Sequence[Result]) -> Content | None:
    """ToMoE's variants at the ratio that most of them share; None without two at one ratio."""
    name = quality(tomoe(results))
    ran = usual(measured(tomoe(results), name)) if name else []
    shown = busiest(ran)
    if len(shown) < 2:
        return None
    caption = (
        f"{name} of ToMoE's variants at {share(shown[0].ratio)} asked; {ERRORS}, which the labels count. They say in "
        "what the variants differ. Left out is what was measured under other conditions, in another ratio basis or "
        f"another data type than most, and {TOO_FAR}."
    )
    told = apart([result.settings for result in shown])
    rows = [_row(result, variant, str(name)) for result, variant in zip(shown, told, strict=True)]
    return Content(caption=caption, rows=rows, draw=draw)


def _row(result: Result, variant: str, name: str) -> Row:
    found = result.metric(name)
    return {
        **identity(result),
        "variant": variant,
        "seeds": found.seeds if found else 0,
        "metric": name,
        **value(result, name, "quality"),
    }


def draw(looks: Looks, rows: Rows) -> Figure:
    """A bar per variant, its label above it, where long ones have room; upwards, the axis counts inches."""
    labels = [wrapped(_label(row), LETTERS) for row in rows]
    ends = list(accumulate(BAR + LINE * (1.5 + label.count("\n")) for label in labels))
    figure = Figure(figsize=(COLUMN, 0.5 + ends[-1]), layout="constrained")
    panel = figure.subplots()
    values, errors = column(rows, "quality"), column(rows, "quality_error")
    places = [end - BAR / 2 for end in ends]
    panel.barh(places, values, BAR, xerr=errors, color=looks.methods[TOMOE].colour, error_kw={"elinewidth": 0.8})
    for end, label in zip(ends, labels, strict=True):
        above = panel.annotate(label, (0, end - BAR), (1, 2), textcoords="offset points", fontsize=6)
        above.set_in_layout(False)
    panel.set(xlabel=wrapped(str(rows[0]["metric"])), yticks=(), ylim=(ends[-1] + LINE / 2, 0))
    panel.grid(axis="y", visible=False)
    return figure


def _label(row: Row) -> str:
    return f"{row['variant']} ({row['seeds']} seeds)" if row["seeds"] > 1 else str(row["variant"])
