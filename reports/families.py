"""Families of methods set against ToMoE at their own sizes, as the paper's Table 2 and its Tables 4 to 6 do."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from reports.accuracy import contested, judged, marked, published_names, published_rows, task_columns
from reports.comparison import (
    IDENTITY,
    UNEVEN,
    Measured,
    MetricName,
    identity,
    plus_minus,
    tried,
)
from reports.footnotes import footnotes
from reports.perplexity import texts
from reports.published import Line, beside, provenance
from reports.results import Absent, Result, Results, by_model
from reports.standings import Standings, standings
from reports.tables import Cell, Column, Table, percent

RIVAL = "tomoe"
SEMI_STRUCTURED = ("magnitude", "wanda", "sparsegpt", "pruner-zero")
CONSTRUCTIONS = ("moefication", "g-moefication", "llama-moe", "llama-moe-v2", "cmoe")
PERPLEXITY = "Token perplexity (lower is better) by text and window"
TASKS = ", right answers to tasks in per cent"
SHARES = (
    "; asked and counted share of active parameters in per cent, and the counted share of the whole model, embeddings "
    "included; ± is "
)


def semi_structured_table(results: Results) -> Table | None:
    """Single weights in a pattern against ToMoE; None where no pattern was measured."""
    title = "Semi-structured sparsity and ToMoE"
    caption = "Single weights, whose zeros count as removed although only kernels for their pattern skip them, against "
    return _table(results, SEMI_STRUCTURED, "semi-structured", title, f"{caption}whole structures. ")


def constructions_table(results: Results) -> Table | None:
    """Ways to cut MLPs into experts against ToMoE; None where none was measured."""
    title = "Mixtures of experts made of dense models"
    return _table(results, CONSTRUCTIONS, "constructions", title, "Ways to make a dense model a mixture of experts. ")


def _table(results: Results, family: Sequence[str], name: str, title: str, caption: str) -> Table | None:
    shown = _shown(results, family)
    if not shown:
        return None
    tasks, standing, measured = judged(shown), family_standings(results, family), mixed_measured(shown)
    metrics = [*map(str, texts(shown)), *published_names(tasks)]
    published = beside(shown, metrics)
    tried_by_model = (_opponents(tried(group, results.absent), family) for group in by_model(results))
    every = [one for group in tried_by_model for one in group]
    rows = tuple(
        row
        for one in every
        for row in (_row(one, *measured[one.model], standing), *_published(published, one, metrics))
    )
    return Table(
        name=name,
        title=title,
        caption=f"{caption}{PERPLEXITY}{TASKS if tasks else ''}{SHARES}{plus_minus(shown)}.",
        columns=(*IDENTITY, Column("Of all, %"), *mixed_columns(shown)),
        rows=rows,
        notes=footnotes(
            rows,
            [metric for kinds in measured.values() for metric in chain(*kinds)],
            standing.notes(),
            [one for one in every if isinstance(one, Absent)],
            provenance(published, metrics),
        ),
    )


def family_standings(results: Sequence[Result], family: Sequence[str]) -> Standings:
    """Who is best in a family's table."""
    return mixed_standings([_shown(results, family)])


def mixed_standings(groups: Sequence[Sequence[Result]]) -> Standings:
    """Who of each group is best in a table of perplexities and tasks."""
    shown = [result for group in groups for result in group]
    columns = (*((str(name),) for name in texts(shown)), *contested(map(str, judged(shown))))
    return standings(tuple(map(tuple, groups)), columns)


def mixed_columns(results: Sequence[Result]) -> tuple[Column, ...]:
    """A column per text, then those of the tasks."""
    return *(Column(f"@{text.protocol}", text.source) for text in texts(results)), *task_columns(judged(results))


def mixed_measured(results: Sequence[Result]) -> dict[str, tuple[list[Measured], list[Measured]]]:
    """By model its texts and its tasks, as only numbers of one model can be compared."""
    names = texts(results), judged(results)
    words, tasks = ({group[0].model: _measured(kind, group) for group in by_model(results)} for kind in names)
    return {model: (words[model], tasks[model]) for model in words}


def mixed_cells(
    result: Result, texts: Sequence[Measured], tasks: Sequence[Measured], standing: Standings
) -> Iterator[Cell]:
    """A result's perplexities and tasks, the best and what is tied with it marked."""
    yield from (standing.cell(text.cell(result), result, (text.name,)) for text in texts)
    yield from marked(result, tasks, standing)


def _measured(names: Sequence[MetricName], group: Sequence[Result]) -> list[Measured]:
    return [Measured(str(name), group) for name in names]


def _shown(results: Sequence[Result], family: Sequence[str]) -> list[Result]:
    every = (one for group in by_model(results) for one in _opponents(group, family))
    return [one for one in every if isinstance(one, Result)]


def _published(
    published: Mapping[Result, Sequence[Line]], result: Result | Absent, metrics: Sequence[str]
) -> Iterator[tuple[Cell, ...]]:
    """The published rows below a result's; the paper does not say their share of the whole model."""
    for head in published_rows(published, result, metrics):
        yield *head[: len(IDENTITY)], Cell(None), *head[len(IDENTITY) :]


def _opponents(group: Sequence[Result | Absent], family: Sequence[str]) -> Iterator[Result | Absent]:
    """Of one model the dense row, those of the family, and ToMoE near ratios of theirs: 2:4 keeps a bit over 50 %."""
    ratios = {one.ratio for one in group if one.name in family and isinstance(one, Result)}
    for one in group:
        near = any(abs(one.ratio - ratio) <= UNEVEN for ratio in ratios)
        if ratios and (one.dense or one.name in family or (near and one.name == RIVAL)):
            yield one


def _row(
    result: Result | Absent, texts: Sequence[Measured], tasks: Sequence[Measured], standing: Standings
) -> tuple[Cell, ...]:
    if isinstance(result, Absent):
        return *identity(result), Cell(None), *[Cell(None)] * len(texts), *marked(result, tasks, standing)
    share = Cell(percent(result.size("active_total") / result.size("dense_params")))
    return *identity(result), share, *mixed_cells(result, texts, tasks, standing)
