"""What compressing took, against what it gave."""

import math
from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure

from reports.figures.plot import Content, Row, Rows, grouped
from reports.figures.select import MAIN, busiest, identity, main, quality
from reports.figures.style import curve, logarithmic, method_legend, method_legend_height, panels, share
from reports.results import Result
from reports.standings import lower_is_better
from reports.tables import plain


def build(results: Sequence[Result]) -> Content | None:
    """Seconds against quality; None where no compressed model has both."""
    name = quality(results)
    shown = busiest(main(results))
    rows = [row for result in shown if name and (row := _row(result, name))]
    if not rows:
        return None
    caption = (
        f"{name} against the seconds that compressing took (training and fine-tuning included, evaluation not), at "
        f"{share(shown[0].ratio)} asked. Hollow markers are fine-tuned. {MAIN}"
    )
    return Content(caption=caption, rows=rows, draw=draw)


def _row(result: Result, name: str) -> Row | None:
    times = [record.time for record in result.records if record.time.get("compress_s")]
    found = result.metric(name)
    if not times or found is None or not math.isfinite(found.value):
        return None
    return {
        **identity(result),
        "metric": name,
        "seconds": fmean(time["compress_s"] + time.get("recover_s", 0) for time in times),
        "quality": found.value,
        "quality_error": found.error,
    }


def draw(rows: Rows) -> Figure:
    """One panel, both axes logarithmic where the quality is a perplexity."""
    figure, (panel,) = panels(1, 2.2, method_legend_height(rows))
    for (_, _), points in grouped(rows, "method", "fine_tuned").items():
        curve(panel, points, "seconds", "quality", "")
    metric = str(rows[0]["metric"])
    panel.set(xlabel="seconds to compress", ylabel=plain(metric))
    logarithmic(panel, "x", (1,))
    if lower_is_better((metric,)):
        logarithmic(panel, "y")
    method_legend(figure, rows)
    return figure
