"""What compressing took, against what it gave."""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from reports.cost import seconds
from reports.figures.legends import method_legend, wrapped
from reports.figures.looks import Looks
from reports.figures.plot import Content, Row, Rows, grouped
from reports.figures.scale import logarithmic
from reports.figures.select import (
    ALIKE,
    ERRORS,
    busiest,
    compressed,
    identity,
    is_near,
    like_most,
    main,
    measured,
    quality,
    usual,
    value,
)
from reports.figures.style import curve, panels, share
from reports.results import Result
from reports.speed import devices
from reports.standings import lower_is_better


def build(results: Sequence[Result]) -> Content | None:
    """Seconds against quality; None where no compressed model has both."""
    timed = [result for result in results if is_near(seconds(result) or math.inf)]
    name = quality(compressed(timed))
    shown = busiest(main(like_most(usual(measured(timed, name)), devices))) if name else []
    if not shown:
        return None
    caption = (
        f"{name} against the seconds that compressing took (training and fine-tuning included, evaluation not), at "
        f"{share(shown[0].ratio)} asked; {ERRORS}. Hollow markers are fine-tuned. {ALIKE} So is "
        "what was compressed on another device than most."
    )
    return Content(caption=caption, rows=[_row(result, str(name)) for result in shown], draw=draw)


def _row(result: Result, name: str) -> Row:
    return {**identity(result), "metric": name, "seconds": seconds(result), **value(result, name, "quality")}


def draw(looks: Looks, rows: Rows) -> Figure:
    """One panel, both axes logarithmic where the quality is a perplexity."""
    figure, (panel,) = panels(1, 2.2)
    for (name, _), points in grouped(rows, "method", "fine_tuned").items():
        curve(panel, looks.methods[name], points, "seconds", "quality", "")
    metric = str(rows[0]["metric"])
    panel.set(xlabel="seconds to compress", ylabel=wrapped(metric))
    logarithmic(panel, "x")
    if lower_is_better((metric,)):
        logarithmic(panel, "y")
    method_legend(figure, rows, looks)
    return figure
