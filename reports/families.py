"""Families of methods set against ToMoE at their own sizes, as the paper's Table 2 and its Tables 4 to 6 do."""

from collections.abc import Iterator, Mapping, Sequence

from reports.accuracy import judged, published_names, published_rows, task_cells, task_columns
from reports.comparison import IDENTITY, UNEVEN, Measured, identity, metric_names, plus_minus, remarks, versions
from reports.published import Line, beside, provenance
from reports.results import Result, by_model
from reports.tables import Cell, Column, Table, legend, percent

RIVAL = "tomoe"
SEMI_STRUCTURED = ("magnitude", "wanda", "sparsegpt", "pruner-zero")
CONSTRUCTIONS = ("moefication", "g-moefication", "llama-moe", "llama-moe-v2", "cmoe")
PERPLEXITY = "Token perplexity (lower is better) by text and window"
TASKS = ", right answers to tasks in per cent"
SHARES = (
    "; asked and counted share of active parameters in per cent, and the counted share of the whole model, embeddings "
    "included; ± is "
)


def semi_structured_table(results: Sequence[Result]) -> Table | None:
    """Single weights in a pattern against ToMoE; None where no pattern was measured."""
    title = "Semi-structured sparsity and ToMoE"
    return _table(results, SEMI_STRUCTURED, "semi-structured", title, "Single weights against whole structures. ")


def constructions_table(results: Sequence[Result]) -> Table | None:
    """Ways to cut MLPs into experts against ToMoE; None where none was measured."""
    title = "Mixtures of experts made of dense models"
    return _table(results, CONSTRUCTIONS, "constructions", title, "Ways to make a dense model a mixture of experts. ")


def _table(results: Sequence[Result], family: Sequence[str], name: str, title: str, caption: str) -> Table | None:
    shown = [result for group in by_model(results) for result in _opponents(group, family)]
    if not shown:
        return None
    texts = [name for name in metric_names(shown) if name.quantity == "token_ppl"]
    tasks = judged(shown)
    measured = {
        group[0].model: [[Measured(str(name), group) for name in names] for names in (texts, tasks)]
        for group in by_model(shown)
    }
    metrics = [*map(str, texts), *published_names(tasks)]
    published = beside(shown, metrics)
    rows = tuple(
        row
        for result in shown
        for row in (_row(result, *measured[result.model]), *_published(published, result, metrics))
    )
    return Table(
        name=name,
        title=title,
        caption=f"{caption}{PERPLEXITY}{TASKS if tasks else ''}{SHARES}{plus_minus(shown)}.",
        columns=(
            *IDENTITY,
            Column("Of all, %"),
            *(Column(f"@{text.protocol}", text.source) for text in texts),
            *task_columns(tasks),
        ),
        rows=rows,
        notes=(
            *legend(rows),
            *(
                text
                for kinds in measured.values()
                for kind in kinds
                for metric in kind
                for text in metric.differences()
            ),
            *remarks(shown),
            *provenance(published, metrics),
            *versions(shown, (*texts, *tasks)),
        ),
    )


def _published(
    published: Mapping[Result, Sequence[Line]], result: Result, metrics: Sequence[str]
) -> Iterator[tuple[Cell, ...]]:
    """The published rows below a result's; the paper does not say their share of the whole model."""
    for head in published_rows(published, result, metrics):
        yield *head[: len(IDENTITY)], Cell(None), *head[len(IDENTITY) :]


def _opponents(group: Sequence[Result], family: Sequence[str]) -> Iterator[Result]:
    """Of one model the dense row, those of the family, and ToMoE near ratios of theirs: 2:4 keeps a bit over 50 %."""
    ratios = {result.ratio for result in group if _method(result) in family}
    for result in group:
        near = any(abs(result.ratio - ratio) <= UNEVEN for ratio in ratios)
        if ratios and (result.dense or (near and _method(result) in {*family, RIVAL})):
            yield result


def _method(result: Result) -> str:
    return result.records[0].cell["method"]


def _row(result: Result, texts: Sequence[Measured], tasks: Sequence[Measured]) -> tuple[Cell, ...]:
    share = Cell(percent(result.size("active_total") / result.size("dense_params")))
    return *identity(result), share, *(text.cell(result) for text in texts), *task_cells(result, tasks)
