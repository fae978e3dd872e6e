"""The figures of a report: each as SVG, PDF and PNG, with the data that it shows as CSV beside it.

plots, gaps = figures(pool(read_all(Path("results"))))
with files.drawing(plots) as drawn:
    contents = drawn()

plot, files       what a figure is; its files
looks, style      a colour and marker per method, a colour per ratio; `report.mplstyle`, panels and curves
legends, scale    legends and long names; logarithmic axes
select            which results are shown
the others        a family of figures each, listed in `FAMILIES`
"""

from collections.abc import Sequence
from functools import partial

from reports.figures import ablation, cost, experts, quality, speed, training, widths
from reports.figures.looks import Looks, looks
from reports.figures.plot import Family, Gap, Plot, Rows, file_name, remedy
from reports.results import Result, by_model

__all__ = ["FAMILIES", "Gap", "Plot", "figures"]

FEW = 4
"""Records that a caption has room for."""
NEEDS_TOMOE = "no record of ToMoE has a {} beside it that can be read"
TOMOE = "--methods tomoe --ratios {ratios}"
SAME = "--methods {methods} --ratios {ratios} --tasks "
FAMILIES = (
    Family(
        name="perplexity",
        title="Perplexity by size",
        build=quality.perplexity,
        needs="no compressed model has a perplexity",
        arguments=f"{SAME}ppl",
    ),
    Family(
        name="accuracy",
        title="Accuracy by size",
        build=quality.accuracy,
        needs="no compressed model was given a task",
        arguments=f"{SAME}zeroshot",
    ),
    Family(
        name="mmlu",
        title="MMLU by size",
        build=quality.mmlu,
        needs="no compressed model was given MMLU",
        arguments=f"{SAME}mmlu",
    ),
    Family(
        name="pareto",
        title="Quality and speed",
        build=speed.pareto,
        needs="no compressed model has both a speed and a perplexity or task",
        arguments=f"{SAME}ppl speed",
    ),
    Family(
        name="throughput",
        title="Throughput",
        build=speed.throughput,
        needs="no compressed model was timed",
        arguments=f"{SAME}speed",
    ),
    Family(
        name="cost",
        title="Cost of compressing",
        build=cost.build,
        needs="no compressed model has both a time and a perplexity or task",
        arguments=f"{SAME}ppl",
    ),
    Family(
        name="ablation",
        title="Ablation of ToMoE",
        build=ablation.build,
        needs="ToMoE did not run with two settings at one ratio",
        arguments=f"{TOMOE} --tasks ppl --set tomoe.experts=1",
    ),
    Family(
        name="training",
        title="Training dynamics",
        build=training.build,
        needs=NEEDS_TOMOE.format("training.csv"),
        arguments=TOMOE,
    ),
    Family(
        name="widths",
        title="Width of each layer",
        build=widths.widths,
        needs=NEEDS_TOMOE.format("structure.json"),
        arguments=TOMOE,
    ),
    Family(
        name="unions",
        title="Union of experts",
        build=widths.unions,
        needs=NEEDS_TOMOE.format("structure.json with experts"),
        arguments=TOMOE,
    ),
    Family(
        name="expert-widths",
        title="Widths of experts",
        build=experts.widths,
        needs=NEEDS_TOMOE.format("structure.json with widths of experts"),
        arguments=TOMOE,
    ),
    Family(
        name="similarity",
        title="Similarity of experts",
        build=experts.similarity,
        needs=NEEDS_TOMOE.format("structure.json with similarities"),
        arguments=TOMOE,
    ),
    Family(
        name="loads",
        title="Tokens of experts",
        build=experts.loads,
        needs=NEEDS_TOMOE.format("structure.json with loads"),
        arguments=TOMOE,
    ),
)
"""Every kind of figure, in the order of the report."""


def figures(results: Sequence[Result]) -> tuple[list[Plot], list[Gap]]:
    """What can be shown of the results, model by model, and what cannot."""
    shown = looks(results)
    made = [_made(family, group, shown) for family in FAMILIES for group in by_model(results)]
    return [one for one in made if isinstance(one, Plot)], [one for one in made if isinstance(one, Gap)]


def _made(family: Family, results: Sequence[Result], looks: Looks) -> Plot | Gap:
    model, content = results[0].model, family.build(results)
    if content is None:
        return Gap(family.title, model, family.needs, remedy(results, family.arguments))
    return Plot(
        name=file_name(family.name, model),
        title=f"{family.title}: {model}",
        caption=f"{content.caption} {_origin(content.rows)}",
        rows=content.rows,
        draw=partial(content.draw, looks),
    )


def _origin(rows: Rows) -> str:
    """Which records are shown: a few by name."""
    cells = dict.fromkeys(cell for row in rows for cell in row["cells"].split())
    named = ", ".join(cells) if len(cells) <= FEW else "named in the CSV file"
    return f"From {len(cells)} records: {named}."
