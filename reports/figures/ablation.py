"""ToMoE with one setting changed, or several: what each is worth."""

import math
from collections import Counter
from collections.abc import Sequence

from matplotlib.figure import Figure

from reports.figures.plot import Content, Row, Rows, column
from reports.figures.select import TOMOE, identity, method, quality, tomoe
from reports.figures.style import COLUMN, look, share
from reports.results import Result, brief, differing, settings_of
from reports.tables import plain

MAIN_SETTINGS = "main settings"


def build(results: Sequence[Result]) -> Content | None:
    """ToMoE's variants at the ratio that most of them share; None without two at one ratio."""
    name = quality(results)
    ran = [result for result in results if method(result) == TOMOE and not result.fine_tuned and _value(result, name)]
    counts = Counter(result.ratio for result in ran)
    if name is None or max(counts.values(), default=0) < 2:
        return None
    ratio = min(counts, key=lambda ratio: (-counts[ratio], ratio))
    main = tomoe(results)[0]
    caption = (
        f"{name} of ToMoE's variants at {share(ratio)} asked, with error bars; a label says in what a variant differs "
        "from the main settings, those that were measured at most ratios."
    )
    return Content(caption=caption, rows=[_row(r, main, name) for r in ran if r.ratio == ratio], draw=draw)


def _value(result: Result, name: str | None) -> float | None:
    found = result.metric(name) if name else None
    return found.value if found and math.isfinite(found.value) else None


def _row(result: Result, main: Result, name: str) -> Row:
    found = result.metric(name)
    return {
        **identity(result),
        "variant": changes(result, main),
        "metric": name,
        "quality": found.value if found else None,
        "quality_error": found.error if found else None,
    }


def changes(result: Result, main: Result) -> str:
    """The settings a variant has and `main` does not; or, where it only lacks some, those."""
    own, usual = settings_of(result.records[0]), settings_of(main.records[0])
    names = differing([own, usual])
    added = brief(tuple(pair for pair in own if pair not in usual), names)
    lacking = brief(tuple(pair for pair in usual if pair not in own), names)
    return added or (f"without {lacking}" if lacking else MAIN_SETTINGS)


def draw(rows: Rows) -> Figure:
    """A bar per variant, its label above it, where long ones have room."""
    figure = Figure(figsize=(COLUMN, 0.5 + 0.36 * len(rows)), layout="constrained")
    panel = figure.subplots()
    places = range(len(rows))
    values, errors = column(rows, "quality"), column(rows, "quality_error")
    panel.barh(places, values, 0.45, xerr=errors, color=look(TOMOE).colour, error_kw={"elinewidth": 0.8})
    for place, row in zip(places, rows, strict=True):
        panel.annotate(plain(str(row["variant"])), (0, place - 0.3), (1, 0), textcoords="offset points", fontsize=6)
    panel.set(xlabel=plain(str(rows[0]["metric"])), yticks=(), ylim=(len(rows) - 0.5, -0.75))
    panel.grid(axis="y", visible=False)
    return figure
